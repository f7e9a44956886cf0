"""The command line, in tiny runs: what it trains, what it leaves alone, and that the same command prints the same
table.

Longer than most: every command has its turn.
"""

import contextlib
import csv
import fcntl
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.experiments.cli.main import commands
from rlroute.experiments.cli.parsing import name_of
from rlroute.experiments.comparison import tune
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.recipes.grid import Axis, Grid
from rlroute.experiments.recipes.tuned import TUNING_SEEDS
from rlroute.experiments.report.runs import find, short_ids
from rlroute.registry import router_names
from tests import ROOT
from tests.commands import (
    COMPARE,
    ENTRIES,
    TINY,
    cells,
    contents,
    ran,
    refused,
    rlroute,
    rows,
    stamps,
    start,
    table,
)
from tests.conftest import HANG
from tests.policies import weights_of, write_policy
from tests.tiny import STEPS


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
    [("--no-tuned", "--train.lr", "0.001"), ("--model.k", "1"), ("--data.seq-len", "8"), ("--seed", "1")],
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
    pairs = list(csv.DictReader((compared / "results" / "verdicts.csv").read_text().splitlines()))
    assert {(row["entry"], row["against"]) for row in pairs} == set(itertools.permutations(ENTRIES, 2))
    listed = csv.DictReader((compared / "results" / "table.csv").read_text().splitlines())
    assert {row["router"] for row in listed} == set(ENTRIES)
    assert (compared / "results" / "report.html").read_text().lower().startswith("<!doctype html>")
    assert sorted(p.name for p in (compared / "results").iterdir()) == [
        *("report.html", "table.csv", "table.md", "verdicts.csv")
    ]


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


@pytest.mark.slow
@pytest.mark.processes
def test_ray_gives_the_same_table_as_one_process(tmp_path):
    """A path in an entry is relative to where the command was typed, in Ray's workers too."""
    write_policy(tmp_path / "p.zip", weights_of(16, 4))
    tables = []
    for how in (("ray", "--concurrency", "2"), ("local",)):  # a process too: in this one audits are smaller
        store = tmp_path / how[0]
        process = start(tmp_path, COMPARE[0], "sb3:policy=p.zip", *COMPARE[1:], "--store", store, "--launcher", *how)
        out, err = process.communicate(timeout=HANG)
        assert process.returncode == 0, err
        assert "results/report.html" in out
        assert len(list(store.glob("sb3-*/summary.json"))) == 2
        tables.append(table(store).encode())
    assert tables[0] == tables[1]


def test_without_ray_compare_names_the_extra_and_the_other_launcher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the launcher writes Ray's settings there
    said = refused(rlroute(*COMPARE, "--launcher", "ray"))
    assert "package ray" in said and "--launcher local" in said


def test_drops_and_attention_experts_stand_beside_the_dense_model(tmp_path):
    """Training may run more or fewer pairs than evaluation, and the dense model's attention has no experts."""
    sized = (*TINY, "--model.capacity-factor", 1.0, "--model.attention-experts", 3)
    with contextlib.chdir(tmp_path):
        table = ran(
            "compare", *ENTRIES, "switch+hash@attention", *sized, "--seeds", 1, "--no-tuned", "--launcher", "local"
        )
    entries = {row.split(" |")[0].partition(",")[0] for row in table.split("\n| ")}  # marked: a capacity is not causal
    assert entries >= {"dense", "hash", "switch", "switch+hash@attention"}
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/summary.json")]
    assert len({summary["fingerprint"]["backbone"] for summary in summaries}) == 1


# --- what is stored ------------------------------------------------------------


