"""A judgement of one routing change: register, train seed by seed, look, and stop at the first verdict.

What is said before the first run is :mod:`.registration`'s, how a look decides that of
:mod:`rlroute.experiments.verdicts`. Everything is trained by the code behind ``compare``; runs that are there are used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlroute.config import Budget, DataConfig, ModelConfig, RunConfig, StartConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.comparison.budget import refuse_two, with_budget
from rlroute.experiments.comparison.entries import Entry, check_comparable, make_entries
from rlroute.experiments.comparison.judgement import Judgement, Look
from rlroute.experiments.comparison.registration import (
    WAY_OUT,
    Plan,
    Registration,
    make_plan,
    register,
    registered,
    registration_file,
)
from rlroute.experiments.launch.jobs import Job, Launch, together
from rlroute.experiments.launch.runs import check_jobs, run_all
from rlroute.experiments.recipes.entries import bring_in
from rlroute.experiments.recipes.presets import build_pair
from rlroute.experiments.statistics import differences
from rlroute.experiments.verdicts import MARGIN, MAX_SEEDS, MaxSeeds, intervals, looks, verdict
from rlroute.experiments.verify.store import refuse_unsound
from rlroute.limits import Positive, checked
from rlroute.records import RunFolder
from rlroute.schema import Asked, RunRecord


def judge(
    candidate: str,
    against: str = "switch",
    *,
    margin: float = MARGIN,
    max_seeds: int = MAX_SEEDS,
    budget: Budget = "tokens",
    seconds: float | None = None,
    tuned: bool = True,
    data: DataConfig | None = None,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    start: StartConfig | None = None,
    how: Launch | None = None,
    said: Collection[str] = (),
    command: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Judgement:
    """Return the verdict on an entry against another, trained on seeds 0, 1, ... until there is one.

    Args:
        candidate: an entry, or the path of a router's file, with fields or without.
        against: the entry that it is held against.
        margin: bits per byte below which a difference does not matter.
        max_seeds: the most seeds.
        budget: what is equal: tokens, the reference's training FLOPs, or seconds.
        seconds: training time of each run under budget time.
        tuned: use tuned settings: see :func:`rlroute.experiments.recipes.presets.build_pair`.
        data, model, train: what both entries share; the defaults of ``compare`` where nothing is said.
        start: the weights from which both start, if they are another run's.
        how: where the runs are stored and how they are launched.
        said: fields of ``train`` that were set on purpose, beyond those that differ from their defaults.
        command: the command line behind it, for the records.
        say: told what is registered, before the first run, and of each look; prints on stderr if nothing is said.

    Raises:
        ConfigError: bad input; or what was registered in this store for these two is another plan, or the other way
            round.
        StoreError: the registration was changed, or is gone.
        ComparisonError: a run failed, its record was edited, or the runs are not comparable.
    """
    margin, max_seeds = checked(margin, Positive, "--margin"), checked(max_seeds, MaxSeeds, "--max-seeds")
    how, shared = how or Launch(), (data or DataConfig(), model or ModelConfig(), train or TrainConfig())
    refuse_two(budget, shared[-1])
    names = [bring_in(entry) for entry in (candidate, against)]
    configs, settings = build_pair(names[0], names[1], *shared, tuned=tuned, said=said)
    configs = [replace(c, start=start) for c in with_budget(configs, budget, configs[1], seconds)]
    at = looks(max_seeds)
    jobs = _jobs(configs, names, max_seeds, command)
    made = check_jobs(jobs, how, registers=True)
    before = [job.id for job in jobs if RunFolder(how.store, job.config, job.seed).ended]
    plan = make_plan(configs[0], configs[1], made, settings, margin, at, before)
    path = registration_file(how.store, configs[0], configs[1])
    _refuse_reversed(path, registration_file(how.store, configs[1], configs[0]), plan)
    registration = _register(path, plan, jobs, how.store)
    say = say or partial(print, file=sys.stderr)
    say(_registered(registration, path))
    return _look(registration, path, configs, names, how, command, say)


def _jobs(configs: Sequence[RunConfig], names: Sequence[str], seeds: int, command: str | None) -> list[Job]:
    """Return the runs of so many seeds, each once where both entries are one."""
    named = dict(zip(configs, names, strict=True))
    return together([Job(c, seed, command, label=name) for seed in range(seeds) for c, name in named.items()])


def _refuse_reversed(path: Path, other: Path, plan: Plan) -> None:
    """Refuse two entries that are registered the other way round: that judgement says all that this one could."""
    if other.exists() and not path.exists():
        one, two = plan["candidate"]["label"], plan["reference"]["label"]
        raise ConfigError(
            f"{two} against {one} is registered in this store ({other}): its verdict read the other way round is that "
            f"of {one} against {two}; {WAY_OUT}"
        )


def _register(path: Path, plan: Plan, jobs: Sequence[Job], store: Path) -> Registration:
    """Register a plan, or find it registered, in agreement with what runs say that are there."""
    entries = {job.entry for job in jobs}

    def plan_of(asked: Asked) -> str | None:
        return asked.get("registration") if set(asked["entries"]) == entries else None

    return register(path, plan, Registration, [store / job.id for job in jobs], plan_of)


def _registered(registration: Registration, path: Path) -> str:
    plan = registration["plan"]
    label, other = plan["candidate"]["label"], plan["reference"]["label"]
    there = f"; {len(plan['there_before'])} runs were there before" if plan["there_before"] else ""
    return (
        f"registered {registration['registered']}: {label} (settings: {plan['candidate']['settings']}) against {other} "
        f"({plan['reference']['settings']}), margin {plan['margin']:g}, looks after "
        f"{', '.join(map(str, plan['looks']))} seeds{there}; SHA-256 {registration['sha256']} in {path}"
    )


def _look(
    registration: Registration,
    path: Path,
    configs: Sequence[RunConfig],
    names: Sequence[str],
    how: Launch,
    command: str | None,
    say: Callable[[str], None],
) -> Judgement:
    """Train and look until there is a verdict, or the seeds are spent."""
    plan, found = registration["plan"], Judgement(registration=registration, file=path, command=command)
    for n, level in zip(plan["looks"], plan["levels"], strict=True):
        jobs = _jobs(configs, names, n, command)
        registered(path, plan, Registration)  # what was changed meanwhile is not gone by
        records = run_all([replace(job, asked=_asked(job, registration["sha256"])) for job in jobs], how)
        candidate, reference = _entries(records, configs)
        found = replace(found, candidate=candidate, reference=reference)
        if found.diverged:
            return found
        diffs = differences(candidate.bits_by_seed, reference.bits_by_seed)
        against_0, within = intervals(diffs, level)
        found = replace(
            found, looks=(*found.looks, Look(against_0, within, level, verdict(diffs, plan["margin"], level)))
        )
        say(str(found.looks[-1]))
        if found.verdict.resolved:
            break
    return found


def _asked(job: Job, sha256: str) -> Asked:
    assert job.asked is not None
    return {**job.asked, "registration": sha256}


def _entries(records: Sequence[RunRecord], configs: Sequence[RunConfig]) -> tuple[Entry, Entry]:
    """Return the candidate's and the reference's runs, which are sound and differ in the routing alone; one entry may
    be both.
    """
    refuse_unsound(records)
    entries = make_entries(records)
    check_comparable(entries)
    by_hash = {entry.runs[0].config["config_hash"]: entry for entry in entries}
    candidate, reference = (by_hash[config.content_hash()] for config in configs)
    return candidate, reference
