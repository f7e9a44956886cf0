"""What is measured of a stored run, or of two of one seed: one number, or none where it is not defined.

Shape suffixes: L routed sites, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from rlroute import metrics
from rlroute.experiments.claims import probes
from rlroute.experiments.claims.probes import Sample
from rlroute.experiments.comparison.regrets import regret_of
from rlroute.reading import worst_vio
from rlroute.schema import EvalRow, RunRecord

WINDOW = 32
"""Steps before one, to whose median gradient norm it is held."""
SPIKE = 3.0
"""A gradient norm of so many times that median is a spike."""
START, MIDDLE, END = (0.0, 0.01), (0.125, 0.333), (0.9, 1.0)
"""Windows of the steps."""


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
        what: it is.
        unit: of it.
        of: the number; of a measure of two runs, of the first held against the second.
        runs: 1 or 2.
        timed: whether a clock is in it, so that another try gives another number.
        spread: whether its value is how far the number lies from the median over an arm's seeds: the mean of that is
            a spread that can be compared by t intervals (Brown and Forsythe 1974).
        scale: what a number without a unit is one of, in a word.
    """

    what: str
    unit: str
    of: Callable[..., float | None]
    runs: int = 1
    timed: bool = False
    spread: bool = False
    scale: str = ""


def _of_record(of: Callable[[RunRecord], float | None]) -> Callable[[Sample], float | None]:
    return lambda sample: of(sample.record)


def _of_final(of: Callable[[EvalRow], float | None]) -> Callable[[Sample], float | None]:
    def value(sample: Sample) -> float | None:
        final = sample.record.summary["final"]
        return None if final is None else of(final)

    return value


# Of one run


def crowd(final: EvalRow, experts: int = 2) -> float:
    """Return the share of the pairs that the most loaded experts have, at the site where it is largest."""
    return max(sum(sorted(load_E)[-experts:]) for load_E in final["load_LE"])


