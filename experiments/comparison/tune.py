"""Tuning: every entry gets the same number of trials on the committed grid, on seeds that no table uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.entries import GRID, TUNING_SEEDS, build_entry
from rlroute.records import write_atomically


def tune(entries: Sequence[str], train: TrainConfig, how: Launch, command: str) -> list[dict[str, Any]]:
    """Run the grid of each entry and return all trials, best first within an entry.

    A trial's score is the mean validation loss in bits per byte over the tuning seeds; a diverged run scores infinity.

    Raises:
        ConfigError: an entry has no grid.
    """
    unknown = [entry for entry in entries if entry not in GRID]
    if unknown:
        raise ConfigError(f"no tuning grid for {unknown[0]!r}: legal are {', '.join(GRID)}")
    data, model = DataConfig(), ModelConfig()
    trials = [(entry, choice) for entry in entries for choice in GRID[entry]]
    configs = [build_entry(entry, data, model, train, choice) for entry, choice in trials]
    jobs = [Job(config, seed, command) for config in configs for seed in TUNING_SEEDS]
    scores = {record.id: _score(record.summary) for record in run_all(jobs, how)}
    rows = []
    for (entry, choice), config in zip(trials, configs, strict=True):
        runs = [config.run_id(seed) for seed in TUNING_SEEDS]
        mean = sum(scores[run] for run in runs) / len(runs)
        rows.append({"entry": entry, "overrides": choice, "bits_per_byte": mean, "runs": runs})
    return sorted(rows, key=lambda row: (entries.index(row["entry"]), row["bits_per_byte"]))


def _score(summary: dict[str, Any]) -> float:
    return float(summary["final"]["bits_per_byte"]) if summary["final"] else float("inf")


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return each entry's best overrides: what ``recipes.TUNED`` holds."""
    found: dict[str, Any] = {}
    for row in rows:
        found.setdefault(row["entry"], row["overrides"])
    return found


def write_trials(rows: Sequence[dict[str, Any]], train: TrainConfig, path: Path, command: str) -> None:
    """Write all trials with the command that ran them."""
    result = {"command": command, "seeds": list(TUNING_SEEDS), "steps": train.steps, "trials": list(rows)}
    write_atomically(path, json.dumps(result, indent=1) + "\n")
