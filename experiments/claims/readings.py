"""From the values of a part, one a seed, to what they say of it: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rlroute.experiments.claims.claim import Part
from rlroute.experiments.statistics import t_interval
from rlroute.experiments.verdicts import LEVEL

Verdict = Literal["holds", "refuted", "inconclusive"]


def read(values: Sequence[float], part: Part, parts: int = 1) -> Verdict:
    """Return what values say of a part (:data:`rlroute.experiments.claims.claim.RULE`).

    A part that is wrong is said to hold in at most 5 %: beyond a single bound that is one tail of the 95 % interval,
    beyond either of two it is one of two tests. A claim of so many ``parts`` that is right is refuted in at most 5 %
    (Bonferroni). Values that are all equal have no spread and are taken as exact; fewer than two say nothing.
    """
    if len(values) < 2:
        return "inconclusive"
    above, below = (
        (-float("inf") if part.above is None else part.above),
        (float("inf") if part.below is None else part.below),
    )
    two = part.above is not None and part.below is not None
    inside, outside = t_interval(values, 1 - LEVEL * (1 + two)), t_interval(values, 1 - LEVEL / parts)
    assert inside.low is not None and inside.high is not None and outside.low is not None and outside.high is not None
    if above < inside.low and inside.high < below:
        return "holds"
    return "refuted" if outside.high < above or outside.low > below else "inconclusive"


def together(parts: Iterable[Verdict]) -> Verdict:
    """Return what is said of a claim: it holds where all parts do, and is refuted where one is."""
    found = set(parts)
    return "refuted" if "refuted" in found else "holds" if found == {"holds"} else "inconclusive"
