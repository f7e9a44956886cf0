"""Stores of made runs, for the views of them: ended ones, and ones that go on."""

import json
import shutil
from pathlib import Path

from rlroute.experiments.report.board import Board, Seen
from rlroute.records import write_json
from rlroute.schema import RunRecord


def lay(store: Path, run: RunRecord, steps: int | None = None) -> Path:
    """Write a run's folder and return it: ended, or as it was after so many steps."""
    folder = store / run.id
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", run.config)
    write_json(folder / "environment.json", run.environment)
    for name, rows in (("metrics", [*run.train, *run.evals]), ("loads", run.loads)):
        kept = sorted((row for row in rows if steps is None or row["step"] <= steps), key=lambda row: row["step"])
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    if steps is None:
        write_json(folder / "summary.json", run.summary)
    return folder


def board_of(runs: list[RunRecord]) -> Board:
    """Return what the views of ended runs show."""
    return Board(runs=tuple(map(Seen.of, runs)), compared=runs)
