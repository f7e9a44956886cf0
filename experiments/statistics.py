"""The statistics of a comparison: pure functions of numbers, none of which looks at a run.

Few seeds are the rule, so intervals are Student's t (at 3 seeds a percentile bootstrap covers 76 % where it says 95 %),
and routers are compared by their differences seed by seed: the same seed means the same initial weights, data order and
validation tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from scipy import optimize, stats

from rlroute.errors import ComparisonError

CONFIDENCE = 0.95
HOLM = 0.05
"""A difference is found where its Holm-adjusted p lies below."""


@dataclass(frozen=True)
class Interval:
    """A mean of n values and its confidence interval; one value has none, so ``low`` and ``high`` are None."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Half the interval's length."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def separated(self) -> bool:
        """Whether the interval exists and leaves zero outside."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return mean +- t_{(1+c)/2, n-1} s / sqrt(n), with s the sample standard deviation (n - 1 below the root).

    Args:
        values: at least one number.
        confidence: c, the share of such intervals that cover the true mean where the values are Gaussian.
    """
    mean, n = math.fsum(values) / len(values), len(values)
    if n == 1:
        return Interval(mean, None, None, n)
    half = _student((1 + confidence) / 2, n - 1) * standard_deviation(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@cache
def _student(share: float, freedom: int) -> float:
    """Return a quantile of Student's t; a figure asks for the same one at each of its points."""
    return float(stats.t.ppf(share, freedom))


def over_seeds(intervals: Sequence[Interval]) -> Interval:
    """Return the interval over seeds of a quantity; one seed keeps its interval over draws."""
    return intervals[0] if len(intervals) == 1 else t_interval([interval.mean for interval in intervals])


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's interval of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953): sound for few trials, and
    near 0 and 1.

    Raises:
        ComparisonError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise ComparisonError(f"{successes} of {n}: want at least one trial and no more successes than trials")
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def differences(a_by_seed: Mapping[int, float], b_by_seed: Mapping[int, float]) -> list[float]:
    """Return a - b seed by seed, in the order of the seeds.

    Raises:
        ComparisonError: the two do not have the same seeds.
    """
    if a_by_seed.keys() != b_by_seed.keys():
        raise ComparisonError(
            f"cannot pair seeds {sorted(a_by_seed)} with seeds {sorted(b_by_seed)}: they must be the same"
        )
    return [a_by_seed[seed] - b_by_seed[seed] for seed in sorted(a_by_seed)]


def paired_difference(a_by_seed: Mapping[int, float], b_by_seed: Mapping[int, float]) -> Interval:
    """Return the t interval of the differences a - b, paired by seed.

    Raises:
        ComparisonError: the two do not have the same seeds.
    """
    return t_interval(differences(a_by_seed, b_by_seed))


def smallest_resolvable(diffs: Sequence[float], power: float = 0.8, alpha: float = 0.05) -> float | None:
    """Return the true mean difference that a two-sided paired t-test at ``alpha`` would find with probability
    ``power``.

    Exact for Gaussian differences of the standard deviation that ``diffs`` have (the test statistic is then of the
    noncentral t distribution), which few seeds estimate badly. None for fewer than two differences.
    """
    n = len(diffs)
    if n < 2:
        return None
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))

    def excess(shift: float) -> float:  # the lower tail as the mirrored upper one: SciPy's own is nan far out
        return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.sf(critical, n - 1, -shift)) - power

    shift = optimize.brentq(excess, 0.0, 3 * critical + 10)
    return float(shift) * standard_deviation(diffs) / math.sqrt(n)


def paired_p_value(diffs: Sequence[float]) -> float | None:
    """Return the two-sided p-value of the paired t-test that the mean of ``diffs`` is zero; None for fewer than two."""
    if len(diffs) < 2:
        return None
    if len(set(diffs)) == 1:  # as between two identical runs, where the statistic is not defined
        return float(diffs[0] == 0)
    return float(stats.ttest_1samp(diffs, 0.0).pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's step-down adjusted p-values (Holm 1979): they bound the chance of *any* false finding among all
    comparisons.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_j).
    """
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def standard_deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation (n - 1 below the root) of at least two values."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
