"""Ends a process that has made no step for too long, and keeps its stacks; whoever started it resumes the run."""

import contextlib
import faulthandler
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "hung-{rank}.txt"


@contextmanager
def watchdog(seconds: float, folder: Path, rank: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to call after each step. If no call comes for ``seconds``, the process exits.

    It leaves the stacks of its threads in ``folder``/hung-<rank>.txt. The timer is the interpreter's own
    (:mod:`faulthandler`): it fires even while a thread never releases the interpreter's lock.

    Args:
        seconds: how long a step may take, reading the corpus and an evaluation included.
        folder: the run's folder, which is there.
        rank: which of the run's workers this is.
    """
    path = folder / FILE.format(rank=rank)
    with path.open("w") as file:
        armed = 0.0

        def alive(step: int) -> None:
            nonlocal armed
            now = time.monotonic()
            if now - armed > min(1.0, seconds / 10):  # a timer is a thread: not one for every step
                faulthandler.dump_traceback_later(seconds, exit=True, file=file)
                armed = now

        alive(0)
        try:
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()
    with contextlib.suppress(OSError):
        path.unlink()


def stacks(folder: Path) -> Path | None:
    """Return a file with the stacks of a process that a watchdog has ended, if there is one."""
    return next((path for path in sorted(folder.glob(FILE.format(rank="*"))) if path.stat().st_size), None)
