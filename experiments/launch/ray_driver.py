"""The process that drives Ray: it trains what :mod:`rlroute.experiments.launch.supervisor` sends it, and tells it what
happens.

It ends when its supervisor does. From time to time it looks whether Ray is still there, whose own calls would wait for
ever.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rlroute.errors import RlrouteError
from rlroute.experiments.launch.ray_session import session
from rlroute.experiments.launch.reach import unreachable
from rlroute.experiments.launch.trials import run_trials

LOOK_SECONDS = 2.0
LOST_SECONDS = 15.0
"""How long Ray's processes may be out of reach before Ray counts as lost."""
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
            tell("ready")
            _look(tell)
            run_trials(tune, jobs, routers, how, scratch, search, tell)
            over.set()
            tell("done")
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


def _look(tell: Line) -> None:
    """Tell again and again that Ray is alive, and at last that it is lost.

    Both looks are taken side by side: where the control store has just ended, Ray takes a minute to answer.
    """
    import ray

    context = ray.get_runtime_context()
    node, places = context.get_node_id(), {"its control store (GCS)": context.gcs_address}
    (here,) = (there for there in ray.nodes() if there["NodeID"] == node)
    places["its raylet here"] = f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}"

    def nobody_listens() -> str | None:
        return next((f"{what} at {at}: {why}" for what, at in places.items() if (why := unreachable(at))), None)

    def given_up() -> str | None:
        if not any(there["Alive"] for there in ray.nodes() if there["NodeID"] == node):
            return nobody_listens() or "it has given up the node that this command runs on"
        tell("alive")
        return None

    for look in (nobody_listens, given_up):
        threading.Thread(target=_until_lost, args=(look, tell), daemon=True).start()


def _until_lost(look: Callable[[], str | None], tell: Line) -> None:
    """Tell that Ray is lost, as soon as a look has said so, and why, for long enough."""
    seen, lost = time.monotonic(), None
    while time.monotonic() - seen < LOST_SECONDS:
        time.sleep(LOOK_SECONDS)
        if (lost := look()) is None:
            seen = time.monotonic()
    tell("lost", lost)
