"""Train what claims need, each run once however many share it, and say what the runs show. What has ended is kept: the
same call goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from rlroute.config import RunConfig
from rlroute.errors import ComparisonError, ConfigError, StoreError
from rlroute.experiments.claims.claim import Claim
from rlroute.experiments.claims.evidence import outcome
from rlroute.experiments.claims.measures import MEASURES
from rlroute.experiments.claims.outcomes import Outcome
from rlroute.experiments.claims.registration import Registration, make_plan, registration_file
from rlroute.experiments.comparison.registration import register
from rlroute.experiments.launch.jobs import Job, Launch, together
from rlroute.experiments.launch.runs import check_jobs, run_jobs
from rlroute.records import RunFolder
from rlroute.schema import Asked, MadeFrom


def run_claims(
    claims: Sequence[Claim],
    how: Launch,
    *,
    command: str | None = None,
    found: Callable[[Outcome], None] = lambda outcome: None,
    say: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Register claims, train what they need, and hand out what was found of each; return why there is nothing of the
    others, by claim.

    Args:
        claims: what is to be decided.
        how: where runs are stored, and how they are launched; the weights of all their checkpoints stay.
        command: the command line behind it, for the records.
        found: told of each outcome, once all runs have ended or the command is stopped.
        say: told what is registered; prints on stderr if nothing is said.

    Raises:
        ConfigError: a claim cannot be expressed yet; bad input; or another plan is registered in this store.
        StoreError: a registration was changed.
    """
    say, how = say or partial(print, file=sys.stderr), replace(how, keep="all")
    for claim in claims:
        if claim.lacks:
            raise ConfigError(f"claim {claim.id} cannot be run: rlroute lacks {claim.lacks}")
    jobs = jobs_of(claims, command)
    made = check_jobs(list(jobs.values()), how, registers=True)
    registered = {claim.id: _register(claim, made, how) for claim in claims}
    ids = {claim.id: jobs_of([claim]).keys() for claim in claims}
    shared = sum(map(len, ids.values())) - len(jobs)
    say(f"{len(claims)} claims registered in {how.store}/, {len(jobs)} runs, {shared} times shared between claims")
    asked = [replace(job, asked=_asked(job, ids, registered)) for job in jobs.values()]
    failed: Mapping[str, str] = {}
    try:
        _, failed = run_jobs(asked, how)
    finally:  # also where it is stopped: what has ended says what it says
        lacking = {}
        for claim in claims:
            try:
                found(outcome(claim, registered[claim.id], how.store))
            except (ComparisonError, StoreError, ConfigError) as error:
                lacking[claim.id] = str(error)
    return {name: _why(reason, failed) for name, reason in lacking.items()}


def _why(reason: str, failed: Mapping[str, str]) -> str:
    """Return why there is no outcome, with the fault of the run that failed, if one did."""
    return next((f"{reason}: {fault}" for run, fault in failed.items() if run in reason), reason)


def jobs_of(claims: Sequence[Claim], command: str | None = None) -> dict[str, Job]:
    """Return the runs of claims by id, each once, seed by seed: those of the first claim first, but before them those
    that the clock holds against each other, which lie side by side for the sake of the machine's load.
    """
    timed = [claim for claim in claims if any(MEASURES[part.measure].timed for part in claim.parts)]
    jobs: dict[str, Job] = {}
    for claim in [*timed, *claims]:
        mine = [
            Job(config, seed, command, label=f"{claim.id} {name}")
            for seed in claim.seeds
            for name, config in claim.configs().items()
        ]
        for job in together(mine):
            jobs.setdefault(job.id, job)
    return jobs


def _register(claim: Claim, made: Mapping[RunConfig, MadeFrom], how: Launch) -> Registration:
    """Register a claim, or find it registered, in agreement with what runs say that are there."""
    folders = [RunFolder(how.store, config, seed) for config in claim.configs().values() for seed in claim.seeds]
    path = registration_file(how.store, claim)
    plan = make_plan(claim, made, {folder.id for folder in folders if folder.ended})

    def plan_of(asked: Asked) -> str | None:
        return asked.get("claims", {}).get(claim.id)

    return register(path, plan, Registration, [folder.path for folder in folders], plan_of)


def _asked(job: Job, ids: Mapping[str, Collection[str]], registered: Mapping[str, Registration]) -> Asked:
    assert job.asked is not None
    plans = {claim: registered[claim]["sha256"] for claim, runs in ids.items() if job.id in runs}
    return {**job.asked, "claims": plans}
