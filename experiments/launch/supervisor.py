"""Ray, at arm's length: a process of its own drives it, which this one starts, listens to and ends.

So whatever happens to Ray ends a command in one line, even where Ray's own calls wait for ever or abort; Ray reads the
token of its sessions when it is imported, which that process does anew; and a Ray that the calling process has is used,
and left as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from rlroute.errors import ConfigError, RlrouteError
from rlroute.experiments.launch.jobs import Job, Launch, Search
from rlroute.experiments.launch.ray_session import LOOPBACK, remove_orphans, temporary_folder
from rlroute.experiments.launch.reach import LOOK_SECONDS, LOST_SECONDS, deaf, out_of_reach, unreachable

START_SECONDS, JOIN_SECONDS = 600.0, 120.0
"""How long Ray may take to start, and a cluster to let this process in."""
SILENCE_SECONDS = 50.0
"""How long nothing may be heard of a Ray that is there: it is asked every two seconds."""
LEAVE_SECONDS = 30.0
PARTS = {"gcs_server": "its control store (GCS)", "raylet": "its raylet here"}
"""Processes of a Ray of our own, which last as long as the one that drives it."""
DRIVER = """
import json, sys
sys.argv[0], sys.path[:] = json.loads(sys.argv[2])
from rlroute.experiments.launch.ray_driver import main
main(int(sys.argv[1]))
"""


class LostRayError(RlrouteError):
    """Ray is gone, or does not answer any more."""

    def __init__(self, how: str) -> None:
        super().__init__(f"Ray was lost: {how}; what ended is kept, and the same command goes on")


def require_reach(how: Launch) -> None:
    """Find out within seconds whether there is a way to Ray at all, which would look for it for minutes.

    Raises:
        ConfigError: nothing answers at the cluster's address, or where a Ray of our own would listen.
        StoreError: there is no folder for temporary files.
    """
    temporary_folder()
    if how.cluster is None:
        if why := deaf(LOOPBACK):
            raise ConfigError(
                f"this machine does not reach itself at {LOOPBACK}, which Ray needs ({why}): is its loopback interface "
                "up? --launcher local needs neither"
            )
        return
    place = os.environ.get("RAY_ADDRESS", "auto") if how.cluster == "auto" else how.cluster
    if place != "auto" and (why := unreachable(place)):
        raise ConfigError(f"--address {how.cluster}: nothing answers at {place}: {why}")


def through_ray(
    jobs: Sequence[Job], how: Launch, search: Search | None, say: Callable[[str, str], None]
) -> dict[str, str]:
    """Train jobs as Ray Tune trials and return the reasons of those that failed, by run id.

    Args:
        jobs: what to train.
        how: where, and how many at a time.
        search: stops trials early.
        say: told of a run that failed, as soon as it has, and why.

    Raises:
        ConfigError: the cluster does not let this process in, or has no room for a trial.
        LostRayError: Ray was lost.
        MissingDependencyError: Ray is not installed.
    """
    from rlroute.registry import included  # and with it torch

    theirs = _ray_of_the_caller() if how.address is None else None
    how = replace(how, store=how.store.absolute(), address=how.address or theirs)
    plain = [(job.id, job.config.to_dict(), job.seed, job.command, job.asked) for job in jobs]
    reasons: dict[str, str] = {}
    late = "Ray has not started" if how.cluster is None else f"--address {how.cluster}: it has not let this process in"
    start = START_SECONDS if how.cluster is None else JOIN_SECONDS
    # A Ray that stands has settled what it asks for, and where that is a token it has set the variable.
    surroundings = {"RAY_AUTH_MODE": "disabled"} | os.environ if theirs else dict(os.environ)
    with _driver(surroundings) as driver:
        with contextlib.suppress(BrokenPipeError):  # it has ended: what is heard next says how
            driver.pipe.send((plain, list(map(str, included())), how, search))
        _, places = driver.hear(start, ConfigError(f"{late} within {start:.0f} s"), {})
        silence = LostRayError(f"it has not answered for {SILENCE_SECONDS:.0f} s")
        while (message := driver.hear(SILENCE_SECONDS, silence, places))[0] != "done":
            if message[0] == "set aside":
                reasons[message[1]] = message[2]
                say(*message[1:])
            elif message[0] == "line":
                print(message[1], file=sys.stderr, flush=True)
    return reasons


def _ray_of_the_caller() -> str | None:
    """Return the address of the Ray that this process is connected to, None where there is none."""
    ray: Any = sys.modules.get("ray")  # of which somebody may have a folder
    if not getattr(ray, "is_initialized", bool)():
        return None
    address: str = ray.get_runtime_context().gcs_address
    return address


@contextmanager
def _driver(surroundings: dict[str, str]) -> Iterator[_Driver]:
    """Start the process that drives Ray; end it, and Ray with it, whatever happens here or there."""
    pipe, theirs = Pipe()
    found = [os.path.abspath(path) if os.path.isdir(path or ".") else str(path) for path in sys.path]
    command = [sys.executable, "-P", "-c", DRIVER, str(theirs.fileno()), json.dumps([sys.argv[0], found])]
    with pipe, tempfile.TemporaryFile() as log:
        with theirs:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=surroundings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the supervisor's to answer
            )
        try:
            yield _Driver(process, pipe, log)
        finally:
            pipe.close()  # which it takes for the end
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LEAVE_SECONDS)
            finally:
                process.kill()
                process.wait()
                remove_orphans()


def _ended(driver: int) -> str | None:
    """Return which part of the Ray that a process drives has ended: until Ray has started, nobody knows where it would
    listen. There is no telling without /proc.
    """
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            begun, _, rest = entry.read_text().rpartition(") ")
            state, parent, *_ = rest.split()
            name = begun.partition(" (")[2]
            if state == "Z" and int(parent) == driver and name in PARTS:
                return f"{PARTS[name]} has ended"
    return None


@dataclass(frozen=True)
class _Driver:
    process: subprocess.Popen[bytes]
    pipe: Connection
    log: IO[bytes]
    """What Ray says on its own account."""

    def hear(self, seconds: float, silence: RlrouteError, places: Mapping[str, str]) -> tuple[Any, ...]:
        """Return the next message: ready, alive, done, or what has happened to a run.

        Args:
            seconds: how long it may take.
            silence: the error if it takes longer.
            places: where Ray listens, by what does.

        Raises:
            LostRayError: Ray is gone, or the process that drives it.
            RlrouteError: it refuses to work.
        """
        began = reached = time.monotonic()
        while not self.pipe.poll(LOOK_SECONDS):
            lost, now = out_of_reach(places) or _ended(self.process.pid), time.monotonic()
            reached = reached if lost else now
            if now - began > seconds or now - reached > LOST_SECONDS:
                self.process.kill()  # its calls of Ray may never return
                raise LostRayError(lost) if lost else silence
        try:
            message: tuple[Any, ...] = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise LostRayError(f"the process that drives it has ended, {self._end()}") from error
        if message[0] == "refused":
            raise message[1]
        if message[0] == "failed":
            raise RuntimeError(f"the process that drives Ray failed:\n{message[1]}")
        if message[0] == "lost":
            self.process.kill()  # its calls of Ray may never return
            raise LostRayError(out_of_reach(places) or message[1])
        return message

    def _end(self) -> str:
        """Say how the process has ended, and its last words."""
        self.process.wait()
        code = self.process.returncode
        self.log.seek(0)
        words = self.log.read().decode(errors="replace").split("\n")
        said = next((f": {' '.join(line.split())[:200]}" for line in reversed(words) if line.strip()), "")
        return (f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}") + said
