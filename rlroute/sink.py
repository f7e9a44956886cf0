"""Where a run's rows may go besides its records: Weights & Biases, offline unless the user says otherwise.

The records are the truth and are written first. Everything wandb does, its import included, happens in a thread of its
own: what fails there, or hangs, ends the sink with one line on stderr, and the run does not notice. One wandb run per
run, under the run's own id; its files lie in ``wandb/`` in the run's folder.
"""

from __future__ import annotations

import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rlroute.alarms import Alarm, Watch
from rlroute.extras import missing
from rlroute.reading import site_keys
from rlroute.values import flatten

Mode = Literal["off", "offline", "online"]
PATIENCE = 30.0
"""Seconds that the end of a run waits for wandb."""
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


def require() -> None:
    """Refuse to go on without wandb.

    Raises:
        MissingDependencyError: it is not installed.
    """
    spec = find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder ./wandb, which wandb leaves behind, is a package without origin
        raise missing("--wandb", "wandb", "--wandb off does without")


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


def leaves(value: Any, name: str, sites: Sequence[int | str]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a row or a summary by their paths below ``name``, as ``eval/load_LE/1.attention/3``; lists
    over the routed sites go by the keys of these, others by number.
    """
    return flatten(value, name, keys=partial(_keys, sites))


def _keys(sites: Sequence[int | str], name: str, values: list[Any]) -> Iterable[int | str]:
    """Return the keys of a list: sites where it is over sites, or over those with experts on devices; else numbers."""
    parent, _, last = name.rpartition("/")
    if last.endswith(("_L", "_LE")) or parent.rpartition("/")[2] in ("terms", "weights"):
        for keys in (sites, [site for site in sites if isinstance(site, int)]):
            if len(keys) == len(values):
                return keys
    return range(len(values))


class _Wandb(Sink):
    """A queue, and the thread that empties it into a wandb run."""

    def __init__(self, mode: Literal["offline", "online"], folder: Path) -> None:
        self._mode, self._folder = mode, folder
        self._queue: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(BACKLOG)
        self._summary: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._stopped = self._closed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        try:
            self._config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self._sites = site_keys(self._config["config"]["model"])
            self._watch = Watch(folder.name, self._config["config"]["model"])
            self._earlier = sorted(_rows(folder), key=lambda named: named[1]["step"])
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
            run = self._open()
            self._feed(run)
            run.finish(exit_code=0 if self._summary else 1)
        except BaseException as error:  # also a sys.exit of wandb's
            self._stop(error)
            _let_go()

    def _open(self) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        if self._mode == "online" and not wandb.login(prompt=False):  # init would ask for it in a terminal
            raise PermissionError("no API key; `wandb login` or WANDB_API_KEY gives one, --wandb offline needs none")
        return wandb.init(
            mode=self._mode,
            id=legal_id(self._folder.name),
            name=self._folder.name,
            group=self._config["router"],
            project=os.environ.get("WANDB_PROJECT", "rlroute"),
            config=self._config["config"] | {name: self._config[name] for name in ("seed", "config_hash")},
            dir=str(self._folder.absolute()),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
            ),
        )

    def _feed(self, run: Any) -> None:
        """Log the rows of before a resume, unless the run online has them, then what comes, until the end."""
        first = run.step
        for name, row in self._earlier:
            _log(run, first, name, row, self._sites)
            self._new_alarms(name, row)  # which were sent when the rows were new
        while not self._stopped and (named := self._next(run)) is not None:
            _log(run, first, *named, self._sites)
            _alert(run, self._new_alarms(*named))
        run.summary.update(
            {name: leaf for name, leaf in leaves(self._summary or {}, "", self._sites) if leaf is not None}
        )

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


def legal_id(run_id: str) -> str:
    """Return a run's id as wandb takes it; its end, which tells runs apart, is kept."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", run_id)[-128:]


def _rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("metrics", "loads"):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            yield name, json.loads(line)


def _log(run: Any, first: int, name: str, row: dict[str, Any], sites: Sequence[int | str]) -> None:
    """Log the numbers of a row under its kind: ``train/loss``, ``eval/loss``, ``loads/load_LE/0/3``."""
    if row["step"] >= first:
        rest = {key: value for key, value in row.items() if key not in ("kind", "step")}
        named = leaves(rest, row.get("kind", name), sites)
        run.log({key: leaf for key, leaf in named if isinstance(leaf, int | float)}, step=row["step"])
