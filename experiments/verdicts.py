"""What a set of paired differences says of one entry against another: better, worse, equivalent within a margin, or
unresolved; at a number of seeds that was fixed, or with looks on the way. Pure functions of numbers.

A difference is entry minus reference, seed by seed, in bits per byte: below 0 is better. Two questions are asked of
it, each by one-sided t-tests: is it on one side of 0 (level / 2 for either side), and is it within the margin (two
one-sided tests, Schuirmann 1987, doi 10.1007/BF01068419, each at the level). Whatever the true difference d, wrong
verdicts have a probability of at most the level where differences are Gaussian: *better* and *worse* are wrong where d
is 0 or of the other sign, *equivalent* where abs(d) is the margin or more, and at abs(d) >= margin both wrong answers
lie in one tail of one statistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rlroute.limits import Between

if TYPE_CHECKING:  # SciPy is loaded late: a command line's help shows the margin
    from rlroute.experiments.statistics import Interval

MARGIN = 0.02
"""Bits per byte: differences below it do not matter, unless somebody says otherwise before the runs."""
LEVEL = 0.05
"""The highest probability of a wrong verdict."""
LOOKS = (3, 4, 6, 8, 12, 16)
"""Seeds at which a judgement looks; beyond them each look has twice the seeds of the one two before."""
Seeds = Annotated[int, Between(1, 10_000)]
"""How many seeds an entry is trained with."""
MaxSeeds = Annotated[int, Between(LOOKS[0], 10_000)]
"""The most seeds of a judgement."""
MAX_SEEDS = LOOKS[-1]


@dataclass(frozen=True)
class Verdict:
    """What is said of an entry; nothing of either kind is *unresolved*, both are "worse, by less than m"."""

    direction: Literal["better", "worse"] | None
    equivalent: bool
    margin: float

    @property
    def resolved(self) -> bool:
        """Whether anything is said."""
        return self.equivalent or self.direction is not None

    def __str__(self) -> str:
        if self.direction is None:
            return f"equivalent within {self.margin:g}" if self.equivalent else "unresolved"
        return f"{self.direction}, by less than {self.margin:g}" if self.equivalent else self.direction


def verdict(diffs: Sequence[float], margin: float = MARGIN, level: float = LEVEL) -> Verdict:
    """Return the verdict of paired differences whose number was fixed beforehand, or of one look (:func:`shares`).

    Differences that are all equal have no spread and are taken as exact: those between two runs of one computation are
    0, and equivalent. Fewer than two differences resolve nothing.

    Args:
        diffs: entry minus reference by seed.
        margin: m, above 0.
        level: the highest probability of a wrong verdict.
    """
    from rlroute.experiments.statistics import standard_deviation

    if len(diffs) < 2:
        return Verdict(None, False, margin)
    mean = math.fsum(diffs) / len(diffs)
    better, worse, equivalent = decide(mean, standard_deviation(diffs), len(diffs), margin, level)
    return Verdict("better" if better else "worse" if worse else None, bool(equivalent), margin)


def decide(mean: Any, deviation: Any, n: Any, margin: float, level: Any) -> tuple[Any, Any, Any]:
    """Return whether differences are better, worse, and equivalent; numbers or arrays that broadcast.

    Args:
        mean: of the differences.
        deviation: their sample standard deviation.
        n: how many there are, at least 2.
        margin: m.
        level: of each of the two questions.
    """
    from scipy import stats

    error = deviation / n**0.5
    side, within = (stats.t.ppf(1 - tail, n - 1) * error for tail in (level / 2, level))
    return mean + side < 0, mean - side > 0, abs(mean) + within < margin


def intervals(diffs: Sequence[float], level: float = LEVEL) -> tuple[Interval, Interval]:
    """Return the two intervals that :func:`verdict` reads: the one that is held against 0, of confidence 1 - level, and
    the one that is held against the margin, of 1 - 2 level.
    """
    from rlroute.experiments.statistics import t_interval

    return t_interval(diffs, 1 - level), t_interval(diffs, 1 - 2 * level)


# Looks on the way


def looks(most: int) -> list[int]:
    """Return the numbers of seeds at which a judgement of at most so many looks; the most is always one of them."""
    found = list(LOOKS)
    while found[-1] < most:
        found.append(found[-2] * 2)
    return [n for n in found if n < most] + [most]


def shares(at: Sequence[int], level: float = LEVEL) -> list[float]:
    """Return the level of each look: its share of the whole, in proportion to its seeds.

    Errors over all looks are then at most the level, whatever their dependence (Bonferroni): it needs no constants, and
    no assumption on how results of successive looks hang together. Early looks get less because a t-test of three
    differences stands on the shape of their distribution most.
    """
    return [level * n / sum(at) for n in at]
