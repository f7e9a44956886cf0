# make compare    train every router side by side and print the table      make test     checks and quick tests
# make fast       one case of each quick test (no processes, none of the files that mostly run whole commands): a first answer within a minute
# make check      format, lint, types, import order                         make slow     the tests that take minutes
# make aot        registers and shared memory of the Triton kernels on three chips
# make parity     our routers against every router class of transformers: the tests, and the table with its figures
# make envs       the environments under the checkers of Gymnasium 1.2.2, of the newest one, and of Stable-Baselines3, whose PPO learns them
# make fuzz       ten minutes of damaged and hostile files for every reader, each of which answers or refuses in one line
# make soak       sixty random kills over sweeps (driver, runs, workers, Ray itself, nodes), which end all the same
# make mutants    small faults of the core, each of which some test must notice
# make versions   the fast tests and those of the kernels with torch 2.11, 2.13 and 2.14, each with its triton, in environments of their own (gigabytes)
# make dist       the wheel and the source archive in dist/
# make gpu        on a machine with a CUDA device: its tests, benches and a comparison, with the system's Python and torch;
#                 ONLY=kernels,layer runs some of them
# Each creates .venv and installs into it when needed. Another interpreter: make PYTHON=python3.12 compare

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Twice quiet: errors alone are shown.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: soak compare test fast check parity slow mutants fuzz envs aot versions dist gpu clean

compare: $(INSTALLED)
	$(BIN)/rlroute compare

# One thread: bits change with their number, and the tests compare bits. Four processes share
# the tests of two cores, file by file, since the tests of a file share what it makes: some wait for others' processes.
# What is compiled is kept, whatever the environment says: hundreds of commands start in the tests.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SPREAD := -n 4 --dist loadfile --no-loadscope-reorder

test: check
	$(PYTEST) $(SPREAD)

fast: $(INSTALLED)
	$(PYTEST) $(SPREAD) --fast

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

parity: $(INSTALLED)
	$(PYTEST) tests/test_parity.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.parity

slow: $(INSTALLED)
	$(PYTEST) -m slow

mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants

# Another seed, other cases: make fuzz SEED=1.
SEED ?= 0
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes 10 --seed $(SEED)

# The older Gymnasium lies in a folder of its own, before the newest one on the path.
envs: $(INSTALLED)
	$(PIP) --upgrade -e ".[sb3]" gymnasium
	$(PIP) --upgrade --no-deps --target .venv/gymnasium-1.2.2 gymnasium==1.2.2
	for path in .venv/gymnasium-1.2.2 .; do \
		export OMP_NUM_THREADS=1 PYTHONPATH=$$path; \
		$(BIN)/python -c "import gymnasium as g, stable_baselines3 as s; print('Gymnasium', g.__version__, 'with SB3', s.__version__)"; \
		$(BIN)/python -m pytest -m "" -k "not test_ppo" tests/test_envs.py tests/test_envs_learn.py || exit 1; \
	done
	$(PYTEST) -s -m "" -k test_ppo tests/test_envs_learn.py

# The stamp comes last, so that an interrupted installation is taken up again.
$(INSTALLED): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlroute needs Python 3.11 or newer: make PYTHON=/path/to/it")'
	@echo "Installing into .venv (3 GB or more, one to five minutes): PyTorch first ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) "torch>=2.11,<2.14"
	@echo "... then rlroute and everything it uses ..."
	@$(PIP) -e ".[all,dev]"
	@touch $@
	@echo "... installed."

# What the pinned kernels cost on chips that need not be there: an A100, an H100, a B200. A fault leaves the page alone.
aot: $(INSTALLED)
	$(BIN)/python -m rlroute.kernels.aot > .venv/compiled.md
	mv .venv/compiled.md docs/compiled.md

# Sixty random kills and their record; a part: make soak SOAK='--kills 6 --victims raylet,GCS'
soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m rlroute.experiments.bench.soak $(SOAK)

# What each torch release for Linux names as its triton, and a NumPy: Triton 3.6 cannot interpret with 2.4.
# All else is as in the usual environment.
TORCH_TRITON_NUMPY := 2.11.0/3.6.0/2.3.5 2.13.0/3.7.1/2.4.6 2.14.1/3.8.0/2.4.6

versions:
	for releases in $(TORCH_TRITON_NUMPY); do \
		set -- $$(echo $$releases | tr / ' '); torch=$$1; triton=$$2; numpy=$$3; home=.venv-versions/$$torch; \
		$(PYTHON) -m venv $$home && pip="$$home/bin/python -m pip install -qq --disable-pip-version-check" || exit 1; \
		$$pip torch==$$torch && $$pip --no-deps triton==$$triton || exit 1; \
		$$home/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
			o = p['optional-dependencies']; \
			print(*[r for r in p['dependencies'] + sum(map(o.get, ('cli', 'ray', 'report', 'dashboard', 'envs', 'hf', 'dev')), []) \
			if not r.startswith(('torch', 'triton', 'rlroute'))], sep='\n')" > $$home/wanted.txt || exit 1; \
		$$pip -r $$home/wanted.txt numpy==$$numpy && $$pip --no-deps -e . || exit 1; \
		$$home/bin/python -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"; \
		OMP_NUM_THREADS=1 $$home/bin/python -m pytest $(SPREAD) --fast || exit 1; \
		OMP_NUM_THREADS=1 $$home/bin/python -m pytest $(SPREAD) tests/test_triton.py tests/test_engines.py || exit 1; \
	done

dist: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -c "import setuptools.build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"

# Nothing is installed: the machine's own Python has torch for its card.
gpu:
	PYTHONPATH=. $(PYTHON) -m rlroute.experiments.bench.gpu --only "$(ONLY)"

clean:
	rm -rf .venv .venv-versions build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
