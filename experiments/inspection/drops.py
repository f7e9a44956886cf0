"""What a sequence's outputs owe to the others in its batch, under capacities and without.

The same validation windows are put into batches again and again, in an order drawn anew, and each one's outputs are
held against those that it had first. With a capacity the pairs of other sequences may take an expert's places;
dropless, and with capacities of each sequence's own, nothing can change unless a router itself looks at the batch.

Shape suffixes: N windows, B sequences of a batch, S sequence length, V vocabulary, P parts of a sequence, E experts of
all sites, O orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlroute import metrics, seeding
from rlroute.errors import ConfigError
from rlroute.experiments.inspection.measures import choices_of
from rlroute.model import Transformer
from rlroute.training.batches import Batch
from rlroute.training.step import Device, make_context

PARTS = 8
"""Of a sequence, or as many as it has tokens."""
SAME = 1e-3
"""A token's output has changed where a logit moves by more than this share of its largest. The rounding of float32 is
far below, that of bfloat16 above.
"""


@dataclass(frozen=True)
class Example:
    """The token whose next-token distribution hangs most on the batch: of those whose likeliest next token changes, if
    there are any.

    Attributes:
        window, position: which.
        said: for each order, the likeliest next token and its probability.
    """

    window: int
    position: int
    said: list[tuple[int, float]]


@dataclass(frozen=True)
class Drops:
    """What a model with one capacity factor does to the same windows in different batches.

    Attributes:
        factor: the capacity over an expert's fair share of pairs; None for dropless.
        dropped: the share of chosen pairs that is dropped.
        by_position, by_row: the same by equal parts of the sequence, and by the sequence's place in its batch.
        changed: the share of tokens of which a logit moves by more than :data:`SAME`.
        moved: the largest move of a logit, over the token's largest logit.
        rerouted: the share of tokens that another set of experts is chosen for, at any site.
        flipped: the share of tokens whose likeliest next token is another.
        divergence: mean Kullback-Leibler divergence of the first order's next-token distribution from another's, nats.
        loss: mean, over all orders.
        spread: mean over windows of the standard deviation of a window's loss over orders, nats a token.
        example: see there; None where nothing changes.
    """

    factor: float | None
    dropped: float
    by_position: list[float]
    by_row: list[float]
    changed: float
    moved: float
    rerouted: float
    flipped: float
    divergence: float
    loss: float
    spread: float
    example: Example | None


@contextmanager
def with_capacity(model: Transformer, factor: float | None) -> Iterator[None]:
    """Give all routed sites of a model a capacity factor in the block, or none."""
    before = [site.config for site in model.routed]
    try:
        for site, config in zip(model.routed, before, strict=True):
            site.config = replace(config, capacity_factor=factor)
        yield
    finally:
        for site, config in zip(model.routed, before, strict=True):
            site.config = config


def measure_drops(
    model: Transformer,
    batches: Sequence[Batch],
    device: Device,
    factors: Sequence[float | None],
    *,
    orders: int,
    seed: int,
    step: int,
) -> list[Drops]:
    """Measure what outputs owe to the rest of the batch, for each capacity factor, the same orders for all.

    Args:
        model: in its final state.
        batches: all of one size, of two sequences or more; the windows are theirs.
        device: where and in what precision it runs.
        factors: None for dropless.
        orders: in which windows are put into batches; the first is that of ``batches``.
        seed, step: what draws are keyed by.

    Raises:
        ConfigError: fewer than two orders, or batches that cannot differ.
    """
    size = len(batches[0].tokens_BS)
    if orders < 2 or size < 2 or len(batches) < 2:
        raise ConfigError(
            f"{len(batches)} batches of {size} in {orders} orders: want two batches or more, of two sequences or more, "
            "in two orders or more"
        )
    windows = _joined(batches)
    count = len(windows.tokens_BS) // size * size
    draw = seeding.numpy_generator(seed, "inspection", "orders")
    order_ON = [np.arange(count), *(draw.permutation(count) for _ in range(orders - 1))]
    found = []
    for factor in factors:
        with with_capacity(model, factor):
            runs = _Windows(model, windows, size, device, {"seed": seed, "step": step})
            found.append(_drops(factor, [runs.run(order_N) for order_N in order_ON]))
    return found


def _joined(batches: Sequence[Batch]) -> Batch:
    names = ("tokens_BS", "targets_BS", "sequence_B")
    tokens_BS, targets_BS, sequence_B = (np.concatenate([getattr(b, name) for b in batches]) for name in names)
    return Batch(tokens_BS, targets_BS, sequence_B, None)


@dataclass(frozen=True, eq=False)
class _Pass:
    """All windows once, in their own order whatever their batches were.

    Attributes:
        moved_NS, divergence_NS, rerouted_NS: against the first pass; see :class:`Drops`.
        best_NS, probability_NS: the likeliest next token, and how likely it is.
        loss_N: nats a token.
        by_part_2P, by_row_2B: chosen and dropped pairs, by part of the sequence and by row of the batch.
    """

    moved_NS: Tensor
    divergence_NS: Tensor
    rerouted_NS: Tensor
    best_NS: Tensor
    probability_NS: Tensor
    loss_N: Tensor
    by_part_2P: Tensor
    by_row_2B: Tensor


class _Windows:
    """Windows that a model runs in one order after another; the outputs of the first are held."""

    def __init__(self, model: Transformer, windows: Batch, size: int, device: Device, keys: dict[str, int]) -> None:
        self.model, self.windows, self.size, self.device, self.keys = model, windows, size, device, keys
        self.length = windows.tokens_BS.shape[1]
        self.first: list[tuple[Tensor, Tensor]] = []  # of each window: logits_SV, and chosen_SE of all sites

    @torch.no_grad()
    def run(self, order_N: np.ndarray) -> _Pass:
        """Run all windows in batches cut from an order."""
        parts, size = min(PARTS, self.length), self.size
        by_part_2P, by_row_2B = torch.zeros(2, parts), torch.zeros(2, size)
        found: list[list[Tensor]] = []
        for start in range(0, len(order_N), size):
            rows_B = order_N[start : start + size]
            windows = self.windows
            batch = Batch(windows.tokens_BS[rows_B], windows.targets_BS[rows_B], windows.sequence_B[rows_B], None)
            context = make_context(batch, self.device, progress=1.0, explore=False, **self.keys)
            with self.device.autocast():
                logits_BSV, decisions = self.model(context.token_ids_T.view(size, -1), context)
            logits_BSV = (logits_BSV if logits_BSV.dtype == torch.float64 else logits_BSV.float()).cpu()
            chosen_BSE = torch.cat([choices_of(decision) for decision in decisions], 1).view(size, self.length, -1)
            found.append(self._against_first(rows_B, logits_BSV, chosen_BSE, torch.from_numpy(batch.targets_BS)))
            row_T = torch.arange(size, device=self.device.name).repeat_interleave(self.length)
            for decision in decisions:
                by_part_2P += metrics.drops_by_position(decision, context.position_T, self.length, parts).cpu()
                by_row_2B += metrics.drops_by_position(decision, row_T, size, size).cpu()
        back_N = torch.from_numpy(np.argsort(order_N))
        moved, divergence, rerouted, best, likely, loss = (torch.cat(of)[back_N] for of in zip(*found, strict=True))
        return _Pass(moved, divergence, rerouted, best, likely, loss, by_part_2P, by_row_2B)

    def _against_first(
        self, rows_B: np.ndarray, logits_BSV: Tensor, chosen_BSE: Tensor, targets_BS: Tensor
    ) -> list[Tensor]:
        """Return what :class:`_Pass` holds of a batch, in the order of its fields."""
        if len(self.first) < len(self.windows.tokens_BS) // self.size * self.size:  # the first order is 0, 1, 2 ...
            self.first.extend(zip(logits_BSV, chosen_BSE, strict=True))
        base_BSV, base_BSE = (torch.stack(part) for part in zip(*(self.first[row] for row in rows_B), strict=True))
        log_BSV, was_BSV = logits_BSV.log_softmax(2), base_BSV.log_softmax(2)
        best = log_BSV.max(2)
        return [
            (logits_BSV - base_BSV).abs().amax(2) / base_BSV.abs().amax(2),
            (was_BSV.exp() * (was_BSV - log_BSV)).sum(2),
            (chosen_BSE != base_BSE).any(2),
            best.indices,
            best.values.exp(),
            -log_BSV.gather(2, targets_BS[..., None])[..., 0].double().mean(1),
        ]


def _drops(factor: float | None, passes: Sequence[_Pass]) -> Drops:
    first, others = passes[0], passes[1:]
    moved_ONS, divergence_ONS, rerouted_ONS = (
        torch.stack([getattr(each, name) for each in others]) for name in ("moved_NS", "divergence_NS", "rerouted_NS")
    )
    loss_ON = torch.stack([each.loss_N for each in passes])
    by_part_2P = torch.stack([each.by_part_2P for each in passes]).sum(0)
    by_row_2B = torch.stack([each.by_row_2B for each in passes]).sum(0)
    flips_ONS = torch.stack([each.best_NS != first.best_NS for each in others])
    moved = float(moved_ONS.max())
    return Drops(
        factor=factor,
        dropped=float(by_row_2B[1].sum() / by_row_2B[0].sum().clamp(min=1)),
        by_position=(by_part_2P[1] / by_part_2P[0].clamp(min=1)).tolist(),
        by_row=(by_row_2B[1] / by_row_2B[0].clamp(min=1)).tolist(),
        changed=float((moved_ONS > SAME).double().mean()),
        moved=moved,
        rerouted=float(rerouted_ONS.double().mean()),
        flipped=float(flips_ONS.double().mean()),
        divergence=max(float(divergence_ONS.double().mean()), 0.0),
        loss=float(loss_ON.mean()),
        spread=float(loss_ON.std(0).mean()),
        example=_example(passes, divergence_ONS.amax(0), flips_ONS.any(0)) if moved > SAME else None,
    )


def _example(passes: Sequence[_Pass], most_NS: Tensor, flips_NS: Tensor) -> Example:
    candidates_NS = torch.where(flips_NS, most_NS, -1.0) if flips_NS.any() else most_NS
    window, position = divmod(int(candidates_NS.argmax()), most_NS.shape[1])
    said = [(int(p.best_NS[window, position]), float(p.probability_NS[window, position])) for p in passes]
    return Example(window, position, said)