def load_swing(record: RunRecord) -> float | None:
    """Return the share of the pairs that change their expert from a step to the next, over the second half of the
    training, at the worst site: half the sum of the loads' absolute differences.
    """
    rows = record.loads[len(record.loads) // 2 :]
    if len(rows) < 2:
        return None
    moved_NL = [
        [sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2 for one, other in zip(*loads, strict=True)]
        for loads in zip((row["load_LE"] for row in rows), (row["load_LE"] for row in rows[1:]), strict=False)
    ]
    return max(math.fsum(moved) / len(moved) for moved in zip(*moved_NL, strict=True))


def gini_over(record: RunRecord, first: float, last: float) -> float | None:
    """Return the Gini coefficient of the loads in training, the mean over sites and over the logged steps between two
    shares of all steps.
    """
    steps = record.loads[-1]["step"] if record.loads else 0
    rows = [row["load_LE"] for row in record.loads if first * steps <= row["step"] <= last * steps]
    found = [float(metrics.gini(torch.tensor(load_E))) for load_LE in rows for load_E in load_LE]
    return math.fsum(found) / len(found) if found else None


def gini_change(one: tuple[float, float], other: tuple[float, float]) -> Callable[[RunRecord], float | None]:
    """Return a measure of that coefficient in one window less that in another."""

    def value(record: RunRecord) -> float | None:
        mine, theirs = gini_over(record, *one), gini_over(record, *other)
        return None if mine is None or theirs is None else mine - theirs

    return value


def loss_rise(record: RunRecord) -> float | None:
    """Return the largest rise of a step's training loss over the least before it, in nats."""
    least, rise = math.inf, 0.0
    for row in record.train:
        rise, least = max(rise, row["loss"] - least), min(least, row["loss"])
    return rise if record.train else None


def spikes(record: RunRecord) -> float | None:
    """Return the share of the steps whose gradient norm is more than three times the median of the 32 before."""
    norms = [row["grad_norm"] for row in record.train]
    late = range(WINDOW, len(norms))
    return sum(norms[i] > SPIKE * median(norms[i - WINDOW : i]) for i in late) / len(late) if late else None


def drop_trend(final: EvalRow) -> float | None:
    """Return the drop rate in the last quarter of the sequences less that in the first."""
    first, *_, last = final.get("drop_by_position", [None, None])
    return None if first is None or last is None else last - first


def others_drop(record: RunRecord) -> float | None:
    """Return the share of a token's pairs that are dropped, or not any more, when other sequences change; the most of
    any site.
    """
    measured = record.summary.get("measured")
    others = None if measured is None else measured["evaluation"]["others"]
    return None if others is None else max(others["drops_L"], default=0.0)


def later_routes(record: RunRecord) -> float | None:
    """Return the share of routes that change when later tokens do, the most of any site."""
    measured = record.summary.get("measured")
    return None if measured is None else max(measured["evaluation"]["later"]["routes_L"], default=0.0)


def sure_regret(record: RunRecord) -> float | None:
    """Return the regret of the three most confident tenths of the tokens over that of the three least confident."""
    regret = regret_of(record)
    if not isinstance(regret, dict) or len(regret["nats_C"]) < 6:
        return None
    unsure = math.fsum(regret["nats_C"][:3])
    return math.fsum(regret["nats_C"][-3:]) / unsure if unsure else None


def better_unsure(record: RunRecord) -> float | None:
    """Return which share of the routes of equal compute is better than the one taken, in the three least confident
    tenths of the tokens.
    """
    regret = regret_of(record)
    shares = regret["better_C"][:3] if isinstance(regret, dict) else []
    known = [share for share in shares if share is not None]
    return math.fsum(known) / len(known) if known else None


# Of two runs of one seed


def _curve(record: RunRecord, axis: str) -> list[tuple[float, float]]:
    """Return evaluations as pairs of what was spent and bits per byte."""
    return [(float(row[axis]), row["bits_per_byte"]) for row in record.evals]  # type: ignore[literal-required]


def _at(curve: Sequence[tuple[float, float]], spent: float) -> float | None:
    """Return the bits per byte at what was spent, between two evaluations by linear interpolation."""
    for (x, y), (after, later) in pairwise(curve):
        if x <= spent <= after:
            return y + (later - y) * (spent - x) / (after - x) if after > x else later
    return None


def _until(curve: Sequence[tuple[float, float]], bits: float) -> float:
    """Return what was spent until a loss was first reached, by linear interpolation; infinite where it never was."""
    for (x, y), (after, later) in pairwise(curve):
        if later <= bits:
            return x + (after - x) * (y - bits) / (y - later) if y > bits else x
    return math.inf


def share_to_reach(axis: str) -> Callable[[Sample, Sample], float | None]:
    """Return a measure of what a run has spent when it reaches the other's last loss, over what the other has spent in
    all; none where it does not reach it. Its learning rate is higher then than at its own end: it does not flatter.
    """

    def value(one: Sample, other: Sample) -> float | None:
        final = other.record.summary["final"]
        if final is None:
            return None
        spent = _until(_curve(one.record, axis), final["bits_per_byte"])
        return spent / float(final[axis]) if math.isfinite(spent) else None  # type: ignore[literal-required]

    return value


def bits_at_equal_time(one: Sample, other: Sample) -> float | None:
    """Return the difference of two runs' losses at the time when the faster one has ended, one less other."""
    curves = [_curve(sample.record, "seconds") for sample in (one, other)]
    if not all(curves):
        return None
    end = min(curve[-1][0] for curve in curves)
    mine, theirs = (_at(curve, end) for curve in curves)
    return None if mine is None or theirs is None else mine - theirs


def cost_ratio(one: Sample, other: Sample) -> float | None:
    """Return the training FLOPs of a run over those of another."""
    mine, theirs = (s.record.summary["model"].get("training_flops") for s in (one, other))
    return mine / theirs if mine and theirs else None


MEASURES: dict[str, Measure] = {
    "bits": Measure("validation loss", "bits per byte", _of_final(lambda final: final["bits_per_byte"])),
    "spread": Measure(
        "distance of the validation loss from the median over seeds",
        "bits per byte",
        _of_final(lambda final: final["bits_per_byte"]),
        spread=True,
    ),
    "max_vio": Measure("MaxVio over the validation set, worst site", "", _of_final(worst_vio), scale="MaxVio"),
    "crowd": Measure("pairs of the two most loaded experts", "share", _of_final(crowd)),
    "load_swing": Measure(
        "pairs that change their expert from one step's loads to the next's, second half",
        "share",
        _of_record(load_swing),
    ),
    "gini_gained": Measure(
        "Gini of the loads in the first hundredth of the steps less that from an eighth to a third",
        "",
        _of_record(gini_change(START, MIDDLE)),
        scale="Gini",
    ),
    "gini_lost": Measure(
        "Gini of the loads in the last tenth of the steps less that from an eighth to a third",
        "",
        _of_record(gini_change(END, MIDDLE)),
        scale="Gini",
    ),
    "loss_rise": Measure("largest rise of the training loss over the least before", "nats", _of_record(loss_rise)),
    "spikes": Measure(
        "steps whose gradient norm is over three times the median of the 32 before", "share", _of_record(spikes)
    ),
    "drop_trend": Measure(
        "drop rate in the last quarter of the sequences less that in the first", "share", _of_final(drop_trend)
    ),
    "others_drop": Measure("drops that change with the other sequences of the batch", "share", _of_record(others_drop)),
    "later_routes": Measure("routes that change with later tokens", "share", _of_record(later_routes)),
    "sure_regret": Measure(
        "regret of the three most confident tenths of tokens over that of the three least",
        "ratio",
        _of_record(sure_regret),
    ),
    "better_unsure": Measure(
        "routes that would be better, three least confident tenths of tokens", "share", _of_record(better_unsure)
    ),
    "tokens_to_reach": Measure(
        "tokens until the other's last loss, over the other's tokens", "ratio", share_to_reach("tokens"), 2
    ),
    "seconds_to_reach": Measure(
        "seconds of training until the other's last loss, over the other's", "ratio", share_to_reach("seconds"), 2, True
    ),
    "bits_at_equal_time": Measure(
        "difference in validation loss when the faster run has ended", "bits per byte", bits_at_equal_time, 2, True
    ),
    "cost_ratio": Measure("training FLOPs over the other's", "ratio", cost_ratio, 2),
    "logit_size": Measure(
        "root mean square of log-sum-exp of the router's logits", "", probes.logit_size, scale="log-sum-exp"
    ),
    "without_shared": Measure("rise of the loss without the shared experts", "bits per byte", probes.without_shared),
    "without_best": Measure(
        "rise of the loss when each token is denied its best expert", "bits per byte", probes.without_best
    ),
    "noise_gini": Measure("Gini of the loads on random tokens less that on text", "", probes.noise_gini, scale="Gini"),
    "prefix_bits": Measure(
        "loss on the last token of prefixes, behind which there is nothing to see", "bits per byte", probes.prefix_bits
    ),
    "settled_early": Measure(
        "final experts of a token that are chosen after a tenth of the steps already", "share", probes.settled(0.1)
    ),
    "unsettled_late": Measure(
        "tokens whose best expert is another after four fifths of the steps than at the end",
        "share",
        probes.unsettled(0.8),
    ),
}
"""By name."""


def values_of(
    measure: Measure, of: Mapping[str, float], samples: Mapping[str, Sequence[Sample]], index: int
) -> tuple[float | None, str]:
    """Return a part's value for one seed, and of which arm it is not defined: none is of a run that diverged.

    Args:
        measure: what is measured.
        of: what each arm's value counts.
        samples: each arm's runs, one a seed.
        index: of the seed among them.
    """
    mine = {name: samples[name][index] for name in of}
    if diverged := [name for name, sample in mine.items() if sample.record.summary["final"] is None]:
        return None, diverged[0]
    if measure.runs == 2:
        value = measure.of(*mine.values())
        return value, " against ".join(of) if value is None else ""
    total = 0.0
    for name, weight in of.items():
        value = _spread(measure, samples[name], index) if measure.spread else measure.of(mine[name])
        if value is None:
            return None, name
        total += weight * value
    return total, ""


def _spread(measure: Measure, samples: Sequence[Sample], index: int) -> float | None:
    """Return how far a run's number lies from the median of all runs, none where one of these has no number."""
    found = [measure.of(sample) for sample in samples]
    known = [value for value in found if value is not None]
    return abs(known[index] - median(known)) if len(known) == len(found) else None
