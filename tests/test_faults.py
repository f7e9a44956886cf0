"""What goes wrong costs one clear line and nothing that was there: bad input, broken records, full disks, kills,
diverging runs.

Longer than most: one list of everything that can go wrong, so that a reader sees what is covered.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlroute import records
from rlroute.errors import StoreError
from rlroute.experiments.launch import launcher
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.recipes.entries import build_entry
from rlroute.reading import failure, last_row
from rlroute.records import RunFolder
from rlroute.training import loop
from tests import ROOT
from tests.commands import COMPARE, TINY, cells, contents, ran, refused, rlroute, rows, stamps, start, table
from tests.conftest import HANG, until
from tests.distributions import install
from tests.mishaps import MISHAP
from tests.runs import figures, interrupted
from tests.test_table import eval_row
from tests.tiny import DATA, MODEL, STEPS
from tests.tiny import TRAIN as SETTINGS

TRAIN = ("train", "hash", *TINY, "--no-tuned")
CONFIG = build_entry("hash", DATA, MODEL, SETTINGS)
"""Of the run that `TRAIN` trains."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a comparison in it; nobody may change it."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        ran(*COMPARE)
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A working directory with finished runs in ``runs`` and a table and a report in ``results``."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of ``TRAIN`` that nothing disturbed."""
    store = tmp_path_factory.mktemp("undisturbed")
    ran(*TRAIN, "--store", store)
    (folder,) = store.iterdir()
    return folder


# --- bad input
# --------------------------------------------------------------------------------------------------------------------

