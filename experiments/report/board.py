"""What the views of stored runs are drawn from: runs as far as they have come, ended or not, and what comes of them."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rlroute.alarms import Alarm, alarms_of
from rlroute.config import DENSE
from rlroute.errors import ComparisonError
from rlroute.experiments.comparison.entries import Entry, grouped, kind, labels, make_entries, router_label
from rlroute.experiments.comparison.groups import largest_group
from rlroute.experiments.comparison.ladder_file import Ladder
from rlroute.experiments.comparison.table import Table, build_table
from rlroute.experiments.report.style import Style, styles_of
from rlroute.experiments.verdicts import MARGIN
from rlroute.reading import site_keys
from rlroute.records import State
from rlroute.schema import Described, Environment, EvalRow, LoadRow, RunRecord, Summary, TrainRow
from rlroute.sites import families

FIRST = 8
"""How many entries are drawn before the reader asks for more."""
ALIVE: frozenset[State] = frozenset({"finished", "running", "interrupted", "stopped early", "set aside"})
"""The states of runs whose figures are those of the entry; the others have none, or diverged."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A run as far as it has come: what is a :class:`~rlroute.schema.RunRecord` once it has ended.

    Attributes:
        state: what has become of it.
        reason: why it was set aside, or cannot be read.
        config: what config.json holds; None where it was not begun or cannot be read.
        alarms: those that stand (:mod:`rlroute.alarms`).
        evals, train: its rows so far; of many training rows some, evenly spread, the last among them.
        read_loads: reads rows of loads.jsonl, as many as a figure shows, when they are asked for.
    """

    id: str
    state: State
    reason: str = ""
    config: Described | None = None
    environment: Environment | None = None
    summary: Summary | None = None
    evals: Sequence[EvalRow] = ()
    train: Sequence[TrainRow] = ()
    alarms: tuple[Alarm, ...] = ()
    read_loads: Callable[[], Sequence[LoadRow]] = field(default=tuple, compare=False)
    record: RunRecord | None = field(default=None, compare=False)
    """Of a run that has ended."""

    @classmethod
    def of(cls, record: RunRecord) -> Seen:
        """Return an ended run."""
        parts: dict[str, Any] = {
            name: getattr(record, name) for name in ("config", "environment", "summary", "evals", "train")
        }
        status: State = record.summary["status"]
        standing = tuple(alarm for alarm in alarms_of(record) if alarm.until is None)
        return cls(id=record.id, state=status, alarms=standing, read_loads=lambda: record.loads, record=record, **parts)

    @property
    def loads(self) -> Sequence[LoadRow]:
        """Rows of loads.jsonl."""
        return self.read_loads()

    @property
    def hash(self) -> str:
        """Of its configuration; empty where there is none."""
        return self.config["config_hash"] if self.config else ""

    @property
    def seed(self) -> int | None:
        """Its seed."""
        return self.config["seed"] if self.config else None

    @property
    def last(self) -> TrainRow | EvalRow | None:
        """Its last row."""
        ends: list[TrainRow | EvalRow] = [*self.train[-1:], *self.evals[-1:]]
        return max(ends, key=lambda row: row["step"], default=None)

    @cached_property
    def kind(self) -> str:
        """What all runs of a table share, as a text, as far as that can be said before it has ended."""
        parts: dict[str, Any] = {"config": self.config, "environment": self.environment or {}, "summary": {}}
        return kind(RunRecord(self.id, **parts, evals=[], loads=[], train=[]))

    @property
    def share(self) -> float:
        """The share of its budget that is spent, as far as its rows say."""
        if self.state in ("finished", "diverged", "stopped early"):
            return 1.0
        if self.config is None or self.last is None:
            return 0.0
        train = self.config["config"]["train"]
        spent = self.last["step"] / max(train["steps"], 1)
        if train.get("budget") == "time" and train.get("budget_amount"):
            spent = max(spent, self.last["seconds"] / train["budget_amount"])
        return min(float(spent), 0.99)

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training until it ends at the pace so far; None where that is not known."""
        if self.last is None or not self.share:
            return None
        return self.last["seconds"] * (1 / self.share - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens over the seconds of training."""
        return self.last["tokens"] / self.last["seconds"] if self.last and self.last["seconds"] else None


@dataclass(frozen=True)
class Group:
    """All runs of one configuration, in the order of their seeds, as far as each has come."""

    label: str
    runs: tuple[Seen, ...]

    @property
    def hash(self) -> str:
        """Of the configuration: what links call the group."""
        return self.runs[0].hash

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration."""
        assert self.runs[0].config
        return self.runs[0].config["config"]

    @property
    def router(self) -> str:
        """The router's name, or ``dense``."""
        assert self.runs[0].config
        return str(self.runs[0].config["router"])

    @cached_property
    def sites(self) -> dict[str, list[int]]:
        """The routed sites that are shown as one, as places in the rows' lists; none in the dense model."""
        return {} if self.router == DENSE else families(site_keys(self.config["model"]))

    @property
    def settled(self) -> list[Seen]:
        """The runs that make its figures: those that finished; before the first has, those that are on their way."""
        finished = [run for run in self.runs if run.state == "finished"]
        return finished or [run for run in self.runs if run.state in ALIVE and (run.evals or run.train)]

    @property
    def going(self) -> list[Seen]:
        """The runs that are being trained."""
        return [run for run in self.runs if run.state == "running" and (run.evals or run.train)]


@dataclass(frozen=True)
class Lot:
    """Runs that may be compared, as far as that can be said before they have ended."""

    key: str
    runs: tuple[Seen, ...]

    @property
    def title(self) -> str:
        """Say whose these are."""
        routers = sorted({router_label(run.config["config"]) for run in self.runs if run.config})
        named = ", ".join(routers[:3]) + (f" and {len(routers) - 3} more" if len(routers) > 3 else "")
        return f"{len(self.runs)} {'run' if len(self.runs) == 1 else 'runs'}: {named or 'not begun'}"


def make_lots(runs: Iterable[Seen]) -> list[Lot]:
    """Part runs by what all runs of a table share, those first in which something runs, then the larger."""
    parts = grouped(sorted((run for run in runs if run.config), key=lambda run: run.id), lambda run: run.kind)
    lots = [Lot(hashlib.sha256(key.encode()).hexdigest()[:8], tuple(runs)) for key, runs in parts.items()]
    return sorted(lots, key=lambda lot: (not any(run.state == "running" for run in lot.runs), -len(lot.runs)))


@dataclass(frozen=True, kw_only=True)
class Board:
    """Everything that views show.

    Attributes:
        runs: those of one lot, in any state.
        others: runs that cannot be read or were not begun, which are in no lot.
        reference: the entry that differences are taken to.
        left_out: what other runs there are, and why they are not here.
        margin: the difference below which entries are equivalent.
        results: what other commands published, by name: see :mod:`rlroute.experiments.dashboard.published`.
        compared: the ended runs that the table is of; the largest group of comparable ones if None.
        ladder: the one of the run store; a line where it cannot be read, None where there is none.
    """

    runs: tuple[Seen, ...]
    others: tuple[Seen, ...] = ()
    reference: str | None = None
    left_out: tuple[str, ...] = ()
    margin: float = MARGIN
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    compared: Sequence[RunRecord] | None = None
    ladder: Ladder | str | None = None

    @cached_property
    def _compared(self) -> tuple[Sequence[RunRecord], Sequence[str]]:
        if self.compared is not None:
            return self.compared, ()
        return largest_group([run.record for run in self.runs if run.record])

    @cached_property
    def _built(self) -> Table | ComparisonError:
        records, left_out = self._compared
        ladder = self.ladder if isinstance(self.ladder, Ladder) else None
        try:
            return build_table(records, self.reference, [*self.left_out, *left_out], self.margin, ladder)
        except ComparisonError as error:
            return error

    def build(self) -> Table:
        """Return the table of the runs that have ended.

        Raises:
            ComparisonError: they are not comparable, or there is no such reference.
        """
        if isinstance(self._built, ComparisonError):
            raise self._built
        return self._built

    @property
    def table(self) -> Table | str:
        """The same; in a line why there is none."""
        return str(self._built) if isinstance(self._built, ComparisonError) else self._built

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The entries of the table by their labels."""
        return {entry.label: entry for entry in make_entries(self._compared[0])} if self._compared[0] else {}

    @cached_property
    def groups(self) -> list[Group]:
        """All entries, ended or not: those of the table as it ranks them, then the others by their last losses."""
        ordered = sorted((run for run in self.runs if run.config), key=lambda run: (run.seed or 0, run.id))
        by_hash = grouped(ordered, lambda run: run.hash)
        said = labels({name: runs[0].config["config"] for name, runs in by_hash.items() if runs[0].config})
        said |= {entry.runs[0].config["config_hash"]: entry.label for entry in self.entries.values()}
        rows = [] if isinstance(self.table, str) else self.table.rows
        rank = {row.config_hash: place for place, row in enumerate(rows)}
        groups = [Group(said[name], tuple(runs)) for name, runs in by_hash.items()]
        return sorted(groups, key=lambda group: (rank.get(group.hash, len(rank)), _last_loss(group), group.label))

    @cached_property
    def styles(self) -> dict[str, Style]:
        """How each group is drawn, the same in all views."""
        return make_styles(self.groups)

    @cached_property
    def first(self) -> frozenset[str]:
        """The labels of those drawn at first: the reference, the yardsticks, what is being trained, the best others."""
        always = [group.label for group in self.groups if group.router == DENSE or group.label == self._base]
        rest = sorted(self.groups, key=lambda group: not group.going)
        others = [group.label for group in rest if group.label not in always]
        return frozenset([*always, *others[: max(FIRST - len(always), 0)]][:FIRST])

    @property
    def _base(self) -> str:
        return "" if isinstance(self.table, str) else self.table.reference

    def take_over(self, before: Board) -> None:
        """Take what another board has made of the runs that ended, where they are the same ones."""
        mine, other = ([run.record for run in board.runs if run.record] for board in (self, before))
        same = len(mine) == len(other) and all(map(operator.is_, mine, other))
        same = same and self.left_out == before.left_out and self.ladder is before.ladder
        for name in ("_compared", "_built", "entries") if same else ():
            if name in vars(before):
                vars(self)[name] = vars(before)[name]

    def run(self, name: str) -> Seen | None:
        """Return the run of an id."""
        return next((run for run in (*self.runs, *self.others) if run.id == name), None)


def make_styles(entries: Sequence[Group] | Sequence[Entry]) -> dict[str, Style]:
    """Give each entry its style, the same in all figures."""
    routed = sorted(entry.label for entry in entries if entry.router != DENSE)
    return styles_of(routed, [entry.label for entry in entries if entry.router == DENSE])


def _last_loss(group: Group) -> float:
    last = [run.evals[-1]["bits_per_byte"] for run in group.runs if run.evals]
    return sum(last) / len(last) if last else math.inf
