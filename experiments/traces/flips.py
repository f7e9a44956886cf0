"""Where two traces of the same tokens differ: rollout against training, as R3 counts it (Ma et al. 2025, arXiv
2510.11370), or one run against another.

Shape suffixes: T tokens, K experts per token, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from rlroute import metrics
from rlroute.errors import StoreError
from rlroute.experiments.traces.reading import NONE, Layer, Part, Trace

AT_ONCE = 1 << 16
"""Tokens that are compared together at most."""


@dataclass(frozen=True)
class Flips:
    """Where two traces of the same tokens differ; a token of which one of them notes nothing in a layer is not compared
    there.

    Attributes:
        layers: names of the first trace's layers.
        compared, changed: by layer, the tokens compared, and those with another set of experts.
        chosen, lost: by layer, their choices, and those that the other trace does not have.
        tokens: tokens compared in at least one layer.
        anywhere: those of them with another set in at least one.
    """

    layers: list[str]
    compared: list[int]
    changed: list[int]
    chosen: list[int]
    lost: list[int]
    tokens: int
    anywhere: int

    @property
    def changed_layers(self) -> float:
        """Layers in which a token has another set, on average; NaN without a token."""
        return sum(self.changed) / self.tokens if self.tokens else math.nan


def flips(one: Trace, other: Trace) -> Flips:
    """Read two traces side by side, token by token, and count where they differ; layers are matched in their order.

    Raises:
        StoreError: they have not the same number of tokens or of layers.
    """
    sums_L4, tokens, anywhere = np.zeros((0, 4), np.int64), 0, 0
    first, second = _Reader(one), _Reader(other)
    while count := _common(first, second):
        pairs = zip(first.take(count), second.take(count), strict=True)
        seen_LT4 = np.stack([_compared(a_TK, b_TK) for a_TK, b_TK in pairs])
        sums_L4 = seen_LT4.sum(1) + (sums_L4 if len(sums_L4) else 0)
        tokens += int(seen_LT4[..., 0].any(0).sum())
        anywhere += int(seen_LT4[..., 1].any(0).sum())
    names = [layer.name for layer in first.layers]
    compared, changed, chosen, lost = (list(map(int, column_L)) for column_L in sums_L4.T)
    return Flips(names, compared, changed, chosen, lost, tokens, anywhere)


def _compared(one_TK: np.ndarray, other_TK: np.ndarray) -> np.ndarray:
    """Return for each token whether it is compared, whether its set differs, its choices and those lost: (T, 4)."""
    one_T, other_T = ((ids_TK != NONE).sum(1) for ids_TK in (one_TK, other_TK))
    shared_T = metrics.shared_T(torch.from_numpy(one_TK), torch.from_numpy(other_TK)).numpy()
    compared_T = (one_T > 0) & (other_T > 0)
    chosen_T = np.maximum(one_T, other_T)
    found_T4: np.ndarray = np.stack([compared_T, shared_T < chosen_T, chosen_T, chosen_T - shared_T], 1)
    found_T4[~compared_T] = 0
    return found_T4


class _Reader:
    """A trace from which tokens are taken, all layers of a token together."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.parts, self.layers = trace, trace.parts(), list[Layer]()
        self.held: Mapping[Layer, np.ndarray] = {}

    @property
    def left(self) -> int:
        """Tokens that are held; there are none at the trace's end alone."""
        while not any(map(len, self.held.values())):
            part = next(self.parts, None)
            if part is None:
                return 0
            self._refuse_uneven(part)
            self.held = part.ids
        return len(next(iter(self.held.values())))

    def _refuse_uneven(self, part: Part) -> None:
        found = sorted(part.ids)
        if found != (self.layers or found):
            raise StoreError(
                f"{self.trace.name}, step {part.step} has {len(found)} layers, the first {len(self.layers)}, or "
                "others: flips want all layers of a token together"
            )
        if len(tokens := {len(ids_TK) for ids_TK in part.ids.values()}) > 1:
            raise StoreError(
                f"{self.trace.name}, step {part.step} has from {min(tokens)} to {max(tokens)} tokens, by layer: flips "
                "want the same in all"
            )
        self.layers = found

    def take(self, count: int) -> Iterator[np.ndarray]:
        """Return the next tokens' choices in each layer."""
        taken = [self.held[layer][:count] for layer in self.layers]
        self.held = {layer: self.held[layer][count:] for layer in self.layers}
        return iter(taken)


def _common(one: _Reader, other: _Reader) -> int:
    """Return how many tokens both hold; none at the end of both.

    Raises:
        StoreError: one ends before the other, or has another number of layers.
    """
    left = one.left, other.left
    names = f"{one.trace.name} and {other.trace.name}"
    if not min(left) and max(left):
        raise StoreError(f"{names} have not the same number of tokens: want traces of the same ones")
    if len(one.layers) != len(other.layers):
        raise StoreError(f"{names} have {len(one.layers)} and {len(other.layers)} layers: want as many")
    return min(*left, AT_ONCE)
