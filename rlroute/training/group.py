"""The processes that train one model together, as the training loop sees them. One alone adds nothing to its own sums.

:class:`rlroute.parallel.mesh.Mesh` is the group of many. Each process (rank) runs its share of a step's micro-batches
through the whole model; what the ranks must agree on passes through here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from rlroute.model.moe import HERE

V = TypeVar("V")


class Group:
    """One process alone.

    Attributes:
        rank, size: this process among how many.
        placement: where the experts are.
    """

    rank = 0
    size = 1
    placement = HERE

    @property
    def writes_shard(self) -> bool:
        """Whether this rank writes the experts that it holds into checkpoints: one replica of each does."""
        return True

    def share(self, parts: Sequence[V]) -> Sequence[V]:
        """Return this rank's share of a step's micro-batches, which are a multiple of the ranks: consecutive ones."""
        each = len(parts) // self.size
        return parts[self.rank * each : (self.rank + 1) * each]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, in place."""

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum each parameter's gradient over the ranks that hold it: all of them, or an expert's replicas."""

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """Return the sum of a value over the shards of the experts."""
        return value

    def sum_over_scope(self, value: Tensor) -> Tensor:
        """Return the differentiable sum of a value over all ranks, for balance over the whole batch."""
        return value

    def whole(self, tensor_E: Tensor) -> Tensor:
        """Return all experts' rows of a tensor whose first dimension is the experts held here."""
        return tensor_E

    def agree(self, value: float) -> float:
        """Return rank 0's number (or truth)."""
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks end the block at once; where one fails, all do."""
        yield

    def traffic(self) -> dict[str, Any] | None:
        """Return what dispatch has exchanged since the last call, over all ranks; None where nothing travels."""
        return None

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave what is exchanged in the block out of the traffic."""
        yield


ALONE = Group()
