"""Intervals and tests agree with scipy, with hand-computed cases and with what they promise."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from rlroute.errors import ComparisonError
from rlroute.experiments.statistics import (
    differences,
    holm,
    paired_difference,
    paired_p_value,
    smallest_resolvable,
    t_interval,
)

VALUES = [2.41, 2.44, 2.38, 2.5, 2.47]


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_t_interval_is_scipys(confidence: float) -> None:
    interval = t_interval(VALUES, confidence)
    low, high = stats.t.interval(confidence, len(VALUES) - 1, loc=np.mean(VALUES), scale=stats.sem(VALUES))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((np.mean(VALUES), low, high))
    assert interval.n == len(VALUES)


def test_t_interval_by_hand() -> None:
    interval = t_interval([1.0, 2.0, 3.0])  # s = 1, t_{0.975, 2} = 4.302653
    assert interval.mean == 2.0 and interval.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval() -> None:
    interval = t_interval([2.5])
    assert (interval.mean, interval.low, interval.high, interval.n) == (2.5, None, None, 1)
    assert interval.half_width is None and not interval.separated


def test_t_interval_covers_as_often_as_it_says() -> None:
    draw = random.Random(0).gauss
    intervals = [t_interval([draw(1.0, 2.0) for _ in range(3)], 0.9) for _ in range(2000)]
    covered = sum(i.low < 1.0 < i.high for i in intervals if i.low is not None and i.high is not None)
    assert covered / 2000 == pytest.approx(0.9, abs=0.02)


def test_differences_are_paired_by_seed_not_by_position() -> None:
    a, b = {2: 5.0, 0: 1.0, 1: 3.0}, {0: 0.5, 1: 2.0, 2: 5.5}
    assert differences(a, b) == [0.5, 1.0, -0.5]
    assert paired_difference(a, b) == t_interval([0.5, 1.0, -0.5])


def test_pairing_takes_the_spread_between_seeds_out() -> None:
    a = {seed: value + 0.01 for seed, value in enumerate(VALUES)}
    interval = paired_difference(a, dict(enumerate(VALUES)))
    assert interval.separated and interval.mean == pytest.approx(0.01)


def test_differing_seeds_cannot_be_paired() -> None:
    with pytest.raises(ComparisonError, match=r"\[0, 1\].*\[0, 2\]"):
        paired_difference({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0})


def test_p_value_is_scipys_and_agrees_with_the_interval() -> None:
    draw = random.Random(1).gauss
    for shift in (0.0, 0.5, 1.0, 2.0):
        diffs = [draw(shift, 1.0) for _ in range(6)]
        p = paired_p_value(diffs)
        assert p == pytest.approx(stats.ttest_1samp(diffs, 0.0).pvalue) and p is not None
        assert (p < 0.05) == t_interval(diffs).separated
    assert paired_p_value([0.0, 0.0]) == 1.0 and paired_p_value([0.5, 0.5]) == 0.0 and paired_p_value([1.0]) is None


@pytest.mark.parametrize("n", [2, 3, 5, 8, 50])
def test_smallest_resolvable_has_the_power_it_says(n: int) -> None:
    diffs = list(np.random.default_rng(n).normal(0.3, 1.5, n))
    delta = smallest_resolvable(diffs)
    assert delta is not None
    draw = np.random.default_rng(0).normal(delta, np.std(diffs, ddof=1), (20_000, n))
    found = stats.ttest_1samp(draw, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_half_a_standard_deviation_needs_34_pairs() -> None:
    """As G*Power 3 says (Faul et al. 2007) of a paired test, two-sided at 5 % with power 80 %."""
    for n, enough in ((33, False), (34, True)):
        diffs = list(np.random.default_rng(n).normal(size=n))
        delta = smallest_resolvable(diffs)
        assert delta is not None and (delta <= 0.5 * np.std(diffs, ddof=1)) == enough


def test_smallest_resolvable_of_few_or_equal_differences() -> None:
    assert smallest_resolvable([1.0]) is None and smallest_resolvable([]) is None
    assert smallest_resolvable([0.2, 0.2]) == 0.0


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
