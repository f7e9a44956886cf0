"""Tuning: every entry gets the same number of trials on the committed grid, on seeds that no table uses."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from rlroute.config import DataConfig, ModelConfig, RunConfig, StartConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.launch.jobs import Job, Launch, together
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.entries import Overrides, build_entry
from rlroute.experiments.recipes.grid import best, key, unscored
from rlroute.experiments.recipes.presets import refuse_overwritten
from rlroute.experiments.recipes.tuned import GRID, TUNING_SEEDS, Length, grid_entry
from rlroute.foreign import parse_json, read_bytes, why
from rlroute.records import write_json
from rlroute.schema import RunRecord


class Trial(NamedTuple):
    """One point of an entry's grid.

    Attributes:
        entry: as named in the grid.
        overrides: the point.
        bits_per_byte: mean final validation loss over the tuning seeds; None where a run diverged.
        by_seed: the same of each seed.
        runs: their ids.
    """

    entry: str
    overrides: Overrides
    bits_per_byte: float | None
    by_seed: dict[int, float | None]
    runs: list[str]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all trials share."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig

    def at(self, entry: str, point: Overrides) -> RunConfig:
        """Return an entry's configuration at a point of its grid."""
        return build_entry(entry, self.data, self.model, self.train, lambda router: point)


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
    seeds: Sequence[int] = TUNING_SEEDS,
) -> list[Trial]:
    """Walk the grid of each entry, one of `named`, and return all trials, in the order in which they ran.

    Args:
        entries, base, how, command: what is trained, and how.
        start: the weights from which all trials start, if they are another run's.
        seeds: of each trial.
    """
    trials: list[Trial] = []
    while following := [(e, point) for e in entries for point in unscored(GRID[e], scores(trials, e))]:
        configs = [replace(base.at(entry, point), start=start) for entry, point in following]
        jobs = [together([Job(config, seed, command) for seed in seeds]) for config in configs]
        records = run_all(list(chain.from_iterable(jobs)), how)
        found = {record.id: record for record in records}
        for (entry, point), config in zip(following, configs, strict=True):
            trials.append(_scored(entry, point, [found[config.run_id(seed)] for seed in seeds]))
    return trials


def refuse_lost(path: Path, entries: Collection[str]) -> None:
    """Refuse to write trials over those of other entries.

    Raises:
        ConfigError: a file holds some, or is none that :func:`write_trials` wrote.
    """
    if not os.path.lexists(path):
        return
    try:
        there = {row["entry"] for row in parse_json(read_bytes(path))["trials"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--out {path} is there, and holds no trials: {why(error)}") from error
    if lost := sorted(there - set(entries)):
        raise ConfigError(f"--out {path} holds trials of {', '.join(lost)}: name these too, or another file")


def _scored(entry: str, point: Overrides, records: Iterable[RunRecord]) -> Trial:
    by_seed = {}
    for record in records:
        final = record.summary["final"]
        by_seed[record.config["seed"]] = final["bits_per_byte"] if final else None
    found = [score for score in by_seed.values() if score is not None]
    mean = sum(found) / len(found) if len(found) == len(by_seed) else None
    return Trial(entry, point, mean, by_seed, [record.id for record in records])


def scores(trials: Sequence[Trial], entry: str) -> dict[str, float | None]:
    """Return the bits per byte of an entry's trials, by point."""
    return {key(trial.overrides): trial.bits_per_byte for trial in trials if trial.entry == entry}


def best_trials(trials: Sequence[Trial]) -> dict[str, Overrides]:
    """Return each entry's best point: what runs of that length are given once the trials are stored."""
    return {entry: best(GRID[entry], scores(trials, entry)) for entry in dict.fromkeys(t.entry for t in trials)}


def write_trials(
    trials: Sequence[Trial], train: TrainConfig, path: Path, command: str, seeds: Sequence[int] = TUNING_SEEDS
) -> None:
    """Write all trials with the command that ran them, their seeds, and the length of the runs."""
    rows = [trial._asdict() for trial in trials]
    length = Length.of(train)._asdict()
    write_json(path, {"command": command, "seeds": list(seeds), **length, "trials": rows})
