"""Dropping pairs over capacity, or down to whole tiles: rules of the layer, not a router's business.

A bin is what has a capacity: one expert (or one device) and some rows, which compete for it.

Shape suffixes: T rows, E experts, R routed pairs.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rlroute.config import ModelConfig
from rlroute.decision import RoutingDecision
from rlroute.routing import RoutingContext


def limit(decision: RoutingDecision, config: ModelConfig, context: RoutingContext) -> RoutingDecision:
    """Return the decision without what is over the capacities of a model's configuration, fills no tile, or is over
    the decision's own bound.
    """
    if config.capacity_factor is not None:
        device_E = context.expert_device_E if config.capacity_of == "device" else None
        real = decision.num_experts - decision.num_free_experts
        takers = decision.num_experts if device_E is None else config.devices * decision.num_experts / real
        decision = drop_over_capacity(
            decision,
            config.capacity_factor * config.k,
            takers,
            order=config.capacity_order,
            bin_T=_bins(config, context),
            device_E=device_E,
        )
    if config.round_to and context.training:
        decision = round_to_tiles(decision, config.round_to, context, nearest=config.rounding == "nearest")
    most = decision.max_pairs
    return decision if most is None or most >= len(decision.kept_R) else _drop_over_bound(decision, most)


def drop_over_capacity(
    decision: RoutingDecision,
    pairs_per_row: float,
    takers: float,
    *,
    order: Literal["position", "gate"] = "position",
    bin_T: Tensor | None = None,
    device_E: Tensor | None = None,
) -> RoutingDecision:
    """Return the decision with ``kept_R`` false for pairs over capacity.

    n rows that compete keep ceil(pairs_per_row * n / takers) pairs of each expert (or device); free experts, which cost
    nothing, keep all of theirs.

    Args:
        decision: any decision.
        pairs_per_row: the capacity factor times k.
        takers: how many experts (or devices) share the pairs; among devices that hold E real of E + Z experts, (E + Z)
            / E times as many.
        order: who comes first: ``position`` (first choices before second ones, then earlier tokens; GShard, arXiv
            2006.16668) or ``gate`` (larger gates; batch-prioritised routing, arXiv 2106.05974).
        bin_T: int64 below T, which rows compete; all with all where it is None.
        device_E: the device of each expert, where devices have the capacity (DeepSeek-V2, arXiv 2405.04434).
    """
    bin_T = decision.token_ids_R.new_zeros(decision.num_tokens) if bin_T is None else bin_T
    rows_T = torch.zeros_like(bin_T).index_add(0, bin_T, torch.ones_like(bin_T))
    capacity_T = torch.ceil(pairs_per_row * rows_T.double() / takers)
    first_R = _places(decision) if order == "position" else _by_gate(decision)
    runs_R = decision.runs_R[first_R]
    taker_R = decision.expert_ids_R.clamp(max=decision.num_experts - 1)[first_R]
    taker_R = taker_R if device_E is None else device_E[taker_R]
    bin_R = bin_T[decision.token_ids_R[first_R]]
    slot_R = torch.where(runs_R, bin_R * decision.num_experts + taker_R, decision.num_tokens * decision.num_experts)
    kept_R = torch.empty_like(decision.kept_R)
    kept_R[first_R] = runs_R & (_rank(slot_R) < capacity_T[bin_R])
    return replace(decision, kept_R=kept_R | decision.idle_R)


def round_to_tiles(
    decision: RoutingDecision, size: int, context: RoutingContext, *, nearest: bool = False
) -> RoutingDecision:
    """Return the decision with ``kept_R`` false for the pairs of smallest gates that are beyond each expert's last full
    tile (token rounding, SonicMoE, arXiv 2512.14080).

    There, tokens that did not choose an expert may fill its last tile; here none are added, since a decision says no
    gates for them.

    Args:
        decision: any decision.
        size: pairs in a tile. Those of each routing sample fill tiles of their own.
        context: says which row is of which sample.
        nearest: keep a last tile that is at least half full.
    """
    experts, sample_T = decision.num_experts, context.sample_T
    first_R = _by_gate(decision)
    runs_R = decision.runs_R[first_R]
    expert_R = sample_T[decision.token_ids_R] * experts + decision.expert_ids_R.clamp(max=experts - 1)
    slot_R = torch.where(runs_R, expert_R[first_R], context.num_samples * experts)
    counts = slot_R.new_zeros(context.num_samples * experts + 1).index_add(0, slot_R, torch.ones_like(slot_R))
    beyond = counts % size
    beyond = torch.where(2 * beyond < size, beyond, 0) if nearest else beyond
    kept_R = torch.empty_like(decision.kept_R)
    kept_R[first_R] = runs_R & (_rank(slot_R) < (counts - beyond)[slot_R])
    return replace(decision, kept_R=kept_R | decision.idle_R)


def _drop_over_bound(decision: RoutingDecision, most: int) -> RoutingDecision:
    """Drop running pairs beyond the first ``most``."""
    first_R = _places(decision)
    runs_R = decision.runs_R[first_R]
    kept_R = torch.empty_like(decision.kept_R)
    kept_R[first_R] = runs_R & (runs_R.cumsum(0) <= most)
    return replace(decision, kept_R=kept_R | decision.idle_R)


def _by_gate(decision: RoutingDecision) -> Tensor:
    """Return the pairs, larger gates first."""
    return decision.gates_R.detach().argsort(descending=True, stable=True)


def _places(decision: RoutingDecision) -> Tensor:
    """Return the pairs, all first choices before all second ones, then by token; by token alone where experts
    choose.
    """
    if decision.k is None:
        return torch.argsort(decision.token_ids_R, stable=True)
    pairs_R = torch.arange(len(decision.token_ids_R), device=decision.kept_R.device)
    return pairs_R.view(decision.num_tokens, decision.k).t().reshape(-1)


def _rank(slot_R: Tensor) -> Tensor:
    """Return how many equal values stand before each one. By sorting: the number of slots need not be known."""
    sorted_R, by_slot_R = torch.sort(slot_R, stable=True)
    rank_R = torch.empty_like(by_slot_R)
    places_R = torch.arange(len(slot_R), device=slot_R.device)
    rank_R[by_slot_R] = places_R - torch.searchsorted(sorted_R, sorted_R)
    return rank_R


def _bins(config: ModelConfig, context: RoutingContext) -> Tensor:
    """Return which rows compete: those of one routing sample, of one of its groups, or of one sequence."""
    sample_T = context.sample_T
    if config.capacity_rows == "sequence":
        changes_T = (context.sequence_T.diff() != 0) | (sample_T.diff() != 0)
        return torch.nn.functional.pad(changes_T.long().cumsum(0), (1, 0))
    per_sample = len(sample_T) // context.num_samples
    groups = min(config.capacity_groups, per_sample)  # a short batch has no more groups than rows
    row_T = torch.arange(len(sample_T), device=sample_T.device) % per_sample
    return sample_T * groups + row_T * groups // per_sample
