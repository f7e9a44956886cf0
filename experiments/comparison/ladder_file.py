"""The ladder that was climbed in a run store (:mod:`.ladder`), as ladder.json keeps it for tables and pages.

Shape suffixes: E entries, J budgets, W widths, S seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from typing_extensions import TypedDict

from rlroute.errors import StoreError
from rlroute.experiments.comparison.multipliers import Multiplier
from rlroute.experiments.statistics import Interval, t_interval
from rlroute.limits import Between
from rlroute.reading import read_json
from rlroute.schema.values import Number, Whole

FILE = "ladder.json"
"""In the run store, and in the folder of results."""
VERSION = 1
Ratio = Annotated[float, Between(1e-30, 1e30)]


def key_of(config: Mapping[str, Any]) -> str:
    """Return what tells the routers of a configuration from others, at whatever scale."""
    return json.dumps([config["router"], config.get("others", [])], sort_keys=True)


@dataclass(frozen=True, eq=False)
class Rungs:
    """What was measured.

    Attributes:
        labels: the entries, the reference first.
        compute_J: the budgets, training FLOPs.
        widths: of the model.
        bits_EJWS: bits per byte.
        speed_EJWS: training FLOPs per second.
        seeds: the seeds.
    """

    labels: tuple[str, ...]
    compute_J: np.ndarray
    widths: tuple[int, ...]
    bits_EJWS: np.ndarray
    speed_EJWS: np.ndarray
    seeds: tuple[int, ...]

    def bits(self, entry: int, widths: Iterable[int]) -> list[np.ndarray]:
        """Return an entry's bits per byte by seed, for each budget at a width of its own."""
        return [self.bits_EJWS[entry, j, self.widths.index(width)] for j, width in enumerate(widths)]


