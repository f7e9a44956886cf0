"""What is measured of decisions, per site: pure functions that leave their result on the device.

Balance is not defined where nothing was chosen: it is NaN there, and all experts are dead.

Shape suffixes: T tokens, E experts, K experts per token, R routed pairs, N values, P parts of a sequence.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlroute.balance import entropy_T
from rlroute.decision import RoutingDecision


def max_vio(load_E: Tensor) -> Tensor:
    """Return max_i n_i / mean(n) - 1 (Wang et al. 2024, arXiv 2408.15664); 0 is perfect balance, E - 1 total
    collapse.
    """
    return load_E.max() / load_E.double().mean() - 1


def coefficient_of_variation(load_E: Tensor) -> Tensor:
    """Return the standard deviation of the loads over their mean."""
    return load_E.double().std(correction=0) / load_E.double().mean()


def load_entropy(load_E: Tensor) -> Tensor:
    """Return the entropy of the load fractions over log E: 1 is perfect balance, 0 total collapse; 1 for a single
    expert.
    """
    fractions_E = load_E.double() / load_E.sum()
    return torch.special.entr(fractions_E).sum() / math.log(len(load_E)) if len(load_E) > 1 else fractions_E.sum()


def gini(load_E: Tensor) -> Tensor:
    """Return the mean difference between two experts' loads over twice the mean load: 0 is perfect balance, 1 - 1/E
    total collapse (LPR, arXiv 2506.21328, measures by it).
    """
    ordered_E, experts = load_E.double().sort().values, len(load_E)
    above_E = 2 * torch.arange(experts, device=load_E.device) - experts + 1  # how many lie below, less those above
    return (above_E * ordered_E).sum() / (experts * ordered_E.sum())


def min_over_max(load_E: Tensor) -> Tensor:
    """Return the lowest load over the highest (LPR, arXiv 2506.21328): 1 is perfect balance, 0 where an expert has
    nothing.
    """
    return load_E.min().double() / load_E.max()


def percentiles(values_N: Tensor, percents: Sequence[float]) -> Tensor:
    """Return percentiles of values, those between two of them by linear interpolation. NaN is left out, and is the
    answer where there is nothing else.
    """
    ordered_N = values_N[~values_N.isnan()].double().sort().values
    at = torch.tensor(percents, dtype=torch.float64, device=values_N.device) / 100
    if not len(ordered_N):
        return torch.full_like(at, math.nan)
    place = at * (len(ordered_N) - 1)
    low = ordered_N[place.floor().long()]
    return low + (place - place.floor()) * (ordered_N[place.ceil().long()] - low)


def router_entropy(probs_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Return the mean entropy of the routing distributions of valid tokens over log E."""
    values_T = entropy_T(probs_TE) / math.log(max(probs_TE.shape[1], 2))
    return values_T.mean() if mask_T is None else (values_T * mask_T).sum() / mask_T.sum()


def dead_experts(load_E: Tensor, share: float = 0.05) -> Tensor:
    """Count the experts whose load is 0 or below ``share`` of the fair one. Meaningful over a window of many tokens
    only.
    """
    return ((load_E < share * load_E.double().mean()) | (load_E == 0)).sum()


def square_sum(logits_TE: Tensor | None) -> Tensor | float:
    """Return the sum over rows of the mean square of a row's finite logits; NaN where there are none."""
    if logits_TE is None:
        return math.nan
    finite_TE, values_TE = logits_TE.isfinite(), logits_TE.detach().double()
    squares_T = torch.where(finite_TE, values_TE, 0.0).square().sum(1)
    return (squares_T / finite_TE.sum(1)).sum()


def drop_rate(decision: RoutingDecision) -> Tensor:
    """Return the share of chosen pairs that the capacity step dropped; 0 where none was chosen."""
    chosen = decision.demand_E().sum()
    return (chosen - decision.load_E().sum()) / chosen.clamp(min=1)


def drops_by_position(decision: RoutingDecision, position_T: Tensor, length: int, parts: int) -> Tensor:
    """Count the chosen pairs, and those of them that were dropped, by equal parts of the sequence; int64 of shape
    (2, P).

    A capacity in the order of positions drops towards the end (OpenMoE, arXiv 2402.01739).

    Args:
        decision: any.
        position_T: of each token in its sequence.
        length: of the sequences.
        parts: P.
    """
    part_R = (position_T * parts // length)[decision.token_ids_R]
    counted_2R = torch.stack([decision.used_R, decision.used_R & ~decision.kept_R]).long()
    return counted_2R.new_zeros(2, parts).index_add(1, part_R, counted_2R)


def overlap(decision: RoutingDecision, other: RoutingDecision) -> Tensor:
    """Return the share of a decision's chosen pairs that another one on the same tokens chose too; NaN where it chose
    none.
    """
    columns = decision.num_experts + 1  # unused slots have one of their own
    mine_R, theirs_R = (d.token_ids_R * columns + d.expert_ids_R for d in (decision, other))
    chosen_N = other.used_R.new_zeros(other.num_tokens * columns).index_fill(0, theirs_R, True)
    return (chosen_N[mine_R] & decision.used_R).sum().double() / decision.used_R.sum()


def shared_T(one_TK: Tensor, other_TK: Tensor) -> Tensor:
    """Return how many experts of a token are in both of two choices, in any order; ids below 0 are none.

    Args:
        one_TK, other_TK: ids, none twice for a token; the two K may differ.
    """
    ordered_TK = torch.cat([one_TK, other_TK], 1).sort(1).values
    return ((ordered_TK[:, 1:] == ordered_TK[:, :-1]) & (ordered_TK[:, 1:] >= 0)).sum(1)
