"""Grids that tuning walks axis by axis: each axis is tried around the best trial of the ones before it.

The trials are a pure function of the grid and the scores, and of a whole grid their number that of the grid alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from rlroute.experiments.recipes.entries import Overrides

Scores = Mapping[str, float | None]
"""Bits per byte by trial (:func:`key`); None where a run diverged."""


class Axis(NamedTuple):
    """Fields that are set together, as ``("train.lr",)``, and the values that they take, numbers in their order."""

    fields: tuple[str, ...]
    values: tuple[Any, ...]


class Grid(NamedTuple):
    """Where tuning starts, and the axes that it goes along, one after the other; the start lies on each."""

    start: Overrides
    axes: tuple[Axis, ...]

    @property
    def trials(self) -> int:
        """How many there are."""
        return 1 + sum(len(axis.values) - 1 for axis in self.axes)


def key(trial: Overrides) -> str:
    """Return the name by which a trial's score is found."""
    return json.dumps(trial, sort_keys=True)


def unscored(grid: Grid, scores: Scores) -> list[Overrides]:
    """Return the trials to run next: those of the first axis that is not done; none at the end."""
    point = grid.start
    for axis in grid.axes:
        line = [_moved(point, axis, value) for value in axis.values]
        if missing := [trial for trial in line if key(trial) not in scores]:
            return missing
        point = min(line, key=lambda trial: _or_last(scores[key(trial)]))
    return []


def unbracketed(grid: Grid, scores: Scores) -> list[Overrides]:
    """Return the trials to run next along the grid's one axis: the best so far, at first the start, and its two
    neighbours; none once these have been run, or lie beyond the axis.
    """
    (axis,) = grid.axes
    line = [_moved(grid.start, axis, value) for value in axis.values]
    at = line.index(best(grid, scores))
    return [trial for trial in line[max(0, at - 1) : at + 2] if key(trial) not in scores]


def best(grid: Grid, scores: Scores) -> Overrides:
    """Return the trial with the lowest score, the first of equals; the start where there is none."""
    found = [name for name, score in scores.items() if score is not None]
    return json.loads(min(found, key=lambda name: _or_last(scores[name]))) if found else grid.start


def edges(grid: Grid, point: Overrides) -> list[str]:
    """Return the fields of which a point has the least or the largest value that was tried: the optimum may lie beyond.

    A field whose values are words has no edge, and beyond 0 lies nothing: these are weights, rates and factors.
    """
    ends = [(axis, value) for axis in grid.axes for value in (axis.values[0], axis.values[-1]) if value != 0]
    return [
        axis.fields[0] for axis, value in ends if not isinstance(value, str) and _moved(point, axis, value) == point
    ]


def _moved(point: Overrides, axis: Axis, value: Any) -> Overrides:
    moved = deepcopy(point)
    for field in axis.fields:
        part, _, name = field.partition(".")
        moved.setdefault(part, {})[name] = value
    return moved


def _or_last(score: float | None) -> float:
    return math.inf if score is None else score
