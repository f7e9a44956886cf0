"""Sweeps under Ray survive what happens to them: each fault costs the run that it hits at most, and the same command
goes on.
"""

import contextlib
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from rlroute.experiments.bench import victims
from rlroute.reading import failure, read_runs
from tests import ROOT
from tests.commands import ran, start, table
from tests.conftest import HANG, until
from tests.distributions import install
from tests.mishaps import MISHAP, ended, spec_of, undisturbed
from tests.runs import figures

pytestmark = pytest.mark.processes

FAULTS = ("raise", "hang", "stop", "lost", "once")
PATIENCE = ("--patience", "0.2")
"""Hundreds of times what a step takes here; on the way to the first step it does not count."""


@pytest.mark.slow
def test_each_fault_costs_its_own_run_and_the_same_command_makes_good(tmp_path, marked, site):
    path = f"{ROOT}:{install(site, 'mishap', 'acme.mishap:MishapRouter', MISHAP)}"
    for fault in FAULTS:
        (tmp_path / f"harm-{fault}").touch()
    entries = ("hash", *(f"mishap:fault={fault}" for fault in FAULTS))
    command = ("sweep", spec_of(tmp_path, entries, 12, 4, seeds=1), "--retries", "1", *PATIENCE)
    process = start(tmp_path, *command, path=path)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 1, err
    assert "2 of 6 runs ended, 4 set aside" in out
    reasons = {}
    for folder in (tmp_path / "runs").glob("mishap-*"):
        if reason := failure(folder):
            reasons.setdefault(reason.partition(" (")[0].partition(" in ")[0], []).append(folder)
            assert f"set aside: {folder.name}: {reason}" in err
            assert not (folder / "summary.json").exists()
    assert {reason: len(folders) for reason, folders in reasons.items()} == {
        "ValueError: this router went wrong": 1,
        "no step": 2,
        "its process was lost 2 times": 1,
    }
    assert "time.sleep" not in err and "Traceback" not in err  # what happened, and no more
    where = sorted("mishap.py" in (folder / "hung-0.txt").read_text() for folder in reasons["no step"])
    assert where == [False, True]  # a process that is stopped writes no stacks
    until(lambda: not marked())
    for fault in FAULTS:
        (tmp_path / f"harm-{fault}").unlink(missing_ok=True)
    process = start(tmp_path, *command, path=path)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert "6 of 6 runs ended, 0 set aside" in out
    assert not list(tmp_path.glob("runs/*/failed.json")) and not list(tmp_path.glob("runs/*/hung-*"))
    assert ended_runs(tmp_path / "runs") == ended_runs(undisturbed(tmp_path))


def finished(process):
    process.communicate(timeout=HANG)
    return process.returncode == 0


def ended_runs(store):
    """Return the figures of each run, by its folder's name."""
    return {path.parent.name: figures(path.parent) for path in store.glob("*/summary.json")}


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_sweep_whose_driver_is_stopped_goes_on(blow, tmp_path, marked, site):
    """Two of its runs have ended by then, and the others wait in their seventh step."""
    path = f"{ROOT}:{install(site, 'mishap', 'acme.mishap:MishapRouter', MISHAP)}"
    command = ("sweep", spec_of(tmp_path, ("hash", "mishap:fault=wait"), 12, 4), "--concurrency", "2")
    store = tmp_path / "runs"
    (tmp_path / "harm-wait").touch()
    process = start(tmp_path, *command, path=path)
    begun = ("hash-*/summary.json", "mishap-*/checkpoint-*")
    until(lambda: all(len(list(store.glob(name))) == 2 for name in begun) or ended(process))
    process.send_signal(blow)
    _, err = process.communicate(timeout=HANG)
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on" in err and "Traceback" not in err
    until(lambda: not [pid for pid in marked() if victims.is_trial(pid)])  # Ray's own agents take a minute longer
    before = {path: path.stat().st_mtime_ns for path in store.glob("*/summary.json")}
    assert len(before) == 2, err
    (tmp_path / "harm-wait").unlink()
    process = start(tmp_path, *command, path=path)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert {path: path.stat().st_mtime_ns for path in before} == before  # no run twice
    assert not list(Path(tempfile.gettempdir()).glob(f"rlroute-{process.pid}-*"))
    assert table(store).encode() == table(undisturbed(tmp_path)).encode()
    with contextlib.chdir(tmp_path):
        assert "4 of 4 runs ended" in ran(*command)  # and with nothing to do Ray is not started


@pytest.mark.slow
def test_a_sweep_of_expert_parallel_groups_leaves_the_figures_of_single_processes(tmp_path, marked):
    more = "[resources]\nworkers = 2\nexpert_parallel = 2\ncpus = 0.5\n"
    spec = spec_of(tmp_path, ("switch",), 12, 4, f"{more}\n[grid]\ntrain.dtype = ['float64']\n")
    process = start(tmp_path, "sweep", spec)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert {run.environment["workers"] for run in read_runs(tmp_path / "runs")} == {2}
    calm = tmp_path / "calm"
    calm.mkdir()
    alone = ("--launcher", "local", "--workers", "1")
    (tmp_path / "alone.toml").write_text((tmp_path / spec).read_text().replace(more, ""))
    assert finished(start(calm, "sweep", tmp_path / "alone.toml", *alone))
    for a, b in zip(read_runs(tmp_path / "runs"), read_runs(calm / "runs"), strict=True):
        assert a.id == b.id and a.loads == b.loads
        assert a.config["asked"] == b.config["asked"] == {"entries": [a.id.rpartition("-s")[0]], "seeds": [0, 1]}
        assert abs(a.summary["final"]["loss"] - b.summary["final"]["loss"]) < 1e-10
    until(lambda: not marked())


