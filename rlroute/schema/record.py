"""A run's record as a whole: a line of a compact file, and what is read from a folder."""

from dataclasses import dataclass
from typing import NotRequired

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.schema.rows import EvalRow, LoadRow, TrainRow
from rlroute.schema.run import Described, Environment
from rlroute.schema.summary import Seal, Summary


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
