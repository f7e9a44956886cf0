"""Evaluation on fixed tokens: greedy for every router, and sampled beside it for stochastic ones. It changes no state.

The batches are micro-batches, so that rules that mix tokens see as many as in training; the ranks of a group take turns with them.

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
from rlroute.training.group import ALONE, Group
from rlroute.training.step import Device, forward, load_fractions, make_context, max_vio_L, surroundings

Decisions = list[list[RoutingDecision]]
"""By batch and layer."""


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: Sequence[Batch],
    token_bytes_V: np.ndarray,
    device: Device,
    *,
    seed: int,
    step: int,
    sampled: bool,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Return the greedy loss, bits per byte and balance over all batches, and the sampled policy's where asked and meaningful.

    Loads are counted over the whole of ``batches``, by layer, before capacity drops.
    """
    loss, decisions = _pass(model, batches, token_bytes_V, device, seed, step, group, explore=False)
    sums = _balance_sums(model, decisions)
    group.add_up(list(sums.values()))
    sampled_row = None
    if sampled and any(router.stochastic for router in model.routers):
        sampled_loss, drawn = _pass(model, batches, token_bytes_V, device, seed, step, group, explore=True)
        sampled_row = sampled_loss | {"overlap_L": _overlap_L(model, decisions, drawn, group)}
    demand_LE, entropy_L, scored_L = sums["demand_LE"].float(), sums["entropy_L"], sums["scored_L"]
    return loss | {
        "max_vio_L": max_vio_L(demand_LE),
        "cv_L": [float(metrics.coefficient_of_variation(d)) for d in demand_LE],
        "load_entropy_L": [float(metrics.load_entropy(d)) for d in demand_LE],
        "router_entropy_L": (entropy_L / scored_L).tolist() if len(scored_L) and bool(scored_L.all()) else None,
        "dead_L": [int(metrics.dead_experts(d)) for d in demand_LE],
        "drop_rate": float(sums["drops"]) / (len(batches) * max(1, len(model.routers))),
        "load_LE": load_fractions(demand_LE),
        "sampled": sampled_row,
    }


def _pass(
    model: Transformer,
    batches: Sequence[Batch],
    token_bytes_V: np.ndarray,
    device: Device,
    seed: int,
    step: int,
    group: Group,
    explore: bool,
) -> tuple[dict[str, float], Decisions]:
    """Run all batches once and return the losses over all of them, and the decisions of this rank's.

    Schedules (a policy's temperature) stand at ``step``; the sequence ids of evaluation batches keep their draws apart from training's.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    decisions, around = [], surroundings(model, group)
    for turn in range(-(-len(batches) // group.size)):
        index = turn * group.size + group.rank
        batch = batches[min(index, len(batches) - 1)]
        context = make_context(batch, device, seed=seed, step=step, explore=explore, **around)
        loss_MT, made = forward(model, batch, context, device)
        if index < len(batches):  # else it ran for the sake of the others, whose pairs its experts take
            nats, text_bytes = float(loss_MT.double().sum()), float(token_bytes_V[batch.targets_BS].sum())
            sums += torch.tensor([nats, batch.targets_BS.size, text_bytes], dtype=torch.float64)
            decisions.append(made)
    sums = sums.to(device.name)
    group.add_up([sums])
    nats, tokens, text_bytes = sums.tolist()
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / text_bytes}, decisions


def _balance_sums(model: Transformer, decisions: Decisions) -> dict[str, Tensor]:
    """Return sums over this rank's batches: demand, entropy of the routing distribution and how often there was one, drop rates."""
    layers, device = len(model.routers), model.embed.weight.device
    experts = model.routers[0].shape.num_experts if layers else 0
    demand_LE = torch.zeros(layers, experts, dtype=torch.long, device=device)
    entropy_L, scored_L, drops = (torch.zeros(n, dtype=torch.float64, device=device) for n in (layers, layers, 1))
    for made in decisions:
        for layer, decision in enumerate(made):
            demand_LE[layer] += decision.demand_E()
            drops += metrics.drop_rate(decision)
            if decision.probs_TE is not None:
                entropy_L[layer] += metrics.router_entropy(decision.probs_TE)
                scored_L[layer] += 1
    return {"demand_LE": demand_LE, "entropy_L": entropy_L, "scored_L": scored_L, "drops": drops}


def _overlap_L(model: Transformer, greedy: Decisions, drawn: Decisions, group: Group) -> list[float | None]:
    """Return the share of chosen experts in common, by layer; None where the number per token is not fixed."""
    sums_L2 = torch.zeros(len(model.routers), 2, dtype=torch.float64, device=model.embed.weight.device)
    for made, other in zip(greedy, drawn, strict=True):
        for layer, (a, b) in enumerate(zip(made, other, strict=True)):
            if a.k and b.k:
                ids = (a.expert_ids_R.view(-1, a.k), b.expert_ids_R.view(-1, b.k))
                sums_L2[layer, 0] += metrics.overlap(*ids)
                sums_L2[layer, 1] += 1
    group.add_up([sums_L2])
    return [shared / count if count else None for shared, count in sums_L2.tolist()]
