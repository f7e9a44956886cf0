"""Run many training runs: here in sequence, or as Ray Tune trials, as many at a time as the machine or cluster has room
for.

The run store is the truth. Ray is a scheduler and no more: whatever happens to it, launching the same jobs again keeps
what is finished and resumes what is not.

A run that fails by its own doing (bad input, a defect in a router, a store that cannot be written) fails at once; one
whose process is lost, or makes no step for too long, is started again from its checkpoint and at last set aside. The
others are not held up by either.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlroute.errors import RlrouteError
from rlroute.experiments.launch.jobs import Job, Launch, Search
from rlroute.experiments.launch.ray_session import WANT_OF_MEMORY, session
from rlroute.sink import take_warnings
from rlroute.watchdog import stacks, watchdog


def launch(
    jobs: Sequence[Job],
    how: Launch,
    search: Search | None = None,
    say: Callable[[str, str], None] = lambda run, reason: None,
) -> dict[str, str]:
    """Train all jobs to their ends and return the reasons of those that failed, by run id; the others are not held up.

    Args:
        jobs: what to train; ended runs, and those that this search has stopped, cost nothing.
        how: where, and how many at a time.
        search: stops trials early, under Ray alone.
        say: told of a run that failed, as soon as it has, and why.
    """
    from rlroute.records import ENDED, state  # and with it torch, which the command line's help does without

    through_ray = how.uses_ray(len(jobs))  # also for the last that is left
    done = ENDED if search is None else ENDED | {"stopped early"}
    jobs = [job for job in jobs if state(how.store / job.id) not in done]
    if jobs and through_ray:
        with session(how) as (tune, scratch):
            reasons = _tune(tune, jobs, how, scratch, search, say)
    else:
        reasons = {}
        for job in jobs:
            reasons[job.id] = _train(job, how)
            if reasons[job.id]:
                say(job.id, reasons[job.id])
    return {run: reason for run, reason in reasons.items() if reason}


def _train(job: Job, how: Launch, on_step: Callable[[int], None] = lambda step: None) -> str:
    """Train a job in this process, or with workers; return why it failed, or an empty string.

    What bad input or the store brings about would come again. Anything else is tried again from the last checkpoint.
    """
    for _ in range(how.retries + 1):
        try:
            _train_once(job, how, on_step)
            return ""
        except RlrouteError as error:
            return str(error)
        except Exception as error:  # a defect in one router must not take the other runs with it; its reason is printed
            reason = f"{type(error).__name__}: {error}"
    return reason


def _train_once(job: Job, how: Launch, on_step: Callable[[int], None]) -> None:
    from rlroute.training.loop import train

    if how.workers == 1:
        train(job.config, job.seed, how.store, command=job.command, on_step=on_step, wandb=how.wandb)
    else:
        from rlroute.parallel.workers import train_group

        train_group(
            job.config,
            job.seed,
            how.store,
            workers=how.workers,
            expert_parallel=how.expert_parallel,
            chunks=how.exchange_chunks,
            cpus=how.cpus,
            gpus=how.gpus,
            command=job.command,
            retries=how.retries,
            patience=60 * how.patience,
            wandb=how.wandb,
        )


def _tune(
    tune: Any, jobs: Sequence[Job], how: Launch, scratch: Path, search: Search | None, say: Callable[[str, str], None]
) -> dict[str, str]:
    how = replace(how, store=how.store.absolute())
    plain = [(job.config.to_dict(), job.seed, job.command) for job in jobs]

    def trial(parameters: dict[str, int]) -> None:
        from rlroute.registry import run_config  # and with it torch

        values, seed, command = plain[parameters["job"]]
        job = Job(run_config(values), seed, command)
        folder = how.store / job.id
        if how.workers > 1:  # each of them has a watchdog of its own
            reason = _train(job, how)
        else:
            try:
                with watchdog(60 * how.patience, folder) as alive:
                    reason = _train(job, how, _reporting(tune, job, folder, alive) if search else alive)
            except OSError as error:  # a full disk, or a store that cannot be written any more
                reason = f"cannot write {folder}: {error.strerror or error}"
        _give_memory_back()
        tune.report({"reason": reason, "warnings": take_warnings()} | (_score(folder) if search else {}))

    room = [{"CPU": how.cpus} | ({"GPU": how.gpus} if how.gpus else {})] * how.workers
    bundles = room if how.workers == 1 else [{}, *room]  # the process that looks after a group needs no core
    tuner = tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory(bundles)),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=how.concurrency, reuse_actors=True, **(search.tune_options() if search else {})
        ),
        run_config=tune.RunConfig(
            name="runs",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=how.retries),
            callbacks=[_listener(tune, jobs, how, say)],
        ),
    )
    reasons = {}
    for result in tuner.fit():
        job = jobs[result.config["job"]]
        reasons[job.id] = _lost(job, how, result.error) if result.error else result.metrics.get("reason", "")
        for line in () if result.error else result.metrics.get("warnings", ()):
            print(line, file=sys.stderr)
    return reasons


def _give_memory_back() -> None:
    """Return freed memory to the system: a worker trains run after run, each in a new thread, whose heap the C library
    would keep.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _listener(tune: Any, jobs: Sequence[Job], how: Launch, say: Callable[[str, str], None]) -> Any:
    from rlroute.records import stop_early

    class Listener(tune.Callback):  # type: ignore[misc]  # a class of Tune, which is imported late
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            run = jobs[trial.config["job"]].id
            if (reason := trial.last_result.get("reason")) is None:  # it did not come to its end
                stop_early(how.store / run)
            elif reason:
                say(run, reason)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            job = jobs[trial.config["job"]]
            say(job.id, _lost(job, how, trial.get_error() or ""))

    return Listener()


def _lost(job: Job, how: Launch, error: object) -> str:
    """Say why a run has failed whose process is gone."""
    if hung := stacks(how.store / job.id):
        return f"no step in {how.patience:g} minutes, {how.retries + 1} times; where it stood is in {hung}"
    memory = f", {WANT_OF_MEMORY}" if WANT_OF_MEMORY in str(error) else ""
    return f"its process was lost {how.retries + 1} times{memory}"


def _score(folder: Path) -> dict[str, float]:
    """Return what a search goes by: the last evaluation's bits per byte, and its step."""
    from rlroute.records import read_rows

    file = folder / "metrics.jsonl"
    rows = read_rows(file, torn_ok=True) if file.exists() else []
    evaluated = [row for row in rows if row["kind"] == "eval"] or [{"bits_per_byte": math.inf, "step": 0}]
    return {name: evaluated[-1][name] for name in ("bits_per_byte", "step")}


def _reporting(tune: Any, job: Job, folder: Path, alive: Callable[[int], None]) -> Callable[[int], None]:
    every = job.config.train.eval_every

    def on_step(step: int) -> None:
        alive(step)
        if step > every and step % every == 1:  # the evaluation of the step before is on disk
            tune.report(_score(folder))

    return on_step
