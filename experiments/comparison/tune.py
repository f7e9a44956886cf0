"""Tuning: every entry gets the same number of trials on the committed grid, on seeds that no table uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.entries import Overrides, build_entry
from rlroute.experiments.recipes.tuned import GRID, TUNING_SEEDS, grid_entry
from rlroute.records import write_json
from rlroute.schema import Summary


def tune(entries: Sequence[str], train: TrainConfig, how: Launch, command: str) -> list[dict[str, Any]]:
    """Run the grid of each entry and return all trials, best first within an entry.

    A trial's score is the mean validation loss in bits per byte over the tuning seeds; None, and last, where a run
    diverged.

    Raises:
        ConfigError: an entry has no grid, or ``train`` a learning rate that every trial would overwrite.
    """
    if train.lr != TrainConfig().lr:
        raise ConfigError(f"train.lr = {train.lr}: each trial of the grid sets it")
    entries = list(map(grid_entry, entries))
    data, model = DataConfig(), ModelConfig()
    trials = [(entry, choice) for entry in entries for choice in GRID[entry]]
    configs = [_trial(entry, choice, data, model, train) for entry, choice in trials]
    jobs = [Job(config, seed, command) for config in configs for seed in TUNING_SEEDS]
    scores = {record.id: _score(record.summary) for record in run_all(jobs, how)}
    rows = []
    for (entry, choice), config in zip(trials, configs, strict=True):
        runs = [config.run_id(seed) for seed in TUNING_SEEDS]
        found = [score for run in runs if (score := scores[run]) is not None]
        mean = sum(found) / len(found) if len(found) == len(runs) else None
        rows.append({"entry": entry, "overrides": choice, "bits_per_byte": mean, "runs": runs})
    return sorted(rows, key=lambda row: (entries.index(row["entry"]), _or_last(row["bits_per_byte"])))


def _trial(entry: str, choice: Overrides, data: DataConfig, model: ModelConfig, train: TrainConfig) -> RunConfig:
    return build_entry(entry, data, model, train, lambda router: choice)


def _score(summary: Summary) -> float | None:
    return summary["final"]["bits_per_byte"] if summary["final"] else None


def _or_last(score: float | None) -> float:
    return math.inf if score is None else score


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return each entry's best overrides: what ``TUNED`` holds."""
    found: dict[str, Any] = {}
    for row in rows:
        found.setdefault(row["entry"], row["overrides"])
    return found


def write_trials(rows: Sequence[dict[str, Any]], train: TrainConfig, path: Path, command: str) -> None:
    """Write all trials with the command that ran them."""
    result = {"command": command, "seeds": list(TUNING_SEEDS), "steps": train.steps, "trials": list(rows)}
    write_json(path, result)
