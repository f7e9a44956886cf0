"""The group of many processes: data-parallel replicas times expert shards, as a two-dimensional device mesh.

Router and dense parameters are replicas on every rank, and their gradients are summed over all; the loss is divided by
the tokens of the whole step, so that the sum is the average. An expert's gradient arrives whole from the shards of one
replica, and is summed over the replicas only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from rlroute.errors import ConfigError, RlrouteError
from rlroute.model.accounting import is_expert
from rlroute.model.moe import Placement
from rlroute.parallel.dispatch import ExpertParallel
from rlroute.parallel.exchange import Traffic
from rlroute.training.group import Group


class WorkerError(RlrouteError):
    """Another worker of the group failed."""


class Mesh(Group):
    """The ranks of the initialised default process group, as replicas times expert shards.

    Args:
        expert_parallel: the experts are cut into so many shards.
        device: ``cpu`` or ``cuda``.
        chunks: parts in which rows travel between shards; 0: in one, and nothing else is computed meanwhile.

    Raises:
        ConfigError: the ranks are no multiple of ``expert_parallel``.
    """

    def __init__(self, expert_parallel: int, device: str = "cpu", chunks: int = 1) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        check_mesh(self.size, expert_parallel)
        mesh = init_device_mesh(
            device, (self.size // expert_parallel, expert_parallel), mesh_dim_names=("replica", "shard")
        )
        self.replica = mesh.get_local_rank("replica")
        self.replicas, self.shards = mesh.get_group("replica"), mesh.get_group("shard")
        self.exchange = ExpertParallel(self.shards, chunks)
        if expert_parallel > 1:
            self.placement = Placement(expert_parallel, mesh.get_local_rank("shard"), self.exchange.start)

    @property
    def writes_shard(self) -> bool:
        """Whether this rank belongs to the first replica."""
        return self.replica == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, in place, all of one dtype at once."""
        _sum(tensors, dist.group.WORLD)

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum each parameter's gradient over the ranks that hold it."""
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        _sum([g for name, g in named if not is_expert(name)], dist.group.WORLD)
        _sum([g for name, g in named if is_expert(name)], self.replicas)

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """Return the sum of a value over the shards of the experts."""
        total = value.clone()
        dist.all_reduce(total, group=self.shards)
        return total

    def sum_over_scope(self, value: Tensor) -> Tensor:
        """Return the differentiable sum of a value over all ranks."""
        total: Tensor = _SumOverRanks.apply(value)  # type: ignore[no-untyped-call]
        return total

    def whole(self, tensor_E: Tensor) -> Tensor:
        """Return all experts' rows, in their order."""
        parts = [torch.empty_like(tensor_E) for _ in range(self.placement.shards)]
        dist.all_gather(parts, tensor_E.contiguous(), group=self.shards)
        return torch.cat(parts)

    def agree(self, value: float) -> float:
        """Return rank 0's number."""
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, src=0)
        return float(box)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks end the block at once; where one fails, all do.

        Raises:
            WorkerError: another rank failed; the rank that did raises its own error.
        """
        failed = torch.zeros(1, dtype=torch.int32, device=self.device)
        try:
            yield
        except Exception:
            dist.all_reduce(failed + 1)
            raise
        dist.all_reduce(failed)
        if failed:
            raise WorkerError("another worker of the group failed")

    def traffic(self) -> dict[str, Any] | None:
        """Return the bytes of rows that all ranks sent each other since the last call, and the mean seconds they spent
        on it (gloo).
        """
        if self.placement.shards == 1:
            return None
        seen, self.exchange.traffic = self.exchange.traffic, Traffic()
        sums = torch.tensor([seen.bytes, seen.seconds], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        sent, seconds = sums.tolist()
        return {"bytes": int(sent)} | ({} if self.device == "cuda" else {"seconds": round(seconds / self.size, 6)})

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave what is exchanged in the block out of the traffic."""
        counted, self.exchange.traffic = self.exchange.traffic, Traffic()
        try:
            yield
        finally:
            self.exchange.traffic = counted


def check_mesh(workers: int, expert_parallel: int) -> None:
    """Refuse a number of workers that does not make a mesh.

    Raises:
        ConfigError: it is no multiple of the expert shards.
    """
    if expert_parallel < 1 or workers < 1 or workers % expert_parallel:
        raise ConfigError(f"{workers} workers with expert parallelism {expert_parallel}: want a multiple of it")


def _sum(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum tensors over a group in place; those of one dtype travel as one."""
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        mine = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in mine])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(mine, torch.split(flat, [t.numel() for t in mine]), strict=True):
            tensor.copy_(part.view_as(tensor))


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> Tensor:
        total = dtotal.clone()
        dist.all_reduce(total)
        return total
