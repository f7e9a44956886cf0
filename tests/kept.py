"""What autograd keeps for backward, in bytes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Kept:
    """The storages that a forward keeps for backward, each once, without those of parameters and buffers.

    What an autograd function hides in its context is not seen: indices alone, in ours.
    """

    def __init__(self, model: nn.Module) -> None:
        held = [*model.parameters(), *model.buffers()]
        self.own = {tensor.untyped_storage().data_ptr() for tensor in held}
        self.storages: dict[int, tuple[int, Tensor]] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:  # the tensor is held, so that no other gets its place
            self.storages[storage.data_ptr()] = (storage.nbytes(), tensor.detach())
        return tensor

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(size for size, _ in self.storages.values())


@contextmanager
def keeping(model: nn.Module) -> Iterator[Kept]:
    """Count what a forward in the block keeps."""
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept._pack, lambda tensor: tensor):
        yield kept
