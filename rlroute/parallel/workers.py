"""Ray actors that train one run together, from wherever a process is connected to Ray.

Ray places the processes and says when one has died; everything between them is ``torch.distributed``. When a worker is
lost, all are started anew and go on from the last checkpoint, with the same figures.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import signal
import socket
import struct
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # exported, but not in so many words

from rlroute.config import RunConfig
from rlroute.errors import RlrouteError
from rlroute.execution import Keep
from rlroute.parallel.mesh import Mesh, WorkerError, check_mesh
from rlroute.records import RunFolder
from rlroute.registry import include, included, run_config
from rlroute.schema import Asked
from rlroute.sink import Mode, pass_on, take_warnings
from rlroute.training.defects import Defects
from rlroute.training.loop import train
from rlroute.training.prepare import check_shares
from rlroute.watchdog import START_SECONDS, watchdog

PLACEMENT_SECONDS = 300
"""How long the workers may take to start: a dead node is noticed after up to a minute, and its share placed
elsewhere.
"""
SETTLING_SECONDS = 5.0
"""How long the other workers may take to say what happened to them, once one has failed."""
EXCHANGES = (Path(__file__).parent, Path(dist.__file__).parent)
"""Folders of the code through which workers exchange something."""
_GET_ADDRESS = 0x8915  # Linux: SIOCGIFADDR


class LostWorkersError(RlrouteError):
    """Workers could not be started, or died too often."""


def train_group(
    config: RunConfig,
    seed: int,
    store: Path,
    *,
    workers: int,
    expert_parallel: int,
    chunks: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    command: str | None = None,
    asked: Asked | None = None,
    retries: int = 2,
    patience: float = 600.0,
    timeout: float | None = None,
    wandb: Mode = "off",
    keep: Keep = "weights",
) -> dict[str, Any]:
    """Train a run with several workers and return its summary, as :func:`rlroute.training.loop.train` does with one.

    They run in the placement group of the calling task, whose last bundles are theirs, or in one of their own.

    Args:
        config: the run's configuration; its micro-batches are shared out.
        seed: the run's seed.
        store: the run store's folder, the same for every worker.
        workers: how many.
        expert_parallel: into how many shards the experts are cut; divides ``workers``.
        chunks: parts in which rows travel between shards.
        cpus, gpus: of each worker.
        command: the command line behind this run, for its record.
        asked: with what it is to be trained, likewise.
        retries: how often the workers are started again after some were lost.
        patience: seconds without a step after which a worker ends itself, and counts as lost; see
            :func:`rlroute.watchdog.watchdog`.
        timeout: seconds that a worker waits for the others before it gives them up; longer than a watchdog waits if
            nothing is said, so that one that hangs has left its stacks by then.
        wandb: where rank 0 sends the rows besides the records.
        keep: what of its checkpoints stays once it has ended.

    Raises:
        ConfigError: the workers cannot share the experts or the step, found before any starts.
        LostWorkersError: they could not be started in time, or were lost too often; the checkpoint is kept.
        DefectError: a worker failed by a defect, mostly of the router; its traceback is in the run's folder.
        RlrouteError: whatever else the training raises.
    """
    import ray

    check_mesh(workers, expert_parallel)
    check_shares(config, workers)
    waits = max(patience, START_SECONDS) + 60 if timeout is None else timeout
    what = (config.to_dict(), list(map(str, included())), seed, str(store.absolute()), command, asked)
    job = (*what, expert_parallel, chunks, patience, waits, wandb, keep)
    with _bundles(workers, cpus, gpus) as strategies, _rendezvous() as (address, port):
        for attempt in range(retries + 1):
            actors = _start(strategies, cpus, gpus)
            try:
                meeting = (address, port, attempt, workers)
                ranks = [a.train.remote(r, *meeting, *job) for r, a in enumerate(actors)]
                going = ranks
                while going:  # whichever fails first, fails at once
                    ended, going = ray.wait(going)
                    ray.get(ended)
                summary: dict[str, Any]
                summary, warnings = ray.get(ranks[0])
                pass_on(warnings)
                return summary
            except ray.exceptions.RayError:
                lost = _loss(ranks)
            finally:
                for actor in actors:
                    ray.kill(actor)
    raise LostWorkersError(f"workers were lost {retries + 1} times, the last time: {lost}")


def _loss(ranks: list[Any]) -> str:
    """Return how workers were lost; raise what one of them raised by its own doing, which the others' errors only
    follow.
    """
    import ray

    lost = []
    for rank in ray.wait(ranks, num_returns=len(ranks), timeout=SETTLING_SECONDS)[0]:
        try:
            ray.get(rank)
        except ray.exceptions.RayTaskError as error:
            if not _tells_of_a_loss(error.cause):
                raise error.cause from None
            lost.append(str(error.cause))
        except ray.exceptions.OutOfMemoryError:  # pages long
            lost.insert(0, "for want of memory")
        except ray.exceptions.RayError as error:
            lost.insert(0, str(error))
    return lost[0]


def _follows_a_loss(error: BaseException) -> bool:
    """Whether an error comes of another worker's loss: it tells of one, and was raised where workers exchange
    something, for a router may say anything.
    """
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _tells_of_a_loss(error) and any(Path(frames[-1]).is_relative_to(place) for place in EXCHANGES)


def _tells_of_a_loss(error: BaseException) -> bool:
    """Whether an error tells of another worker: its connection closed or it did not answer. Of one that comes from a
    worker nothing but what it tells is left, and a router's is a DefectError by then.
    """
    return isinstance(error, WorkerError | dist.DistError) or (
        type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "Connection", "Timed out", "NCCL"))
    )


class _Worker:
    """One rank, in a process of its own."""

    def __init__(self) -> None:
        # Ray's own handler raises SystemExit wherever the process is, be it in a router, whose defect it would seem.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))

    def ready(self) -> None:
        """Answer once the process runs."""

    def train(
        self,
        rank: int,
        address: str,
        port: int,
        attempt: int,
        workers: int,
        config: dict[str, Any],
        routers: list[str],
        seed: int,
        store: str,
        command: str | None,
        asked: Asked | None,
        expert_parallel: int,
        chunks: int,
        patience: float,
        timeout: float,
        wandb: Mode,
        keep: Keep,
    ) -> tuple[dict[str, Any], list[str]]:
        import ray

        include(*routers)
        run = run_config(config)
        interface = interface_of(ray.util.get_node_ip_address())
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        torch.set_num_threads(run.train.threads)
        waits = timedelta(seconds=timeout)
        meeting = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=waits)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if run.train.device == "cuda" else "gloo",
            store=PrefixStore(str(attempt), meeting),
            rank=rank,
            world_size=workers,
            timeout=waits,
        )
        group = Mesh(expert_parallel, run.train.device, chunks)
        folder = RunFolder(Path(store), run, seed)
        folder.create()
        with (
            watchdog(patience, folder.path, rank) as alive,
            Defects(run, folder.path, lambda e: not _follows_a_loss(e)),
        ):
            how: Any = {"command": command, "asked": asked, "wandb": wandb, "keep": keep}
            summary = dict(train(run, seed, Path(store), **how, on_step=alive, group=group))
        return summary, take_warnings()


@contextmanager
def _bundles(workers: int, cpus: float, gpus: float) -> Iterator[list[Any]]:
    """Yield where each worker runs: the last bundles of the calling task's placement group, or a group made for
    them.
    """
    from ray.util import get_current_placement_group, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ours = get_current_placement_group()
    group = ours or placement_group([{"CPU": cpus} | ({"GPU": gpus} if gpus else {})] * workers, strategy="PACK")
    try:
        if not group.wait(PLACEMENT_SECONDS):
            import ray

            raise LostWorkersError(
                f"{workers} workers of {cpus:g} CPUs and {gpus:g} GPUs found no place in {PLACEMENT_SECONDS} s; "
                f"the cluster has {ray.cluster_resources()}, free are {ray.available_resources()}"
            )
        yield [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=group.bundle_count - workers + rank)
            for rank in range(workers)
        ]
    finally:
        if ours is None:
            remove_placement_group(group)


@contextmanager
def _rendezvous() -> Iterator[tuple[str, int]]:
    """Serve, on this node's own address, the store through which ranks find each other; no rank does, so that each may
    die.
    """
    import ray

    with socket.socket() as listener:
        listener.bind((ray.util.get_node_ip_address(), 0))
        listener.listen()
        address, port = listener.getsockname()
        server = TCPStore(  # given an address alone it would listen on all of them
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )
        yield address, port
        del server


def _start(strategies: list[Any], cpus: float, gpus: float) -> list[Any]:
    """Start a worker in each bundle; one that was placed on a node that has just died is started again."""
    import ray

    actor = ray.remote(_Worker)
    deadline = time.monotonic() + PLACEMENT_SECONDS
    while True:
        options = {"num_cpus": cpus, "num_gpus": gpus}
        actors = [actor.options(**options, scheduling_strategy=place).remote() for place in strategies]
        try:
            ray.get([a.ready.remote() for a in actors], timeout=max(1.0, deadline - time.monotonic()))
            return actors
        except ray.exceptions.RayError as error:  # also that it takes too long
            for one in actors:
                with contextlib.suppress(Exception):  # it may be gone already
                    ray.kill(one)
            if time.monotonic() > deadline:
                raise LostWorkersError(f"workers did not start within {PLACEMENT_SECONDS} s: {error}") from error
            time.sleep(1.0)


def interface_of(address: str) -> str:
    """Return the network interface that has an IPv4 address. Left alone, gloo listens where the host's name points,
    often loopback.

    Raises:
        LostWorkersError: none has it.
    """
    if ipaddress.ip_address(address).is_loopback:  # all of 127.0.0.0/8 is, but the interface names one
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)[20:24]) == address:
                    return name
    raise LostWorkersError(f"no network interface has the node's address {address}")
