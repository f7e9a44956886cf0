"""One run's trouble is its own: whatever a router does, and whoever else trains the same run."""

import os
import signal
from itertools import product
from types import SimpleNamespace

import pytest

from rlroute.config import TrainConfig
from rlroute.errors import HeldError
from rlroute.experiments.bench import victims
from rlroute.experiments.launch import trials
from rlroute.experiments.launch.jobs import Job, Launch, Search
from rlroute.experiments.launch.launcher import train_job
from rlroute.experiments.recipes.entries import build_entry
from rlroute.reading import failure
from rlroute.records import RunFolder, state
from rlroute.training import loop
from tests import ROOT
from tests.commands import TINY, refused, rlroute, start
from tests.conftest import HANG, until
from tests.distributions import install
from tests.mishaps import MISHAP, spec_of
from tests.tiny import DATA, MODEL

WILD = '''
"""Does what no router should, where it is told to.

Nobody et al. 2026 (no paper).
"""


from dataclasses import dataclass

from rlroute.baselines.uniform import UniformRouter
from rlroute.config import RouterConfig


class Wild(BaseException):
    pass


FAULTS = {"raise": ValueError, "exit": SystemExit, "wild": Wild, "stop": GeneratorExit, "io": FileNotFoundError}


class WildRouter(UniformRouter):
    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        fault: str = "raise"
        where: str = "forward"

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.config = config
        self.go_wrong("init")

    def go_wrong(self, where):
        if self.config.where == where:
            raise FAULTS[self.config.fault]("this router went wrong")

    def forward(self, x_TD, context):
        self.go_wrong("forward")
        return super().forward(x_TD, context)

    def observe(self, decision, feedback):
        self.go_wrong("observe")
        return super().observe(decision, feedback)

    def adapt(self, sums, progress):
        self.go_wrong("adapt")
'''


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        pytest.param(*case, marks=[] if "raise" in case or "forward" in case else pytest.mark.slow)
        for case in product(["raise", "exit", "wild", "stop", "io"], ["init", "forward", "observe", "adapt"])
    ],
)
def test_a_router_that_goes_wrong_in_any_way_costs_its_own_runs(fault, where, site, tmp_path, monkeypatch):
    install(site, "wild", "acme.wild:WildRouter", WILD)
    monkeypatch.chdir(tmp_path)
    entries = (f"wild:fault={fault},where={where}", "hash")
    said = refused(rlroute("compare", *entries, *TINY, "--seeds", "1", "--launcher", "local", "--retries", "0"))
    assert "1 of 2 runs failed, the others are kept in runs" in said and "this router went wrong" in said
    (wild,), (other,) = ((tmp_path / "runs").glob(f"{name}-*") for name in ("wild", "hash"))
    assert "this router went wrong" in failure(wild)
    assert state(other) == "finished"


