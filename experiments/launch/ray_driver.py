"""The process that drives Ray: it trains what :mod:`rlroute.experiments.launch.supervisor` sends it, and tells it what
happens.

It ends when its supervisor does, and tells it from time to time that Ray answers. Where Ray is gone its own calls wait
for minutes, some of them without letting another thread run: whether it listens at all is for the supervisor to see.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from rlroute.errors import RlrouteError
from rlroute.experiments.launch.ray_session import NotStartedError, session
from rlroute.experiments.launch.reach import LOOK_SECONDS, LOST_SECONDS
from rlroute.experiments.launch.trials import run_trials

LEAVE_SECONDS = 20.0
"""How long Ray may take to stop, once nobody listens any more."""


class Line:
    """Tells the supervisor something, from any thread."""

    def __init__(self, pipe: Connection | None = None) -> None:
        self.pipe, self.lock = pipe, threading.Lock()

    def __call__(self, *message: Any) -> None:
        """Send a message."""
        assert self.pipe is not None
        with self.lock:
            self.pipe.send(message)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Leave the pipe out of what Tune writes to its own files, which nobody reads."""
        return Line, ()


def main(descriptor: int) -> None:
    """Train what comes through the pipe of this descriptor, and tell it what happens: see ``supervisor``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipe = Connection(descriptor)
    jobs, routers, how, search = pipe.recv()
    tell, over = Line(pipe), threading.Event()
    threading.Thread(target=_end_with, args=(pipe, over), daemon=True).start()
    try:
        with session(how) as (tune, scratch):
            tell("ready", _places())
            threading.Thread(target=_look, args=(tell,), daemon=True).start()
            run_trials(tune, jobs, routers, how, scratch, search, tell)
            over.set()
            tell("done")
    except NotStartedError as error:
        tell("lost", f"it has not started: {error}")
    except RlrouteError as error:
        tell("refused", error)
    except Exception:  # of Ray's, or a defect
        tell("failed", traceback.format_exc())


def _end_with(pipe: Connection, over: threading.Event) -> None:
    """Leave Ray as soon as the supervisor hangs up, by its will or not."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)  # where the trials are, Ray's clean-up follows
        time.sleep(LEAVE_SECONDS)
        os._exit(1)


def _places() -> dict[str, str]:
    """Return where Ray listens, by what does."""
    import ray

    context = ray.get_runtime_context()
    (here,) = (there for there in ray.nodes() if there["NodeID"] == context.get_node_id())
    raylet = f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}"
    return {"its control store (GCS)": context.gcs_address, "its raylet here": raylet}


def _look(tell: Line) -> None:
    """Tell again and again that Ray is alive, and at last that it has given up this node."""
    import ray

    node, seen = ray.get_runtime_context().get_node_id(), time.monotonic()
    while time.monotonic() - seen < LOST_SECONDS:
        time.sleep(LOOK_SECONDS)
        if any(there["Alive"] for there in ray.nodes() if there["NodeID"] == node):
            seen = time.monotonic()
            tell("alive")
    tell("lost", "it has given up the node that this command runs on")
