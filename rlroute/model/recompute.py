"""Activation recomputation (Chen et al. 2016, arXiv 1604.06174): a part of a model keeps its inputs alone, and computes
the rest again in backward.

Routers stay outside: a decision is drawn once, and is what the part gets, forward and again. A part draws from keys
alone, so that what is computed again has the same bits, and so have gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """A module, parts of which can be computed again in backward.

    Attributes:
        recompute: whether they are.
    """

    recompute = False

    def forgetting(self, part: Callable[..., Any], *inputs: Any) -> Any:
        """Run a part, which draws from keys alone, on its inputs."""
        if not (self.recompute and torch.is_grad_enabled()):
            return part(*inputs)
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Have the parts of a model computed again in backward, or kept."""
    for module in model.modules():
        if isinstance(module, Recomputing):
            module.recompute = recompute
