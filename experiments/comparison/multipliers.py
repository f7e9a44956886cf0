"""Compute multipliers: how much more compute the reference needs for an entry's loss. Pure functions of numbers.

At each budget of compute several widths are trained, and the one of lowest mean loss stands for the entry there: what
this compute buys. Through these points goes a loss law, L(C) = L0 + A C^-a (Kaplan et al. 2020, arXiv 2001.08361;
Hoffmann et al. 2022, arXiv 2203.15556), the reference's and the entry's: bounded (L0, A >= 0 and a of ``EXPONENTS``)
and robust (of a residual beyond ``SOFT`` only the size counts, not its square: soft L1). The multiplier is the mean
horizontal distance of the two curves, in log C, over the losses that *both* reach: nothing is extrapolated. Where they
share none it is a bound, the range of the rungs.

The interval is by bootstrap over seeds: a seed has the same weights and data in all runs, so whole seeds are drawn, and
all is done again, the choice of widths and the laws included. Up to ``ENUMERATED`` seeds all draws are enumerated with
their probabilities, beyond it there are ``DRAWS``. Percentiles of a bootstrap of few seeds cover far too little (76 %
of 95 % at 3 seeds), so the bootstrap gives the standard error of log m alone, times sqrt(n / (n - 1)), and the ends are
at Student's t of n - 1 degrees: exact for a mean of Gaussian values.

Shape suffixes: R draws of seeds, S seeds, J budgets, W widths, G exponents, P losses between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from scipy import stats

from rlroute.experiments.statistics import CONFIDENCE

EXPONENTS = np.geomspace(0.02, 3.0, 120)
SOFT = 0.01
"""Bits per byte."""
ENUMERATED = 6
DRAWS = 999
LOST = 1 - CONFIDENCE
"""More draws than this share without a multiplier: there is no interval."""
Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Laws:
    """Loss laws, one for each draw: floor + scale (C / unit)^-exponent; arrays of shape (R,)."""

    floor: Array
    scale: Array
    exponent: Array
    unit: float

    def loss(self, compute: Array | float) -> Array:
        """Return the loss at a compute, shape (R,)."""
        found: Array = self.floor + self.scale * (compute / self.unit) ** -self.exponent
        return found

    def log_compute(self, loss_PR: Array) -> Array:
        """Return the logarithm of the compute that a loss takes, shape (P, R); NaN where none does."""
        with np.errstate(all="ignore"):
            found: Array = math.log(self.unit) - np.log((loss_PR - self.floor) / self.scale) / self.exponent
        return found


def fit_laws(compute_J: Array, loss_RJ: Array) -> Laws:
    """Return the law of each row of losses.

    The exponents are tried one by one: for each, floor and scale are a linear problem, solved with the weights of soft
    L1 until they stay (iteratively reweighted least squares).

    Args:
        compute_J: at least 3 budgets, different and above 0.
        loss_RJ: losses there.
    """
    unit = float(np.exp(np.log(compute_J).mean()))
    basis_GJ = (compute_J / unit) ** -EXPONENTS[:, None]
    loss_R1J, weight_RGJ = loss_RJ[:, None], np.ones((len(loss_RJ), *basis_GJ.shape))
    for _ in range(8):
        floor_RG, scale_RG = _line(basis_GJ, loss_R1J, weight_RGJ)
        residual_RGJ = loss_R1J - floor_RG[..., None] - scale_RG[..., None] * basis_GJ
        weight_RGJ = 1 / np.sqrt(1 + (residual_RGJ / SOFT) ** 2)
    cost_RG = (np.sqrt(1 + (residual_RGJ / SOFT) ** 2) - 1).sum(2)
    rows, best_R = np.arange(len(loss_RJ)), cost_RG.argmin(1)
    return Laws(floor_RG[rows, best_R], scale_RG[rows, best_R], EXPONENTS[best_R], unit)


def _line(x_GJ: Array, y_R1J: Array, weight_RGJ: Array) -> tuple[Array, Array]:
    """Return the weighted least-squares line through points, offset and slope both at least 0; shapes (R, G)."""
    total_RG = weight_RGJ.sum(2)
    mean_x_RG, mean_y_RG = ((weight_RGJ * values).sum(2) / total_RG for values in (x_GJ, y_R1J))
    dx_RGJ = x_GJ - mean_x_RG[..., None]
    slope_RG = (weight_RGJ * dx_RGJ * y_R1J).sum(2) / (weight_RGJ * dx_RGJ**2).sum(2)
    offset_RG = mean_y_RG - slope_RG * mean_x_RG
    through_0_RG = (weight_RGJ * x_GJ * y_R1J).sum(2) / (weight_RGJ * x_GJ**2).sum(2)
    below = offset_RG < 0
    offset_RG, slope_RG = np.where(below, 0.0, offset_RG), np.where(below, through_0_RG, slope_RG)
    flat = slope_RG < 0
    return np.where(flat, mean_y_RG, offset_RG), np.where(flat, 0.0, slope_RG)


def log_multipliers(reference: Laws, entry: Laws, compute_J: Array) -> Array:
    """Return the mean of log C_reference(L) - log C_entry(L) over the losses L that both reach within the budgets,
    shape (R,): infinite where there is none (above 0: the entry is better everywhere), NaN where one does not fall with
    compute.
    """
    first, last = float(compute_J.min()), float(compute_J.max())
    low_R = np.maximum(reference.loss(last), entry.loss(last))
    high_R = np.minimum(reference.loss(first), entry.loss(first))
    between_PR = low_R + (high_R - low_R) * np.linspace(0.02, 0.98, 13)[:, None]
    distance_R = (reference.log_compute(between_PR) - entry.log_compute(between_PR)).mean(0)
    apart_R = np.where(entry.loss(first) <= reference.loss(last), np.inf, -np.inf)
    found_R = np.where(low_R < high_R, distance_R, apart_R)
    flat_R = (reference.scale <= 0) | (entry.scale <= 0)
    return np.where(flat_R, np.nan, found_R)


# Seeds


def seed_draws(seeds: int) -> tuple[Array, Array]:
    """Return the shares of seeds in each draw of so many with replacement, shape (R, S), and the draws' probabilities;
    the first draw is that of each seed once, and is there whether or not it was drawn.
    """
    if seeds > ENUMERATED:
        counts_RS = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)
        chance_R = np.full(DRAWS, 1 / DRAWS)
    else:
        draws = list(combinations_with_replacement(range(seeds), seeds))
        counts_RS = np.stack([np.bincount(draw, minlength=seeds) for draw in draws])
        ways = [math.factorial(seeds) / math.prod(map(math.factorial, counts)) for counts in counts_RS.tolist()]
        chance_R = np.array(ways) / seeds**seeds
    return np.concatenate([np.ones((1, seeds)), counts_RS]) / seeds, np.concatenate([[0.0], chance_R])


def curve(loss_JWS: Array, share_RS: Array) -> tuple[Array, Array]:
    """Return the lowest mean loss at each budget over the widths, and at which width, shape (R, J)."""
    mean_RJW = np.einsum("jws,rs->rjw", loss_JWS, share_RS)
    return mean_RJW.min(2), mean_RJW.argmin(2)


@dataclass(frozen=True)
class Multiplier:
    """A multiplier with its interval.

    Attributes:
        value: the multiplier; where the two share no loss, the end of the rungs' range beyond which it lies; None where
            losses do not fall with compute.
        low, high: the interval's ends, at most those of the range; None where there is no interval (one seed).
        n: seeds.
        reach: the range is from 1 / reach to reach: what lies beyond is not known.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reach: float

    @property
    def separated(self) -> bool:
        """Whether it is told from 1."""
        return self.low is not None and self.high is not None and (self.low > 1 or self.high < 1)

    def __str__(self) -> str:
        if self.value is None:
            return "no law"
        ends = "" if self.low is None or self.high is None else f" ({self._said(self.low)} to {self._said(self.high)})"
        return f"{self._said(self.value)}{ends}"

    def _said(self, number: float) -> str:
        inside = 1 / self.reach < number < self.reach
        return f"{number:.2f}" if inside else f"{'≥' if number > 1 else '≤'} {number:.2f}"


