"""The command line, in tiny runs: what it trains, what it leaves alone, and that the same command prints the same
table.
"""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.experiments.cli.main import main
from rlroute.experiments.recipes.entries import build_entry
from rlroute.registry import router_names
from tests.conftest import HANG
from tests.policies import weights_of, write_policy

ROOT = Path(__file__).parents[1]
STEPS = 12
TINY = (
    *("--data.spec", "synth:documents=64,length=64", "--data.seq-len", "16", "--data.eval-tokens", "128"),
    *("--model.num-layers", "1", "--model.d-model", "16", "--model.num-heads", "2"),
    *("--model.num-experts", "4", "--model.d-expert", "8", "--train.batch-size", "4", "--train.warmup-steps", "2"),
    *("--train.log-every", "1", "--train.eval-every", "4", "--train.checkpoint-every", "4"),
    *("--train.steps", str(STEPS)),
)
ENTRIES = ("dense", "hash", "switch")
COMPARE = ("compare", *ENTRIES, *TINY, "--seeds", "2", "--launcher", "local")


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def rlroute(*arguments: object) -> Done:
    """Run the command line in this process; what it does not catch itself is raised."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    argv = ["rlroute", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def start(folder: Path, *arguments: object, path: str = str(ROOT)) -> subprocess.Popen[str]:
    """Start the command line in a process and a process group of its own, with ``folder`` as its working directory."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlroute.experiments.cli", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ran(*arguments: object) -> str:
    """Run a command that has to succeed and return what it printed."""
    done = rlroute(*arguments)
    assert done.code == 0, done.err
    return done.out


def refused(done: Done) -> str:
    """Assert that a command ended as bad input must, and return its one line; before it stands at most what was
    begun.
    """
    assert done.code == 2, done
    *begun, line = done.err.splitlines()
    assert line.startswith("error: "), done.err
    assert [" into " in other for other in begun] in ([], [True]), done.err
    return line


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stamps(folder: Path) -> dict[str, int]:
    """Return when every file under a folder was last written; a run's lock is touched by whoever looks at the run."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files}


def rows(folder: Path, kind: str) -> list[dict]:
    """Return a run's train or eval rows."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def table(store: Path) -> str:
    """Return the table of a store without the timings, and without what was typed in which state of the repository."""
    lines = ran("table", store, "--no-timings").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("- **Command**", "- **Commit**")))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder in which a comparison of two routers and the dense model was run; nobody may change it."""
    folder = tmp_path_factory.mktemp("compared")
    with contextlib.chdir(folder):
        (folder / "printed").write_text(ran(*COMPARE))
    return folder


# --- train


def test_training_again_trains_nothing_and_says_so(tmp_path):
    command = ("train", "switch", "--store", tmp_path, *TINY)
    first = ran(*command)
    before, when = contents(tmp_path), stamps(tmp_path)
    second = ran(*command)
    assert (contents(tmp_path), stamps(tmp_path)) == (before, when)
    assert "already" in second
    assert "already" not in first


def test_train_says_where_the_record_is(tmp_path):
    said = ran("train", "hash", "--store", tmp_path, *TINY)
    (folder,) = tmp_path.iterdir()
    assert str(folder) in said
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{summary['final']['bits_per_byte']:.4f}" in said
    assert summary["steps"] == STEPS


def test_a_run_shorter_than_its_logging_interval_has_a_record(tmp_path):
    said = ran("train", "hash", "--store", tmp_path, *TINY, "--train.steps", "2", "--train.log-every", "10")
    assert said.startswith("finished: ")
    assert "| hash |" in ran("table", tmp_path)


@pytest.mark.parametrize(
    "change",
    [("--train.lr", "0.001"), ("--model.k", "1"), ("--data.seq-len", "8"), ("--seed", "1")],
    ids=lambda c: c[0],
)
def test_a_changed_configuration_has_a_folder_of_its_own(tmp_path, change):
    ran("train", "hash", "--store", tmp_path, *TINY)
    before = contents(tmp_path)
    ran("train", "hash", "--store", tmp_path, *TINY, *change)
    assert len(list(tmp_path.iterdir())) == 2
    assert contents(tmp_path).items() > before.items()


def test_what_an_entry_says_reaches_its_router(tmp_path):
    ran("train", "switch:balance_weight=0.5,normalize=false", "--store", tmp_path, *TINY)
    (path,) = tmp_path.glob("*/config.json")
    router = json.loads(path.read_text())["config"]["router"]
    assert router | {"balance_weight": 0.5, "normalize": False} == router


# --- compare ------------------------------------------------------------


def test_compare_trains_every_entry_on_every_seed(compared):
    summaries = [json.loads(path.read_text()) for path in compared.glob("runs/*/summary.json")]
    assert sorted((s["router"], s["seed"]) for s in summaries) == [(e, seed) for e in ENTRIES for seed in (0, 1)]
    assert {s["status"] for s in summaries} == {"finished"}
    for folder in (compared / "runs").iterdir():
        losses = [row["loss"] for row in rows(folder, "train")]
        assert len(losses) == STEPS
        assert sum(losses[-3:]) < sum(losses[:3]), folder.name
        assert [row["step"] for row in rows(folder, "eval")] == [4, 8, 12]


def test_compare_writes_table_and_report_and_says_where(compared):
    printed = (compared / "printed").read_text()
    written = (compared / "results" / "table.md").read_text()
    assert printed.startswith(written)
    for path in ("runs/", "results/table.md", "table.csv", "results/report.html"):
        assert path in printed.removeprefix(written)
    assert written.strip() == ran("table", compared / "runs").strip()
    listed = csv.DictReader((compared / "results" / "table.csv").read_text().splitlines())
    assert {row["router"] for row in listed} == set(ENTRIES)
    assert (compared / "results" / "report.html").read_text().lower().startswith("<!doctype html>")
    assert sorted(p.name for p in (compared / "results").iterdir()) == ["report.html", "table.csv", "table.md"]


def test_comparing_from_scratch_prints_the_same_table(compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran(*COMPARE)
    again, first = (ran("table", folder / "runs", "--no-timings") for folder in (tmp_path, compared))
    assert again.encode() == first.encode()
    for name in contents(compared / "runs"):
        if name.endswith(("config.json", "loads.jsonl")):
            assert (tmp_path / "runs" / name).read_bytes() == (compared / "runs" / name).read_bytes()


def test_comparing_again_trains_nothing(compared, tmp_path, monkeypatch):
    monkeypatch.chdir(compared)
    before, when = contents(compared / "runs"), stamps(compared / "runs")
    written = (compared / "results" / "table.md").read_text()
    assert ran(*COMPARE, "--out", tmp_path).startswith(written)
    assert (contents(compared / "runs"), stamps(compared / "runs")) == (before, when)


def test_one_more_seed_trains_only_that(compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran(*COMPARE, "--seeds", "1")
    before, when = contents(tmp_path / "runs"), stamps(tmp_path / "runs")
    ran(*COMPARE)
    after = stamps(tmp_path / "runs")
    assert contents(tmp_path / "runs").items() > before.items()
    assert {name: after[name] for name in when} == when
    assert table(tmp_path / "runs") == table(compared / "runs")


@pytest.mark.processes
def test_ray_gives_the_same_table_as_this_process(compared, tmp_path):
    """A path in an entry is relative to where the command was typed, in Ray's workers too."""
    write_policy(tmp_path / "p.zip", weights_of(16, 4))
    process = start(tmp_path, COMPARE[0], "sb3:policy=p.zip", *COMPARE[1:], "--launcher", "ray", "--concurrency", "2")
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert "results/report.html" in out
    of_policy = list((tmp_path / "runs").glob("sb3-*/summary.json"))
    assert len(of_policy) == 2
    for path in of_policy:
        shutil.rmtree(path.parent)
    assert table(tmp_path / "runs").encode() == table(compared / "runs").encode()