def test_runs_lists_every_run_ended_or_not(compared, tmp_path):
    """And each goes by the short id that is listed."""
    listed = cells(ran("runs", compared / "runs"))
    assert [row[:4] for row in listed] == [
        [entry, str(seed), "finished", f"{STEPS} of {STEPS}"] for entry in ENTRIES for seed in (0, 1)
    ]
    for label, seed, *_, short in listed:
        run = ran("runs", compared / "runs", short).splitlines()[0]
        assert run.startswith(f"{label}-") and run.endswith(f"-s{seed}") and len(short) < len(run)
    ran("train", "hash", "--store", tmp_path, *TINY)
    (folder,) = tmp_path.iterdir()
    (folder / "summary.json").unlink()
    assert [row[:4] for row in cells(ran("runs", tmp_path))] == [["hash", "0", "interrupted", f"{STEPS} of {STEPS}"]]


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
    assert str(file) in ran("export", file, "--store", compared / "runs")
    assert len(file.read_text().splitlines()) == 6
    for options in ((), ("--csv",), ("--no-timings",), ("--reference", "hash")):
        assert ran("table", file, *options) == ran("table", compared / "runs", *options)
    assert ran("runs", file) == ran("runs", compared / "runs")
    for path in (compared / "runs").iterdir():
        assert ran("runs", file, path.name) == ran("runs", compared / "runs", path.name)


