"""Ends a process that has made no step for too long, and keeps its stacks; whoever started it resumes the run."""

import contextlib
import faulthandler
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "hung-{rank}.txt"
START_SECONDS = 600.0
"""The way to the first step may take at least this long: it reads code, corpus and checkpoint, perhaps on a busy
machine.
"""


@contextmanager
def watchdog(seconds: float, folder: Path, rank: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to call after each step. If no call comes for ``seconds``, the process exits.

    It leaves the stacks of its threads in ``folder``/hung-<rank>.txt. The timer is the interpreter's own
    (:mod:`faulthandler`): it fires even while a thread never releases the interpreter's lock.

    Args:
        seconds: how long a step may take, an evaluation included; the first one has ``START_SECONDS`` if that is
            longer.
        folder: the run's folder, which is there.
        rank: which of the run's workers this is.
    """
    path = folder / FILE.format(rank=rank)
    with path.open("w") as file:
        armed = -math.inf  # the first step always sets the timer anew

        def alive(step: int) -> None:
            nonlocal armed
            now = time.monotonic()
            if now - armed > min(1.0, seconds / 10):  # a timer is a thread: not one for every step
                faulthandler.dump_traceback_later(seconds, exit=True, file=file)
                armed = now

        faulthandler.dump_traceback_later(max(seconds, START_SECONDS), exit=True, file=file)
        try:
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()
    with contextlib.suppress(OSError):
        path.unlink()


def stacks(folder: Path) -> Path | None:
    """Return a file with the stacks of a process that a watchdog has ended, if there is one."""
    return next((path for path in sorted(folder.glob(FILE.format(rank="*"))) if path.stat().st_size), None)
