"""A live table of how far runs are, read from the run store alone, so that it serves every launcher."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rlroute.experiments.launch.jobs import Job
from rlroute.records import ENDED, State, last_row, state

if TYPE_CHECKING:
    from rich.table import Table

REFRESH_SECONDS = 1.0
LOG_SECONDS = 30.0
"""Where output is not a terminal, a line this often instead of a live table."""
OVER: frozenset[State] = ENDED | {"stopped early"}
INTEREST: tuple[State, ...] = ("running", "set aside", "empty", "interrupted", "stopped early", *sorted(ENDED))
"""What is shown first: what runs, what has failed, what waits for its turn, what is over."""


class Monitor:
    """Shows the progress of ``jobs`` while its ``with`` block runs."""

    def __init__(self, jobs: Sequence[Job], store: Path) -> None:
        self.jobs, self.store = jobs, store
        self.start = time.monotonic()
        self.first = self._done()
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
        from rich.live import Live

        console = Console(stderr=True)
        if not console.is_terminal:
            while not self.stop.wait(LOG_SECONDS):
                print(self._headline(), file=sys.stderr, flush=True)
            return
        with Live(console=console, transient=True, auto_refresh=False) as live:
            while not self.stop.wait(REFRESH_SECONDS):
                live.update(self._table(), refresh=True)

    def _share(self, job: Job) -> float:
        """Return the share of a job's steps that are done, as far as its records say."""
        if self._state(job) in OVER:
            return 1.0
        row = last_row(self.store / job.id)
        return min(0.99, row["step"] / job.config.train.steps) if row else 0.0

    def _done(self) -> float:
        return sum(map(self._share, self.jobs))

    def _state(self, job: Job) -> State:
        return state(self.store / job.id)

    def _headline(self) -> str:
        done, elapsed = self._done(), time.monotonic() - self.start
        counts = Counter(map(self._state, self.jobs))
        speed = (done - self.first) / elapsed if elapsed else 0.0
        to_do = len(self.jobs) - done - counts["set aside"]
        left = f"about {to_do / speed / 60:.0f} min left" if speed else "starting"
        shown: tuple[State, ...] = ("running", "stopped early", "set aside")
        states = ", ".join(f"{counts[one]} {one}" for one in shown if counts[one])
        ended = f"{sum(counts[one] for one in ENDED)} of {len(self.jobs)} runs ended"
        return f"{', '.join(filter(None, (ended, states)))}; {elapsed / 60:.1f} min so far, {left}"

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(title=self._headline(), title_justify="left", box=None, pad_edge=False)
        for column in ("run", "seeds done", "progress", "last loss"):
            table.add_column(column)
        by_config: dict[str, list[Job]] = {}
        for job in self.jobs:
            by_config.setdefault(job.id.rpartition("-s")[0], []).append(job)
        for jobs in sorted(by_config.values(), key=self._interest)[: _rows_that_fit()]:
            shares = [self._share(job) for job in jobs]
            rows = [row for job in jobs if (row := last_row(self.store / job.id))]
            loss = f"{rows[-1]['loss']:.3f}" if rows else ""
            bar = "".join("█" if share == 1.0 else "▓▒░"[2 - int(share * 3)] if share else "·" for share in shares)
            bar = "".join("✗" if self._state(job) == "set aside" else mark for job, mark in zip(jobs, bar, strict=True))
            name = jobs[0].label or jobs[0].config.router_name
            table.add_row(name, f"{shares.count(1.0)}/{len(jobs)}", f"{bar} {sum(shares) / len(jobs):4.0%}", loss)
        return table

    def _interest(self, jobs: list[Job]) -> int:
        """Rank what is watched first where not all fits."""
        return min(INTEREST.index(self._state(job)) for job in jobs)


def _rows_that_fit() -> int:
    return max(5, shutil.get_terminal_size().lines - 4)
