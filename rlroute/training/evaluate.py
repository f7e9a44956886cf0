"""Evaluation on fixed tokens: greedy for every router, and sampled beside it for stochastic ones. It changes no state.

The batches are micro-batches, so that rules that mix tokens see as many as in training; the ranks of a group take turns
with them.

Shape suffixes: T tokens, L routed sites, E experts.
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
from rlroute.training.step import Device, defined, forward, load_fractions, make_context, max_vio_L

Decisions = list[list[RoutingDecision]]
"""By batch and site."""


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
    progress: float = 0.0,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Return the greedy loss, bits per byte and balance over all batches, and the sampled policy's where asked and
    meaningful.

    Loads are counted over the whole of ``batches``, by site, before capacity drops; pairs per token after them, as they
    ran.
    """
    loss, decisions = _pass(model, batches, token_bytes_V, device, seed, step, progress, group, explore=False)
    balance = _balance(model, decisions, group)
    sampled_row = None
    if sampled and any(router.stochastic for router in model.routers):
        sampled_loss, drawn = _pass(model, batches, token_bytes_V, device, seed, step, progress, group, explore=True)
        sampled_row = sampled_loss | {"overlap_L": _overlap_L(model, decisions, drawn, group)}
    return loss | balance | {"sampled": sampled_row}


def _pass(
    model: Transformer,
    batches: Sequence[Batch],
    token_bytes_V: np.ndarray,
    device: Device,
    seed: int,
    step: int,
    progress: float,
    group: Group,
    explore: bool,
) -> tuple[dict[str, float], Decisions]:
    """Run all batches once and return the losses over all of them, and the decisions of this rank's.

    Schedules (a policy's temperature) stand at ``step`` and ``progress``; the sequence ids of evaluation batches keep
    their draws apart from training's.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    decisions = []
    for turn in range(-(-len(batches) // group.size)):
        index = turn * group.size + group.rank
        batch = batches[min(index, len(batches) - 1)]
        context = make_context(batch, device, seed=seed, step=step, progress=progress, explore=explore)
        loss_MT, made = forward(model, batch, context, device)
        if index < len(batches):  # else it ran for the sake of the others, whose pairs its experts take
            nats, text_bytes = float(loss_MT.double().sum()), float(token_bytes_V[batch.targets_BS].sum())
            sums += torch.tensor([nats, batch.targets_BS.size, text_bytes], dtype=torch.float64)
            decisions.append(made)
    sums = sums.to(device.name)
    group.add_up([sums])
    nats, tokens, text_bytes = sums.tolist()
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / text_bytes}, decisions


def _balance(model: Transformer, decisions: Decisions, group: Group) -> dict[str, Any]:
    """Return the balance of all ranks' decisions, and what they ran, by site."""
    made_L = list(zip(*decisions, strict=True)) if decisions else [() for _ in model.routers]
    device = model.embed.weight.device
    demand_L = [
        sum((d.demand_E() for d in made), start=torch.zeros(router.shape.num_experts, dtype=torch.long, device=device))
        for router, made in zip(model.routers, made_L, strict=True)
    ]
    sums_L6 = torch.zeros(len(made_L), 6, dtype=torch.float64, device=device)
    for site, made in enumerate(made_L):
        for decision in made:
            sums_L6[site] += _sums(decision)
    group.add_up([*demand_L, sums_L6])
    tokens_L, used_L, ran_L, without_L, scored_L, entropy_L = sums_L6.t()
    return {
        "max_vio_L": max_vio_L(demand_L),
        "cv_L": [defined(metrics.coefficient_of_variation(d)) for d in demand_L],
        "load_entropy_L": [defined(metrics.load_entropy(d)) for d in demand_L],
        "router_entropy_L": [defined(entropy) for entropy in entropy_L / scored_L] if scored_L.any() else None,
        "dead_L": [int(metrics.dead_experts(d)) for d in demand_L],
        "drop_rate": float((used_L - ran_L).sum() / used_L.sum().clamp(min=1)),
        "pairs_L": (ran_L / tokens_L).tolist(),
        "without_L": (without_L / tokens_L).tolist(),
        "load_LE": load_fractions(demand_L),
    }


def _sums(decision: RoutingDecision) -> Tensor:
    """Return what :func:`_balance` adds up of one batch at one site, float64 of shape (6,).

    These are: tokens, pairs, pairs that ran, tokens without any, tokens with probabilities, and the entropies of these.
    """
    ran_T, probs_TE = decision.token_sum(decision.kept_R.double()), decision.probs_TE
    tokens = ran_T.new_tensor(decision.num_tokens)
    scored = 0 * tokens if probs_TE is None else tokens
    entropy = 0 * tokens if probs_TE is None else tokens * metrics.router_entropy(probs_TE).double()
    used = decision.used_R.sum().double()
    return torch.stack([tokens, used, ran_T.sum(), (ran_T == 0).sum().double(), scored, entropy])


def _overlap_L(model: Transformer, greedy: Decisions, drawn: Decisions, group: Group) -> list[float | None]:
    """Return the share of the drawn pairs that are greedy ones too, by site; None where no pair was drawn."""
    sums_L2 = torch.zeros(len(model.routers), 2, dtype=torch.float64, device=model.embed.weight.device)
    for made, other in zip(greedy, drawn, strict=True):
        for site, (a, b) in enumerate(zip(made, other, strict=True)):
            pairs = b.used_R.sum().double()
            sums_L2[site] += torch.stack([pairs * metrics.overlap(b, a).nan_to_num(), pairs])
    group.add_up([sums_L2])
    return [shared / count if count else None for shared, count in sums_L2.tolist()]
