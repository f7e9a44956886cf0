"""Runs as Ray Tune trials, as many at a time as the machine or cluster has room for.

The run store is the truth, and Ray a scheduler and no more. A run whose process is lost, or makes no step for too long,
is started again from its checkpoint, and at last set aside; the others are not held up.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlroute.errors import RlrouteError
from rlroute.experiments.launch.jobs import Job, Launch, Search
from rlroute.experiments.launch.launcher import train_job
from rlroute.experiments.launch.ray_session import WANT_OF_MEMORY
from rlroute.reading import rows_so_far
from rlroute.schema import Asked
from rlroute.sink import take_warnings
from rlroute.watchdog import stacks, watchdog

Plain = tuple[str, dict[str, Any], int, str | None, Asked | None]
"""A job without classes, which this process would have to import: id, and the first fields of :class:`Job`."""


def run_trials(
    tune: Any,
    jobs: Sequence[Plain],
    routers: Sequence[str],
    how: Launch,
    scratch: Path,
    search: Search | None,
    tell: Callable[..., None],
) -> None:
    """Train all jobs to their ends.

    Args:
        tune: Ray Tune.
        jobs: what to train.
        routers: files of routers that were brought in.
        how: with how much, and how many at a time.
        scratch: a private folder, for Tune's own files.
        search: stops trials early.
        tell: told ("set aside", run, reason) of a run that failed, as soon as it has, and ("line", text) of what the
            user should read.
    """
    room = [{"CPU": how.cpus} | ({"GPU": how.gpus} if how.gpus else {})] * how.workers
    bundles = room if how.workers == 1 else [{}, *room]  # the process that looks after a group needs no core
    over: set[str] = set()
    tuner = tune.Tuner(
        tune.with_resources(_trial(tune, jobs, routers, how, search), tune.PlacementGroupFactory(bundles)),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=how.concurrency, reuse_actors=True, **(search.tune_options() if search else {})
        ),
        run_config=tune.RunConfig(
            name="runs",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=how.retries),
            callbacks=[_listener(tune, jobs, how, tell, over)],
        ),
    )
    tuner.fit()
    for run in sorted({job[0] for job in jobs} - over):
        tell("set aside", run, "Ray ended before it was trained")


def _trial(
    tune: Any, jobs: Sequence[Plain], routers: Sequence[str], how: Launch, search: Search | None
) -> Callable[[dict[str, int]], None]:
    """Return what a trial does, in a process of Ray's."""

    def trial(parameters: dict[str, int]) -> None:
        from rlroute.registry import include, run_config  # and with it torch

        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"  # else it gives up one that has not ended in 2 s
        run, values, seed, command, asked = jobs[parameters["job"]]
        folder = how.store / run

        def report(values: dict[str, Any]) -> None:
            try:
                tune.report(values | (_score(folder) if search else {}))
            except SystemExit as end:  # Tune's way to stop a trial; raised by a router, it would be a defect
                raise _Stopped from end

        try:
            include(*routers)
            job = Job(run_config(values), seed, command, asked)
        except RlrouteError as error:  # a router's file is not on this machine, or is another one
            report({"reason": str(error), "lines": []})
            return

        @contextmanager
        def watched() -> Iterator[Callable[[int], None]]:
            with watchdog(60 * how.patience, folder) as alive:
                yield _reporting(report, job.config.train.eval_every, alive) if search else alive

        def say(line: str) -> None:
            report({"lines": [line]})

        try:  # each worker of a group has a watchdog of its own
            reason = train_job(job, how, say, watched) if how.workers == 1 else train_job(job, how, say)
            _give_memory_back()
            report({"reason": reason, "lines": take_warnings()})
        except _Stopped:
            sys.exit(0)  # a trial that returns reports once more, to nobody, and waits

    return trial


class _Stopped(KeyboardInterrupt):
    """Tune stops a trial."""


def _listener(tune: Any, jobs: Sequence[Plain], how: Launch, tell: Callable[..., None], over: set[str]) -> Any:
    """Return Tune's listener, which adds to ``over`` the runs that are."""

    class Listener(tune.Callback):  # type: ignore[misc]  # a class of Tune, which is imported late
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            for line in result.get("lines", ()):
                tell("line", line)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            run = jobs[trial.config["job"]][0]
            over.add(run)
            if (reason := (trial.last_result or {}).get("reason")) is None:  # it did not come to its end
                from rlroute.records import STOPPED, mark  # and with it torch, which only a search needs here

                mark(how.store / run / STOPPED)
            elif reason:
                tell("set aside", run, reason)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            run = jobs[trial.config["job"]][0]
            over.add(run)
            tell("set aside", run, _lost(how.store / run, how, trial.get_error() or ""))

    return Listener()


def _lost(folder: Path, how: Launch, error: object) -> str:
    """Say why a run has failed whose process is gone."""
    if hung := stacks(folder):
        return f"no step in {how.patience:g} minutes, {how.retries + 1} times; where it stood is in {hung}"
    memory = f", {WANT_OF_MEMORY}" if WANT_OF_MEMORY in str(error) else ""
    return f"its process was lost {how.retries + 1} times{memory}"


def _give_memory_back() -> None:
    """Return freed memory to the system: a worker trains run after run, each in a new thread, whose heap the C library
    would keep.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _score(folder: Path) -> dict[str, float]:
    """Return what a search goes by: the last evaluation's bits per byte, and its step."""
    none = {"bits_per_byte": math.inf, "step": 0}
    last = next((row for row in reversed(rows_so_far(folder)) if row["kind"] == "eval"), none)
    return {name: last[name] for name in none}


def _reporting(
    report: Callable[[dict[str, Any]], None], every: int, alive: Callable[[int], None]
) -> Callable[[int], None]:
    """Return what a trial of a search calls after each step: the evaluation of the step before is then on disk."""

    def on_step(step: int) -> None:
        alive(step)
        if step > every and step % every == 1:
            report({})

    return on_step
