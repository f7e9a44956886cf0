"""The registration of a judgement: what is compared, within which margin and by which rule, written into the store with
its SHA-256 before the first run, and held against whatever comes later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.config import RunConfig
from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.comparison.entries import labels
from rlroute.experiments.verdicts import LEVEL, shares
from rlroute.provenance import utc_now
from rlroute.reading import read_described, read_json
from rlroute.records import storing, write_json
from rlroute.schema import Amount, Asked, Digest, MadeFrom, Moment, Name, Part, Whole
from rlroute.seal import of_part
from rlroute.values import differing

MEASURE = "validation bits per byte after the last step, greedy; candidate minus reference, paired by seed"
RULE = (
    "after the seeds of each look: better or worse where the t interval of confidence 1 - level leaves 0 outside, "
    "equivalent where that of confidence 1 - 2 level lies within the margin; the first look that says one of them is "
    "the last; a run that diverges ends it unresolved"
)
WAY_OUT = "what was said before the first run stands: another plan wants another store"
VERSION = 1
"""Of the plan's fields and rule."""


class Trained(TypedDict):
    """What is trained for a plan."""

    config: dict[str, Any]
    """The configuration of its runs."""
    made_from: MadeFrom
    """The code and data of its runs."""


class Party(Trained):
    """An entry of a judgement."""

    label: str
    """What it is called."""
    settings: str
    """Whose they are."""


class Plan(TypedDict):
    """What is said before the first run."""

    version: Whole
    """Of these fields."""
    candidate: Party
    """What is judged."""
    reference: Party
    """Against what."""
    measure: str
    """What a difference is."""
    margin: Amount
    """Differences below it do not matter, in bits per byte."""
    looks: list[Whole]
    """Seeds, from 0 on, after which verdicts are looked for."""
    level: Part
    """The highest probability of a wrong verdict, over all looks."""
    levels: list[Part]
    """Of each look."""
    rule: str
    """How a look decides, and when it is the last."""
    there_before: list[Name]
    """Runs that had ended before, whose results could be known."""


class Registration(TypedDict):
    """A file ``judgement-HASH-against-HASH.json`` of a run store."""

    plan: Plan
    """What was said."""
    sha256: Digest
    """Of the plan, as :func:`rlroute.seal.of_part` takes it."""
    registered: Moment
    """When, in UTC."""


P = TypeVar("P", bound=Mapping[str, Any])
R = TypeVar("R", bound=Mapping[str, Any])


def make_plan(
    candidate: RunConfig,
    reference: RunConfig,
    made: Mapping[RunConfig, MadeFrom],
    settings: Sequence[str],
    margin: float,
    at: Sequence[int],
    there_before: Iterable[str],
) -> Plan:
    """Return what a judgement says before its first run; ``settings`` are whose the candidate's and the reference's
    are, ``at`` the numbers of seeds at which it looks.
    """
    pair = {"candidate": candidate, "reference": reference}
    called = labels({name: config.to_dict() for name, config in pair.items()})
    parties: dict[str, Party] = {
        name: {"label": called[name], "settings": whose, "config": config.to_dict(), "made_from": made[config]}
        for (name, config), whose in zip(pair.items(), settings, strict=True)
    }
    return {
        "version": VERSION,
        "candidate": parties["candidate"],
        "reference": parties["reference"],
        "measure": MEASURE,
        "margin": margin,
        "looks": list(at),
        "level": LEVEL,
        "levels": shares(at),
        "rule": RULE,
        "there_before": sorted(there_before),
    }


def registration_file(store: Path, candidate: RunConfig, reference: RunConfig) -> Path:
    """Return where a store keeps the registration of two entries, of which it has one."""
    return store / f"judgement-{candidate.content_hash()}-against-{reference.content_hash()}.json"


def register(path: Path, plan: P, kind: type[R], folders: Iterable[Path], plan_of: Callable[[Asked], str | None]) -> R:
    """Write a plan down, or return the registration that is there and says the same; what is refused leaves the store
    as it was.

    Args:
        path: where.
        plan: what is said before the first run.
        kind: of its registration: a plan, its SHA-256, and when it was registered.
        folders: of its runs, begun or not.
        plan_of: from what asked for a run to the SHA-256 of the plan that it had in place of this one; None: it had
            none.

    Raises:
        ConfigError: what is registered says something else; the message names what, and both values.
        StoreError: it was changed, or cannot be read or written; or a run was trained under another plan.
    """
    if path.exists():
        found = registered(path, plan, kind)
        _refuse_other_plan(folders, plan_of, found["sha256"], f"{path} was changed after the first run")
        return found
    sha256 = of_part(plan)
    _refuse_other_plan(folders, plan_of, sha256, f"{path} is gone, and was there before the first run")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"plan": plan, "sha256": sha256, "registered": utc_now()})
    return registered(path, plan, kind)


def registered(path: Path, plan: P, kind: type[R]) -> R:
    """Return the registration that is there, which has to say the same as a plan, but for the runs that were there
    before it.

    Raises:
        ConfigError, StoreError: as :func:`register` does.
    """
    registration = read_registration(path, kind)
    was = registration["plan"]
    now = json.loads(json.dumps(plan)) | {"there_before": was["there_before"]}
    for field, before, after in differing(was, now):
        if field.startswith(("looks/", "levels/")):
            before, after = was["looks"], now["looks"]
        raise ConfigError(f"{_said(field)}: {path} was registered with {before!r}, now it is {after!r}; {WAY_OUT}")
    return cast(R, registration)


def read_registration(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Return what a registration of a kind says.

    Raises:
        StoreError: it is none, or its plan is not the one that was hashed.
    """
    registration = read_json(path, kind)
    if (found := of_part(registration["plan"])) != registration["sha256"]:
        said = registration["sha256"]
        raise StoreError(f"{path} was changed after it was registered: its plan's SHA-256 is {found}, it says {said}")
    return registration


def _refuse_other_plan(folders: Iterable[Path], plan_of: Callable[[Asked], str | None], sha256: str, what: str) -> None:
    """Refuse runs that were trained under another plan: what is registered is then not ``what`` was."""
    for folder in folders:
        asked = read_described(folder).get("asked") if (folder / "config.json").exists() else None
        said = None if asked is None else plan_of(asked)
        if said not in (None, sha256):
            raise StoreError(
                f"{what}: run {folder.name} was trained under the plan of SHA-256 {said}, this one's is {sha256}; "
                f"{WAY_OUT}"
            )


def _said(field: str) -> str:
    """Return what of a plan has changed, in words where a field does not say it."""
    party, _, rest = field.partition("/")
    if rest.startswith("made_from/routers/"):
        return f"the {party}'s code has changed ({rest.removeprefix('made_from/')})"
    if rest.startswith("made_from/"):
        return f"what the {party} is made from has changed ({rest.removeprefix('made_from/')})"
    return "other looks (--max-seeds)" if party in ("looks", "levels") else f"another {field.replace('/', ' ')}"
