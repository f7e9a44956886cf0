"""The registration of a claim: what decides it, written into the store with its SHA-256 before the first run, and held
against whatever comes later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.config import RunConfig
from rlroute.errors import StoreError
from rlroute.experiments.claims.claim import Claim
from rlroute.experiments.comparison.registration import WAY_OUT
from rlroute.schema import Described, Digest, MadeFrom, Moment, Name, Whole

VERSION = 1
"""Of the plan's fields."""


class Trained(TypedDict):
    """An arm of a claim."""

    config: dict[str, Any]
    """The configuration of its runs."""
    made_from: MadeFrom
    """The code and data of its runs."""


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


def refuse_other_plan(runs: Mapping[str, Described], claim: Claim, sha256: str, path: Path) -> None:
    """Refuse runs that were trained for a claim under another plan.

    Args:
        runs: by id, begun or ended: what their config.json says.
        claim: the claim.
        sha256: of its plan.
        path: where it is registered.

    Raises:
        StoreError: naming the first.
    """
    for run, described in runs.items():
        asked = described.get("asked")
        said = sha256 if asked is None else asked.get("claims", {}).get(claim.id, sha256)
        if said != sha256:
            raise StoreError(
                f"{path} was changed after the first run: run {run} was trained under the plan of SHA-256 {said}, "
                f"this one's is {sha256}; {WAY_OUT}"
            )
