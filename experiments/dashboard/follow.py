"""A run store that grows, whoever writes it: each look reads only what has come since the last.

Files that have not changed (by inode, size and time) are not opened. Every row is read once, for its alarms; of many
some are kept, to be drawn.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlroute import lock
from rlroute.alarms import Watch
from rlroute.errors import RlrouteError, StoreError
from rlroute.experiments.comparison.ladder_file import FILE, Ladder, read_ladder
from rlroute.experiments.launch.tail import Tail
from rlroute.experiments.report.board import Seen
from rlroute.foreign import Unfit, parse_json, shown, why
from rlroute.reading import (
    hold_config,
    hold_row,
    last_line,
    read_part,
    read_runs,
    refuse_inconsistent,
    refuse_other_sites,
)
from rlroute.records import ENDED, State, state
from rlroute.schema import RunRecord

KEPT = 200
"""Of a run's training rows at most so many are kept, and the last."""
LOADS_KEPT = 100
LIVELY = 60.0
"""Seconds: a run whose rows grew within them is running, also where another machine's lock cannot be seen."""
PARTS = ("config", "environment", "summary", "failed")
FILES = (*(f"{name}.json" for name in PARTS), "metrics.jsonl", "loads.jsonl")
Row = TypeVar("Row")


class Thinned(Generic[Row]):
    """Rows of a list that grows: every n-th of them, n a power of two, and the last; all lists of a length have the
    same ones, so that seeds are drawn at common steps.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count, self.stride = most, 0, 1
        self._kept: dict[int, Row] = {}

    def add(self, row: Row) -> None:
        """Take in the next row."""
        if (self.count - 1) % self.stride:
            del self._kept[self.count - 1]  # which was kept as the last
        self.count += 1
        if self.count > self.stride * self.most:
            self.stride *= 2
            self._kept = {place: kept for place, kept in self._kept.items() if place % self.stride == 0}
        self._kept[self.count - 1] = row

    @property
    def rows(self) -> list[Row]:
        """Those that are kept."""
        return list(self._kept.values())


class FollowedRun:
    """One run's folder."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.clock = folder, clock
        self.seen = Seen(id=folder.name, state="empty")
        self._stamps: tuple[Any, ...] | None = None
        self._grown: float | None = None
        self._experts_L: Sequence[int] = ()
        self._parts: dict[str, tuple[Any, Any]] = {}
        self._begin()

    def _begin(self) -> None:
        self._metrics, self._turns = Tail(self.folder / "metrics.jsonl"), 0
        self._train, self._evals = Thinned[Any](KEPT), list[Any]()
        self._watch: Watch | None = None

    def look(self) -> bool:
        """Read what is new; return whether anything is."""
        before, stamps = self.seen, self._stamp()
        same = stamps == self._stamps
        if not same and self._stamps is not None and stamps[FILES.index("metrics.jsonl")]:
            self._grown = self.clock()
        now = before.state if same and before.state in ENDED else self._state()
        try:
            stalls = self._watch.idle(self._idle()) if self._watch and now == "running" else []
            if same and now == before.state and not stalls:
                return False
            self._stamps = stamps
            self.seen = self._read(now)
        except (RlrouteError, OSError, ValueError, LookupError, TypeError) as error:
            self.seen = Seen(id=self.folder.name, state="damaged", reason=why(error))
            self._begin()
        return True

    @property
    def is_run(self) -> bool:
        """Whether the folder is a run's; one that waits for its turn is locked once."""
        return self.seen.state != "empty" or (self.folder / lock.FILE).exists()

    def _stamp(self) -> tuple[Any, ...]:
        return tuple(_stamp(self.folder / name) for name in FILES)

    def _state(self) -> State:
        now = state(self.folder)
        lively = self._grown is not None and self.clock() - self._grown < LIVELY
        return "running" if now == "interrupted" and lively else now

    def _idle(self) -> float:
        """Return the seconds since its last row, or since it was begun."""
        times = [stamp[2] for name in ("metrics.jsonl", "config.json") if (stamp := _stamp(self.folder / name))]
        return max(0.0, time.time() - times[0] / 1e9) if times else 0.0

    def _read(self, now: State) -> Seen:
        parts = {name: self._part(name) for name in PARTS}
        if parts["config"] is None:
            return Seen(id=self.folder.name, state=now)
        if parts["config"]["id"] != self.folder.name:
            raise Unfit(f"it holds another run, {shown(parts['config']['id'])}")
        self._experts_L, _ = hold_config(parts["config"]["config"])
        self._take_rows(parts["config"]["config"]["model"])
        failed = parts.pop("failed")
        rows: dict[str, Any] = {"evals": list(self._evals), "train": self._train.rows}
        ended = parts["summary"] is not None
        return Seen(
            id=self.folder.name,
            state=now,
            reason=failed["reason"] if failed and now == "set aside" else "",
            alarms=tuple(self._watch.standing) if self._watch else (),
            read_loads=_Once(self._loads),
            record=self._record(parts | rows) if ended else None,
            **parts,
            **rows,
        )

    def _part(self, name: str) -> Any:
        """Return what a file of the folder holds; it is read again where it has changed."""
        stamp = _stamp(self.folder / f"{name}.json")
        if self._parts.get(name, (None, None))[0] != stamp or stamp is None:
            self._parts[name] = stamp, read_part(self.folder, name)
        return self._parts[name][1]

    def _take_rows(self, model: dict[str, Any]) -> None:
        lines = list(self._metrics.lines())
        if self._metrics.turns != self._turns:  # begun, or begun anew: earlier rows hold no more
            tail = self._metrics
            self._begin()
            self._metrics, self._turns, self._watch = tail, tail.turns, Watch(self.folder.name, model)
        for line in lines:
            assert self._watch  # there are rows, so the file was begun
            row = self._row("metrics.jsonl", line)
            self._watch.see(row)  # also those that are not drawn: alarms are about rows in a row, and their pace
            (self._evals.append if row["kind"] == "eval" else self._train.add)(row)

    def _row(self, name: str, line: bytes) -> dict[str, Any]:
        row = parse_json(line)
        if not isinstance(row, dict):
            raise Unfit(f"{name} holds {shown(row)}: want an object")
        hold_row(row, self.folder / name)
        refuse_other_sites(row, self._experts_L)
        return row

    def _record(self, parts: dict[str, Any]) -> RunRecord:
        """Return an ended run's record, as a compact file has it: of its rows some, of its loads the last."""
        line = last_line(self.folder / "loads.jsonl")
        loads = [] if line is None else [self._row("loads.jsonl", line)]
        record = RunRecord(self.folder.name, **parts, loads=loads)  # type: ignore[arg-type]
        refuse_inconsistent(record)
        return record

    def _loads(self) -> list[Any]:
        thinned = Thinned[bytes](LOADS_KEPT)
        try:
            for line in Tail(self.folder / "loads.jsonl").lines():
                thinned.add(line)
            return [self._row("loads.jsonl", line) for line in thinned.rows]
        except (RlrouteError, OSError, ValueError):
            return []  # the run's own look says what is wrong with its files


