"""Routers from files anywhere, and files that hold none: what brings them in, what names them, and what they leave
alone.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlroute import registry
from rlroute.errors import ConfigError
from rlroute.experiments.launch import supervisor
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.launch.runs import run_jobs
from rlroute.experiments.recipes.entries import build_entry
from tests.commands import TINY, contents, ran, refused, rlroute
from tests.tiny import DATA, MODEL, TRAIN

SOURCE = '''
"""Top-k of a softmax.

Nobody et al. 2026 (no paper)."""

from dataclasses import dataclass

from rlroute.config import RouterConfig
from rlroute.routing import LinearScores, Router, RoutingDecision


class PlainRouter(Router):
    learns_from = frozenset({"gate"})
    gate_meaning = "plain softmax"

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        std: float = 0.02

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.std)

    def forward(self, x_TD, context):
        logits_TE = self.scores(x_TD)
        probs_TE, ids_TK = logits_TE.softmax(1), context.choose(logits_TE, self.shape.k)
        gates_TK, experts = probs_TE.gather(1, ids_TK), self.shape.num_experts
        return RoutingDecision.token_choice(ids_TK, gates_TK, experts, logits_TE=logits_TE, probs_TE=probs_TE)
'''
LOCAL = ("--launcher", "local")
BROKEN = {
    "unparsed": (SOURCE.replace("class PlainRouter(Router):", "class PlainRouter(Router:"), "SyntaxError", "line 12"),
    "not_utf8": (b'"""\xff"""\n', "SyntaxError", ""),
    "null": (b"x = 1\0", "", ""),
    "raises": (SOURCE + "\n{}['key']\n", "KeyError: 'key'", "line 30"),
    "asserts": (SOURCE + "\nassert not PlainRouter\n", "AssertionError", "line 30"),
    "exits": (SOURCE + "\nraise SystemExit('bye')\n", "SystemExit: bye", "line 30"),
    "no_such_name": ("from rlroute.routing import Rooter\n", "ImportError: cannot import name 'Rooter'", "line 1"),
    "no_such_module": ("import rlroute.rooting\n", "No module named 'rlroute.rooting'", "line 1"),
    "relative": ("from . import other\n", "ImportError", "line 1"),
    "missing": (
        "import json\nimport nowhere.to_be.found\n",
        "needs the package nowhere: pip install nowhere",
        "line 2",
    ),
    "beside": ("import a_neighbour\n", "imports a_neighbour from its folder: a router is one file", "line 1"),
    "empty": ("", "defines 0 routers", ""),
    "imported": ("from rlroute.baselines.hash import HashRouter\n", "defines 0 routers", ""),
    "two": (SOURCE + "\n\nclass Other(PlainRouter):\n    pass\n", "2 routers (PlainRouter, Other): a file holds", ""),
    "no_config": (
        SOURCE.replace("class Config(RouterConfig)", "class Settings(RouterConfig)"),
        "no class Config",
        "line 12",
    ),
    "other_config": (
        SOURCE.replace("class Config(RouterConfig)", "class Config"),
        "has no class Config(Router",
        "line 12",
    ),
    "undecorated": (SOURCE.replace("    @dataclass(frozen=True, kw_only=True)\n", ""), "std is no field", "line 12"),
    "not_frozen": (SOURCE.replace("frozen=True, ", ""), "TypeError: cannot inherit non-frozen", "line 16"),
    "mutable": (SOURCE.replace("std: float = 0.02", "std: list = []"), "ValueError: mutable default", "line 16"),
    "bad_default": (SOURCE.replace("std: float = 0.02", "std: float = 'x'"), "std = 'x': want float", "line 12"),
    "bad_type": (SOURCE.replace("std: float", "std: 'Flot'"), "NameError: name 'Flot'", ""),
}


@pytest.fixture
def plain(tmp_path, routers, monkeypatch):
    """The file of a router in another folder than the one in which commands run."""
    folder, here = tmp_path / "elsewhere", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    file = folder / "plain.py"
    file.write_text(SOURCE)
    return file


def trained(store="runs"):
    return sorted(path.parent.name.rpartition("-s")[0].partition("-")[0] for path in Path(store).glob("*/summary.json"))


@pytest.mark.parametrize("where", ["before", "after", "equals", "relative", "variable"])
def test_a_file_comes_in_wherever_it_is_said(where, plain, monkeypatch):
    train = ("train", "plain:std=0.5", *TINY)
    if where == "variable":
        monkeypatch.setenv(registry.INCLUDE, str(plain))
    words = {
        "before": ("--include", plain, *train),
        "after": (*train, "--include", plain),
        "equals": (*train, f"--include={plain}"),
        "relative": (*train, "--include", "../elsewhere/plain.py"),
        "variable": train,
    }[where]
    ran(*words)
    assert trained() == ["plain"]
    (folder,) = Path("runs").iterdir()
    code = json.loads((folder / "config.json").read_text())["made_from"]["routers"]["plain"]
    assert code == registry.router_code("plain") and code["distribution"] == "none"
    said = json.loads((folder / "config.json").read_text())["command"]
    assert ("--include" in said) == (where != "variable"), "the same command goes on"


def test_several_files_come_in_and_join_where_nobody_is_named(plain):
    other = plain.with_name("other.py")
    other.write_text(SOURCE)
    text = ran("--include", plain, "routers", "--include", other)
    for name in ("plain", "other"):
        assert f"{name}  (rlroute_included.{name})\n    Top-k of a softmax.\n    Nobody et al. 2026" in text
    assert {"plain", "other"} < set(registry.default_names())


def test_its_records_are_read_without_it(plain, monkeypatch):
    ran("compare", "plain", "hash", "--include", plain, *TINY, *LOCAL, "--seeds", "2", "--no-tuned")
    plain.unlink()
    monkeypatch.delenv(registry.INCLUDE)
    registry._sources.cache_clear()
    (run, _) = sorted(path.name for path in Path("runs").glob("plain-*"))
    assert "\n| plain |" in ran("table", "runs") and "plain softmax" in ran("table", "runs")
    assert "plain" in ran("runs", "runs") and run in ran("runs", "runs", run)
    ran("report", "runs")
    ran("export", "packed.jsonl")
    assert "| plain |" in ran("table", "packed.jsonl")
    said = refused(rlroute("train", "plain", *TINY))
    assert "unknown router 'plain'" in said and "--include FILE" in said


@pytest.mark.parametrize("name", ["switch", "reinforce", "dense"])
def test_a_name_that_is_taken_is_refused(name, plain):
    taken = plain.with_name(f"{name}.py")
    taken.write_text(SOURCE)
    for command in (("routers",), ("train", "hash", *TINY), ("compare", "hash", *TINY, *LOCAL)):
        said = refused(rlroute(*command, "--include", taken))
        assert f"router file {taken}: the name {name!r} is taken" in said
    assert not contents(Path())


def test_two_files_of_one_name_are_refused_and_one_file_twice_is_not(plain):
    again = plain.parent / "more" / "plain.py"
    again.parent.mkdir()
    again.write_text(SOURCE)
    ran("routers", "--include", plain, "--include", plain.parent / ".." / "elsewhere" / "plain.py")
    said = refused(rlroute("routers", "--include", plain, "--include", again))
    assert f"{again}: the name 'plain' is taken by {plain}" in said


def test_a_file_of_ours_is_the_router_that_it_is(routers):
    file = registry.router_file("switch")
    registry.include(file)
    assert registry.router_class("switch").__module__ == "rlroute.baselines.switch"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--include", "nowhere.py"), "nowhere.py: there is no such file"),
        (("--include", "."), "want NAME.py"),
        (("--include", "../elsewhere/plain.txt"), "plain.txt: want NAME.py"),
        (("--include", "my-router.py"), "my-router.py: want NAME.py"),
        (("--include", "a:b/plain.py"), "in a folder without ':'"),
        (("--include",), "--include wants a router's file"),
        (("--include=",), "--include wants a router's file"),
    ],
)
def test_what_is_no_router_file_is_refused_by_name(words, said, plain):
    assert said in refused(rlroute("routers", *words))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line_and_holds_up_nobody_else(kind, plain):
    source, said, line = BROKEN[kind]
    plain.write_bytes(source if isinstance(source, bytes) else source.encode())
    plain.with_name("a_neighbour.py").touch()
    include = ("--include", plain)
    error = refused(rlroute("train", "plain", *TINY, *include))
    assert "'plain'" in error or "plain.py" in error
    assert said in error and line in error and (str(plain) in error or not line)
    assert not contents(Path())
    done = rlroute("routers", *include)
    (named,) = (line for line in done.err.splitlines() if line.startswith("left out: "))
    assert done.code == 0 and said in named


@pytest.mark.parametrize(
    "kind", [next(iter(BROKEN)), *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(BROKEN)[1:])]
)
def test_beside_a_broken_file_others_are_trained(kind, plain):
    source, said, _ = BROKEN[kind]
    plain.write_bytes(source if isinstance(source, bytes) else source.encode())
    plain.with_name("a_neighbour.py").touch()
    for command in (("train", "hash", *TINY), ("compare", "hash", *TINY, *LOCAL, "--seeds", "1")):
        done = rlroute(*command, "--include", plain)
        (named,) = (line for line in done.err.splitlines() if line.startswith("left out: "))
        assert done.code == 0 and said in named
    assert trained() == ["hash"]


def test_a_broken_wing_file_is_named_as_well(monkeypatch, tmp_path, routers):
    """As one of ours that is being written."""
    from rlroute import baselines

    (tmp_path / "halfway.py").write_text("def f(:\n")
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    registry._sources.cache_clear()
    done = rlroute("routers")
    assert done.code == 0 and f"{tmp_path / 'halfway.py'}, line 1" in done.err and "switch  (" in done.out


def test_a_router_that_cannot_be_asked_or_made_is_no_reason_for_others_to_stop(plain, tmp_path):
    refuses = "    @classmethod\n    def refuses(cls, config, shape):\n        return 1 / 0\n\n"
    asked = SOURCE.replace("    def __init__", f"{refuses}    def __init__")
    for source in (asked, SOURCE.replace('"scores", config.std)', '"scores", config.typo)')):
        plain.write_text(source)
        sys.modules.pop("rlroute_included.plain", None)
        text = ran("routers", "--include", plain)
        assert f"cannot be made: {'ZeroDivisionError' if source == asked else 'AttributeError'}" in text
        assert "switch  (" in text


def test_a_check_of_its_own_is_one_line(plain):
    check = "\n        def __post_init__(self):\n            assert self.std < 1, 'wide'\n"
    plain.write_text(SOURCE.replace("std: float = 0.02\n", f"std: float = 0.02\n{check}"))
    said = refused(rlroute("train", "plain:std=2.0", "--include", plain, *TINY))
    assert "router plain: AssertionError: wide" in said and f"{plain}, line " in said


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("there", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_job_carries_it_to_processes_that_have_not_heard_of_it(workers, there, plain, monkeypatch):
    """As those of another machine, whose environment is another; there the file itself may be missing."""
    real = supervisor._driver

    def driver(surroundings):
        del surroundings[registry.INCLUDE]
        if not there:
            plain.unlink()
        return real(surroundings)

    monkeypatch.setattr(supervisor, "_driver", driver)
    registry.include(plain)
    micro = replace(TRAIN, micro_batches=workers)
    job = Job(build_entry("plain", DATA, MODEL, micro), 0)
    _, failed = run_jobs([job], Launch(launcher="ray", workers=workers, cpus=0.5))
    if there:
        assert not failed and trained() == ["plain"]
    else:
        assert f"router file {plain}: there is no such file on " in failed[job.id]


def test_the_environment_of_a_test_is_clean(routers):
    assert not registry.included()
    with pytest.raises(ConfigError, match="unknown router 'plain'"):
        registry.router_class("plain")
