"""Randomness from keys, never from a shared stream.

A parameter's initial value depends on (seed, parameter name) alone, so adding a router never shifts another draw.
Routing noise depends on what it is drawn *for* (seed, purpose, layer, step, sample, sequence, position), so
micro-batches, data-parallel ranks and recomputation all see the same draws, on every device.

Shape suffixes: N rows, one per token (and per routing sample).
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def derive_key(*parts: int | str) -> int:
    """Return the signed 64-bit key that stands for ``parts``; different parts give unrelated keys."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """Return NumPy's counter-based generator for ``parts``."""
    return np.random.Generator(np.random.Philox(key=derive_key(*parts) % 2**64))


def _mix(z: Tensor) -> Tensor:
    """Finalise 64-bit integers as SplitMix64 does (Steele et al. 2014, doi 10.1145/2660193.2660195)."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX_1  # torch's >> keeps the sign: the mask makes it a logical shift
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX_2
    return z ^ ((z >> 31) & (2**33 - 1))


def keyed_uniform(key: int, keys_N: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    """Draw uniform float32 numbers strictly between 0 and 1, bit-identical on every device.

    Args:
        key: a key from :func:`derive_key`.
        keys_N: integer tensors of shape (N,); together they say which token each row is for.
        shape: what to draw for one token.

    Returns:
        A tensor of shape (N, *shape) with a resolution of 2**-23.
    """
    return uniform(row_keys(key, keys_N), shape)


def row_keys(key: int, keys_N: tuple[Tensor, ...]) -> Tensor:
    """Return one int64 key for each row, from the arguments of :func:`keyed_uniform`."""
    state_N = torch.full_like(keys_N[0], key)
    for part_N in keys_N:
        state_N = _mix((state_N ^ part_N) + _GOLDEN)
    return state_N


def uniform(state_N: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw what :func:`keyed_uniform` does, from the keys that :func:`row_keys` returned."""
    slots = torch.arange(1, math.prod(shape) + 1, device=state_N.device) * _GOLDEN
    bits = (_mix(state_N[:, None] + slots) >> 41) & (2**23 - 1)
    return ((bits.to(torch.float32) + 0.5) * 2.0**-23).view(-1, *shape)


def gumbel(uniform: Tensor) -> Tensor:
    """Turn uniform draws into standard Gumbel draws."""
    return -torch.log(-torch.log(uniform))


def normal(uniform: Tensor) -> Tensor:
    """Turn uniform draws into standard normal draws by the inverse distribution function."""
    return math.sqrt(2.0) * torch.erfinv(2.0 * uniform - 1.0)


@torch.no_grad()
def init_normal(tensor: Tensor, std: float, *parts: int | str) -> None:
    """Fill ``tensor`` with N(0, std^2) drawn from the key ``parts``, on the CPU so that every device starts alike.

    A tensor on the meta device has nothing to fill.
    """
    if tensor.is_meta:
        return
    generator = torch.Generator().manual_seed(derive_key(*parts) % 2**63)
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std)
