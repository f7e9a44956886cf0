"""How good an estimator of a known gradient is: pure functions of its draws.

With G the target (P numbers), g_1 .. g_n independent estimates, m their mean, S their covariance, and everything in
units of |G|:

- cosine: the mean over draws of cos(g_i, G); what one micro-batch is worth as a direction.
- mean cosine: cos(m, G); towards it the cosine rises as estimates are averaged. Below 1 by the noise left in m, and by
  bias.
- gain: the mean of <g_i, G> / |G|^2: how much of G an estimate holds. 1 where unbiased.
- squared bias: |E g - G|^2 / |G|^2 by the U-statistic over pairs i != j of <g_i - G, g_j - G>, from which the noise of
  m is thereby taken out; it may come out below 0. ``floor`` is what |m - G| / |G| would be on average without any bias,
  tr(S / n)^(1/2) / |G|.
- variance: tr S / |G|^2.
- SNR: gain^2 |G|^2 / tr S, the power of the useful part of the mean over the noise; 0 where the mean points away from
  G. Averaging 1 / SNR micro-batches brings it to 1, whatever the scale of the estimator.

Intervals are of 95 %: Student's t over draws for means, the jackknife over draws (Efron 1982) for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from rlroute.experiments.statistics import CONFIDENCE, Interval, over_seeds, t_interval

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Signal:
    """The quality of one estimator at one target; see the module for the definitions.

    Attributes:
        draws: n; None where all choices were enumerated: the figures are then exact and have no intervals.
        norm: |G|, nats per unit of logit.
        deterministic: all draws are equal: there is no noise, variance is 0 and the SNR has no value.
    """

    draws: int | None
    norm: float
    deterministic: bool
    cosine: Interval
    mean_cosine: Interval
    gain: Interval
    squared_bias: Interval
    floor: float
    variance: Interval
    snr: Interval | None


def measure(estimates_NP: Floats, target_P: Floats) -> Signal:
    """Return the quality of n estimates, n at least 2; a target of 0 has no direction and gives cosines of 0."""
    norm = float(np.linalg.norm(target_P))
    unit_P = target_P / norm if norm else target_P
    draws_NP = estimates_NP / norm if norm else estimates_NP
    n = len(draws_NP)
    if _all_equal(draws_NP):
        return replace(measure_enumerated(estimates_NP[:1], np.ones(1), target_P), draws=n)
    mean_P, along_N = draws_NP.mean(0), draws_NP @ unit_P
    spread_N = np.square(draws_NP - mean_P).sum(1) * n / (n - 1)
    gain, variance = _mean(along_N), _mean(spread_N)
    return Signal(
        draws=n,
        norm=norm,
        deterministic=False,
        cosine=_mean(_cosines(draws_NP, unit_P)),
        mean_cosine=_jackknife(float(_cosines(mean_P[None], unit_P)[0]), _cosines(_means_without(draws_NP), unit_P)),
        gain=gain,
        squared_bias=_squared_bias(draws_NP - unit_P),
        floor=math.sqrt(variance.mean / n),
        variance=variance,
        snr=_snr(gain, float(np.var(along_N, ddof=1)), variance.mean),
    )


def measure_enumerated(estimates_NP: Floats, prob_N: Floats, target_P: Floats) -> Signal:
    """Return the quality of an estimator of which every possible value and its probability are known; nothing is left
    to chance.
    """
    norm = float(np.linalg.norm(target_P))
    unit_P = target_P / norm if norm else target_P
    draws_NP = estimates_NP / norm if norm else estimates_NP
    mean_P = prob_N @ draws_NP
    gain, variance = float(mean_P @ unit_P), float(prob_N @ np.square(draws_NP - mean_P).sum(1))
    deterministic = _all_equal(draws_NP)
    return Signal(
        draws=None,
        norm=norm,
        deterministic=deterministic,
        cosine=_exactly(float(prob_N @ _cosines(draws_NP, unit_P))),
        mean_cosine=_exactly(_cosines(mean_P[None], unit_P)[0]),
        gain=_exactly(gain),
        squared_bias=_exactly(np.square(mean_P - unit_P).sum()),
        floor=0.0,
        variance=_exactly(variance),
        snr=None if deterministic else _exactly(max(gain, 0.0) ** 2 / variance),
    )


def without_target_error(signal: Signal, error: float) -> Signal:
    """Return a signal whose squared bias is rid of the target's own noise, which it holds on top: a target known to
    ``error`` |G|.

    |E g - G'|^2 is on average |E g - G|^2 + error^2 |G'|^2 for a noisy target G'. The other figures stay: cosines and
    gains are too low by error^2 / 2 and error^2.
    """
    found = signal.squared_bias
    low, high = (None if end is None else end - error**2 for end in (found.low, found.high))
    return replace(signal, squared_bias=Interval(found.mean - error**2, low, high, found.n))


def relative_bias(squared: Interval) -> Interval:
    """Return |E g - G| / |G| from its square, cut off at 0."""
    low, high = (None if end is None else _root(end) for end in (squared.low, squared.high))
    return Interval(_root(squared.mean), low, high, squared.n)


def over_seeds_by_factor(intervals: Sequence[Interval]) -> Interval:
    """Return the interval over seeds of a positive quantity whose seeds differ by factors: of the geometric mean.

    Where one of several is not above 0, so is the mean: 0, with the upper end of the plain interval.
    """
    means = [interval.mean for interval in intervals]
    plain = over_seeds(intervals)
    if len(means) == 1:
        return replace(plain, low=None if plain.low is None else max(plain.low, 0.0))
    if min(means) <= 0:
        return replace(plain, mean=0.0, low=0.0)
    logs = t_interval([math.log(mean) for mean in means])
    assert logs.low is not None and logs.high is not None
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(min(logs.high, 700.0)), logs.n)


def _snr(gain: Interval, gain_variance: float, noise: float) -> Interval:
    """Return gain^2 over noise, less what noise alone would give: the square of a mean of n is too large by its
    variance.
    """
    useful = max(gain.mean, 0.0) ** 2 - (gain_variance / gain.n if gain.mean > 0 else 0.0)
    low, high = (None if end is None else max(end, 0.0) ** 2 / noise for end in (gain.low, gain.high))
    return Interval(max(useful, 0.0) / noise, low, high, gain.n)


def _squared_bias(errors_NP: Floats) -> Interval:
    """Return the mean of <e_i, e_j> over pairs i != j, which estimates |E e|^2 without bias."""
    n, sum_P, square_N = len(errors_NP), errors_NP.sum(0), np.square(errors_NP).sum(1)
    whole = (sum_P @ sum_P - square_N.sum()) / (n * (n - 1))
    if n == 2:
        return Interval(float(whole), None, None, n)
    others_NP = sum_P - errors_NP
    without_N = (np.square(others_NP).sum(1) - (square_N.sum() - square_N)) / ((n - 1) * (n - 2))
    return _jackknife(float(whole), without_N)


def _jackknife(value: float, without_N: Floats) -> Interval:
    """Return the interval of a statistic from its values with each draw left out."""
    n = len(without_N)
    error = math.sqrt((n - 1) / n * float(np.square(without_N - without_N.mean()).sum()))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Interval(value, value - half, value + half, n)


def _means_without(draws_NP: Floats) -> Floats:
    means_NP: Floats = (draws_NP.sum(0) - draws_NP) / (len(draws_NP) - 1)
    return means_NP


def _cosines(draws_NP: Floats, unit_P: Floats) -> Floats:
    """Return each row's cosine to a unit vector; 0 for rows of zeros."""
    norm_N = np.linalg.norm(draws_NP, axis=1)
    cosines_N: Floats = np.divide(draws_NP @ unit_P, norm_N, out=np.zeros_like(norm_N), where=norm_N > 0)
    return cosines_N


def _all_equal(draws_NP: Floats) -> bool:
    """Whether nothing but rounding tells the draws apart."""
    return bool(np.abs(draws_NP - draws_NP[0]).max() <= 1e-12 * np.abs(draws_NP[0]).max())


def _exactly(value: float) -> Interval:
    return Interval(float(value), None, None, 1)


def _mean(values_N: Floats) -> Interval:
    return t_interval(values_N.tolist())


def _root(value: float) -> float:
    return math.sqrt(max(value, 0.0))
