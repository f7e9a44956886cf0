"""Processes of this machine that form a process group over gloo on loopback, without Ray: for tests and benches."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # exported, but not in so many words

from rlroute.parallel.mesh import WorkerError

_CONTEXT = multiprocessing.get_context("forkserver")  # a forked torch may hang, a spawned one imports for seconds
_CONTEXT.set_forkserver_preload(["rlroute.parallel.mesh", "rlroute.training.loop"])


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, seconds: float = 600.0) -> list[Any]:
    """Return ``function(*arguments)`` of each rank of a new group, in their order; each has one thread.

    Args:
        function: of a module that can be imported; what it returns can be pickled.
        world: how many ranks.
        arguments: for every rank.
        seconds: how long a rank waits for the others, and the caller for a rank.

    Raises:
        WorkerError: a rank raised; the message is its traceback.
        queue.Empty: a rank ended without a word, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        queue = _CONTEXT.Queue()
        ranks = [
            _CONTEXT.Process(target=_rank, args=(function, rank, world, folder, seconds, queue, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            outcomes = {rank: pickle.loads(dump) for rank, dump in (queue.get(timeout=seconds) for _ in ranks)}
        finally:
            for process in ranks:
                process.join(5)
                process.kill()
    if failures := [text for text, _ in outcomes.values() if text]:
        raise WorkerError("\n".join(failures))
    return [outcomes[rank][1] for rank in range(world)]


def _rank(
    function: Callable[..., Any], rank: int, world: int, folder: str, seconds: float, queue: Any, arguments: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    text, value = "", None
    try:
        store = FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
        value = function(*arguments)
    except Exception:
        text = f"rank {rank}: {traceback.format_exc()}"
    queue.put((rank, pickle.dumps((text, value))))  # by value: shared memory ends with its process
    if not text:
        dist.destroy_process_group()
