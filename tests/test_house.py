"""The house keeps its order: links agree with setup.py, the core stands alone, `rlroute --help` loads nothing heavy."""

import ast
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.conftest import HANG

PACKAGE = ROOT / "rlroute"


def _wings() -> tuple[str, ...]:
    """Read WINGS out of setup.py, which cannot be imported: it would build."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WINGS":
            return tuple(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no WINGS")


def _modules(package: Path, name: str) -> list[str]:
    """List a package and all its modules by their full names, without importing any."""
    found = [name]
    for module in pkgutil.iter_modules([str(package)]):
        if not package.joinpath(module.name).is_symlink():
            child = f"{name}.{module.name}"
            found += _modules(package / module.name, child) if module.ispkg else [child]
    return found


def _python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=HANG)


def test_links_are_the_wings_of_setup() -> None:
    links = {path.name: os.readlink(path) for path in PACKAGE.iterdir() if path.is_symlink()}
    assert links == {wing: f"../{wing}" for wing in _wings()}


@pytest.mark.parametrize("wing", _wings())
def test_wings_are_packages(wing: str) -> None:
    assert (ROOT / wing / "__init__.py").is_file()


def test_experiments_live_in_rooms() -> None:
    flat = {path.name for path in (ROOT / "experiments").glob("*.py")}
    assert flat == {"__init__.py", "statistics.py", "terminal.py", "text.py", "verdicts.py"}


def test_the_tour_names_every_file_of_the_core_and_every_room() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text().partition("## Tour")[2].partition("## Add a router")[0]
    core = [path for path in PACKAGE.iterdir() if not path.is_symlink()]
    places = [path for path in [*core, *(ROOT / "experiments").iterdir()] if not path.name.startswith(("_", "."))]
    named = {path.name + "/" * path.is_dir() for path in places if path.suffix in ("", ".py")}
    assert not [name for name in named if f"`{name}`" not in tour and f"/{name}`" not in tour]


def test_files_can_be_read_in_one_sitting() -> None:
    files = {path.resolve() for folder in ("rlroute", *_wings()) for path in (ROOT / folder).rglob("*.py")}
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.processes
def test_core_and_routers_need_no_extra() -> None:
    extras = ("gymnasium", "pandas", "plotly", "ray", "rich", "scipy", "tokenizers", "tyro", "wandb")
    routers = [name for wing in ("agents", "baselines") for name in _modules(ROOT / wing, f"rlroute.{wing}")]
    done = _python(
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({extras}))\n"  # None: as if it were not installed
        f"for name in {_modules(PACKAGE, 'rlroute') + routers}:\n"
        "    importlib.import_module(name)\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
def test_help_loads_nothing_heavy() -> None:
    heavy = {"gymnasium", "numpy", "pandas", "plotly", "ray", "scipy", "torch", "wandb"}
    done = _python(
        "import sys\n"
        "from rlroute.experiments.cli.main import main\n"
        "sys.argv = ['rlroute', '--help']\n"
        "try:\n"
        "    code = main()\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        f"print('heavy:', sorted({heavy} & set(sys.modules)), 'code:', code or 0)\n"
    )
    assert done.stdout.splitlines()[-1:] == ["heavy: [] code: 0"], done.stdout + done.stderr
