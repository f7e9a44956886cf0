"""Evaluation on fixed tokens: greedy for every router, and sampled beside it for stochastic ones. It changes no state.

Shape suffixes: T tokens, L MoE layers, E experts, K experts per token.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.model import Transformer
from rlroute.routing import RoutingDecision
from rlroute.training.data import Batch
from rlroute.training.step import Device, forward, load_fractions, make_context, max_vio_L


@torch.no_grad()
def evaluate(
    model: Transformer, batches: Sequence[Batch], token_bytes_V: np.ndarray, device: Device, *, seed: int, sampled: bool
) -> dict[str, Any]:
    """Return the greedy loss, bits per byte and balance over all batches, and the sampled policy's where asked and meaningful.

    Loads are counted over the whole of ``batches``, by layer, before capacity drops.
    """
    greedy = _pass(model, batches, token_bytes_V, device, seed, explore=False)
    decisions = greedy.pop("decisions")
    sampled_row = None
    if sampled and any(router.stochastic for router in model.routers):
        drawn = _pass(model, batches, token_bytes_V, device, seed, explore=True)
        overlap_L = [_overlap(a, b) for a, b in zip(decisions, drawn["decisions"], strict=True)]
        sampled_row = {"loss": drawn["loss"], "bits_per_byte": drawn["bits_per_byte"], "overlap_L": overlap_L}
    demand_LE = _demand(decisions)
    probs_L = [[d.probs_TE for d in layer if d.probs_TE is not None] for layer in decisions]
    return greedy | {
        "max_vio_L": max_vio_L(demand_LE),
        "cv_L": [float(metrics.coefficient_of_variation(d)) for d in demand_LE],
        "load_entropy_L": [float(metrics.load_entropy(d)) for d in demand_LE],
        "router_entropy_L": [_router_entropy(probs) for probs in probs_L] if probs_L and all(probs_L) else None,
        "dead_L": [int(metrics.dead_experts(d)) for d in demand_LE],
        "drop_rate": float(np.mean([float(metrics.drop_rate(d)) for layer in decisions for d in layer]))
        if decisions
        else 0.0,
        "load_LE": load_fractions(demand_LE),
        "sampled": sampled_row,
    }


def _pass(
    model: Transformer, batches: Sequence[Batch], token_bytes_V: np.ndarray, device: Device, seed: int, explore: bool
) -> dict[str, Any]:
    """Run all batches once. Step 0 keys the draws; the sequence ids of evaluation batches keep them apart from training's."""
    nats, tokens, text_bytes = 0.0, 0, 0.0
    decisions: list[list[RoutingDecision]] = [[] for _ in model.routers]
    for batch in batches:
        context = make_context(batch, device, seed=seed, step=0, explore=explore)
        loss_MT, made = forward(model, batch, context, device)
        nats += float(loss_MT.double().sum())
        tokens += batch.targets_BS.size
        text_bytes += float(token_bytes_V[batch.targets_BS].sum())
        for layer, decision in zip(decisions, made, strict=True):
            layer.append(decision)
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / text_bytes, "decisions": decisions}


def _demand(decisions: list[list[RoutingDecision]]) -> Tensor:
    """Return the pairs that chose each expert, by layer, over all batches; shape (L, E), empty for the dense model."""
    layers = [torch.stack([d.demand_E() for d in layer]).sum(0) for layer in decisions]
    return torch.stack(layers).float() if layers else torch.zeros(0, 0)


def _router_entropy(probs: list[Tensor]) -> float:
    return float(np.mean([float(metrics.router_entropy(p)) for p in probs]))


def _overlap(greedy: list[RoutingDecision], drawn: list[RoutingDecision]) -> float | None:
    """Return the share of chosen experts in common; None where the number per token is not fixed."""
    pairs = [
        (a.expert_ids_R.view(-1, a.k), b.expert_ids_R.view(-1, b.k))
        for a, b in zip(greedy, drawn, strict=True)
        if a.k and b.k
    ]
    return float(np.mean([float(metrics.overlap(a, b)) for a, b in pairs])) if pairs else None
