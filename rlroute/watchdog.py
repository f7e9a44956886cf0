"""Ends a process that has made no step for too long, and keeps its stacks; whoever started it resumes the run.

What watches is a process of its own: it also ends one that is stopped, or that never lets go of the interpreter's lock.
"""

import contextlib
import faulthandler
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rlroute.errors import RlrouteError, StoreError

FILE = "hung-{rank}.txt"
START_SECONDS = 600.0
"""The way to the first step may take at least this long: it reads code, corpus and checkpoint, perhaps on a busy
machine.
"""
DUMP_SECONDS = 5.0
"""How long a process may take to write its stacks before it is ended."""
PAUSES = (0.1, 1.0, 5.0)
"""Seconds until a watcher that could not be started is tried again."""
WATCHER = """
import os, select, signal, sys
process, limit, step, dump = int(sys.argv[1]), *map(float, sys.argv[2:])
def hears(seconds):
    if not select.select([0], [], [], seconds)[0]:
        return False
    if not os.read(0, 4096):
        sys.exit()  # the process has ended
    return True
while hears(limit):
    limit = step
print(f"no step in {limit:g} s", flush=True)
os.kill(process, signal.SIGUSR2)
hears(dump)
os.kill(process, signal.SIGKILL)
"""


class WatchdogError(RlrouteError):
    """No process can be started that would watch this one."""


@contextmanager
def watchdog(seconds: float, folder: Path, rank: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to call after each step. If no call comes for ``seconds``, the process is killed.

    The stacks of its threads are then in ``folder``/hung-<rank>.txt; of one that was stopped there is but a line.

    Args:
        seconds: how long a step may take, an evaluation included; the first one has ``START_SECONDS`` if that is
            longer.
        folder: the run's folder, which is there.
        rank: which of the run's workers this is.

    Raises:
        StoreError: the file cannot be written.
        WatchdogError: the system starts no more processes.
    """
    path = folder / FILE.format(rank=rank)
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), "w")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    with file:
        faulthandler.register(signal.SIGUSR2, file=file)  # in C: it needs no lock of the interpreter
        watcher = _watch(max(seconds, START_SECONDS), seconds, file)
        told = -math.inf

        def alive(step: int) -> None:
            nonlocal watcher, told
            now = time.monotonic()
            if now - told > min(1.0, seconds / 10):
                told = now
                assert watcher.stdin is not None
                try:
                    os.write(watcher.stdin.fileno(), b".")
                except BrokenPipeError:  # somebody has killed it
                    watcher.communicate()
                    watcher = _watch(seconds, seconds, file)

        try:
            yield alive
        finally:
            with watcher:  # which closes the pipe
                watcher.kill()
            faulthandler.unregister(signal.SIGUSR2)
    with contextlib.suppress(OSError):
        path.unlink()


def _watch(first: float, step: float, file: IO[str]) -> subprocess.Popen[bytes]:
    """Start the watcher of this process, in a session of its own: what stops this one leaves it alone."""
    limits = [os.getpid(), first, step, DUMP_SECONDS]
    command = [sys.executable, "-I", "-S", "-c", WATCHER, *map(str, limits)]
    for pause in (*PAUSES, None):
        try:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, start_new_session=True, bufsize=0)
        except OSError as error:
            if pause is None:
                allowed = resource.getrlimit(resource.RLIMIT_NPROC)[0]
                raise WatchdogError(
                    f"no process can be started to watch the run: {error.strerror}; legal are {allowed} processes and "
                    "threads of a user (ulimit -u), or fewer where a control group says so (pids.max)"
                ) from error
            time.sleep(pause)
    raise AssertionError


def stacks(folder: Path) -> Path | None:
    """Return a file with the stacks of a process that a watchdog has ended, if there is one."""
    return next((path for path in sorted(folder.glob(FILE.format(rank="*"))) if path.stat().st_size), None)
