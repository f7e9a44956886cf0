"""The dense parts of a model through ``torch.compile``: attention with its norms and rotary positions, dense MLPs, and
the head with its cross-entropy. Routers and the expert kernel stay as they are.

A part is compiled once for all layers, for each shape, precision and mode (training, evaluation) that it meets; it is
compiled whole or not at all: nothing falls back silently. Sums are fused, so figures are rounded otherwise.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rlroute.errors import ConfigError
from rlroute.model.recompute import Recomputing

FORMS = 64
"""A part may meet so many shapes and modes in one run; PyTorch's own limit of 8 is for programs of unknown size."""


class DenseParts(Recomputing):
    """A module, parts of which can be compiled.

    Attributes:
        compiled: whether they are.
    """

    compiled = False

    def part(self, part: Callable[..., Any], *tensors: Tensor) -> Any:
        """Run a part: a plain function of this module and tensors."""
        return (_compiled(part, tensors[0].device.type) if self.compiled else part)(self, *tensors)


def set_compiled(model: nn.Module, compiled: bool) -> None:
    """Have the dense parts of a model run compiled, or not."""
    if compiled:
        torch._dynamo.config.recompile_limit = FORMS
    for module in model.modules():
        if isinstance(module, DenseParts):
            module.compiled = compiled


@cache
def _compiled(part: Callable[..., Any], device: str) -> Callable[..., Any]:
    # On the CPU in this process: the compiler's own pool would be as many more processes as there are cores.
    options: dict[str, Any] | None = {"compile_threads": 1} if device == "cpu" else None
    return torch.compile(part, dynamic=False, fullgraph=True, options=options)


@cache
def check_compiler(device: str) -> None:
    """Compile a line for a device, so that a missing compiler is found before any work.

    Raises:
        ConfigError: it cannot be done here.
    """
    try:
        _compiled(_trial, device)(None, torch.ones(8, device=device))
    except Exception as error:  # whatever the compilers of a system come to
        why = " ".join(str(error).split())[:160]
        what = f"train.compile = True: torch.compile does not work here on {device}, legal is False"
        raise ConfigError(f"{what}: {why}") from error


def _trial(_: None, x: Tensor) -> Tensor:
    return x.sin() + 1