def test_an_export_of_no_runs_is_refused_and_keeps_the_old_file(compared, tmp_path):
    file = tmp_path / "published.jsonl"
    ran("export", file, "--store", compared / "runs")
    before = file.read_bytes()
    assert "'nothing'" in refused(rlroute("export", file, "--store", compared / "runs", "--only", "nothing"))
    said = refused(rlroute("export", file, "--store", compared / "runs", "--only", "hash", "nothing", "neither"))
    assert "'nothing' or 'neither'" in said and "hash" not in said.rpartition("starts with")[2]
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
    *parts, refused = text.split("\n\n")
    assert [part.split()[0] for part in parts] == router_names()
    assert refused.startswith("Refused: ")
    assert all(f"    {name}, " in refused for name in ("Soft MoE", "SMEAR", "Lory"))
    for part in parts:
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
        "layer": ("--routings", "--tune", "--store", "--path"),
        "step": ("--shapes", "--device", "--tune"),
        "parallel": ("--device", "--contenders"),
        "sweep": ("--rounds", "--minutes"),
        "scale": ("--rounds", "--shapes"),
        "table": ("--rounds", "--device"),
    }.items():
        said = refused(rlroute("bench", what, *(word for option in options for word in (option, "1,2,3,4,5"))))
        assert all(f"{option} (applied to rlroute bench {what})" in said for option in options)
    assert "no run store or compact file at nothing" in refused(rlroute("bench", "scale", "--store", "nothing"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("compare", "--task", "clusters", "--launcher", "ray"), "--launcher ray does not apply to --task clusters"),
        (("compare", "--task", "clusters", "--workers", "7"), "--workers 7 does not apply to --task clusters"),
        (("compare", "--task", "clusters", "--wandb", "offline"), "--wandb offline does not apply"),
        (("compare", "--task", "clusters", "--no-tuned"), "--tuned False does not apply to --task clusters"),
        (("compare", "--task", "clusters", "--model.k", "1"), "--model.k 1 does not apply"),
        (("compare", "hash", "--launcher", "local", "--concurrency", "2"), "--concurrency 2 wants --launcher ray"),
        (("train", "hash", "--launcher", "local", "--retries", "5"), "--retries 5 wants --launcher ray"),
        (("compare", "hash", "--budget", "time", "--seconds", "1", "--train.budget", "flops"), "want one of them"),
        (("train", "hash", "--concurrency", "2"), "--concurrency 2: train trains one run"),
        (("train", "hash", "--gpus", "1"), "--gpus 1.0 wants --launcher ray"),
        (("train", "hash", "--retries", "5"), "--retries 5 wants --launcher ray"),
        (("upcycle", "run", "--patience", "3"), "--patience 3.0 wants --launcher ray"),
        (("plan", "--preset", "gpu-30m", "--tuned"), "--tuned does not apply to a preset"),
        (("table", "--seed", "5"), "--seed 5 wants --rerun N"),
        (("table", "page.md", "--check", "--seed", "5"), "--seed 5 wants --rerun N"),
        (("verify", "--seed", "5"), "--seed 5 wants --rerun N"),
        (("play", "TokenBandit-v0", "uniform", "--updates", "9"), "--updates 9 does not apply"),
        (("tune", "hash", "--train.lr", "0.1"), "train.lr = 0.1: each trial of the grid of hash sets it"),
        (("tune", "dense", f"--train.lr={TrainConfig().lr}"), "each trial of the grid of dense sets it"),
        (("tune", "hash", "switch", "--train.router-lr-scale", "3"), "train.router_lr_scale = 3.0: each trial of the"),
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


# --- one recipe, one store


def test_train_trains_the_run_that_compare_has(compared, tmp_path):
    for entry, tuned in (("switch", ()), ("hash", ()), ("switch", ("--no-tuned",))):
        ran("train", entry, "--seed", "1", *tuned, "--store", tmp_path, *TINY)
    trained, there = ({path.name for path in store.iterdir()} for store in (tmp_path, compared / "runs"))
    assert len(trained) == 3 and len(trained & there) == 2
    (odd,) = trained - there
    assert json.loads((tmp_path / odd / "config.json").read_text())["config"]["train"]["lr"] == TrainConfig().lr


@pytest.mark.parametrize("command", [("train",), ("compare",)])
@pytest.mark.parametrize("rate", [0.001, TrainConfig().lr])
def test_a_rate_of_ones_own_is_refused_beside_a_tuned_one(command, rate, tmp_path, monkeypatch):
    """Also where it is the default: it was asked for, and would not be what is trained."""
    monkeypatch.chdir(tmp_path)
    said = refused(rlroute(*command, "hash", *TINY, f"--train.lr={rate}"))
    assert f"train.lr = {rate}" in said and "for hash" in said and "--no-tuned" in said
    assert not contents(tmp_path)
    if command == ("train",):
        ran("train", "credit", *TINY, f"--train.lr={rate}", "--train.steps", "1")  # never tuned: nothing to overwrite


def test_trials_have_a_store_of_their_own_whose_table_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = Grid({"train": {"lr": 0.004}}, (Axis(("train.lr",), (0.004, 0.008)),))
    monkeypatch.setattr(tune, "GRID", {"hash": grid})
    monkeypatch.setattr(tune, "DataConfig", lambda: DataConfig(spec="synth:documents=64", seq_len=16, eval_tokens=128))
    monkeypatch.setattr(tune, "ModelConfig", lambda: ModelConfig(num_layers=1, d_model=16, num_heads=2, d_expert=8))
    assert "in tuning/" in ran("tune", "hash", "--train.steps", "2", "--launcher", "local")
    assert not (tmp_path / "runs").exists() and len(list((tmp_path / "tuning").iterdir())) == 2 * len(TUNING_SEEDS)
    assert "trials of rlroute tune" in ran("table", "tuning")
    assert {row[0] for row in cells(ran("runs", "tuning"))} == {"hash (train.lr=0.004)", "hash (train.lr=0.008)"}


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("tune", "hash"), "--out"),
        (("export",), None),
        (("export-tokens", "hash"), None),
        (("export-clusters", "hash"), None),
        (("report",), "--out"),
        (("inspect", "hash"), "--out"),
        (("trace", "hash"), "--out"),
        (("bench", "sweep"), "--out"),
        (("bench", "scale"), "--out"),
        (("bench", "kernels", "--shapes", "8,8,8,2,1"), "--out"),
    ],
    ids=lambda words: "-".join(words[:2]) if isinstance(words, tuple) else "",
)
def test_what_is_no_file_does_not_give_way_to_one_and_is_refused_before_any_work(words, option, tmp_path, monkeypatch):
    """A folder, or a pipe, which a device would fare like."""
    monkeypatch.chdir(tmp_path)
    ends = (".npy", ".npz", ".json")
    for end in ends:
        Path(f"there{end}").mkdir()
        os.mkfifo(f"pipe{end}")
        Path(f"link{end}").symlink_to(f"pipe{end}")
    names = [".", *(kind + end for end in ends for kind in ("there", "pipe", "link"))]
    for name in names:
        assert name in refused(rlroute(*words, *filter(None, (option, name))))
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {"."}
    assert all(Path(f"pipe{end}").is_fifo() and Path(f"link{end}").is_symlink() for end in ends)


