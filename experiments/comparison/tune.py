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
from typing import Any, NamedTuple

from rlroute.config import DataConfig, ModelConfig, RunConfig, StartConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.launch.jobs import Job, Launch, together
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.entries import Overrides, build_entry
from rlroute.experiments.recipes.grid import Scores, best, key, unbracketed, unscored
from rlroute.experiments.recipes.presets import refuse_overwritten
from rlroute.experiments.recipes.tuned import GRID, TUNABLE, TUNING_SEEDS, Length, grid_around, grid_entry
from rlroute.foreign import parse_json, read_bytes, why
from rlroute.records import write_json
from rlroute.schema import RunRecord
from rlroute.values import differing


class Trial(NamedTuple):
    """One point of an entry's grid.

    Attributes:
        entry: as named in the grid.
        overrides: the point.
        bits_per_byte: mean final validation loss over the tuning seeds; None where a run diverged.
        by_seed: the same of each seed.
        runs: their ids.
        command: that ran it.
    """

    entry: str
    overrides: Overrides
    bits_per_byte: float | None
    by_seed: dict[int, float | None]
    runs: list[str]
    command: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all trials share."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    seeds: tuple[int, ...] = TUNING_SEEDS
    around: Length | None = None
    """The length, for which all are tuned, around whose settings learning rates alone are tried; none: whole grids."""

    def untried(self, entry: str, found: Scores) -> list[Overrides]:
        """Return an entry's trials to run next; none at the end."""
        if self.around is None:
            return unscored(GRID[entry], found)
        return unbracketed(grid_around(entry, self.around), found)

    def at(self, entry: str, point: Overrides) -> RunConfig:
        """Return an entry's configuration at a point of its grid."""
        return build_entry(entry, self.data, self.model, self.train, lambda router: point)

    def to_dict(self) -> dict[str, Any]:
        """Return what a file of trials says of them all."""
        parts = RunConfig(data=self.data, model=self.model, train=self.train).to_dict()
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
    start: StartConfig | None = None,
) -> list[Trial]:
    """Walk the grid of each entry, one of :func:`named`, and return all trials, in the order in which they ran.

    Args:
        entries, base, how, command: what is trained, and how.
        start: the weights from which all trials start, if they are another run's.
    """
    trials: list[Trial] = []
    while following := [(e, point) for e in entries for point in base.untried(e, scores(trials, e))]:
        configs = [replace(base.at(entry, point), start=start) for entry, point in following]
        jobs = [together([Job(config, seed, command) for seed in base.seeds]) for config in configs]
        records = run_all(list(chain.from_iterable(jobs)), how)
        found = {record.id: record for record in records}
        for (entry, point), config in zip(following, configs, strict=True):
            trials.append(_scored(entry, point, [found[config.run_id(seed)] for seed in base.seeds], command))
    return trials


def others(path: Path, entries: Collection[str], base: Base) -> list[dict[str, Any]]:
    """Return the trials of other entries that a file holds, beside which these may stand.

    Raises:
        ConfigError: it is none that :func:`write_trials` wrote, or its trials have another base.
    """
    if not os.path.lexists(path):
        return []
    try:
        stored = parse_json(read_bytes(path))
        rows, theirs = stored.pop("trials"), stored
        kept = [row for row in rows if row["entry"] not in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"--out {path} is there, and holds no trials: {why(error)}") from error
    for field, his, mine in differing(theirs, parse_json(json.dumps(base.to_dict()))) if kept else ():
        raise ConfigError(
            f"--out {path} holds trials with {field.replace('/', '.')} = {his!r}, not {mine!r}: name another file"
        )
    return kept


def _scored(entry: str, point: Overrides, records: Iterable[RunRecord], command: str) -> Trial:
    by_seed = {}
    for record in records:
        final = record.summary["final"]
        by_seed[record.config["seed"]] = final["bits_per_byte"] if final else None
    found = [score for score in by_seed.values() if score is not None]
    mean = sum(found) / len(found) if len(found) == len(by_seed) else None
    return Trial(entry, point, mean, by_seed, [record.id for record in records], command)


def scores(trials: Sequence[Trial], entry: str) -> dict[str, float | None]:
    """Return the bits per byte of an entry's trials, by point."""
    return {key(trial.overrides): trial.bits_per_byte for trial in trials if trial.entry == entry}


def best_trials(trials: Sequence[Trial]) -> dict[str, Overrides]:
    """Return each entry's best point: what runs of that length are given once the trials are stored."""
    return {entry: best(GRID[entry], scores(trials, entry)) for entry in dict.fromkeys(t.entry for t in trials)}


def write_trials(trials: Sequence[Trial], base: Base, path: Path, kept: Sequence[dict[str, Any]] = ()) -> None:
    """Write all trials, behind those of :func:`others`, and what they have in common."""
    write_json(path, base.to_dict() | {"trials": [*kept, *(trial._asdict() for trial in trials)]})