def test_without_ray_compare_names_the_extra_and_the_other_launcher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the launcher writes Ray's settings there
    said = refused(rlroute(*COMPARE, "--launcher", "ray"))
    assert "'ray'" in said
    assert "--launcher local" in said


def test_drops_and_attention_experts_stand_beside_the_dense_model(tmp_path):
    """Training may run more or fewer pairs than evaluation, and the dense model's attention has no experts."""
    sized = (*TINY, "--model.capacity-factor", 1.0, "--model.attention-experts", 3)
    with contextlib.chdir(tmp_path):
        table = ran(
            "compare", *ENTRIES, "switch+hash@attention", *sized, "--seeds", 1, "--no-tuned", "--launcher", "local"
        )
    assert all(f"\n| {label} | " in table for label in ("dense, yardstick", "hash", "switch", "switch+hash@attention"))
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/summary.json")]
    assert len({summary["fingerprint"]["backbone"] for summary in summaries}) == 1


# --- what is stored ------------------------------------------------------------


def test_runs_lists_every_run_ended_or_not(compared, tmp_path):
    lines = ran("runs", compared / "runs").splitlines()[1:]
    ids = sorted(path.name for path in (compared / "runs").iterdir())
    assert [line.split()[:3] for line in lines] == [[run, "finished", str(STEPS)] for run in ids]
    ran("train", "hash", "--store", tmp_path, *TINY)
    (folder,) = tmp_path.iterdir()
    (folder / "summary.json").unlink()
    assert [line.split()[:3] for line in ran("runs", tmp_path).splitlines()[1:]] == [
        [folder.name, "interrupted", str(STEPS)]
    ]


def test_runs_inspects_one(compared):
    (run,) = (path.name for path in (compared / "runs").glob("switch-*-s1"))
    said = ran("runs", compared / "runs", run)
    summary = json.loads((compared / "runs" / run / "summary.json").read_text())
    assert said.startswith(run)
    assert summary["final"]["chain"] in said
    assert [f"{row['bits_per_byte']:.4f}" in said for row in rows(compared / "runs" / run, "eval")] == [True] * 3
    assert said == ran("runs", compared / "runs", run[:-1] + "1")


