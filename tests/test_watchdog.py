"""A process that makes no step is ended, whatever keeps it, and one that makes steps is not."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlroute import watchdog as watching
from rlroute.errors import StoreError
from rlroute.watchdog import WatchdogError, stacks, watchdog
from tests.conftest import HANG, until

pytestmark = pytest.mark.processes

SCRIPT = """
import ctypes, sys, time
from pathlib import Path
from rlroute.watchdog import watchdog

def stands_still():
    {how}

with watchdog({seconds}, Path(sys.argv[1])) as alive:
    time.sleep({first})
    (Path(sys.argv[1]) / "begun").touch()
    alive(1)
    stands_still()
"""


def begin(folder, how, seconds=0.1, first=0.0):
    script = SCRIPT.format(how=how, seconds=seconds, first=first)
    return subprocess.Popen([sys.executable, "-c", script, folder])


def watchers(pid):
    """Return the processes that watch a process."""
    mark = f"\0{pid}\0".encode()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                command = Path(entry, "cmdline").read_bytes()
            except OSError:
                continue
            if b"no step in" in command and mark in command:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(("how", "where"), [
    (f"time.sleep({HANG})", "stands_still"),
    (f"while True: ctypes.PyDLL(None).sleep({HANG})", "stands_still"),  # without letting go of the interpreter's lock
    ("import signal; signal.raise_signal(signal.SIGSTOP)", None),  # which writes no stacks any more
])  # fmt: skip
def test_a_process_that_makes_no_step_is_ended_and_says_where_it_stood(how, where, tmp_path):
    """Ten times the patience on the way to the first step is no fault."""
    process = begin(tmp_path, how, first=1.0)
    assert process.wait(HANG) == -signal.SIGKILL
    assert (tmp_path / "begun").exists()
    file = stacks(tmp_path)
    assert file == tmp_path / "hung-0.txt"
    said = file.read_text()
    assert said.startswith("no step in 0.1 s") and (where is None or where in said)
    until(lambda: not watchers(process.pid))


def test_a_process_that_is_stopped_for_a_while_goes_on(tmp_path):
    script = "while not Path(sys.argv[1], 'over').exists(): time.sleep(0.01); alive(2)"
    process = begin(tmp_path, script, seconds=HANG)
    until((tmp_path / "begun").exists)
    process.send_signal(signal.SIGSTOP)
    until(lambda: " T " in Path(f"/proc/{process.pid}/stat").read_text())
    process.send_signal(signal.SIGCONT)
    (tmp_path / "over").touch()
    assert process.wait(HANG) == 0
    assert stacks(tmp_path) is None and not (tmp_path / "hung-0.txt").exists()
    until(lambda: not watchers(process.pid))


def test_a_watcher_goes_with_its_process_and_is_replaced_if_it_goes_alone(tmp_path):
    with watchdog(0.2, tmp_path) as alive:
        until(lambda: len(watchers(os.getpid())) == 1)
        (first,) = watchers(os.getpid())
        os.kill(first, signal.SIGKILL)
        until(lambda: (alive(1), time.sleep(0.05), watchers(os.getpid()))[-1] not in ([], [first]))
    assert not watchers(os.getpid())
    process = begin(tmp_path, f"time.sleep({HANG})", seconds=HANG)
    until(lambda: (tmp_path / "begun").exists() and watchers(process.pid))
    process.kill()
    process.wait()
    until(lambda: not watchers(process.pid))


def test_a_full_table_of_processes_is_waited_for_and_at_last_named(tmp_path, monkeypatch):
    start, tries = subprocess.Popen, []

    def full(times):
        def popen(*given, **options):
            tries.append(1)
            if len(tries) <= times:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return start(*given, **options)

        return popen

    monkeypatch.setattr(watching, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(subprocess, "Popen", full(3))
    with watchdog(HANG, tmp_path):
        assert len(tries) == 4
        until(lambda: len(watchers(os.getpid())) == 1)  # it has to have begun
    tries.clear()
    monkeypatch.setattr(subprocess, "Popen", full(4))
    said = r"Resource temporarily unavailable; legal are .* processes"
    with pytest.raises(WatchdogError, match=said), watchdog(HANG, tmp_path):
        pass
    assert not watchers(os.getpid())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere/hung-0.txt: No such file"), watchdog(1.0, tmp_path / "nowhere"):
        pass
