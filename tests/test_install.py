"""The archives hold what they should, and the wheel works with each extra alone.

A clean environment is a folder of links to exactly those installed distributions that pip would have put beside the
wheel, so that nothing is downloaded.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rlroute.experiments.report.router_page import field_texts, routers_page
from rlroute.registry import router_class, router_names
from tests import ROOT
from tests.conftest import HANG

TINY = (
    "--launcher local --train.steps 2 --train.batch-size 2 --train.eval-every 1 --data.seq-len 16 --data.eval-tokens 32"
)
TINY += " --model.d-model 16 --model.num-layers 1 --model.num-experts 4 --model.d-expert 8 --no-tuned"
CORPUS = "synth:documents=8,vocab=16,length=400"

pytestmark = pytest.mark.processes
PARQUET = """
import pyarrow, pyarrow.parquet
from rlroute.training.data import load_corpus
pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {n} " * 20 for n in range(40)]}), "rows.parquet")
assert load_corpus("parquet:rows.parquet", None).provenance["train_tokens"] > 0
"""
BLOCK = """
import torch, transformers
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from rlroute.experiments.checkpoints.blocks import read_block
config = transformers.MixtralConfig(hidden_size=8, intermediate_size=4, num_local_experts=4)
block = MixtralSparseMoeBlock(config)
for weight in block.parameters():
    torch.nn.init.normal_(weight)  # theirs are whatever the memory held
layer = read_block("mixtral", config, block.state_dict()).layer()
assert torch.equal(layer.experts.out_EDF, block.experts.down_proj)
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the wheel and the source archive of the tree as it is."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    listed = subprocess.run(
        ("git", "ls-files", "-co", "--exclude-standard", "-z"), cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.exists():  # and not deleted
            target.write_bytes(source.read_bytes())
    build = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    subprocess.run((sys.executable, "-c", build), cwd=tree, check=True, capture_output=True, timeout=HANG)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_archives_hold_sources_results_recipes_and_docs(archives: tuple[Path, Path]) -> None:
    wheel, source = archives
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
    with tarfile.open(source) as opened:
        in_source = {name.partition("/")[2] for name in opened.getnames()}
    docs = {path.name for path in (ROOT / "docs").glob("*.md")} | {"CITATION.cff", "CHANGELOG.md", "constraints.txt"}
    assert docs <= {name.rpartition("/")[2] for name in in_wheel if "/share/doc/rlroute/" in name}
    for folder in ("agents", "baselines", "envs", "experiments"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in name:
                assert f"rlroute/{name}" in in_wheel and name in in_source
    assert {"tests/test_install.py", "docs/README.md", "Makefile", "LICENSE"} <= in_source
    linked = {"docs/notebook.ipynb", "docs/upcycling.svg", "docs/images/dashboard-light.png"}
    assert linked | {"docs/images/dashboard-dark.png"} <= in_source  # pages link to them
    assert not [name for name in in_wheel if name.startswith("tests/")]


class Environment:
    """A clean environment in which the wheel is installed with some extras, and nothing else is."""

    def __init__(self, folder: Path, wheel: Path, *extras: str) -> None:
        self.folder = folder
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(folder)
        for name in sorted(closure(f"rlroute[{','.join(extras)}]", folder)):
            for path in distribution(name).files or ():
                self._link(Path(str(distribution(name).locate_file(path.parts[0]))))

    def _link(self, top: Path) -> None:
        if top.name not in ("..", "__pycache__") and top.exists() and not (self.folder / top.name).exists():
            (self.folder / top.name).symlink_to(top)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python, to which nothing is visible but the environment."""
        known = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            (sys.executable, "-S", "-P", *arguments),
            env=known | {"PYTHONPATH": str(self.folder)},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=HANG,
        )

    def rlroute(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a command line."""
        return self.python("-c", "from rlroute.experiments.cli.main import main; main()", *line.split())


def closure(wanted: str, folder: Path) -> set[str]:
    """Return the distributions that pip installs for a requirement, beside the first, which lies in ``folder``."""
    (metadata,) = folder.glob("rlroute-*.dist-info/METADATA")
    lines = [x.partition(": ")[2] for x in metadata.read_text().splitlines() if x.startswith("Requires-Dist: ")]
    first = Requirement(wanted)
    found: set[str] = set()
    open_ = [(Requirement(line), first.extras) for line in lines]
    while open_:
        requirement, extras = open_.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            continue
        if requirement.name == "rlroute":
            open_ += [(Requirement(line), requirement.extras) for line in lines]
            continue
        try:
            needs = distribution(requirement.name).requires or []
        except PackageNotFoundError:  # which the test then says, where it matters
            continue
        key = distribution(requirement.name).name
        if key not in found:
            found.add(key)
            open_ += [(Requirement(line), requirement.extras) for line in needs]
    return found


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple[str, ...], Environment] = {}

    def get(*extras: str) -> Environment:
        if extras not in made:
            made[extras] = Environment(tmp_path_factory.mktemp("env"), archives[0], *extras)
        return made[extras]

    return get


