"""The same bits again on CUDA, where a sum's order is otherwise anyone's.

PyTorch's switch does most of it: ``index_add``, ``scatter_add`` and the backward of a gather sort before they sum,
flash attention and memory-efficient attention sum their backward in one order, cuDNN's attention is not taken, and an
operator that has no such form raises. Our own kernels have no atomics: each of their sums has one order.

On the CPU a run is deterministic anyway, and nothing is switched.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

from rlroute.errors import ConfigError

WORKSPACE, FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""What cuBLAS goes by, and the values by which it computes alike each time
(docs.nvidia.com/cuda/cublas/index.html#results-reproducibility).
"""
os.environ.setdefault(WORKSPACE, FIXED[0])  # read once, when CUDA starts; on Hopper it is PyTorch's own default in size


def check_workspace() -> None:
    """Refuse to promise the same bits where cuBLAS is told otherwise.

    Raises:
        ConfigError: the environment holds another value.
    """
    if (found := os.environ.get(WORKSPACE)) not in FIXED:
        raise ConfigError(
            f"train.deterministic = True with {WORKSPACE} = {found!r} in the environment: legal are {', '.join(FIXED)}"
        )


@contextmanager
def deterministic(wanted: bool, device: str = "cuda") -> Iterator[None]:
    """Compute deterministically inside, where that is wanted; what was set before is set back.

    Args:
        wanted: whether it is.
        device: ``cpu`` needs nothing.
    """
    if not wanted or device == "cpu":
        yield
        return
    check_workspace()
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Nothing reads what it has not written; filling every torch.empty would cost a pass over memory each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
