"""Outcomes held against the published ones: what comes out again, bit for bit or within a tolerance, and what a clock
moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from rlroute.experiments.claims.measures import MEASURES
from rlroute.experiments.claims.outcomes import Outcome, PartOutcome
from rlroute.experiments.claims.readings import together
from rlroute.values import differing

BITS = ("torch", "numpy", "cpu_capability", "device_name", "threads", "device", "core")
"""What the bits of figures depend on."""
UNKNOWN, SHOWN = "unknown", 24
"""What an outcome does not say; of a value that differs so many characters are shown."""
MOVED = (*BITS, "registration", "registered", "there_before", "commit", "dirty")
"""What of an outcome is of the try, and not of what came out."""
TOLERANCE = 0.01
"""Of an effect, relatively, where the bits are not those of the published runs and its interval is narrower."""


def timed(outcome: Outcome) -> list[int]:
    """Return the numbers of the parts that hold a clock, from 1 on."""
    return [number for number, part in enumerate(outcome["parts"], 1) if _timed(part)]


def _timed(part: PartOutcome) -> bool:
    return part["measure"] in MEASURES and MEASURES[part["measure"]].timed


def like_published(outcome: Outcome, published: Outcome) -> Outcome:
    """Return an outcome with what a clock, the machine and the commit move as the published one of the same claim has
    it: timed parts and what they decide, seconds, versions.
    """
    parts = [
        theirs if _timed(part) else part for part, theirs in zip(outcome["parts"], published["parts"], strict=True)
    ]
    said: dict[str, Any] = {name: value for name, value in outcome.items() if name not in MOVED}
    said |= {name: value for name, value in published.items() if name in MOVED}
    said |= {"parts": parts, "cost": outcome["cost"] | {"seconds": published["cost"]["seconds"]}}
    if timed(published):
        said["verdict"] = together(part["verdict"] for part in parts)
    return cast(Outcome, said)


def of_one_claim(outcome: Outcome, published: Outcome) -> bool:
    """Whether two outcomes are of one claim, as it is written."""
    return outcome["sha256"] == published["sha256"] and len(outcome["parts"]) == len(published["parts"])


def all_like_published(outcomes: Mapping[str, Outcome], published: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Return outcomes by claim, each like the published one, where there is one of the same claim."""
    return {
        name: like_published(outcome, published[name])
        if name in published and of_one_claim(outcome, published[name])
        else outcome
        for name, outcome in outcomes.items()
    }


def elsewhere(outcome: Outcome, published: Outcome) -> list[str]:
    """Return what its bits depend on that is otherwise than with the published outcome, or that one of them does not
    say; nothing: bits are the same.
    """
    mine, theirs = ({name: one.get(name, UNKNOWN) for name in BITS} for one in (outcome, published))
    return [
        f"{name} {theirs[name]!s:.{SHOWN}}, here {mine[name]!s:.{SHOWN}}"
        for name in BITS
        if mine[name] != theirs[name] or mine[name] == UNKNOWN
    ]


def differences(outcome: Outcome, published: Outcome | None) -> Iterator[str]:
    """Yield where an outcome is not the published one, a line each.

    Where its runs were made by the same core on the same kind of processor, with the same threads, PyTorch and NumPy,
    that is every verdict and every figure but those of a clock, bit for bit. Elsewhere it is each verdict, the number
    of values, and each effect, which has to lie in the published interval, or within :data:`TOLERANCE` of the published
    effect.
    """
    where = f"claim {outcome['claim']}"
    if published is None or not of_one_claim(outcome, published):
        why = "nothing of it is published" if published is None else "it was changed since it was published"
        yield f"{where}: {why}"
        return
    now = like_published(outcome, published)
    if not (otherwise := elsewhere(outcome, published)):
        for path, theirs, mine in differing(cast(dict[str, Any], published), cast(dict[str, Any], now)):
            yield f"{where}: {_said(path)} is {mine!r}, published is {theirs!r}"
        return
    why = "; ".join(otherwise)
    for number, (part, said) in enumerate(zip(now["parts"], published["parts"], strict=True), 1):
        if part["effect"] != said["effect"] and not _near(part["effect"], said):
            yield (
                f"{where}: part {number}: effect is {part['effect']!r}, outside of the published "
                f"{said['interval'] or said['effect']!r} ({why})"
            )
        for field in ("n", "verdict"):
            if part[field] != said[field]:
                yield f"{where}: part {number}: {field} is {part[field]!r}, published is {said[field]!r} ({why})"
    if now["verdict"] != published["verdict"]:
        yield f"{where}: verdict is {now['verdict']!r}, published is {published['verdict']!r} ({why})"


def held(outcome: Outcome, published: Outcome | None) -> str:
    """Return how an outcome is held against the published one, and which parts are not, in a line."""
    if published is None or not of_one_claim(outcome, published):
        return "    held against nothing"
    otherwise = elsewhere(outcome, published)
    how = f"by the published intervals ({'; '.join(otherwise)})" if otherwise else "bit for bit"
    clock = " and ".join(map(str, timed(outcome)))
    left_out = f"; a clock is in part {clock}: not held, nor what is decided by it" if clock else ""
    return f"    held against the published outcome {how}{left_out}"


def _near(effect: float | None, published: PartOutcome) -> bool:
    theirs, ends = published["effect"], published["interval"]
    if effect is None or theirs is None:
        return False
    within = ends is not None and ends[0] <= effect <= ends[1]
    return within or abs(effect - theirs) <= TOLERANCE * abs(theirs)


def _said(path: str) -> str:
    """Return the path of a field in words: parts are counted from 1 on."""
    first, *rest = path.split("/")
    return f"part {int(rest[0]) + 1}: {'/'.join(rest[1:])}" if first == "parts" and rest else path
