"""Where a run's rows may go besides its records: Weights & Biases, offline unless the user says otherwise.

The records are the truth and are written first. Everything wandb does, its import included, happens in a thread of its
own: what fails there, or hangs, ends the sink with one line on stderr, and the run does not notice. One wandb run per
run, under the run's own id; its files lie in ``wandb/`` in the run's folder.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rlroute.alarms import Alarm, Watch
from rlroute.extras import missing
from rlroute.reading import Row, read_json, read_lines, site_keys
from rlroute.upload import PATIENCE, Where, begin, conclude, log_row

Mode = Literal["off", "offline", "online"]
BACKLOG = 10_000
"""Rows that may wait for wandb."""
LOOK_SECONDS = 20.0
"""How often it is looked whether a run has stalled."""
_said: list[str] = []


class Sink:
    """Takes a run's rows and, at its end, the summary. This one drops them."""

    def log(self, name: str, row: dict[str, Any]) -> None:
        """Take a row of ``name``.jsonl."""

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Take the summary of an ended run, or none from one that was stopped. Only the first call counts."""


OFF = Sink()


def require(what: str = "--wandb") -> None:
    """Refuse to go on without wandb.

    Args:
        what: needs it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    spec = find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder ./wandb, which wandb leaves behind, is a package without origin
        raise missing(what, "wandb", "--wandb off does without" if what == "--wandb" else "")


def open_sink(mode: Mode, folder: Path) -> Sink:
    """Return the sink of the run whose folder, described and rewound, this is. Nothing is raised, now or later."""
    return OFF if mode == "off" else _Wandb(mode, folder)


def warn(run: str, what: str) -> None:
    """Print a warning about a run on stderr, in one line, whatever becomes of stderr."""
    line = f"warning: run {run} {' '.join(what.split())}"
    _said.append(line)
    with suppress(Exception):
        print(line, file=sys.stderr, flush=True)


def take_warnings() -> list[str]:
    """Return the warnings that this process has printed on stderr since the last call.

    A launcher prints them for its workers, whose stderr it does not show.
    """
    said = _said.copy()
    del _said[: len(said)]
    return said


def pass_on(warnings: list[str]) -> None:
    """Add warnings of another process to those of this one."""
    _said.extend(warnings)


class _Wandb(Sink):
    """A queue, and the thread that empties it into a wandb run."""

    def __init__(self, mode: Where, folder: Path) -> None:
        self._mode, self._folder = mode, folder
        self._queue: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(BACKLOG)
        self._summary: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._stopped = self._closed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        try:
            self._config = read_json(folder / "config.json")
            self._sites = site_keys(self._config["config"]["model"])
            self._watch = Watch(folder.name, self._config["config"]["model"])
            self._earlier = sorted(_rows(folder, "metrics", "loads"), key=lambda named: named[1]["step"])
            self._thread.start()
        except Exception as error:
            self._stop(error)

    def log(self, name: str, row: dict[str, Any]) -> None:
        try:
            if not self._stopped:
                self._queue.put_nowait((name, row))
        except queue.Full:
            self._stop(f"{BACKLOG} rows wait for it")

    def close(self, summary: dict[str, Any] | None = None) -> None:
        if self._closed or not self._thread.ident:
            return
        self._closed, self._summary = True, summary
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(0 if self._stopped else PATIENCE)
        if self._thread.is_alive():
            self._stop(f"not done {PATIENCE:g} s after the end of the run")
            letting_go = threading.Thread(target=_let_go, daemon=True)
            letting_go.start()
            letting_go.join(1)

    def _stop(self, why: BaseException | str) -> None:
        """Take no more rows, and say so once."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        reason = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else why
        warn(self._folder.name, f"goes on without wandb: {' '.join(reason.split())[:300]}")

    def _work(self) -> None:
        try:
            run = begin(self._mode, self._config, self._folder)
            self._feed(run)
            run.finish(exit_code=0 if self._summary else 1)
        except BaseException as error:  # also a sys.exit of wandb's
            self._stop(error)
            _let_go()

    def _feed(self, run: Any) -> None:
        """Log the rows of before a resume, unless the run online has them, then what comes, until the end."""
        first = run.step
        for name, row in self._earlier:
            log_row(run, first, name, row, self._sites)
            self._new_alarms(name, row)  # which were sent when the rows were new
        while not self._stopped and (named := self._next(run)) is not None:
            log_row(run, first, *named, self._sites)
            _alert(run, self._new_alarms(*named))
        if self._summary is not None:
            loads = [row for _, row in _rows(self._folder, "loads")]
            conclude(run, first, self._summary, loads, self._sites, (alarm.kind for alarm in self._watch.standing))

    def _next(self, run: Any) -> tuple[str, dict[str, Any]] | None:
        """Wait for the next row, or the end; say it if none comes."""
        since = time.monotonic()
        while True:
            try:
                return self._queue.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                _alert(run, self._watch.idle(time.monotonic() - since))

    def _new_alarms(self, name: str, row: dict[str, Any]) -> list[Alarm]:
        return self._watch.see(row) if name == "metrics" else []


def _alert(run: Any, alarms: Iterable[Alarm]) -> None:
    for alarm in alarms:
        run.alert(title=alarm.kind, text=str(alarm), level="WARN", wait_duration=0)


def _let_go() -> None:
    """Part with wandb's service, for whose end a process would otherwise wait at its own; the next run starts a new
    one.
    """
    with suppress(BaseException):
        sys.modules["wandb"].teardown(exit_code=1)


def _rows(folder: Path, *names: str) -> Iterator[tuple[str, Row]]:
    return ((name, row) for name in names for _, row in read_lines(folder / f"{name}.jsonl"))