def paired(mine: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> tuple[Interval, ...]:
    """Return the differences of two entries by budget, paired by seed, with their 95 % t intervals."""
    return tuple(t_interval((a - b).tolist()) for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Climb:
    """One entry on the ladder: its best mean loss at each budget, the width that has it, its differences to the
    reference there (paired by seed, each at its own best width), its law where it has one, and its multipliers.
    """

    label: str
    key: str
    bits: tuple[Interval, ...]
    widths: tuple[int, ...]
    differences: tuple[Interval, ...]
    law: Mapping[str, float] | None
    compute: Multiplier | None
    time: Multiplier | None
    """Of the speeds at which these runs went, beside whatever else ran."""


@dataclass(frozen=True)
class Ladder:
    """What came out; the reference is the first entry."""

    rungs: Rungs
    entries: tuple[Climb, ...]
    order: tuple[tuple[str, ...], ...]
    """The entries from best to worst, at each budget."""
    runs: tuple[str, ...]
    command: str | None

    @property
    def order_holds(self) -> bool:
        """Whether it is the same at all budgets."""
        return all(one == other for one, other in pairwise(self.order))

    @property
    def crossings(self) -> list[list[str]]:
        """The pairs of which one is better at some budget and worse at another, each time beyond the 95 % interval of
        their paired differences: what of a change of the order is not noise.
        """
        return [
            [one.label, other.label]
            for (i, one), (j, other) in combinations(enumerate(self.entries), 2)
            if len({d.mean > 0 for d in self._differences(i, j) if d.separated}) > 1
        ]

    def _differences(self, one: int, other: int) -> tuple[Interval, ...]:
        return paired(*(self.rungs.bits(index, self.entries[index].widths) for index in (one, other)))

    def multiplier(self, config: Mapping[str, Any], reference: Mapping[str, Any]) -> Multiplier | None:
        """Return the compute multiplier of a configuration's routers; None where the ladder does not know it, or knows
        it against another reference.
        """
        base, *others = self.entries
        known = {entry.key: entry.compute for entry in others}
        return known.get(key_of(config)) if key_of(reference) == base.key else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: what ladder.json holds."""
        rungs = self.rungs
        return {
            "version": VERSION,
            "reference": rungs.labels[0],
            "compute": rungs.compute_J.tolist(),
            "widths": list(rungs.widths),
            "seeds": list(rungs.seeds),
            "entries": [asdict(entry) for entry in self.entries],
            "bits_per_byte_EJWS": rungs.bits_EJWS.tolist(),
            "flops_per_second_EJWS": rungs.speed_EJWS.tolist(),
            "order": [list(order) for order in self.order],
            "order_holds": self.order_holds,
            "crossings": self.crossings,
            "runs": list(self.runs),
            "command": self.command,
        }


# Reading it


class IntervalOf(TypedDict):
    """A mean over seeds and its 95 % t interval, in bits per byte."""

    mean: Number
    """Of the seeds."""
    low: Number | None
    """The interval's lower end; None for one seed."""
    high: Number | None
    """Its upper end, likewise."""
    n: Whole
    """How many."""


class MultiplierOf(TypedDict):
    """How many times the compute, or the time, the reference needs for the same loss."""

    value: Ratio | None
    """The multiplier, or the end of the range beyond which it lies; None where losses do not fall with compute."""
    low: Ratio | None
    """The lower end of its 95 % interval; None for one seed."""
    high: Ratio | None
    """The upper end, likewise."""
    n: Whole
    """How many seeds."""
    reach: Ratio
    """The range is from 1 / reach to reach: what lies beyond is not known."""


class LawOf(TypedDict):
    """A loss law: floor + scale (C / unit)^-exponent, in bits per byte."""

    floor: Number
    """What no compute goes below."""
    scale: Number
    """The loss above the floor at a compute of one unit."""
    exponent: Annotated[float, Between(0, 4)]
    """How fast it falls."""
    unit: Ratio
    """The compute that counts as 1."""


class ClimbOf(TypedDict):
    """One entry on the ladder; lists are by budget."""

    label: str
    """What it is called."""
    key: str
    """The routers of its configuration, as JSON: by it tables know the entry."""
    bits: list[IntervalOf]
    """Its best mean loss."""
    widths: list[Whole]
    """The width of the model that has it."""
    differences: list[IntervalOf]
    """To the reference, each at its own best width; none of the reference."""
    law: LawOf | None
    """Its law, where it has one."""
    compute: MultiplierOf | None
    """The compute multiplier; None of the reference."""
    time: MultiplierOf | None
    """The time multiplier, of the speeds at which these runs went; None of the reference."""


class LadderOf(TypedDict):
    """ladder.json: a ladder; E entries, J budgets, W widths, S seeds."""

    version: Literal[1]
    """Of these fields."""
    reference: NotRequired[str]
    """What the reference is called."""
    compute: list[Ratio]
    """The budgets, in training FLOPs."""
    widths: list[Whole]
    """Of the model."""
    seeds: list[Whole]
    """The seeds."""
    entries: list[ClimbOf]
    """The entries, the reference first."""
    bits_per_byte_EJWS: list[list[list[list[Number]]]]
    """Final validation losses."""
    flops_per_second_EJWS: list[list[list[list[Number]]]]
    """Training FLOPs a second."""
    order: list[list[str]]
    """The entries from best to worst, at each budget."""
    order_holds: NotRequired[bool]
    """Whether it is the same at all budgets."""
    crossings: NotRequired[list[list[str]]]
    """The pairs of entries whose order changes by more than noise."""
    runs: list[str]
    """The ids of all runs."""
    command: str | None
    """The command line behind it."""


def read_ladder(store: Path) -> Ladder | None:
    """Return the ladder of a run store; None where there is none.

    Raises:
        StoreError: it cannot be read, or is none.
    """
    path = store / FILE
    if not path.is_file():
        return None
    held = read_json(path, LadderOf)
    try:
        return _ladder(held)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path} is no ladder: {error}") from error


def _ladder(held: Mapping[str, Any]) -> Ladder:
    entries = tuple(map(_climb, held["entries"]))
    bits, speed = (np.array(held[f"{name}_EJWS"], float) for name in ("bits_per_byte", "flops_per_second"))
    budgets, lists = len(held["compute"]), [held["order"]]
    lists += [part for entry in entries for part in (entry.bits, entry.widths)]
    lists += [entry.differences for entry in entries[1:]]
    shape = (len(entries), budgets, len(held["widths"]), len(held["seeds"]))
    if 0 in shape or bits.shape != shape or speed.shape != shape or {*map(len, lists)} != {budgets}:
        raise ValueError("its lists are not of one length for each entry, budget, width and seed")
    if not {width for entry in entries for width in entry.widths} <= set(held["widths"]):
        raise ValueError("an entry's best width is none of its widths")
    labels, numbers = tuple(entry.label for entry in entries), (np.array(held["compute"]), tuple(held["widths"]))
    rungs = Rungs(labels, *numbers, bits, speed, tuple(held["seeds"]))
    return Ladder(rungs, entries, tuple(map(tuple, held["order"])), tuple(held["runs"]), held["command"])


def _climb(held: Mapping[str, Any]) -> Climb:
    return Climb(
        label=held["label"],
        key=held["key"],
        bits=tuple(Interval(**one) for one in held["bits"]),
        widths=tuple(held["widths"]),
        differences=tuple(Interval(**one) for one in held["differences"]),
        law=held["law"],
        compute=held["compute"] and Multiplier(**held["compute"]),
        time=held["time"] and Multiplier(**held["time"]),
    )