CORPUS = "synth:documents=64,length=64"
BAD_INPUT = {
    "unknown router": (("train", "swich"), ("'swich'", "did you mean 'switch'", "legal are ", "noisy_topk")),
    "one unknown router of several": (("compare", "hash", "dens"), ("'dens'", "did you mean 'dense'")),
    "unknown field": (
        ("train", "switch:blance_weight=1"),
        ("'blance_weight'", "balance_weight, device_balance_weight"),
    ),
    "field without value": (("train", "switch:jitter"), ("'switch:jitter'", "FIELD=VALUE")),
    "value of another type": (("train", "switch:balance_weight=much"), ("'much'", "float")),
    "value out of range": (("train", "switch:jitter=2.0"), ("jitter = 2.0", "0 to below 1")),
    "value that is no choice": (("train", "hash:table=tall"), ("'tall'", "'random', 'balanced', 'position'")),
    "field of the dense model": (("train", "dense:k=1"), ("'dense:k=1'", "no fields")),
    "k above E": (("train", "hash", "--model.k", "5"), ("model.k = 5", "1 to model.num_experts = 4")),
    "k of 0": (("train", "hash", "--model.k", "0"), ("model.k = 0", "numbers from 1")),
    "width": (("train", "hash", "--model.d-model", "18"), ("model.d_model = 18", "multiple of", "= 4")),
    "micro-batches": (("train", "hash", "--train.micro-batches", "3"), ("micro_batches = 3", "batch_size = 4")),
    "unknown scheme": (("train", "hash", "--data.spec", "web:x"), ("'web:x'", "package:NAME, stdlib, synth:OPTIONS")),
    "no such package": (("train", "hash", "--data.spec", "package:nope"), ("'nope'", "any that is")),
    "no such file": (("train", "hash", "--data.spec", "file:nope/*.txt"), ("'nope/*.txt'", "at least one")),
    "no such shard": (("train", "hash", "--data.spec", "bin:nope/*,vocab=9,bytes_per_token=1"), ("'nope/*'",)),
    "one document": (("train", "hash", "--data.spec", "file:texts/long"), ("'file:texts/long'", "at least 2")),
    "too short to evaluate": (("train", "hash", "--data.eval-tokens", "9999"), (CORPUS, "eval_tokens = 9999", "260")),
    "too short to train": (("train", "hash", "--data.spec", "file:texts/*"), ("'file:texts/*'", "6 training", "17")),
    "compare checks all corpora": (("compare", "hash", "--data.spec", "web:x"), ("'web:x'", "file:GLOB")),
    "reference": (("compare", "hash", "--reference", "switch"), ("'switch'", "hash")),
    "time without seconds": (("compare", "hash", "--budget", "time"), ("--seconds None", "time needs it")),
    "seconds without time": (("compare", "hash", "--seconds", "9"), ("--seconds 9", "--budget tokens")),
    "tuned and a rate": (("compare", "hash", "--train.lr", "0.5"), ("train.lr = 0.5", "--no-tuned")),
    "grid": (("tune", "hsh"), ("'hsh'", "did you mean 'hash'")),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(case, here):
    (command, wanted) = BAD_INPUT[case]
    (here / "texts").mkdir()
    for name, text in zip(
        names_of_training_and_validation(), ("short", "a long text for validation " * 40), strict=True
    ):
        (here / "texts" / name).write_text(text)
    before = contents(here)
    said = refused(rlroute(command[0], *(() if command[0] == "tune" else TINY), *command[1:]))
    for part in wanted:
        assert part in said
    assert contents(here) == before


def names_of_training_and_validation() -> tuple[str, str]:
    """Return the names of two files, the second of which is held out for validation."""
    from rlroute.training.documents import Document, split_documents

    names = ("long", "brief")
    (train,), (valid,), _ = split_documents("file:", [Document(name, name.encode()) for name in names])
    return train.name, valid.name


def test_an_unknown_option_is_named_and_writes_nothing(here):
    before = contents(here)
    done = rlroute("train", "hash", *TINY, "--train.stpes", "9")
    assert done.code == 2
    assert "--train.stpes" in done.err
    assert "Traceback" not in done.err
    assert contents(here) == before


# --- stores that cannot be used
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        (*TRAIN, "--store", "a_file"),
        (*TRAIN, "--store", "a_file/store"),
        (*COMPARE, "--store", "a_file"),
        (*COMPARE, "--out", "a_file"),
        ("report", "runs", "--out", "a_file/report.html"),
        ("export", "a_file/compact.jsonl"),
        ("table", "a_file"),
        ("table", "no_store"),
        ("runs", "no_store"),
        ("report", "no_store"),
    ],
    ids=lambda command: " ".join((command[0], *command[-2:])),
)
def test_a_folder_that_cannot_be_used_is_named_and_nothing_is_lost(command, here):
    """Permission bits would stop everybody but root; a file in the place of a folder stops everybody."""
    (here / "a_file").write_text("precious\n")
    before = contents(here)
    said = refused(rlroute(*command))
    assert next(part for part in ("a_file", "no_store") if any(part in c for c in command)) in said
    assert contents(here).items() >= before.items()


def test_of_runs_that_are_not_comparable_the_most_make_the_table_and_the_others_are_named(here):
    before = ran("table", "--no-timings")
    ran(*TRAIN, "--train.steps", "16")
    (odd,) = (p.parent.name for p in here.glob("runs/*/config.json") if '"steps": 16,' in p.read_text())
    left_out = ("summary.budget.amount", str(STEPS * 64), str(16 * 64), odd)
    said = ran("table", "--no-timings")
    assert all(part in said for part in left_out)
    assert said.splitlines()[: before.count("\n|")] == before.splitlines()[: before.count("\n|")]
    for command in (("report",), ("export", "some.jsonl"), ("table", "--csv")):
        done = rlroute(*command)
        assert done.code == 0 and all(part in done.err for part in left_out)
    assert all(part in (here / "results" / "report.html").read_text() for part in left_out)
    assert odd not in (here / "some.jsonl").read_text()
    assert "| hash |" in ran(*COMPARE)  # which names its runs, whatever else lies there