def test_ctrl_c_in_a_run_is_for_all_of_them(monkeypatch, tmp_path):
    def stop(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        train_job(Job(build_entry("hash", DATA, MODEL, TrainConfig()), 0), Launch(store=tmp_path), print)


def test_a_run_that_a_third_process_takes_first_is_waited_for_again(monkeypatch, tmp_path):
    tries = []

    def train(*given, **options):
        tries.append(1)
        if len(tries) < 9:  # more often than a run is tried
            raise HeldError("taken")

    monkeypatch.setattr(loop, "train", train)
    job = Job(build_entry("hash", DATA, MODEL, TrainConfig()), 0)
    assert train_job(job, Launch(store=tmp_path, retries=1), print) == "" and len(tries) == 9


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_second_command_on_a_run_waits_says_so_and_marks_nothing(launcher, site, tmp_path):
    path = f"{ROOT}:{install(site, 'mishap', 'acme.mishap:MishapRouter', MISHAP)}"
    harm = tmp_path / "harm-wait"
    harm.touch()
    command = ("compare", "mishap:fault=wait", "hash", *TINY, "--seeds", "1", "--launcher")
    first = start(tmp_path, *command, "local", path=path)
    (run,) = until(lambda: list(tmp_path.glob("runs/mishap-*/checkpoint-*")) or first.poll())
    second = start(tmp_path, *command, launcher, "--out", "others", path=path)
    waits = f"run {run.parent.name} is being trained by process {first.pid}: waiting for it"
    said = until(lambda: next((line for line in second.stderr if waits in line), None))
    assert said.strip() == waits
    assert state(run.parent) == "running" and not (run.parent / "failed.json").exists()
    harm.unlink()
    ends = [process.communicate(timeout=HANG) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], ends
    assert (tmp_path / "results/table.csv").read_bytes() == (tmp_path / "others/table.csv").read_bytes()
    assert not list(tmp_path.glob("runs/*/failed.json"))
    assert "Traceback" not in ends[1][1]


@pytest.mark.slow
@pytest.mark.processes
def test_comparisons_side_by_side_on_one_store_end_with_one_table(tmp_path):
    command = ("compare", "hash", "switch", *TINY, "--seeds", "3", "--launcher", "local", "--train.steps", "100")
    several = [start(tmp_path, *command, "--out", f"out-{n}") for n in range(3)]
    for process in several:
        _, err = process.communicate(timeout=HANG)
        assert process.returncode == 0, err
    tables = {path.read_bytes() for path in tmp_path.glob("out-*/table.csv")}
    assert len(tables) == 1 and len(list(tmp_path.glob("out-*/table.csv"))) == 3
    assert not list(tmp_path.glob("runs/*/failed.json"))


@pytest.mark.processes
def test_a_command_that_trains_in_its_own_process_ends_as_it_is_asked_to(site, tmp_path):
    path = f"{ROOT}:{install(site, 'mishap', 'acme.mishap:MishapRouter', MISHAP)}"
    (tmp_path / "harm-wait").touch()
    process = start(tmp_path, "train", "mishap:fault=wait", *TINY, path=path)
    until(lambda: any(tmp_path.glob("runs/*/checkpoint-*")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 143
    assert err.splitlines()[-1] == "stopped; what ended is kept, and the same command goes on"
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.processes
def test_a_trial_that_is_lost_before_its_first_word_is_set_aside_and_the_others_have_their_table(tmp_path, marked):
    process = start(tmp_path, "sweep", spec_of(tmp_path, ("hash",), 12, 4), "--retries", "0", "--concurrency", "1")
    (trial,) = until(lambda: [pid for pid in marked() if victims.is_trial(pid)], 0.001)
    os.kill(trial, signal.SIGKILL)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 1, err
    assert "1 of 2 runs ended, 1 set aside" in out and "| hash |" in out
    (folder,) = (folder for folder in tmp_path.glob("runs/*") if not (folder / "summary.json").exists())
    assert f"set aside: {folder.name}: its process was lost 1 times" in err and "Traceback" not in err
    assert failure(folder) == "its process was lost 1 times"


@pytest.mark.processes
def test_a_trial_that_tune_stops_is_not_one_with_a_defect(monkeypatch, tmp_path):
    """Tune raises SystemExit in a report."""
    begun, reports = [], []

    def train(*given, on_step, **options):
        begun.append(given)
        for step in range(1, 100):
            on_step(step)

    def report(values):
        reports.append(values)
        raise SystemExit(0)

    monkeypatch.setattr(loop, "train", train)
    job = Job(build_entry("hash", DATA, MODEL, TrainConfig(eval_every=10)), 0)
    RunFolder(tmp_path, job.config, 0).create()
    plain = [(job.id, job.config.to_dict(), 0, None, None)]
    trial = trials._trial(SimpleNamespace(report=report), plain, [], Launch(store=tmp_path), Search(99, 10))
    with pytest.raises(SystemExit, match="0"):  # as Tune wants it
        trial({"job": 0})
    assert len(begun) == 1 and [set(values) for values in reports] == [{"bits_per_byte", "step"}]
