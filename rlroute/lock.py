"""The lock of a run's folder: one process at a time holds it, and its number stands in the file for whoever waits."""

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rlroute.errors import HeldError

FILE = ".lock"


def make(folder: Path) -> None:
    """Make the file if it is not there.

    Raises:
        OSError: it cannot be written, or is a link.
    """
    os.close(_open(folder))


def take(folder: Path, run: str, patience: float) -> int:
    """Lock a folder and return the open file; the system lets go of it when the process ends, however it ends.

    Args:
        folder: the run's.
        run: its id.
        patience: seconds to wait for another process.

    Raises:
        HeldError: another process still holds it.
        OSError: the file cannot be written, or is a link.
    """
    file, deadline = _open(folder), time.monotonic() + patience
    try:
        while not _try(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise HeldError(f"run {run} is being trained by {holder(folder)} (waited {patience:.0f} s)")
            time.sleep(0.2)
        _write(file, b"%d" % os.getpid())  # over that of whoever was killed
    except BaseException:
        os.close(file)
        raise
    return file


def let_go(file: int) -> None:
    """Let go of what :func:`take` has locked."""
    with suppress(OSError):  # the disk may be what failed
        _write(file, b"")
    os.close(file)


def held(folder: Path) -> bool:
    """Whether a process holds a folder: this asks for a share of it; whoever wants all of it meanwhile tries again."""
    try:
        file = _open(folder, os.O_RDONLY)
    except OSError:  # there is none
        return False
    try:
        return not _try(file, fcntl.LOCK_SH)
    except OSError:  # the file system has no locks
        return False
    finally:
        os.close(file)


def holder(folder: Path) -> str:
    """Return which process holds a folder, by its number on its own host."""
    with suppress(OSError), open(_open(folder, os.O_RDONLY), "rb") as file:
        if (number := file.read(20)).isdigit():
            return f"process {number.decode()}"
    return "another process"


def wait(folder: Path, run: str, goes_on: Callable[[], bool], say: Callable[[str], None], patience: float) -> None:
    """Wait for as long as another process trains a run.

    Args:
        folder: the run's.
        run: its id.
        goes_on: whether it does.
        say: told which process that is, and again whenever its records have stood still for so long.
        patience: seconds.
    """
    seen, since, told = None, time.monotonic(), False
    while goes_on():
        if (now := _stamps(folder)) != seen:
            seen, since = now, time.monotonic()
        if not told:
            told = True
            say(f"run {run} is being trained by {holder(folder)}: waiting for it")
        elif time.monotonic() - since > patience:
            since = time.monotonic()
            still = f"{holder(folder)} has written nothing for {patience / 60:.3g} minutes"
            say(f"run {run}: {still}; waiting all the same, until it goes on or ends")
        time.sleep(0.2)


def _stamps(folder: Path) -> tuple[int, ...]:
    """Return when the files of a run that grow were last written."""
    files = (folder / "metrics.jsonl", folder / "loads.jsonl", folder)
    return tuple(file.stat().st_mtime_ns for file in files if file.exists())


def _open(folder: Path, how: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open the file itself: nothing that a link of its name points to, and no pipe to wait for."""
    return os.open(folder / FILE, how | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _write(file: int, text: bytes) -> None:
    """Replace what the file holds, unless it has another name too: then it holds what is somebody else's."""
    if os.fstat(file).st_nlink == 1:
        os.truncate(file, 0)
        os.pwrite(file, text, 0)


def _try(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
