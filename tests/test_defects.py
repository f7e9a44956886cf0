"""A defect in a router: its traceback is in the run's folder, its place in one line, it is not tried again, and the
other runs go on. Outside of runs there is the line alone; a defect of our own has its traceback.
"""

import json
import pickle

import pytest
import torch
import torch.distributed as dist

from rlroute.errors import DefectError, StoreError
from rlroute.experiments.bench import plan
from rlroute.experiments.play import ladder
from rlroute.faults import explain, place
from rlroute.foreign import printable
from rlroute.parallel import mesh
from rlroute.parallel.workers import _follows_a_loss
from rlroute.registry import include
from rlroute.training import defects
from tests.commands import TINY, ran, refused, rlroute, start
from tests.conftest import HANG, forget

ROUTER = '''
"""Top-k that fails where it is told to.

No paper."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rlroute.config import RouterConfig
from rlroute.routing import LinearScores, Router, RoutingDecision


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        fail("zero", True)


def fail(error, sure=False):
    with Path(COUNT).open("a") as file:
        file.write("failed\\n")
    if error == "key":
        raise KeyError("expert 7")  # key
    if error == "bare":
        assert 1 == 2  # bare
    if error == "lines":
        raise RuntimeError("two lines\\nof trouble")  # lines
    if error == "pair":
        raise Unpicklable("one", "two")  # pair
    if error == "mute":
        raise Mute  # mute
    if error == "exit":
        raise SystemExit(3)  # exit
    if error == "endless":
        fail.__call__("endless", {}["deep"])  # endless
    if error == "stop":
        next(iter(()))  # stop
    if error == "surrogate":
        raise ValueError("\\udcff")  # surrogate
    if error == "syntax":
        eval("1 +")  # syntax
    if error == "peer":
        raise RuntimeError("Connection closed by gloo: Timed out")  # peer
    if error == "torch":
        torch.zeros(2) @ torch.zeros(3)  # torch
    return 1 / 0  # zero


class FaultyRouter(Router):
    learns_from = frozenset({"gate"})
    gate_meaning = "softmax"

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        where: Literal[
            "init", "forward", "evaluation", "objective", "backward", "observe", "adapt", "reads"
        ] = "forward"
        error: str = "zero"

        def reads(self):
            if self.where == "reads":
                fail(self.error)
            return {}

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 0.02)
        self.at("init")

    def at(self, where):
        if self.config.where == where:
            fail(self.config.error)

    def forward(self, x_TD, context):
        self.at("forward" if context.explore else "evaluation")
        logits_TE = self.scores(x_TD)
        if self.config.where == "backward":
            logits_TE = Backward.apply(logits_TE)
        probs_TE, ids_TK = logits_TE.softmax(1), context.choose(logits_TE, self.shape.k)
        return RoutingDecision.token_choice(
            ids_TK, probs_TE.gather(1, ids_TK), self.shape.num_experts, logits_TE=logits_TE, probs_TE=probs_TE
        )

    def objective(self, decision, feedback):
        self.at("objective")
        return {}

    def observe(self, decision, feedback):
        self.at("observe")
        return {}

    def adapt(self, sums, progress):
        self.at("adapt")
'''
GROUP = ("--workers", "2", "--cpus", "0.5")
PLACES = ("init", "forward", "evaluation", "objective", "backward", "observe", "adapt", "reads")
SAID = {
    "key": "KeyError: 'expert 7'",
    "bare": "AssertionError (",
    "lines": "RuntimeError: two lines of trouble",
    "pair": "Unpicklable: one and two",
    "mute": "Mute: its message cannot be had: ValueError",
    "exit": "RuntimeError: sys.exit(3)",
    "endless": "KeyError: 'deep'",
    "stop": "StopIteration",
    "surrogate": "ValueError: ",
    "syntax": "SyntaxError: ",
    "peer": "RuntimeError: Connection closed by gloo",
    "torch": "RuntimeError: ",
}


@pytest.fixture
def faulty(tmp_path, routers):
    """The file of a router that notes in ``count`` how often it failed."""
    file = tmp_path / "faulty.py"
    file.write_text(ROUTER.replace("COUNT", repr(str(tmp_path / "count"))))
    return file


def line_of(file, error):
    (number,) = (n for n, text in enumerate(file.read_text().splitlines(), 1) if text.endswith(f"# {error}"))
    return f"{file}, line {number}"


