"""Ends a process that makes no step for too long, and leaves where it stood: whoever started it starts it again from its checkpoint."""

import contextlib
import faulthandler
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "hung-{rank}.txt"
START_SECONDS = 600.0
"""The way to the first step may take at least this long: it reads code, corpus and checkpoint, perhaps on a busy machine."""


@contextmanager
def watchdog(seconds: float, folder: Path, rank: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield what is to be called after each step; without a call for so long the process exits.

    Its stacks are then in ``folder``/hung-<rank>.txt.

    The interpreter's own timer does it, which a thread that never lets go of the interpreter cannot hold up.

    Args:
        seconds: how long a step may take, an evaluation included; the first one has ``START_SECONDS`` if that is longer.
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