def test_every_command_calls_the_store_store():
    for command in ("runs", "table", "report"):
        said = ran(command, "--help")
        assert "STORE" in said and "--store" not in said
    for command in ("train", "compare", "sweep", "tune", "export", "export-tokens", "export-clusters"):
        assert "--store" in ran(command, "--help")
    assert "--store" in ran("bench", "scale", "--help")
    everything = "".join(ran(command, "--help") for command in COMMANDS)
    assert "--path" not in everything


# --- the runs of a store


def test_runs_says_what_has_become_of_each(compared, tmp_path):
    store = tmp_path / "runs"
    shutil.copytree(compared / "runs", store)
    folders = {name: next(store.glob(f"{name}-*-s0")) for name in ENTRIES}
    for folder in folders.values():
        (folder / "summary.json").unlink()
    (folders["switch"] / "failed.json").write_text('{"id": "switch", "reason": "ValueError: went wrong"}')
    (folders["hash"] / "stopped").touch()
    (store / "noisy_topk-0123456789ab-s4").mkdir()
    (store / "noisy_topk-0123456789ab-s4" / ".lock").touch()
    (store / "no-run-at-all").mkdir()
    with (folders["dense"] / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = ran("runs", store)
    states = {(row[0], row[1]): row[2] for row in cells(said)}
    unfinished = {"switch": "set aside", "hash": "stopped early", "dense": "running"}
    assert states == {(name, "0"): now for name, now in unfinished.items()} | {
        (name, "1"): "finished" for name in ENTRIES
    } | {("noisy_topk", "4"): "not begun"}
    assert f"{folders['switch'].name} was set aside: ValueError: went wrong" in said
    last = json.loads((folders["switch"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['bits_per_byte']:.4f}" in said  # so far
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d|–", row[5]) for row in cells(said))


def test_runs_has_alarms_that_stand_and_the_sentences_of_what_runs(compared, tmp_path):
    store = tmp_path / "runs"
    shutil.copytree(compared / "runs", store)
    assert "alarm" not in ran("runs", store)
    folders = [next(store.glob(f"switch-*-s{seed}")) for seed in (0, 1)]
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "summary.json").unlink()
        bad = [row | {"dead_L": [3] * len(row["dead_L"])} if row["kind"] == "eval" else row for row in rows]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    with (folders[0] / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = ran("runs", store)
    assert [(row[2], row[6]) for row in cells(said) if row[0] == "switch"] == [
        ("running", "dead experts"),
        ("interrupted", "dead experts"),
    ]
    sentences = [line for line in said.splitlines() if line.startswith("alarm: ")]
    assert sentences and all(line.startswith(f"alarm: {folders[0].name}, site ") for line in sentences)
    assert f"alarm: {folders[1].name}, site 0: 3 of 4 experts are dead" in ran("runs", store, folders[1].name)


def test_an_unfinished_run_can_be_inspected(compared, tmp_path):
    store = tmp_path / "runs"
    shutil.copytree(compared / "runs", store)
    folder = next(store.glob("switch-*-s0"))
    (folder / "summary.json").unlink()
    (folder / "failed.json").write_text('{"id": "switch", "reason": "ValueError: went wrong"}')
    said = ran("runs", store, folder.name)
    assert "set aside: ValueError: went wrong" in said and '"balance_weight": 0.03' in said and '"torch"' in said
    assert "last row: {" in said and "failed.json, loads.jsonl" in said
    assert all(f"{row['bits_per_byte']:.4f}" in said for row in rows(folder, "eval"))


def test_runs_that_differ_in_a_field_are_told_apart_by_it(tmp_path):
    for rate in (0.001, 0.002):
        ran("train", "credit", *TINY, "--train.lr", rate, "--train.steps", "1", "--store", tmp_path)
    ran("train", "dense", *TINY, "--train.steps", "1", "--store", tmp_path)
    labels = [row[0] for row in cells(ran("runs", tmp_path))]
    assert labels == ["credit (train.lr=0.001)", "credit (train.lr=0.002)", "dense"]


def test_short_ids_tell_runs_apart():
    ids = ["a-0123456789ab-s0", "b-0123f56789ab-s0", "c-d-ffff456789ab-s10", "c-d-ffff456789ab-s1"]
    short = short_ids(ids)
    assert short == dict(zip(ids, ("01234-s0", "0123f-s0", "ffff4-s10", "ffff4-s1"), strict=True))
    for run, word in short.items():
        assert find(ids, word) == find(ids, run) == [run]
        assert run in find(ids, run.rpartition("-")[0]) and run in find(ids, run.rpartition("-")[0] + "-s")
    assert find(ids, "c-d-ffff456789ab-s") == ids[2:] and find(ids, "-s0") == []
    assert find(ids[:3], ids[3]) == [], "the run of seed 1 has not ended, that of seed 10 is another"
    assert find(["some", "something"], "some") == ["some"]


def test_when_a_run_was_begun_and_ended_is_recorded(compared):
    for folder in (compared / "runs").iterdir():
        begun = json.loads((folder / "environment.json").read_text())["begun"]
        summary = json.loads((folder / "summary.json").read_text())
        assert datetime.fromisoformat(begun) <= datetime.fromisoformat(summary["ended"])
        assert datetime.fromisoformat(begun).utcoffset() == timedelta(0)
        assert summary["peak_memory"] is None  # of a GPU


# --- the words of the command line

COMMANDS = tuple(map(name_of, commands()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "unknown command 'trian': did you mean 'train'?"),
        (("export_token", "x"), "unknown command 'export_token': did you mean 'export-tokens'?"),
        (("qqq",), f"unknown command 'qqq': legal are {', '.join(COMMANDS)}"),
        (("train", "hash", "--sed", "3"), "unknown option '--sed': did you mean '--seed'?"),
        (("train", "hash", "--train.stpes=3"), "unknown option '--train.stpes=3': did you mean '--train.steps'?"),
        (
            ("plan", "switch", "--device", "h999"),
            "'h999' for argument '--device'. Legal are a100, b200, cpu, h100, h200.",
        ),
        (("compare", "--store", "x", "--tunde"), "unknown option '--tunde': did you mean '--tuned'?"),
        (("bench", "layer", "--contender", "x"), "unknown option '--contender': did you mean '--contenders'?"),
        (("bench", "kernls"), "unexpected 'kernls': did you mean 'kernels'?"),
        (("table", "--qqq"), "unknown option '--qqq': rlroute table --help lists what there is"),
        (("train", "hash", "--seed", "x"), "--seed"),
        (("train", "hash", "--launcher", "x"), "Legal are auto, local, ray."),
        (("train",), "rlroute train wants an ENTRY: a router"),
        (("--tyro-print-completion", "csh"), "csh"),
        (("table", os.fsdecode(b"r\xffns")), "b'r\\xffns' is not UTF-8"),
        (("train", "hash", "--store", os.fsdecode(b"\xff")), "b'\\xff' is not UTF-8"),
        (("compare", "--data.spec", os.fsdecode(b"file:\xff/*")), "is not UTF-8"),
    ],
)
def test_words_that_are_none_are_refused_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(rlroute(*words))
    assert not contents(tmp_path)


def test_help_version_and_completion():
    alone, asked = ran(), ran("--help")
    assert alone == asked and all(command in asked for command in COMMANDS)
    assert re.fullmatch(r"rlroute \d\S+ \(commit ([0-9a-f]{40}|unknown).*\)\n", ran("--version"))
    for shell in ("bash", "zsh", "fish"):
        script = ran("--tyro-print-completion", shell)
        assert all(command in script for command in COMMANDS) and "balance_scope" in script.replace("-", "_")


def test_what_the_report_shows_of_other_commands_is_read_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/claims.jsonl").write_text("none\n")
    assert "claims.jsonl" in refused(rlroute(*COMPARE))
    assert not Path("runs").exists()


def test_the_page_of_commands_names_each():
    page = (ROOT / "docs" / "commands.md").read_text()
    assert not [command for command in COMMANDS if f"`rlroute {command}" not in page]


@pytest.mark.parametrize("columns", ["0", "1", "5", "39", "100000000", "x"])
def test_any_width_ends(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert "--help" in ran("train", "--help")


# --- where the output goes


def test_a_terminal_gets_tables_that_do_not_wrap(compared, monkeypatch):
    for width in (40, 80, 140):
        monkeypatch.setenv("COLUMNS", str(width))
        for command in (("table",), ("runs",)):
            done = rlroute(*command, compared / "runs", terminal=True)
            out = re.sub(r"\x1b\[[\d;]*m", "", done.out)
            assert done.code == 0 and "|" not in out and "**" not in out
            lines = [line for line in out.partition("\nColumns: ")[0].splitlines() if line.startswith(ENTRIES)]
            assert len(lines) == (3 if command == ("table",) else 6)
            assert all(len(line) <= width for line in out.splitlines())
    assert "begun (UTC)" in out
    assert rlroute("table", compared / "runs", "--csv", terminal=True).out == ran("table", compared / "runs", "--csv")


@pytest.mark.processes
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_output_that_cannot_be_written_ends_cleanly(compared, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)

    def of(stdout, *words):
        process = start(compared, *words, stdout=stdout)
        return process, *process.communicate(timeout=HANG)

    with open("/dev/full", "w") as full:
        process, _, err = of(full, "table", "--no-timings")
    assert (process.returncode, err) == (1, "error: cannot write the output: No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    process, _, err = of(writing, "runs")
    os.close(writing)
    assert (process.returncode, err) == (141, "")


@pytest.mark.processes
@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(e, marks=pytest.mark.slow) for e in ("latin-1", "cp1252"))]
)
def test_what_an_encoding_lacks_is_replaced(compared, encoding, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    process = start(compared, "table", "--no-timings")
    out, err = process.communicate(timeout=HANG)
    assert (process.returncode, err) == (0, "")
    assert out.count("\n| ") == ran("table", compared / "runs").count("\n| ")


@pytest.mark.slow
@pytest.mark.processes
def test_without_docstrings_routers_have_their_papers(compared):
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "rlroute", "routers"], capture_output=True, text=True, cwd=ROOT, timeout=HANG
    )
    assert done.stdout == ran("routers")


@pytest.mark.parametrize(
    "command",
    [
        ("compare", "nonsense"),
        ("compare", "--task", "clusters", "nonsense", "--out", "a/b/c"),
        ("gradients", "nonsense"),
        ("export", "a/b.jsonl", "--store", "none"),
    ],
    ids=" ".join,
)
def test_a_command_that_is_refused_leaves_no_folder(command, tmp_path, monkeypatch):
    """Neither those that it made, however deep; what was there before stays, be it empty."""
    monkeypatch.chdir(tmp_path)
    refused(rlroute(*command))
    assert not contents(Path())
    Path("results").mkdir()
    refused(rlroute(*command))
    assert Path("results").is_dir()
