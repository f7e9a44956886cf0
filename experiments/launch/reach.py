"""Whether something listens at an address, within a bound."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Mapping

SECONDS = 5.0
LOOK_SECONDS = 2.0
LOST_SECONDS = 15.0
"""How long Ray's processes may be out of reach before Ray counts as lost."""


def unreachable(address: str, seconds: float = SECONDS) -> str | None:
    """Return why nothing is reached at ``HOST:PORT`` within so many seconds, None if something listens there."""
    host, _, port = address.rpartition(":")
    return _within(seconds, lambda: socket.create_connection((host.strip("[]"), int(port)), seconds).close())


def out_of_reach(places: Mapping[str, str]) -> str | None:
    """Return which of several addresses, by what listens there, is not reached, and why; None if all are."""
    return next((f"{what} at {at}: {why}" for what, at in places.items() if (why := unreachable(at))), None)


def deaf(host: str, seconds: float = SECONDS) -> str | None:
    """Return why this machine does not reach itself at an address, None if it does."""

    def talk() -> None:
        with socket.create_server((host, 0)) as server:
            socket.create_connection(server.getsockname(), seconds).close()

    return _within(seconds, talk)


def _within(seconds: float, act: Callable[[], None]) -> str | None:
    """Return why ``act`` fails; names are looked up without any bound, so that it has a thread of its own."""
    outcome = queue.Queue[str | None]()

    def thread() -> None:
        try:
            act()
            outcome.put(None)
        except (OSError, OverflowError, ValueError) as error:
            outcome.put(getattr(error, "strerror", None) or str(error))

    threading.Thread(target=thread, daemon=True).start()
    try:
        return outcome.get(timeout=seconds)
    except queue.Empty:
        return f"no answer in {seconds:g} s"
