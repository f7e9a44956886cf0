"""Tuning, on seeds that no table uses: whole committed grids, of which every entry has the same number of trials, or
their learning rates around what an entry was tuned to for runs of another length.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from typing_extensions import TypedDict

from rlroute.config import DataConfig, ModelConfig, RunConfig, StartConfig, TrainConfig
from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.launch.jobs import Job, Launch, together
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.entries import Overrides, build_entry
from rlroute.experiments.recipes.grid import Grid, Scores, best, key, unbracketed, unscored
from rlroute.experiments.recipes.presets import refuse_overwritten
from rlroute.experiments.recipes.tuned import GRID, TUNABLE, TUNING_SEEDS, Length, grid_around, grid_entry
from rlroute.reading import Row, read_json
from rlroute.records import write_json
from rlroute.schema import RunRecord
from rlroute.schema.values import Number, Whole
from rlroute.values import differing


class Trial(NamedTuple):
    """One point of an entry's grid.

    Attributes:
        entry: as named in the grid.
        overrides: the point.
        bits_per_byte: mean final validation loss over the tuning seeds; None where a run diverged.
        by_seed: the same of each seed, by its digits.
        runs: their ids.
        command: that ran it.
    """

    entry: str
    overrides: Overrides
    bits_per_byte: float | None
    by_seed: dict[str, float | None]
    runs: list[str]
    command: str


class TrialRow(TypedDict):
    """A :class:`Trial`."""

    entry: str
    overrides: dict[str, dict[str, Any]]
    bits_per_byte: Number | None
    by_seed: dict[str, Number | None]
    runs: list[str]
    command: str


class Trials(TypedDict):
    """What a file of trials holds: them, and their :class:`Base`."""

    data: Row
    model: Row
    train: Row
    start: NotRequired[Row]
    seeds: list[Whole]
    around: Row | None
    trials: list[TrialRow]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all trials share."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    seeds: tuple[int, ...] = TUNING_SEEDS
    around: Length | None = None
    """The length, for which all are tuned, around whose settings learning rates alone are tried; none: whole grids."""
    start: StartConfig | None = None
    """The weights from which all trials start, if they are another run's."""

    def grid(self, entry: str) -> Grid:
        """Return what is tried of an entry."""
        return GRID[entry] if self.around is None else grid_around(entry, self.around)

    def untried(self, entry: str, found: Scores) -> list[Overrides]:
        """Return an entry's trials to run next; none at the end."""
        return (unscored if self.around is None else unbracketed)(self.grid(entry), found)

    def at(self, entry: str, point: Overrides) -> RunConfig:
        """Return an entry's configuration at a point of its grid."""
        config = build_entry(entry, self.data, self.model, self.train, lambda router: point)
        return replace(config, start=self.start)

    def to_dict(self) -> dict[str, Any]:
        """Return what a file of trials says of them all."""
        parts = RunConfig(data=self.data, model=self.model, train=self.train, start=self.start).to_dict()
        del parts["router"]
        for field in TUNABLE:
            del parts["train"][field]
        around = self.around and self.around._asdict()
        return parts | {"seeds": list(self.seeds), "around": around}


def named(entries: Sequence[str], base: Base, said: Collection[str] = ()) -> tuple[str, ...]:
    """Return the entries of the grid that are named, each once.

    Args:
        entries: what to tune.
        base: what all trials share.
        said: fields of ``train`` that were set on purpose, beyond those that differ from their defaults.

    Raises:
        ConfigError: an entry has no grid, ``base`` a value that cannot be, or one that every trial would overwrite.
    """
    found = tuple(dict.fromkeys(map(grid_entry, entries)))
    for entry in found:
        refuse_overwritten(base.train, said, GRID[entry].start, f"each trial of the grid of {entry} sets it")
        base.at(entry, {})  # what cannot be trained is found here
    return found


def tune(
    entries: Sequence[str],
    base: Base,
    how: Launch,
    command: str,
    known: Iterable[Trial] = (),
) -> list[Trial]:
    """Walk the grid of each entry, one of :func:`named`, and return all trials, in their order.

    Args:
        entries, base, how, command: what is trained, and how.
        known: trials of the same base, which are not run again.
    """
    trials: list[Trial] = []
    done = {(trial.entry, key(trial.overrides)): trial for trial in known}
    while following := [(e, point) for e in entries for point in base.untried(e, scores(trials, e))]:
        new = {(e, key(point)): base.at(e, point) for e, point in following if (e, key(point)) not in done}
        jobs = [together([Job(config, seed, command) for seed in base.seeds]) for config in new.values()]
        records = {record.id: record for record in run_all(list(chain.from_iterable(jobs)), how)} if jobs else {}
        for (entry, point), config in new.items():
            runs = [records[config.run_id(seed)] for seed in base.seeds]
            done[entry, point] = _scored(entry, json.loads(point), runs, command)
        trials += [done[entry, key(point)] for entry, point in following]
    return trials


def read_trials(path: Path, base: Base) -> list[Trial]:
    """Return the trials that a file holds, none where it is not there.

    Raises:
        ConfigError: it is none that :func:`write_trials` wrote, or its trials have another base.
    """
    if not os.path.lexists(path):
        return []
    try:
        stored = read_json(path, Trials)
    except StoreError as error:
        raise ConfigError(f"--out {path} is there, and holds no trials: {error}") from error
    trials = [Trial(**row) for row in stored.pop("trials")]
    for field, his, mine in differing(stored, json.loads(json.dumps(base.to_dict()))) if trials else ():
        raise ConfigError(
            f"--out {path} holds trials with {field.replace('/', '.')} = {his!r}, not {mine!r}: name another file"
        )
    return trials


def _scored(entry: str, point: Overrides, records: Iterable[RunRecord], command: str) -> Trial:
    by_seed = {}
    for record in records:
        final = record.summary["final"]
        by_seed[str(record.config["seed"])] = final["bits_per_byte"] if final else None
    found = [score for score in by_seed.values() if score is not None]
    mean = sum(found) / len(found) if len(found) == len(by_seed) else None
    return Trial(entry, point, mean, by_seed, [record.id for record in records], command)


def scores(trials: Sequence[Trial], entry: str) -> dict[str, float | None]:
    """Return the bits per byte of an entry's trials, by point."""
    return {key(trial.overrides): trial.bits_per_byte for trial in trials if trial.entry == entry}


def best_trials(trials: Sequence[Trial]) -> dict[str, Overrides]:
    """Return each entry's best point: what runs of that length are given once the trials are stored."""
    return {entry: best(GRID[entry], scores(trials, entry)) for entry in dict.fromkeys(t.entry for t in trials)}


def write_trials(trials: Sequence[Trial], base: Base, path: Path) -> None:
    """Write trials, and what they have in common."""
    write_json(path, base.to_dict() | {"trials": [trial._asdict() for trial in trials]})