def test_runs_that_are_named_and_not_comparable_are_refused_by_field_and_values(here):
    ran(*TRAIN, "--train.steps", "16")
    before = contents(here)
    for command in (("table",), ("report",)):
        said = refused(rlroute(*command, "--only", "hash"))
        for part in ("summary.budget.amount", str(STEPS * 64), str(16 * 64), "hash-"):
            assert part in said
    assert contents(here) == before


# --- records that are broken
# ------------------------------------------------------------------------------------------------------


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def last_line_missing(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:-1])


def torn(data: bytes) -> bytes:
    return data[:-10]


BROKEN = {
    "summary cut": ("summary.json", half),
    "summary empty": ("summary.json", lambda data: b""),
    "summary of another thing": ("summary.json", lambda data: b"[]"),
    "summary of another schema": ("summary.json", lambda data: data.replace(b'"schema": 2', b'"schema": 99')),
    "summary overwritten": ("summary.json", lambda data: b"\xff\x00" * 40),
    "config cut": ("config.json", half),
    "environment cut": ("environment.json", half),
    "metrics torn": ("metrics.jsonl", torn),
    "metrics cut in a line": ("metrics.jsonl", half),
    "metrics cut at a line": ("metrics.jsonl", last_line_missing),
    "metrics empty": ("metrics.jsonl", lambda data: b""),
    "metrics missing": ("metrics.jsonl", None),
    "metrics zeroed": ("metrics.jsonl", lambda data: half(data) + b"\0" * 100 + b"\n"),
    "metrics with a line of another thing": ("metrics.jsonl", lambda data: b"42\n" + data),
    "loads torn": ("loads.jsonl", torn),
    "loads cut at a line": ("loads.jsonl", last_line_missing),
    "loads empty": ("loads.jsonl", lambda data: b""),
    "loads missing": ("loads.jsonl", None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_truncated_record_is_named_and_left_as_it_is(case, here):
    name, damage = BROKEN[case]
    (folder,) = (here / "runs").glob("hash-*-s1")
    file = folder / name
    whole = file.read_bytes()
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(whole))
    before = contents(here)
    for command in (("table",), ("runs",), ("report",), ("export", "results/compact.jsonl")):
        assert folder.name in refused(rlroute(*command))
        assert contents(here) == before
    file.write_bytes(whole)
    ran("table")


def test_a_comparison_names_the_broken_record_of_an_ended_run(here):
    (file,) = (here / "runs").glob("hash-*-s1/summary.json")
    file.write_bytes(half(file.read_bytes()))
    before = contents(here)
    assert str(file.relative_to(here)) in refused(rlroute(*COMPARE))
    assert contents(here) == before


@pytest.mark.parametrize("damage", [half, torn, lambda data: b"not a record\n"])
def test_a_broken_compact_file_is_named(damage, here):
    ran("export", "compact.jsonl")
    file = here / "compact.jsonl"
    file.write_bytes(damage(file.read_bytes()))
    before = contents(here)
    assert "compact.jsonl" in refused(rlroute("table", file))
    assert contents(here) == before


def test_an_unfinished_run_with_a_broken_row_is_named(tmp_path):
    """A power cut leaves zeros where rows should be."""
    folder = interrupted(CONFIG, tmp_path, 6)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    before = contents(tmp_path)
    assert folder.name in refused(rlroute("runs", tmp_path))
    assert folder.name in refused(rlroute(*TRAIN, "--store", tmp_path))
    assert folder.name in noted(folder)
    assert contents(tmp_path) == before


def test_a_very_long_row_is_read_whole(tmp_path):
    """27 layers of 256 experts make rows of more than 64 kB."""
    row = eval_row("switch", 0, 12, 0.0) | {"load_LE": [[0.003906] * 256] * 40}
    (tmp_path / "metrics.jsonl").write_text("{}\n" + json.dumps(row) + "\n")
    assert last_row(tmp_path) == row


# --- checkpoints
# ------------------------------------------------------------------------------------------------------------------


def noted(folder: Path) -> str:
    """Return why a run was set aside, and forget it."""
    reason = failure(folder)
    (folder / "failed.json").unlink()
    assert reason
    return reason


@pytest.mark.parametrize("ended", [False, True])
def test_a_checkpoint_of_another_configuration_is_refused_by_name(ended, tmp_path):
    theirs = replace(CONFIG, train=replace(SETTINGS, lr=1e-3))
    mine, other = interrupted(CONFIG, tmp_path, 6), interrupted(theirs, tmp_path / "other", 6)
    if ended:
        ran(*TRAIN, "--train.lr", "0.001", "--store", tmp_path / "other")
    shutil.rmtree(mine / "checkpoint-00000004")
    (checkpoint,) = other.glob("checkpoint-*")
    shutil.copytree(checkpoint, mine / checkpoint.name)
    before = contents(tmp_path)
    said = refused(rlroute(*TRAIN, "--store", tmp_path))
    assert other.name in said
    assert said.count(mine.name) > 1  # the run that failed, and the owner that was wanted
    assert noted(mine) in said
    assert contents(tmp_path) == before


# --- a full disk
# ------------------------------------------------------------------------------------------------------------------


def nameless(folder: Path) -> dict[str, Any]:
    """Return a run's figures without its name: how often it writes checkpoints changes that and nothing else."""
    found = figures(folder)
    return found | {"summary": found["summary"] | {"id": "", "config_hash": ""}}


@contextlib.contextmanager
def full_disk(size: int):
    """No file of this process grows beyond so many bytes; what is written on top fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("first", ["config.json", "metrics.jsonl", "model.safetensors", "trainer.pt"])
def test_a_run_stopped_by_a_full_disk_goes_on_when_there_is_room(first, here, undisturbed):
    """``first`` is the file that does not fit any more."""
    size = {path.name: path.stat().st_size for path in undisturbed.rglob("*")}
    room = {
        "config.json": 600,
        "metrics.jsonl": size["metrics.jsonl"] * 9 // 10,
        "model.safetensors": size["model.safetensors"] - 1,
        "trainer.pt": size["model.safetensors"] + 100,
    }
    often = ("--train.checkpoint-every", str(STEPS)) if first == "metrics.jsonl" else ()
    before = contents(here)
    with full_disk(room[first]):
        said = refused(rlroute(*TRAIN, *often, "--store", "disk"))
    assert (first if first.endswith(("json", "jsonl")) else "checkpoint-") in said
    assert "cannot write" in said
    assert not [name for name in contents(here / "disk") if "tmp" in name or "summary" in name]
    assert contents(here).items() >= before.items()
    ran(*TRAIN, *often, "--store", "disk")
    (folder,) = (here / "disk").iterdir()
    assert nameless(folder) == nameless(undisturbed)
    assert [row["step"] for row in rows(folder, "train")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("room", [600, 10_000])
def test_a_full_disk_does_not_cost_the_checkpoint(room, tmp_path, undisturbed):
    """At 600 bytes the resumed run cannot even rewrite its metrics, at 10 000 not write its next checkpoint."""
    folder = interrupted(CONFIG, tmp_path, 6)
    kept = contents(folder / "checkpoint-00000004")
    logged = (folder / "metrics.jsonl").read_bytes()
    with full_disk(room):
        assert folder.name in refused(rlroute(*TRAIN, "--store", tmp_path))
    assert contents(folder / "checkpoint-00000004") == kept
    known = b"".join(logged.splitlines(keepends=True)[:5])  # four training rows and an evaluation
    assert (folder / "metrics.jsonl").read_bytes().startswith(known)
    ran(*TRAIN, "--store", tmp_path)
    assert figures(folder) == figures(undisturbed)


@pytest.mark.parametrize("every", ["4", "5"])
def test_a_full_disk_at_the_summary_costs_nothing_that_was_trained(every, tmp_path, undisturbed, monkeypatch):
    """The last checkpoint is there, at a step that may not be a multiple of ``checkpoint_every``; the summary is
    not.
    """
    command = (*TRAIN, "--train.checkpoint-every", every, "--store", tmp_path)

    def no_room(folder: RunFolder, summary: dict) -> None:
        raise StoreError(f"cannot write {folder.path / 'summary.json'}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", no_room)
        assert "summary.json" in refused(rlroute(*command))
    (folder,) = tmp_path.iterdir()
    before = (folder / "metrics.jsonl").read_bytes()
    ran(*command)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert nameless(folder) == nameless(undisturbed)


@pytest.mark.parametrize("command", [("report",), ("export", "results/compact.jsonl"), COMPARE], ids=lambda c: c[0])
def test_a_full_disk_keeps_the_old_table_report_and_export(command, here):
    ran("export", "results/compact.jsonl")
    before = contents(here)
    with full_disk(500):
        assert "cannot write results" in refused(rlroute(*command))
    assert contents(here) == before


# --- kill -9
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_killed_comparison_goes_on_where_it_stood(launcher, tmp_path, site):
    """A run has ended by then, and another one waits in its seventh step."""
    seeds = "2" if launcher == "ray" else "1"
    path = f"{ROOT}:{install(site, 'mishap', 'acme.mishap:MishapRouter', MISHAP)}"
    entries = ("hash", "mishap:fault=wait")
    how = ("--launcher", launcher, *(("--concurrency", "2") if launcher == "ray" else ()))
    command = ("compare", *entries, *TINY, "--seeds", seeds)
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    killed.mkdir()
    calm.mkdir()
    (killed / "harm-wait").touch()
    process = start(killed, *command, *how, path=path)
    try:
        until(lambda: in_the_middle(killed / "runs") or process.poll() is not None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    (killed / "harm-wait").unlink()
    done = [path.parent for path in (killed / "runs").glob("*/summary.json")]
    begun = [path for path in (killed / "runs").glob("*/checkpoint-*") if path.parent not in done]
    assert done
    assert begun
    before = {folder: (contents(folder), stamps(folder)) for folder in done}
    logged = {path.parent: (int(path.name[-8:]), rows(path.parent, "train")) for path in begun}
    process = start(killed, *command, *how, path=path)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    for folder, was in before.items():
        assert (contents(folder), stamps(folder)) == was
    for folder, (step, kept) in logged.items():
        assert 0 < step < STEPS
        assert rows(folder, "train")[:step] == kept[:step]  # their timings too: these steps were not trained again
    for folder in (killed / "runs").iterdir():
        assert [row["step"] for row in rows(folder, "train")] == list(range(1, STEPS + 1))
        assert [row["step"] for row in rows(folder, "eval")] == [4, 8, 12]
    process = start(calm, *command, "--launcher", "local", path=path)  # a process too: in this one audits are smaller
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert table(killed / "runs").encode() == table(calm / "runs").encode()


def in_the_middle(store: Path) -> bool:
    """Whether a run has ended and another one is beyond its checkpoint."""
    steps = [row["step"] for path in store.glob("mishap-*/checkpoint-*") if (row := last_row(path.parent))]
    return any(store.glob("*/summary.json")) and max(steps, default=0) > 5


# --- a loss that is not finite
# ------------------------------------------------------------------------------------------------------


def test_a_diverged_run_says_where_and_the_others_go_on(site, tmp_path, monkeypatch):
    install(site)
    monkeypatch.chdir(tmp_path)
    command = ("compare", "fragile:fault=gates,step=5,seed=1", "hash", *TINY, "--seeds", "2", "--launcher", "local")
    printed = ran(*command)
    (folder,) = (tmp_path / "runs").glob("fragile-*-s1")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["final"]) == ("diverged", None)
    assert summary["diverged"]["step"] == 5
    assert "loss is not finite" in summary["diverged"]["what"]
    assert [row["step"] for row in rows(folder, "train")] == [1, 2, 3, 4, 5]
    others = [path for path in (tmp_path / "runs").iterdir() if path != folder]
    assert len(others) == 3
    assert all(figures(path)["summary"]["steps"] == STEPS for path in others)
    (line,) = (line for line in printed.splitlines() if line.startswith("| fragile"))
    assert "1 of 2 diverged" in line
    assert "seed 1 at step 5 (the language-model loss is not finite)" in printed
    assert "diverged" in str([row for row in cells(ran("runs")) if row[0].startswith("fragile") and row[1] == "1"])
    before, when = contents(tmp_path / "runs"), stamps(tmp_path / "runs")
    assert ran(*command) == printed
    assert (contents(tmp_path / "runs"), stamps(tmp_path / "runs")) == (before, when)


def test_runs_that_diverge_before_their_first_row_have_a_table(site, tmp_path, monkeypatch):
    install(site)
    monkeypatch.chdir(tmp_path)
    entries = ("fragile:fault=gates,step=2", "hash")
    often = ("--train.log-every", STEPS, "--train.eval-every", STEPS, "--train.checkpoint-every", STEPS)
    printed = ran("compare", *entries, *TINY, *often, "--seeds", "2", "--launcher", "local")
    assert "seed 0 at step 2 (the language-model loss is not finite)" in printed
    for command in (("table",), ("runs",), ("report",), ("export", "compact.jsonl")):
        ran(*command)


def test_a_comparison_in_which_everything_diverges_still_has_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = ran(*COMPARE, "--no-tuned", "--train.lr", "1e30", "--train.warmup-steps", "0")
    table_rows = [line for line in printed.splitlines() if line.startswith(("| dense", "| hash", "| switch"))]
    assert len(table_rows) == 3
    assert all("2 of 2 diverged" in line for line in table_rows)
    for path in (tmp_path / "runs").glob("*/summary.json"):
        assert "not finite" in json.loads(path.read_text())["diverged"]["what"]


def test_a_validation_loss_that_is_not_finite_is_a_divergence(site, tmp_path):
    """Records hold JSON, which has no word for it."""
    install(site)
    ran("train", "fragile:fault=greedy", "--store", tmp_path / "runs", *TINY)
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "diverged"
    assert summary["diverged"]["step"] == 4  # the first evaluation
    assert "validation" in summary["diverged"]["what"]
    for path in folder.glob("*.json*"):
        assert "NaN" not in path.read_text()
        assert "Infinity" not in path.read_text()


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), MemoryError(), OSError("gone"), StoreError("full disk")]
)
def test_what_is_raised_would_come_again_and_is_not_tried_again(error, tmp_path, monkeypatch):
    raised = []

    def train(*arguments, **options):
        raised.append(error)
        raise error

    monkeypatch.setattr(loop, "train", train)
    job = Job(build_entry("hash", DATA, MODEL, SETTINGS), 0)
    reason = launcher.train_job(job, Launch(store=tmp_path, retries=2), print)
    assert len(raised) == 1 and str(error) in reason


def test_the_one_run_that_is_left_of_several_goes_through_ray_as_they_did(finished, monkeypatch):
    """In the driver it could hang for ever, or take the driver with it."""
    configs = [build_entry(entry, DATA, MODEL, SETTINGS) for entry in ("uniform", "unbalanced")]
    asked = []
    monkeypatch.setattr(launcher, "through_ray", lambda jobs, *rest: asked.extend(jobs) or {})
    jobs = [Job(config, 0) for config in configs]
    monkeypatch.setattr(records, "state", lambda folder: "finished" if folder.name == jobs[0].id else "empty")
    launcher.launch(jobs, Launch(store=finished / "runs"))
    assert asked == jobs[1:]