def test_an_ambiguous_or_unknown_run_is_refused_with_the_choices(compared):
    several = refused(rlroute("runs", compared / "runs", "switch"))
    none = refused(rlroute("runs", compared / "runs", "swich"))
    for path in (compared / "runs").glob("switch-*"):
        assert path.name in several
        assert path.name in none
    assert "'swich'" in none


def test_an_exported_file_says_what_the_store_says(compared, tmp_path):
    file = tmp_path / "published.jsonl"
    assert str(file) in ran("export", file, "--path", compared / "runs")
    assert len(file.read_text().splitlines()) == 6
    for options in ((), ("--csv",), ("--no-timings",), ("--reference", "hash")):
        assert ran("table", file, *options) == ran("table", compared / "runs", *options)
    assert ran("runs", file) == ran("runs", compared / "runs")
    for path in (compared / "runs").iterdir():
        assert ran("runs", file, path.name) == ran("runs", compared / "runs", path.name)


def test_an_export_of_no_runs_is_refused_and_keeps_the_old_file(compared, tmp_path):
    file = tmp_path / "published.jsonl"
    ran("export", file, "--path", compared / "runs")
    before = file.read_bytes()
    assert "'nothing'" in refused(rlroute("export", file, "--path", compared / "runs", "--only", "nothing"))
    assert file.read_bytes() == before


def test_a_table_of_some_runs(compared):
    text = ran("table", compared / "runs", "--only", "hash", "dense", "--csv")
    found = {row["router"]: row for row in csv.DictReader(io.StringIO(text)) if row["router"]}
    assert set(found) == {"dense", "hash"}
    assert found["hash"]["n"] == "2"


def test_report_says_where_it_is(compared, tmp_path):
    page = tmp_path / "page.html"
    assert str(page) in ran("report", compared / "runs", "--out", page)
    assert page.stat().st_size > 10**6  # Plotly is inside


def test_routers_lists_every_router_with_its_paper():
    text = ran("routers")
    assert [part.split()[0] for part in text.split("\n\n")] == router_names()
    for part in text.split("\n\n"):
        assert "learns from: " in part
        assert "fields: " in part
    assert "arXiv 2202.01169" in text


def test_an_entry_may_say_none_where_it_is_a_word_among_choices():
    config = build_entry("reinforce:baseline=none", DataConfig(), ModelConfig(), TrainConfig())
    assert config.to_dict()["router"]["baseline"] == "none"


def test_routers_by_sites_are_trained_and_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = ("switch", "switch+hash@attention", "uniform")
    printed = ran("compare", *entries, *TINY, "--model.attention-experts", "2", "--seeds", "1", "--launcher", "local")
    assert "| switch+hash@attention |" in printed
    page = (tmp_path / "results" / "report.html").read_text()
    assert ">0.attention</option>" in page
    (run,) = (path.name for path in (tmp_path / "runs").glob("switch+hash-*"))
    assert ran("runs", "runs", run).startswith(run)


# --- options ------------------------------------------------------------


def test_every_bench_has_its_own_options():
    for what, options in {
        "envs": ("--shapes", "--contenders", "--tune", "--out"),
        "layer": ("--routings", "--tune", "--path"),
        "parallel": ("--device", "--contenders"),
        "sweep": ("--rounds", "--minutes"),
        "scale": ("--rounds", "--shapes"),
        "table": ("--rounds", "--device"),
    }.items():
        for option in options:
            done = rlroute("bench", what, option, "1,2,3,4,5")
            assert done.code == 2
            assert option in done.err
    assert "no run store or compact file at nothing" in refused(rlroute("bench", "scale", "--path", "nothing"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("compare", "--task", "clusters", "--launcher", "ray"), "--launcher ray does not apply to --task clusters"),
        (("compare", "--task", "clusters", "--workers", "7"), "--workers 7 does not apply to --task clusters"),
        (("compare", "--task", "clusters", "--wandb", "offline"), "--wandb offline does not apply"),
        (("compare", "--task", "clusters", "--no-tuned"), "--tuned False does not apply to --task clusters"),
        (("compare", "--task", "clusters", "--model.k", "1"), "--model.k 1 does not apply"),
        (("compare", "hash", "--launcher", "local", "--concurrency", "2"), "--concurrency 2 wants --launcher ray"),
        (("compare", "hash", "--budget", "time", "--seconds", "1", "--train.budget", "flops"), "want one of them"),
        (("train", "hash", "--concurrency", "2"), "--concurrency 2: train trains one run"),
        (("tune", "hash", "--train.lr", "0.1"), "train.lr = 0.1: each trial of the grid sets it"),
        (("compare", "switch+hash"), "'hash' names no sites"),
    ],
)
def test_options_that_do_not_apply_are_refused_by_name(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(rlroute(*command))
    assert not contents(tmp_path)


@pytest.mark.processes
def test_without_the_extra_cli_there_is_one_line(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ImportError('no tyro here')\n")
    done = start(tmp_path, "routers", path=f"{tmp_path}:{ROOT}")
    _, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (
        2,
        "error: the command line needs the package tyro: pip install 'tyro<2,>=1.0' 'rich<16,>=14' 'scipy<2,>=1.15'\n",
    )
