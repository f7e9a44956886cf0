"""A run's record as a whole: a line of a compact file, and what is read from a folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.schema.rows import EvalRow, LoadRow, TrainRow
from rlroute.schema.run import Described, Environment
from rlroute.schema.summary import Seal, Summary

TIMED = frozenset({"seconds", "tokens_per_second", "traffic", "begun", "ended", "peak_memory"})
"""What differs when the same run is trained again, in whatever part of a record."""


class Stored(TypedDict):
    """A line of a compact file: a run that has ended, its load and training rows thinned."""

    config: Described
    """What config.json holds."""
    environment: Environment
    """What environment.json holds."""
    summary: Summary
    """What summary.json holds."""
    evals: list[EvalRow]
    """The evaluations of metrics.jsonl."""
    loads: list[LoadRow]
    """At most a hundred rows of loads.jsonl, evenly spread, the last among them."""
    train: list[TrainRow]
    """At most a hundred of the training steps of metrics.jsonl, likewise."""
    seal: NotRequired[Seal]
    """What seal.json holds; records of schema 1 have none."""


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind: the content of its files."""

    id: str
    config: Described
    environment: Environment
    summary: Summary
    evals: list[EvalRow]
    loads: list[LoadRow]
    train: list[TrainRow]
    seal: Seal | None = None
    """Of the parts as they were when the run ended; records of schema 1 have none."""


def untimed(values: Any) -> Any:
    """Return a part of a record, or a list of them, without what differs when the same run is trained again."""
    if isinstance(values, Mapping):
        return {name: untimed(value) for name, value in values.items() if name not in TIMED}
    return [untimed(value) for value in values] if isinstance(values, list) else values