class _Once:
    """Reads when it is first asked, and says the same again afterwards."""

    def __init__(self, read: Callable[[], list[Any]]) -> None:
        self._read, self._found, self._lock = read, list[Any](), threading.Lock()
        self._asked = False

    def __call__(self) -> list[Any]:
        with self._lock:
            if not self._asked:
                self._found, self._asked = self._read(), True
            return self._found


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat(follow_symlinks=False)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def unended(store: Path) -> list[Seen]:
    """Return the runs of a store that have not ended, each as far as it has come; none of a compact file, which holds
    none.
    """
    folders = sorted(store.iterdir()) if store.is_dir() else []
    runs = [FollowedRun(path) for path in folders if path.is_dir() and not path.name.startswith(".")]
    going = [run for run in runs if state(run.folder) not in ENDED]
    for run in going:
        run.look()
    return [run.seen for run in going if run.is_run]


class Followed:
    """A store folder, or a compact file, as it is now.

    Attributes:
        version: another number whenever anything has changed.
        ladder: a folder's, where it has one; a line where it cannot be read.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.version, self._clock = path, 0, clock
        self._runs: dict[str, FollowedRun] = {}
        self.ladder: Ladder | str | None = None
        self._records: tuple[Seen, ...] = ()
        self._read: Any = None
        """The stamp of the file that was read: the compact one, or the ladder."""
        self._lock = threading.Lock()

    def look(self) -> tuple[Seen, ...]:
        """Return the runs, each as far as it has come; several threads may ask.

        Raises:
            StoreError: a compact file cannot be read.
        """
        with self._lock:
            return self._look_at_file() if self.path.is_file() else self._look_at_folder()

    def _look_at_file(self) -> tuple[Seen, ...]:
        if (stamp := _stamp(self.path.resolve())) != self._read:
            self._records = tuple(map(Seen.of, read_runs(self.path)))
            self._read, self.version = stamp, self.version + 1
        return self._records

    def _look_at_folder(self) -> tuple[Seen, ...]:
        try:
            names = {entry.name for entry in self.path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        except OSError:  # not there yet, or a shared folder that is away for a moment
            names = set(self._runs)
        changed = bool(self._runs.keys() - names)
        self._runs = {name: run for name, run in self._runs.items() if name in names}
        for name in sorted(names):
            run = self._runs.setdefault(name, FollowedRun(self.path / name, self._clock))
            changed |= run.look()
        if (stamp := _stamp(self.path / FILE)) != self._read:
            self._read, changed = stamp, True
            try:
                self.ladder = read_ladder(self.path)
            except StoreError as error:
                self.ladder = str(error)
        self.version += changed
        return tuple(run.seen for _, run in sorted(self._runs.items()) if run.is_run)