@pytest.mark.slow
def test_a_group_of_workers_one_of_which_hangs_leaves_their_stacks_and_goes_on(tmp_path, marked):
    site = tmp_path / "site"
    site.mkdir()
    path = f"{ROOT}:{install(site, 'mishap', 'acme.mishap:MishapRouter', MISHAP)}"
    (tmp_path / "harm-hang").touch()
    more = "[resources]\nworkers = 2\nexpert_parallel = 2\ncpus = 0.5\n"
    spec = spec_of(tmp_path, ("mishap:fault=hang",), 12, 4, more)
    command = ("sweep", spec, "--retries", "0", *PATIENCE)
    process = start(tmp_path, *command, path=path)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 1 and err.count("workers were lost 1 times") == 2
    assert "mishap.py" in "".join(file.read_text() for file in tmp_path.glob("runs/*/hung-*.txt"))
    until(lambda: not marked())
    (tmp_path / "harm-hang").unlink()
    assert finished(start(tmp_path, *command, path=path))
    assert not list(tmp_path.glob("runs/*/hung-*"))


@pytest.mark.slow
def test_a_run_of_workers_stops_at_ctrl_c_and_goes_on(tmp_path, marked):
    command = ["train", "switch", "--workers", "2", "--expert-parallel", "2", "--cpus", "0.5", "--train.steps", "300"]
    command += ["--data.spec", "synth:documents=64,length=64", "--data.seq-len", "16", "--data.eval-tokens", "128"]
    command += ["--train.batch-size", "4", "--train.checkpoint-every", "20", "--train.eval-every", "300"]
    process = start(tmp_path, *command)
    until(lambda: any(tmp_path.glob("runs/*/checkpoint-*")) or ended(process))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert "the same command goes on" in err and "Traceback" not in err
    until(lambda: not marked())
    process = start(tmp_path, *command)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0 and "finished" in out, err
    (record,) = read_runs(tmp_path / "runs")
    assert record.environment["workers"] == 2 and record.config["config"]["train"]["micro_batches"] == 2


@pytest.mark.slow
def test_a_search_stops_trials_early_and_enters_no_table(tmp_path):
    more = "[grid]\ntrain.lr = [1e-2, 1e-3, 1e-4]\n\n[asha]\ngrace = 10\nreduction = 3\n"
    process = start(tmp_path, "sweep", spec_of(tmp_path, ("hash",), 40, 10, more))
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    store = tmp_path / "runs" / "search-sweep"
    assert out.count("hash lr=") == 6 and "| 40 |" in out
    assert len(list(store.glob("*/config.json"))) == 6 > len(list(store.glob("*/summary.json")))
    rows = {path: path.read_bytes() for path in store.glob("*/metrics.jsonl")}
    again = start(tmp_path, "sweep", "sweep.toml")
    assert again.communicate(timeout=HANG)[0] == out  # what it stopped stays stopped
    assert {path: path.read_bytes() for path in store.glob("*/metrics.jsonl")} == rows
    process = start(tmp_path, "table", store)
    assert "trials of a search" in process.communicate(timeout=HANG)[1]
    assert process.returncode == 2


@pytest.mark.slow
def test_a_run_that_takes_all_memory_is_set_aside_and_the_others_go_on(tmp_path, marked, monkeypatch):
    """Ray's monitor ends it once the machine has 2 GiB less than now."""
    there = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(there[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    if free < 8:
        pytest.skip("wants 8 GiB of free memory")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{1 - (free - 2) / total:.3f}")
    site = tmp_path / "site"
    site.mkdir()
    path = f"{ROOT}:{install(site, 'mishap', 'acme.mishap:MishapRouter', MISHAP)}"
    (tmp_path / "harm-memory").touch()
    spec = spec_of(tmp_path, ("mishap:fault=memory", "hash"), 12, 4)
    process = start(tmp_path, "sweep", spec, "--retries", "1", "--concurrency", "1", path=path)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 1, err
    assert "2 of 4 runs ended, 2 set aside" in out, err
    assert err.count("its process was lost 2 times, for want of memory") == 2 and "Traceback" not in err
    until(lambda: not marked())


@pytest.fixture
def mount(tmp_path):
    """Return a function that mounts something on the store's folder; what it mounted is taken off, at the end if not
    before.
    """
    store = tmp_path / "runs"
    store.mkdir()

    def do(*arguments):
        if subprocess.run(["mount", *arguments, store], capture_output=True, check=False).returncode:
            pytest.skip("wants the right to mount")

    do.undo = lambda: subprocess.run(["umount", "-l", store], capture_output=True, check=False)
    yield do
    do.undo()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["No space left on device", "Read-only file system"])
def test_a_store_that_cannot_be_written_sets_runs_aside_and_costs_nothing(fault, tmp_path, marked, mount):
    store = tmp_path / "runs"
    command = ("sweep", spec_of(tmp_path, ("hash", "switch"), 200, 50))
    if fault.startswith("No space"):
        mount("-t", "tmpfs", "-o", "size=8m", "tmpfs")
    process = start(tmp_path, *command)
    until(lambda: any(store.glob("*/checkpoint-*")) or ended(process))
    if fault.startswith("No space"):
        with contextlib.suppress(OSError), (store / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(2**12))
    else:
        mount("--bind", store)
        mount("-o", "remount,bind,ro")
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 1, err
    assert "set aside" in err and fault in err and "Traceback" not in err
    until(lambda: not marked())
    (store / "filler").unlink() if fault.startswith("No space") else mount.undo()
    process = start(tmp_path, *command)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert "4 of 4 runs ended, 0 set aside" in out
    assert ended_runs(store) == ended_runs(undisturbed(tmp_path))
