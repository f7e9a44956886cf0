"""Whom the soak may kill: processes that carry its mark, by what they are; and a cluster of two nodes of its own."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "RLROUTE_SOAK"


def marked(mark: str) -> list[int]:
    """Return the processes in whose environment a mark stands, which every process hands down to those that it
    starts.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def _called(words: bytes) -> Callable[[int], bool]:
    """Return whether a process is called so: by the title that Ray gives a worker, or by its program."""

    def matches(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return words in Path(f"/proc/{pid}/cmdline").read_bytes()[:4096]
        return False

    return matches


is_trial = _called(b"ray::ImplicitFunc")
VICTIMS = {
    "trial": is_trial,
    "group worker": _called(b"ray::_Worker"),
    "raylet": _called(b"/raylet/raylet\0"),
    "GCS": _called(b"/gcs/gcs_server\0"),
    "Ray driver": _called(b"launch.ray_driver"),
}


class Nodes:
    """A cluster on this machine: a head without cores, and two nodes of one core each.

    Attributes:
        address: the head's.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address: str = self.cluster.address
        self.mend()

    def raylets(self) -> list[int]:
        """Return the processes of the nodes that have cores."""
        return [node.all_processes["raylet"][0].process.pid for node in self._working()]

    def mend(self) -> None:
        """Put new nodes in the place of those that are gone."""
        for node in set(self.cluster.worker_nodes) - set(self._working()):
            self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < 2:
            self.cluster.add_node(num_cpus=1)

    def _working(self) -> list[Any]:
        nodes = self.cluster.worker_nodes
        return [node for node in nodes if node.all_processes["raylet"][0].process.poll() is None]


@contextmanager
def nodes(mark: str) -> Iterator[Nodes]:
    """Start a cluster whose processes carry a mark, with a token of its own; stop it at the end."""
    from rlroute.experiments.launch.ray_session import TOKEN, require

    with tempfile.TemporaryDirectory(prefix="rr") as folder:
        os.environ |= {MARK: mark, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        require()
        cluster = Nodes()
        try:
            yield cluster
        finally:
            cluster.cluster.shutdown()
            del os.environ[MARK]
