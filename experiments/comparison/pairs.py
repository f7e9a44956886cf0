"""Every entry of a comparison against every other one: the verdicts of the report's matrix, as rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

from rlroute.experiments.comparison.entries import Entry
from rlroute.experiments.comparison.table import paired
from rlroute.experiments.statistics import Interval, holm, paired_p_value, t_interval
from rlroute.experiments.verdicts import Verdict, verdict


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An entry against another."""

    entry: str
    against: str
    difference: Interval | None
    """Entry minus the other, in bits per byte, paired by seed, with its 95 % t interval; None without a common seed."""
    verdict: Verdict
    """What it says of the entry, by itself."""
    margin: float
    """Of the verdict, in bits per byte."""
    p_holm: float | None = None
    """Of the paired t-test that the difference is 0, corrected for all pairs of the comparison (Holm); None for fewer
    than two common seeds.
    """


def pair(entry: Entry, other: Entry, margin: float) -> Pair:
    """Return what is said of an entry against another, without a correction for others."""
    diffs = paired(entry, other)
    return Pair(
        entry=entry.label,
        against=other.label,
        difference=t_interval(diffs) if diffs else None,
        verdict=verdict(diffs, margin),
        margin=margin,
    )


def all_pairs(entries: Sequence[Entry], margin: float) -> list[Pair]:
    """Return each entry against each other one, in the order of the entries, and each pair both ways.

    Args:
        entries: of comparable runs.
        margin: below which entries are equivalent, in bits per byte, above 0.
    """
    tests = {_both(*two): paired_p_value(paired(*two)) for two in combinations(entries, 2)}
    adjusted = holm({both: p for both, p in tests.items() if p is not None})
    return [replace(pair(*two, margin), p_holm=adjusted.get(_both(*two))) for two in permutations(entries, 2)]


def _both(one: Entry, other: Entry) -> str:
    """Return a name of two entries, whichever comes first."""
    return " and ".join(sorted((one.label, other.label)))