def failed_run(store, start="faulty-"):
    """Return the folder of the run that failed, and the reason in it."""
    (folder,) = (path for path in store.iterdir() if path.name.startswith(start))
    return folder, json.loads((folder / "failed.json").read_text())["reason"]


@pytest.mark.parametrize(
    ("where", "error"), [*((where, "zero") for where in PLACES), *(("forward", error) for error in SAID)]
)
def test_it_is_named_with_its_place_and_the_others_go_on(where, error, faulty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = (f"faulty:where={where},error={error}", "hash")
    how = ("--launcher", "local", "--seeds", "1", "--no-tuned")
    said = refused(rlroute("compare", *entries, "--include", faulty, *TINY, *how))
    assert "1 of 2 runs failed" in said
    folder, reason = failed_run(tmp_path / "runs")
    assert printable(reason) in said and reason.startswith(SAID.get(error, "ZeroDivisionError: division by zero"))
    assert line_of(faulty, error) in reason
    assert ("router faulty at site 0" in reason) == (where not in ("backward", "reads"))
    kept = (folder / "traceback.txt").read_text()
    assert "traceback.txt" in reason and kept.startswith("Traceback") and str(faulty) in kept
    tries = (tmp_path / "count").read_text().count("failed")
    assert tries == (2 if where in ("init", "reads") else 1), "once, and where the driver checks the configuration too"
    assert [path.parent.name[:5] for path in (tmp_path / "runs").glob("*/summary.json")] == ["hash-"]


def test_the_run_that_would_start_from_another_says_it(faulty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran("train", "hash", *TINY)
    (source,) = (tmp_path / "runs").iterdir()
    how = (*TINY, "--launcher", "local", "--seeds", "1", "--no-tuned", "--from", source)
    said = rlroute("compare", "faulty:where=init", "hash", "--include", faulty, *how).err
    assert "hash starts from" in said and "1 of 2 runs failed" in said
    _, reason = failed_run(tmp_path / "runs")
    assert line_of(faulty, "zero") in reason


def test_an_ended_run_is_not_handed_out_where_what_it_reads_cannot_be_said(faulty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("train", "faulty:where=reads", "--include", faulty, *TINY)
    whole = faulty.read_text()
    faulty.write_text(whole.replace("            if self.where ==", "            if False and self.where =="))
    ran(*command)
    faulty.write_text(whole)
    forget(tmp_path)
    assert f"error: router faulty: ZeroDivisionError: division by zero ({line_of(faulty, 'zero')})" == refused(
        rlroute(*command)
    )


OUTSIDE = {
    "budget": ("compare", "faulty:where=init", "--budget", "flops", "--no-tuned", "--seeds", "1"),
    "reference": ("compare", "faulty:where=init", "hash", "--reference", "faulty", "--budget", "flops", "--no-tuned"),
    "ladder": ("ladder", "hash", "--against", "faulty:where=init", "--no-tuned"),
    "judge": ("judge", "faulty:where=reads", "--against", "hash", "--no-tuned"),
    "plan": ("plan", "faulty:where=init"),
    "play": ("play", "TokenBandit-v0", "faulty:where=evaluation", "--episodes", "2"),
    "gradients": ("gradients", "faulty:where=init"),
}


@pytest.mark.parametrize("command", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_outside_of_runs_there_is_one_line(command, faulty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = () if command[0] in ("play", "gradients") else TINY
    said = refused(rlroute(*command, "--include", faulty, *settings))
    assert said.startswith("error: router faulty: ZeroDivisionError: division by zero (")
    assert line_of(faulty, "zero") in said
    assert not (tmp_path / "results").exists() and not (tmp_path / "runs").exists()


def test_it_is_named_across_processes_whatever_its_class(faulty):
    include(faulty)
    with pytest.raises(DefectError, match="router faulty: Unpicklable: one and two") as got:
        ladder.train("faulty:error=pair", ladder.TASKS["uniform"], "own", 0, ladder.Ladder(steps=1))
    assert line_of(faulty, "pair") in str(pickle.loads(pickle.dumps(got.value)))


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*anything):
        return 1 / 0

    monkeypatch.setattr(plan, "planned_steps", broken)
    with pytest.raises(ZeroDivisionError):
        rlroute("plan", "hash", *TINY)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ((), "zero"),
        pytest.param((), "pair", marks=pytest.mark.slow),
        pytest.param(("--workers", "2", "--cpus", "0.5"), "zero", marks=pytest.mark.slow),
        pytest.param(("--workers", "2", "--cpus", "0.5"), "pair", marks=pytest.mark.slow),
        pytest.param(("--workers", "2", "--cpus", "0.5"), "peer", marks=pytest.mark.slow),
    ],
    ids=["tune, zero", "tune, pair", "workers, zero", "workers, pair", "workers, peer"],
)
def test_it_is_named_where_other_processes_train(how, error, faulty, tmp_path):
    """Whatever its class: a worker's error crosses processes."""
    micro = ("--train.micro-batches", "2")
    entry = f"faulty:where=objective,error={error}"
    process = start(tmp_path, "train", entry, f"--include={faulty}", *TINY, *micro, "--launcher", "ray", *how)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 2, err
    folder, reason = failed_run(tmp_path / "runs")
    assert reason in " ".join(err.split()) and "router faulty at site 0" in reason
    assert reason.startswith(SAID.get(error, "ZeroDivisionError")) and line_of(faulty, error) in reason
    assert str(faulty) in (folder / "traceback.txt").read_text()
    assert (tmp_path / "count").read_text().count("failed") <= (2 if how else 1)


def test_the_place_is_that_of_the_sites_router(faulty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = "hash+faulty:where=adapt@1-1"
    refused(rlroute("--include", faulty, "train", entry, *TINY, "--model.num-layers", "2"))
    _, reason = failed_run(tmp_path / "runs", "hash+faulty-")
    assert "router faulty at site 1" in reason


def test_a_mended_router_leaves_no_traceback(faulty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("train", "faulty:where=init", "--include", faulty, *TINY)
    refused(rlroute(*command))
    folder, _ = failed_run(tmp_path / "runs")
    faulty.write_text(faulty.read_text().replace("    if error ==", "    return\n    if error =="))
    forget(tmp_path)
    ran(*command)
    assert not (folder / "traceback.txt").exists() and not (folder / "failed.json").exists()


def test_runs_shows_the_reason_and_where_the_traceback_is(faulty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(rlroute("train", "faulty", "--include", faulty, *TINY))
    folder, reason = failed_run(tmp_path / "runs")
    shown = ran("runs", "runs", folder.name)
    assert reason in shown and f"runs/{folder.name}" in shown and "traceback.txt" in shown


def test_a_disk_that_is_full_costs_the_traceback_and_not_the_reason(tmp_path, monkeypatch):
    def refuse(path, text):
        raise StoreError("no space left")

    monkeypatch.setattr(defects, "write_atomically", refuse)
    with pytest.raises(DefectError, match=r"ValueError: x \(.*, line \d+\)$"), defects.Defects(config(), tmp_path):
        raise ValueError("x")


def config():
    from rlroute.config import RunConfig
    from rlroute.registry import router_class

    return RunConfig(router=router_class("hash").Config())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreError("x"), ConnectionError("of another worker")])
def test_what_is_no_defect_passes(error, tmp_path):
    with pytest.raises(type(error)) as got, defects.Defects(config(), tmp_path, lambda e: "another" not in str(e)):
        raise error
    assert got.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "text", "lost"),
    [
        (mesh.__file__, "Connection closed by peer", True),
        (dist.distributed_c10d.__file__, "[gloo] Timed out", True),
        (mesh.__file__, "tensors of other shapes", False),
        (torch.nn.functional.__file__, "Connection closed by peer", False),
        (__file__, "[gloo] Timed out", False),
    ],
)
def test_a_lost_worker_is_told_by_what_was_raised_where_workers_exchange_something(file, text, lost):
    with pytest.raises(RuntimeError) as got:
        exec(compile(f"raise RuntimeError({text!r})", file, "exec"))
    assert _follows_a_loss(got.value) == lost


def test_a_line_stays_a_line():
    try:
        raise RuntimeError("long " * 1000 + "\n\n\tend")
    except RuntimeError as error:
        said = explain(error)
    assert len(said) < 800 and "\n" not in said and __file__ in said
    assert place(ValueError("never raised")) is None and explain(ValueError()) == "ValueError"