def multiplier(log_R: Array, chance_R: Array, seeds: int, reach: float) -> Multiplier:
    """Return the multiplier of the first draw, with the interval that the others give.

    Args:
        log_R: the logarithm of the multiplier in each draw.
        chance_R: the draws' probabilities.
        seeds: n.
        reach: the largest ratio of two rungs' compute: what lies beyond is not known.
    """
    value = float(log_R[0])
    if math.isnan(value):
        return Multiplier(None, None, None, seeds, reach)
    furthest, known_R = math.log(reach), np.isfinite(log_R)
    clipped = min(max(value, -furthest), furthest)
    if math.isinf(value) or seeds < 2 or chance_R[~known_R].sum() > LOST:
        return Multiplier(math.exp(clipped), None, None, seeds, reach)
    mean = np.average(log_R[known_R], weights=chance_R[known_R])
    variance = np.average((log_R[known_R] - mean) ** 2, weights=chance_R[known_R])
    half = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1) * math.sqrt(variance * seeds / (seeds - 1))
    low, high = (math.exp(min(max(end, -furthest), furthest)) for end in (value - half, value + half))
    return Multiplier(math.exp(clipped), low, high, seeds, reach)


def compare_curves(
    compute_J: Array,
    reference_JWS: Array,
    entry_JWS: Array,
    log_speed_S: Array | None = None,
    fit: Callable[[Array, Array], Laws] = fit_laws,
) -> Multiplier:
    """Return the compute multiplier of an entry; with speeds, its time multiplier.

    Args:
        compute_J: the budgets.
        reference_JWS, entry_JWS: losses by budget, width and seed.
        log_speed_S: the logarithm of the entry's compute per second over the reference's, by seed.
        fit: fits the laws.
    """
    seeds, reach = reference_JWS.shape[2], float(compute_J.max() / compute_J.min())
    share_RS, chance_R = seed_draws(seeds)
    reference, entry = (fit(compute_J, curve(losses, share_RS)[0]) for losses in (reference_JWS, entry_JWS))
    log_R = log_multipliers(reference, entry, compute_J)
    if log_speed_S is None:
        return multiplier(log_R, chance_R, seeds, reach)
    return multiplier(log_R + share_RS @ log_speed_S, chance_R, seeds, reach * math.exp(abs(log_speed_S.mean())))
