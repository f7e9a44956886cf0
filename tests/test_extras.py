"""What is said where an optional package is missing: a command that works, whatever is installed from where."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from rlroute import extras
from rlroute.extras import missing, needed_beside
from tests import ROOT
from tests.commands import TINY, ran, refused, rlroute
from tests.conftest import HANG

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PACKAGES = {
    re.split(r"[^\w-]", requirement)[0]: extra
    for extra, requirements in reversed(EXTRAS.items())
    for requirement in requirements
    if not requirement.startswith("rlroute") and extra != "dev"
}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_command_installs_what_the_extra_wants_and_nothing_from_an_index_is_ours(package):
    said = str(missing("this", package))
    assert said.startswith(f"this needs the package {package}: pip install ") and "rlroute" not in said
    for requirement in EXTRAS[PACKAGES[package]]:
        name, *bounds = re.split(r"(?=[<>=,;])", requirement.partition(";")[0].replace(",", ""))
        if not name.startswith("rlroute"):
            assert name.strip() in said and all(bound.strip() in said for bound in bounds)


def test_an_extra_that_is_made_of_others_brings_theirs():
    assert any(part.startswith("gymnasium") for part in needed_beside("stable-baselines3"))


def test_a_checkout_that_was_never_installed_names_the_package_alone(monkeypatch):
    def requires(name):
        raise extras.PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", requires)
    assert str(missing("this", "plotly", "that does without")) == (
        "this needs the package plotly: pip install plotly; that does without"
    )


def test_a_package_that_is_there_and_fails_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "plotly.py").write_text("from nowhere import nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plotly", raising=False)
    try:
        import plotly  # noqa: F401
    except ImportError:
        said = str(missing("this", "plotly"))
    assert said == "this needs the package plotly, whose import fails: No module named 'nowhere'"


def test_no_text_advises_to_install_ours_from_an_index():
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for folder in ("rlroute", "agents", "baselines", "envs", "experiments"):
        files += (ROOT / folder).rglob("*.py")
    advice = re.compile(r"pip install [\"']?rlroute")
    assert [str(path) for path in files if path.name != "extras.py" and advice.search(path.read_text())] == []


def test_without_what_the_report_needs_the_table_is_printed_all_the_same(tmp_path, monkeypatch):
    package = "plotly"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    compare = ("compare", "hash", "switch", *TINY, "--launcher", "local", "--seeds", "2", "--no-tuned")
    out = ran(*compare)
    assert "\n| hash |" in out and (tmp_path / "results" / "table.md").exists()
    assert f"no report: the report needs the package {package}: pip install" in out
    assert f"the package {package}" in refused(rlroute("report"))
    monkeypatch.delitem(sys.modules, package)
    ran(*compare)
    monkeypatch.setitem(sys.modules, package, None)
    ran(*compare, "--reference", "hash")
    assert not (tmp_path / "results" / "report.html").exists(), "that of another table"


@pytest.mark.processes
def test_runs_are_listed_and_inspected_without_what_tables_and_reports_need(tmp_path):
    ran("train", "hash", *TINY, "--store", tmp_path / "runs")
    for words in (["runs"], ["runs", "runs", "hash"]):
        script = f"import sys\nsys.modules |= {{'scipy': None, 'plotly': None}}\nsys.argv = ['rlroute', *{words}]\n"
        script += "from rlroute.experiments.cli.main import main\nmain()\n"
        there = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=there, capture_output=True, text=True, timeout=HANG
        )
        assert done.returncode == 0 and "hash" in done.stdout, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("gymnasium", ("play", "TokenBandit-v0", "uniform", "--episodes", "2")),
        pytest.param("gymnasium", ("play", "CartPole-v1"), marks=pytest.mark.slow),
        pytest.param("gymnasium", ("bench", "envs", "--rounds", "2"), marks=pytest.mark.slow),
        ("ray", ("train", "hash", "--launcher", "ray")),
        pytest.param("plotly", ("gradients", "hash"), marks=pytest.mark.slow),
        ("tyro", ("routers",)),
        pytest.param("scipy", ("table",), marks=pytest.mark.slow),
        pytest.param("wandb", ("train", "hash", "--wandb", "offline"), marks=pytest.mark.slow),
    ],
)
def test_a_command_without_its_package_is_one_line(package, command, tmp_path):
    script = (
        f"import sys\nsys.modules[{package!r}] = None\nsys.argv = ['rlroute', *{command}]\n"
        "from rlroute.experiments.cli.main import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: "), done.stderr
    assert f" needs the package {package}: pip install " in line
    assert not list(tmp_path.rglob("config.json"))