def refuses_in_one_line(done: subprocess.CompletedProcess[str], *named: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for name in named:
        assert name in done.stderr


def test_core_alone_trains_and_its_command_names_what_is_missing(installed) -> None:
    core = installed()
    code = (
        "from pathlib import Path; from rlroute.registry import run_config; from rlroute.training.loop import train\n"
        "tiny = {'d_model': 16, 'num_layers': 1, 'num_experts': 4, 'd_expert': 8}\n"
        f"data = {{'spec': '{CORPUS}', 'tokenizer': None, 'seq_len': 16, 'eval_tokens': 32}}\n"
        "config = run_config({'data': data, 'model': tiny, 'router': {'name': 'switch'},"
        " 'train': {'steps': 2, 'batch_size': 2, 'eval_every': 1}})\n"
        "print(train(config, 0, Path('runs'))['status'])"
    )
    done = core.python("-c", code)
    assert done.stdout.strip() == "finished", done.stderr
    assert core.rlroute("--version").stdout.startswith("rlroute ")
    refuses_in_one_line(core.rlroute("train switch"), "tyro")


def test_cli_alone_trains_compares_and_prints(installed) -> None:
    cli = installed("cli")
    assert cli.rlroute("--version").stdout.startswith("rlroute ")
    trained = cli.rlroute(f"train switch --data.spec {CORPUS} {TINY}")
    assert trained.returncode == 0 and "bits per byte" in trained.stdout, trained.stderr
    compared = cli.rlroute(f"compare switch dense --seeds 1 --data.spec {CORPUS} {TINY}")
    assert "| switch" in compared.stdout, compared.stderr
    assert "no report: the report needs the package plotly" in compared.stdout and "Traceback" not in compared.stderr
    refuses_in_one_line(cli.rlroute("play TokenBandit-v0 uniform"), "gymnasium")
    refuses_in_one_line(cli.rlroute("report"), "plotly")
    scaled = cli.rlroute("bench scale")
    assert scaled.returncode == 0, scaled.stderr  # from the results that ship


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("ray", "import ray.tune"),
        ("report", "from rlroute.experiments.report.page import render"),
        ("dashboard", "from rlroute.experiments.dashboard.app import make_app"),
        ("triton", "import rlroute.kernels.triton_kernels"),
        ("parquet", PARQUET),
        ("hf", BLOCK),
    ],
)
def test_extra_alone_imports_what_it_is_for(installed, extra: str, code: str) -> None:
    done = installed(extra).python("-c", code)
    assert done.returncode == 0, done.stderr
    if extra == "parquet":  # the smallest: all of them lack the command line
        refuses_in_one_line(installed(extra).rlroute("train switch"), "tyro")


def test_environments_alone_play_and_load_no_torch(installed) -> None:
    code = (
        "import sys, gymnasium\n"
        "for name in ('TokenBandit-v0', 'TokenBandits-v0', 'Dispatch-v0'):\n"
        "    game = gymnasium.make('rlroute.envs:rlroute/' + name); game.reset(seed=0)\n"
        "    game.step(game.action_space.sample())\n"
        "print(sorted({'torch', 'sympy', 'scipy'} & set(sys.modules)))"
    )
    done = installed("envs").python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_cli_and_envs_play(installed) -> None:
    played = installed("cli", "envs").rlroute("play TokenBandit-v0 uniform --episodes 4")
    assert played.returncode == 0 and "uniform" in played.stdout, played.stderr


# Pages that are made from the code.


def test_router_page_is_what_the_command_prints() -> None:
    assert (ROOT / "docs" / "routers.md").read_text() == routers_page() + "\n"


def test_every_field_of_every_router_has_a_text() -> None:
    for name in router_names():
        config = router_class(name).Config
        texts = dict(field_texts(config))
        assert not [f.name for f in fields(config) if not texts.get(f.name)]
