"""A live table of how far runs are, a line for each entry, read from the run store alone: it serves every launcher."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rlroute.alarms import Alarm, Watch
from rlroute.experiments.launch.jobs import Job
from rlroute.experiments.launch.tail import Tail
from rlroute.experiments.terminal import Grid
from rlroute.experiments.text import NOTHING, si
from rlroute.reading import worst_vio
from rlroute.records import ENDED, State, state

if TYPE_CHECKING:
    from rich.console import Console, Group

REFRESH_SECONDS = 1.0
LOG_SECONDS = 30.0
"""Where output is not a terminal, a line this often instead of a live table."""
OVER: frozenset[State] = ENDED | {"stopped early"}
INTEREST: tuple[State, ...] = ("running", "set aside", "empty", "interrupted", "stopped early", *sorted(ENDED))
"""What is shown first: what runs, what has failed, what waits for its turn, what is over."""
HEAD = ("entry", "done", "running", "set aside", "bits/byte", "tokens/s", "MaxVio", "left")
SHORT = {"running": "run", "set aside": "lost", "bits/byte": "b/byte", "tokens/s": "tok/s"}
SPARE = ("set aside", "running", "done")
LEGEND = (
    "done, running, set aside: runs; bits/byte and MaxVio: last evaluations, mean over seeds, MaxVio at its worst "
    "site; tokens/s: of a run; left: at this pace"
)


class Follower:
    """What a run's records say so far; each look reads only what has come since the last."""

    def __init__(self, job: Job, store: Path) -> None:
        self.job, self.folder = job, store / job.id
        self.train: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.state: State = "empty"
        self.old = state(self.folder) in ENDED
        """It had ended before: its alarms were said then."""
        self.watch = Watch(job.id, job.config.to_dict()["model"])
        self.alarms: list[Alarm] = []
        """New ones, for whoever says them to take out."""
        self.pace = 0.0  # share of the run a second, since it was first seen to run; kept when it is over
        self._metrics = Tail(self.folder / "metrics.jsonl")
        self._heard: float | None = None  # when its last row came, or it was first seen to run
        self._first: tuple[float, float] | None = None  # when it was first seen to run, and how far it was

    def look(self, now: float) -> None:
        """Read what is new; ``now`` is a time in seconds."""
        if self.state in ENDED:  # which it was before its rows were read
            return
        self.state = state(self.folder)
        for row in self._rows():
            self.train, self.evaluation = (row, self.evaluation) if row["kind"] == "train" else (self.train, row)
            self.alarms += self.watch.see(row)
            self._heard = now
        if self.state != "running":
            self._heard = None
        elif self._heard is None:
            self._heard = now
        else:
            self.alarms += self.watch.idle(now - self._heard)
        if self.state == "running" and self._first is None:
            self._first = now, self.share
        elif self.state == "running" and self._first is not None and now > self._first[0]:
            self.pace = max(0.0, self.share - self._first[1]) / (now - self._first[0])

    def _rows(self) -> Iterable[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            for line in self._metrics.lines():
                with contextlib.suppress(ValueError):  # whoever trains the run will say so
                    yield json.loads(line)

    @property
    def share(self) -> float:
        """The share of the run's budget that is spent, as far as its records say."""
        if self.state in OVER:
            return 1.0
        last = max(self.train, self.evaluation, key=lambda row: row.get("step", 0))
        config = self.job.config.train
        spent = last.get("step", 0) / config.steps
        if config.budget == "time" and config.budget_amount:
            spent = max(spent, last.get("seconds", 0.0) / config.budget_amount)
        return min(0.99, float(spent))

    @property
    def speed(self) -> float | None:
        """Tokens a second of training time."""
        return self.train["tokens"] / self.train["seconds"] if self.train.get("seconds") else None

    @property
    def max_vio(self) -> float | None:
        """MaxVio of the last evaluation, at its worst site."""
        return worst_vio(self.evaluation) if self.evaluation else None


class Monitor:
    """Shows the progress of ``jobs`` while its ``with`` block runs."""

    def __init__(self, jobs: Sequence[Job], store: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.start = clock, clock()
        self.entries: dict[str, list[Follower]] = {}
        for job in jobs:
            self.entries.setdefault(job.entry, []).append(Follower(job, store))
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self.thread.join()

    def _show(self) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        try:
            if console.is_terminal:
                self._draw(console)
            else:
                while not self.stop.wait(LOG_SECONDS):
                    print(self.line(), *self.take_alarms(), sep="\n", file=sys.stderr, flush=True)
            self.look()  # what has come since the last look, which is all of a run that was over before the first
            for alarm in self.take_alarms():
                print(alarm, file=sys.stderr, flush=True)
        except OSError:  # whoever looked on is gone, and the runs are not held up by that
            return

    def _draw(self, console: Console) -> None:
        from rich.live import Live

        with Live(console=console, transient=True, auto_refresh=False) as live:
            while not self.stop.wait(REFRESH_SECONDS):
                live.update(self.draw(console), refresh=True)
                for alarm in self.take_alarms():
                    console.print(alarm, style="yellow", markup=False, highlight=False)  # above the table

    @property
    def runs(self) -> list[Follower]:
        """All runs."""
        return [run for runs in self.entries.values() for run in runs]

    def look(self) -> None:
        """Read what has come since the last look."""
        now = self.clock()
        for run in self.runs:
            run.look(now)

    def take_alarms(self) -> list[str]:
        """Return, each in a line, the alarms that have come since the last call, of runs that had not ended before."""
        said = [f"alarm: {alarm}" for run in self.runs if not run.old for alarm in run.alarms]
        for run in self.runs:
            run.alarms.clear()
        return said

    def line(self) -> str:
        """Return in one line how far all are, and what the running entries have come to."""
        self.look()
        counts = Counter(run.state for run in self.runs)
        shown: tuple[State, ...] = ("running", "stopped early", "set aside")
        states = [f"{counts[one]} {one}" for one in shown if counts[one]]
        ended = f"{sum(counts[one] for one in ENDED)} of {len(self.runs)} runs ended"
        standing = sum(len(run.watch.standing) for run in self.runs if run.state == "running")
        states += [f"{standing} alarm{'s' if standing > 1 else ''}"] if standing else []
        elapsed = (self.clock() - self.start) / 60
        head = f"{', '.join([ended, *states])}; {elapsed:.1f} min so far, left {self._left(self.runs)}"
        running = [runs for runs in self.entries.values() if any(run.state == "running" for run in runs)]
        return "; ".join([head, *(_said(self._row(runs)) for runs in running)])

    def grid(self, rows: int) -> Grid:
        """Return the entries as a table of at most so many rows, the last of which is all runs together."""
        ordered = sorted(self.entries.values(), key=lambda runs: min(INTEREST.index(run.state) for run in runs))
        fitting = ordered if len(ordered) < rows else ordered[: rows - 2]
        lines = [self._row(runs) for runs in fitting]
        if more := len(ordered) - len(fitting):
            lines.append([f"{more} entries more", *[""] * (len(HEAD) - 1)])
        total = self._row(self.runs)
        lines.append(["all", *total[1:4], "", "", "", total[-1]])
        return Grid(HEAD, lines, spare=SPARE, short=SHORT)

    def draw(self, console: Console) -> Group:
        """Return what a terminal shows: a line each, none of which wraps."""
        from rich.console import Group
        from rich.text import Text

        self.look()
        table = self.grid(max(6, console.height - 4)).draw(console.width)
        legend = [Text(LEGEND, style="dim")] if len(LEGEND) <= console.width else []
        return Group(table, *legend)

    def _row(self, runs: Sequence[Follower]) -> list[str]:
        counts = Counter(run.state for run in runs)
        done = sum(counts[one] for one in OVER)
        numbers = [f"{done}/{len(runs)}", str(counts["running"] or ""), str(counts["set aside"] or "")]
        bits = _mean([run.evaluation["bits_per_byte"] for run in runs if run.evaluation], "{:.4f}".format)
        speed, vio = _mean([run.speed for run in runs], si), _mean([run.max_vio for run in runs], "{:.2f}".format)
        return [runs[0].job.label or runs[0].job.config.router_name, *numbers, bits, speed, vio, self._left(runs)]

    def _left(self, runs: Sequence[Follower]) -> str:
        """Return the time until these runs have ended, if as many go on at a time as now."""
        to_do = sum(1 - run.share for run in runs if run.state != "set aside")
        paces = [run.pace for run in runs if run.pace]
        running = sum(run.state == "running" for run in runs)
        if not to_do:
            return ""
        return duration(to_do * len(paces) / (sum(paces) * running)) if paces and running else NOTHING


def _mean(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return form(sum(known) / len(known)) if known else NOTHING


def duration(seconds: float) -> str:
    """Return a time with its unit."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _said(row: Sequence[str]) -> str:
    values = dict(zip(HEAD, row, strict=True))
    return f"{row[0]} {row[1]}: {row[4]} bits/byte, {row[5]} tokens/s, MaxVio {row[6]}, left {values['left']}"
