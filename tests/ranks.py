"""Runs a function in many processes that form a process group (gloo on loopback), without Ray: tests of what ranks compute together."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "rlroute.parallel.mesh", "rlroute.training.loop"])
SECONDS = 120


def run_ranks(function, world, *arguments):
    """Return ``function(*arguments)`` of each rank, in their order; fail with the first rank's traceback that there is."""
    with tempfile.TemporaryDirectory() as folder:
        queue = CONTEXT.Queue()
        ranks = [
            CONTEXT.Process(target=_rank, args=(function, rank, world, folder, queue, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            outcomes = {rank: pickle.loads(dump) for rank, dump in (queue.get(timeout=SECONDS) for _ in ranks)}
        finally:
            for process in ranks:
                process.join(5)
                process.kill()
    failures = [text for text, _ in outcomes.values() if text]
    if failures:
        pytest.fail("\n".join(failures))
    return [outcomes[rank][1] for rank in range(world)]


def _rank(function, rank, world, folder, queue, arguments):
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    text, value = "", None
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
        value = function(*arguments)
    except Exception:
        text = f"rank {rank}: {traceback.format_exc()}"
    queue.put((rank, pickle.dumps((text, value))))  # by value: shared memory ends with its process
    if not text:
        dist.destroy_process_group()
