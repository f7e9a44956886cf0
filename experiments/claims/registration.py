"""The registration of a claim: what decides it, written into the store with its SHA-256 before the first run, and held
against whatever comes later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.config import RunConfig
from rlroute.experiments.claims.claim import Claim
from rlroute.experiments.comparison.registration import Trained
from rlroute.schema import Digest, MadeFrom, Moment, Name, Whole

VERSION = 1
"""Of the plan's fields."""


class Plan(TypedDict):
    """What is said before the first run."""

    version: Whole
    """Of these fields."""
    claim: dict[str, Any]
    """The claim as it is written: :meth:`rlroute.experiments.claims.claim.Claim.to_dict`."""
    arms: dict[str, Trained]
    """What is trained."""
    there_before: list[Name]
    """Runs that had ended before, whose results could be known."""


class Registration(TypedDict):
    """A file ``claim-ID.json`` of a run store."""

    plan: Plan
    """What was said."""
    sha256: Digest
    """Of the plan, as :func:`rlroute.seal.of_part` takes it."""
    registered: Moment
    """When, in UTC."""


def make_plan(claim: Claim, made: Mapping[RunConfig, MadeFrom], there_before: Iterable[str]) -> Plan:
    """Return what is said of a claim before its first run."""
    arms: dict[str, Trained] = {
        name: {"config": config.to_dict(), "made_from": made[config]} for name, config in claim.configs().items()
    }
    return {"version": VERSION, "claim": claim.to_dict(), "arms": arms, "there_before": sorted(there_before)}


def registration_file(store: Path, claim: Claim) -> Path:
    """Return where a store keeps the registration of a claim, of which it has one."""
    return store / f"claim-{claim.id}.json"
