"""The two ways between host and device: there without waiting, and back by one wait.

Nothing else in a training step may make the host wait for the device; tests/test_waits.py counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    import numpy as np


def put(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """Return what the host holds as a tensor on a device; the host does not wait for the copy."""
    here = torch.as_tensor(values)
    if torch.device(device).type == "cuda":  # from memory that may be swapped out, a copy waits
        return here.pin_memory().to(device, non_blocking=True)
    return here.to(device)


def numbers(nest: Any) -> Any:
    """Return dicts, lists and tuples as records have them, by one wait for the device: with numbers, or lists of them,
    in place of tensors, and None for what is not finite.

    Args:
        nest: its tensors are of one device and have at most one dimension; whole numbers in them are below 2**53.
    """
    leaves, form = tree_flatten(nest)
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return nest
    flat = iter(torch.cat([tensor.reshape(-1).double() for tensor in tensors]).tolist())
    return tree_unflatten([_take(flat, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)


def _take(flat: Iterator[float], like: Tensor) -> Any:
    read = islice(flat, like.numel())
    values = [defined(value) for value in read] if like.is_floating_point() else [int(value) for value in read]
    return values if like.dim() else values[0]


def defined(value: Tensor | float) -> float | None:
    """Return a number, or None for what is not finite: records hold neither NaN nor infinity."""
    number = float(value)
    return number if math.isfinite(number) else None
