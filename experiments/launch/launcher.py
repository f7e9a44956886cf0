"""Run many training runs: here in sequence, or through Ray, as many at a time as the machine or cluster has room for.

The run store is the truth: whatever happens, launching the same jobs again keeps what is finished and resumes what is
not. A run that fails by its own doing is set aside at once; one whose process is lost or hangs is started again, a few
times. No run holds up another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from rlroute.errors import HeldError, RlrouteError
from rlroute.experiments.launch.jobs import Job, Launch, Search
from rlroute.experiments.launch.supervisor import through_ray
from rlroute.faults import notes


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

    Raises:
        ConfigError: the cluster does not let this process in, or has no room for a run.
        LostRayError: Ray was lost.
    """
    from rlroute.records import ENDED, state  # and with it torch, which the process that drives Ray does without

    uses_ray = how.uses_ray(len(jobs))  # also for the last that is left
    done = ENDED if search is None else ENDED | {"stopped early"}
    jobs = [job for job in jobs if state(how.store / job.id) not in done]
    if jobs and uses_ray:
        return through_ray(jobs, how, search, say)
    reasons = {}
    for job in jobs:
        if reason := train_job(job, how, partial(print, file=sys.stderr)):
            reasons[job.id] = reason
            say(job.id, reason)
    return reasons


def unwatched() -> AbstractContextManager[Callable[[int], None]]:
    """Train without anyone who minds how long a step takes."""
    return nullcontext(lambda step: None)


def train_job(
    job: Job,
    how: Launch,
    say: Callable[[str], None],
    watched: Callable[[], AbstractContextManager[Callable[[int], None]]] = unwatched,
) -> str:
    """Train a job in this process, or with workers; return why it failed, or an empty string.

    Whatever is raised would come again, and must not take the other runs with it.

    Args:
        job: the run.
        how: with how many workers.
        say: told of another process that is waited for.
        watched: it yields what to call after each step.
    """
    from rlroute.training.defects import Defects

    try:
        with Defects(job.config, how.store / job.id):
            _train_alone(job, how, say, watched)
    except RlrouteError as error:
        return "; ".join((str(error), *notes(error)))
    return ""


def _train_alone(
    job: Job,
    how: Launch,
    say: Callable[[str], None],
    watched: Callable[[], AbstractContextManager[Callable[[int], None]]],
) -> None:
    """Train a job as soon as no other process does."""
    from rlroute.records import RunFolder

    folder = RunFolder(how.store, job.config, job.seed)
    while True:
        folder.wait(say, 60 * how.patience)
        try:
            return _train(job, how, watched)
        except HeldError:  # a third process was faster
            continue


def _train(job: Job, how: Launch, watched: Callable[[], AbstractContextManager[Callable[[int], None]]]) -> None:
    from rlroute.training.loop import train

    options: Any = {"command": job.command, "asked": job.asked, "wandb": how.wandb, "keep": how.keep}
    if how.workers == 1:
        with watched() as on_step:
            train(job.config, job.seed, how.store, **options, on_step=on_step)
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
            **options,
            retries=how.retries,
            patience=60 * how.patience,
        )
