"""All runs of a command: check them before any work, train them, and say what ended and what failed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from rlroute.config import DataConfig, RunConfig
from rlroute.errors import ComparisonError, ConfigError, StoreError
from rlroute.experiments.launch.jobs import Job, Launch, Search
from rlroute.experiments.launch.launcher import launch
from rlroute.experiments.launch.progress import Monitor
from rlroute.experiments.launch.ray_session import require_installed
from rlroute.experiments.launch.supervisor import require_reach
from rlroute.records import RunFolder
from rlroute.schema import MadeFrom, RunRecord
from rlroute.sink import require as require_wandb

if TYPE_CHECKING:
    from rlroute.training.data import Corpus


def run_all(jobs: Sequence[Job], how: Launch) -> list[RunRecord]:
    """Train all jobs and return their records.

    Raises:
        ConfigError, DataError, StoreError: a job cannot be trained or the store cannot be written, found before any
            work.
        MissingDependencyError: the launcher is not installed.
        ComparisonError: some failed; the finished ones stay in the store.
    """
    records, failed = run_jobs(jobs, how)
    if failed:
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failed.items())
        raise ComparisonError(
            f"{len(failed)} of {len(jobs)} runs failed, the others are kept in {how.store}: {reasons}"
        )
    return records


def run_jobs(jobs: Sequence[Job], how: Launch, search: Search | None = None) -> tuple[list[RunRecord], dict[str, str]]:
    """Train all jobs; return the records of those that ended, and why the others failed, by run id.

    Raises:
        ConfigError, DataError, StoreError: a job cannot be trained or the store cannot be written, found before any
            work.
        MissingDependencyError: the launcher, or wandb where it is asked for, is not installed.
    """
    check_jobs(jobs, how)
    folders = {job.id: RunFolder(how.store, job.config, job.seed) for job in jobs}
    for folder in folders.values():
        folder.create()
        folder.set_aside(None)
    print(f"{len(jobs)} {'run' if len(jobs) == 1 else 'runs'} into {how.store}/; {_engines(jobs)}", file=sys.stderr)

    def say(run: str, reason: str) -> None:
        with suppress(StoreError):  # the disk may be what failed; the reason is returned in any case
            folders[run].set_aside(reason)

    with Monitor(jobs, how.store):
        failed = launch(jobs, how, search, say)
    return [folder.read() for folder in folders.values() if folder.ended], failed


def check_jobs(jobs: Sequence[Job], how: Launch, *, registers: bool = False) -> dict[RunConfig, MadeFrom]:
    """Find out whether jobs can be trained, and what they are made from; nothing is written.

    A defect in a router is left to its runs, which keep the traceback. One that hides what a run is made from which has
    ended is raised: nothing runs that again.

    Args:
        jobs, how: as of :func:`run_jobs`.
        registers: what they are made from is to be registered before they run, so that it has to be known of all.

    Raises:
        As :func:`run_jobs` does before any work.
    """
    from rlroute.provenance import made_from
    from rlroute.training.prepare import check, defects_left_to_the_run, refuse_changed

    how.check()
    ids = [job.id for job in jobs]
    twice = sorted(run for run, count in Counter(ids).items() if count > 1)
    if twice:
        raise ConfigError(f"run {twice[0]} is asked for twice: want each entry once")
    if not ids:
        raise ConfigError("no runs: want at least 1 seed and 1 entry")
    seeds_of: dict[RunConfig, list[int]] = {}
    for job in jobs:
        seeds_of.setdefault(job.config, []).append(job.seed)
    folders = {job.id: RunFolder(how.store, job.config, job.seed) for job in jobs}
    if how.uses_ray(len(jobs)):
        require_installed()
        if not all(folder.ended for folder in folders.values()):
            require_reach(how)
    corpora = check(seeds_of, how.workers, how.expert_parallel, elsewhere=how.cluster is not None)
    for note in (note for corpus in corpora.values() for note in corpus.notes):
        print(note, file=sys.stderr)
    if how.uses_ray(len(jobs)) and not how.gpus and any(job.config.train.device == "cuda" for job in jobs):
        raise ConfigError("--gpus 0 with train.device = 'cuda': say how much of a GPU a worker gets")
    if how.wandb != "off":
        require_wandb()
    for line in dict.fromkeys(_starts(jobs, how, corpora)):
        print(line, file=sys.stderr)
    made = {}
    ended = {job.config for job in jobs if folders[job.id].ended}
    for config in seeds_of:
        with nullcontext() if registers or config in ended else defects_left_to_the_run():
            made[config] = made_from(config, corpora[config.data].provenance)
    for job in jobs:
        if job.config in made:
            refuse_changed(folders[job.id], made[job.config])
    return made


def _starts(jobs: Sequence[Job], how: Launch, corpora: Mapping[DataConfig, Corpus]) -> list[str]:
    """Find out whether runs can start from others, and say once for each start what these have nothing for."""
    from rlroute.training.prepare import defects_left_to_the_run
    from rlroute.training.start import check_start

    said = []
    for config in dict.fromkeys(job.config for job in jobs if job.config.start is not None):
        with defects_left_to_the_run():
            keyed = check_start(config, corpora[config.data], how.store)
            anew = f"; anew: {', '.join(keyed)}" if keyed else ""
            said.append(f"{config.router_name} starts from {config.start}{anew}")
    return said


def _engines(jobs: Sequence[Job]) -> str:
    """Say which engine runs the experts: chosen before any work, never changed afterwards."""
    from rlroute.kernels import choose_backend

    chosen = {(choose_backend(job.config.train.kernel, job.config.train.device), job.config.train) for job in jobs}
    return ", ".join(
        sorted({f"experts run on the {engine} engine, device {t.device}, {t.dtype}" for engine, t in chosen})
    )
