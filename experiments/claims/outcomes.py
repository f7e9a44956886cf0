"""What was found of claims, as it is stored: a line of claims.jsonl each, read, merged, and held against the ledger and
against its own values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.errors import StoreError
from rlroute.experiments import RESULTS
from rlroute.experiments.claims.claim import Claim
from rlroute.experiments.claims.readings import Verdict, read, together
from rlroute.experiments.statistics import t_interval
from rlroute.foreign import Unfit, hold, why
from rlroute.reading import read_lines
from rlroute.records import write_atomically
from rlroute.schema import Amount, Digest, Moment, Name, Noted, Number, Whole
from rlroute.values import differing

FILE = "claims.jsonl"
PUBLISHED = RESULTS / FILE
"""The published outcomes."""
NEAR = 1e-9
"""Sums of floating-point numbers may differ by so much of their size between platforms."""


class PartOutcome(TypedDict):
    """What was found of a part of a claim."""

    says: str
    """The part in words."""
    measure: str
    """What is measured: a name of :data:`rlroute.experiments.claims.measures.MEASURES`."""
    of: dict[str, Number]
    """What each arm counts in it."""
    above: Number | None
    """The bound below which the claim is wrong."""
    below: Number | None
    """The bound above which the claim is wrong."""
    unit: str
    """Of the effect."""
    effect: Number | None
    """The mean over seeds; None where there is no value."""
    interval: list[Number] | None
    """Its 95 % interval; None for fewer than two values."""
    n: Whole
    """Values, one a seed."""
    verdict: Verdict
    """What they say."""
    values: dict[str, Number]
    """By seed."""
    undefined: list[str]
    """Of which arm and seed there is no value; nothing is then said."""


class Cost(TypedDict):
    """What the runs of a claim took, those that it has in common with others included."""

    runs: Whole
    """How many."""
    tokens: Whole
    """Of training."""
    training_flops: Whole
    """Of all steps."""
    seconds: Amount
    """Of training and evaluation, one run after the other."""


class Outcome(TypedDict):
    """A line of claims.jsonl: what was found of a claim."""

    claim: Name
    """Its id."""
    sha256: Digest
    """Of the claim as it was written before the first run."""
    verdict: Verdict
    """holds, refuted or inconclusive."""
    parts: list[PartOutcome]
    """In the claim's order."""
    seeds: list[Whole]
    """Of every arm."""
    cost: Cost
    """Of the runs."""
    runs: list[Name]
    """Their ids."""
    registration: Digest
    """SHA-256 of the registered plan."""
    registered: Moment
    """When."""
    there_before: Whole
    """Runs that had ended before."""
    diverged: list[Name]
    """Runs that diverged."""
    core: Digest
    """Of rlroute's own sources, of which the runs were made."""
    commit: str
    """Of the repository, or unknown; all of them, where runs were made at several."""
    dirty: bool
    """Whether files differed from it."""
    torch: str
    """PyTorch's version."""
    numpy: NotRequired[str]
    """NumPy's version; old outcomes do not say it."""
    cpu_capability: str
    """The instruction set."""
    threads: Whole | Noted
    """Of a run."""
    device: str
    """Where it was computed."""
    device_name: NotRequired[str]
    """The kind of processor; old outcomes do not say it."""


def interval_of(values: list[float]) -> tuple[float | None, list[float] | None]:
    """Return the mean of values and the ends of its 95 % interval."""
    if not values:
        return None, None
    found = t_interval(values)
    return found.mean, None if found.low is None or found.high is None else [found.low, found.high]


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """Return stored outcomes by claim.

    Raises:
        StoreError: the file cannot be read, or a line is no outcome.
    """
    found: dict[str, Outcome] = {}
    for where, line in read_lines(path, follow=True):
        try:
            hold(line, Outcome)
            for number, part in enumerate(line["parts"]):
                if part["interval"] is not None and len(part["interval"]) != 2:
                    raise Unfit(" has more or fewer than two ends", "parts", number, "interval")
        except Unfit as error:
            raise StoreError(f"{where}: {why(error)}") from error
        outcome = cast(Outcome, line)
        if outcome["claim"] in found:
            raise StoreError(f"{where}: claim {outcome['claim']} is there twice")
        found[outcome["claim"]] = outcome
    return found


def merge_outcomes(path: Path, new: Iterable[Outcome], order: Iterable[str]) -> dict[str, Outcome]:
    """Write outcomes in place of those of the same claims, in the order of the ledger, and return all of them."""
    found = read_outcomes(path) if path.exists() else {}
    found |= {outcome["claim"]: outcome for outcome in new}
    ids = [*(name for name in order if name in found), *sorted(found.keys() - set(order))]
    found = {name: found[name] for name in ids}
    write_atomically(path, "".join(json.dumps(outcome, allow_nan=False) + "\n" for outcome in found.values()))
    return found


# What is wrong with them


def faults(outcomes: Mapping[str, Outcome], claims: Mapping[str, Claim]) -> Iterator[str]:
    """Yield what stored outcomes say that the ledger or their own values do not: a line each."""
    for name, outcome in outcomes.items():
        if (claim := claims.get(name)) is None:
            yield f"claim {name}: the ledger has no such claim"
        elif outcome["sha256"] != claim.sha256:
            yield (
                f"claim {name} was changed after its runs: its SHA-256 is {claim.sha256}, they were made for "
                f"{outcome['sha256']}; run it again"
            )
        else:
            yield from (f"claim {name}: {fault}" for fault in _faults(outcome, claim))


def _faults(outcome: Outcome, claim: Claim) -> Iterator[str]:
    if len(outcome["parts"]) != len(claim.parts) or outcome["seeds"] != list(claim.seeds):
        yield "its parts or seeds are not the claim's"
        return
    for number, (said, part) in enumerate(zip(outcome["parts"], claim.parts, strict=True), 1):
        plain = json.loads(json.dumps(asdict(part)))
        for field, recorded, wanted in differing({key: said[key] for key in plain}, plain):  # type: ignore[literal-required]
            yield f"part {number}: {field} is {recorded!r}, the claim says {wanted!r}"
        values = list(said["values"].values())
        if not said["undefined"] and list(said["values"]) != [str(seed) for seed in claim.seeds]:
            yield f"part {number}: it has values of seeds {', '.join(said['values'])}, want all of {list(claim.seeds)}"
        effect, interval = interval_of(values)
        for field, wanted in (("effect", effect), ("interval", interval), ("n", len(values))):
            if not _near(said[field], wanted):  # type: ignore[literal-required]
                yield f"part {number}: {field} is {said[field]!r}, its values give {wanted!r}"  # type: ignore[literal-required]
        verdict = read([] if said["undefined"] else values, part, len(claim.parts))
        if said["verdict"] != verdict:
            yield f"part {number}: verdict is {said['verdict']!r}, its values give {verdict!r}"
    whole = together(part["verdict"] for part in outcome["parts"])
    if outcome["verdict"] != whole:
        yield f"verdict is {outcome['verdict']!r}, its parts give {whole!r}"


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_near, one, other))
    known = isinstance(one, int | float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=NEAR, abs_tol=NEAR) if known else one is other
