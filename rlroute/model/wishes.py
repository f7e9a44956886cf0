"""What a layer hands to routers that wish for it (:attr:`rlroute.routing.Router.wishes`); without a wish nothing here
runs.

Outputs by pair: each pair runs as a token of its own with a gate of 1, through the same engine or across the same
shards, and gates and sums are made here. The products are those of the plain way; rows are copied, and kept.

Shape suffixes: T tokens, D model width, K slots per token, R routed pairs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from rlroute.decision import RoutingDecision
from rlroute.routing import Router


def by_pair(x_TD: Tensor, decision: RoutingDecision) -> tuple[Tensor, RoutingDecision]:
    """Return each pair's row, shape (R, D), and a decision over these rows whose output are the outputs of the
    pairs.
    """
    if decision.k is None:
        rows_RD = x_TD[decision.token_ids_R]
    else:
        rows_RD = x_TD[:, None].expand(-1, decision.k, -1).reshape(-1, x_TD.shape[1])
    return rows_RD, alone(decision, x_TD.dtype)


def alone(decision: RoutingDecision, dtype: torch.dtype) -> RoutingDecision:
    """Return the decision in which each pair is a token of its own, with a gate of 1, in the order of the pairs."""
    ids_R = torch.where(decision.kept_R, decision.expert_ids_R, decision.num_experts)
    gates_R1 = torch.ones_like(ids_R, dtype=dtype)[:, None]
    return RoutingDecision.token_choice(ids_R[:, None], gates_R1, decision.num_experts, max_pairs=decision.max_pairs)


def combine(outputs_RD: Tensor, decision: RoutingDecision) -> tuple[Tensor, RoutingDecision]:
    """Return each token's gated sum of its pairs' outputs, shape (T, D), and the decision with these outputs."""
    gated_RD = decision.gates_R[:, None] * outputs_RD
    if decision.k is not None:
        out_TD = gated_RD.view(decision.num_tokens, decision.k, -1).sum(1)
    else:
        out_TD = gated_RD.new_zeros(decision.num_tokens, gated_RD.shape[1])
        out_TD = out_TD.index_add(0, decision.token_ids_R, gated_RD)
    return out_TD.to(outputs_RD.dtype), replace(decision, outputs_RD=outputs_RD)


def stand_in(router: Router, decision: RoutingDecision, x_TD: Tensor) -> RoutingDecision:
    """Return what a router that stands alone would be handed: its inputs, as if they were outputs of experts, and any
    numbers as their weights.
    """
    if "outputs" in router.wishes:
        columns = torch.arange(router.shape.d_output, device=x_TD.device) % x_TD.shape[1]
        rows_RD = x_TD.detach()[:, columns][decision.token_ids_R]
        decision = replace(decision, outputs_RD=rows_RD * decision.runs_R[:, None])
    if "weights" in router.wishes:
        sizes = (router.shape.num_experts, router.shape.d_expert, router.shape.d_model)
        places = torch.arange(sizes[0] * sizes[1] * sizes[2], dtype=x_TD.dtype, device=x_TD.device)
        decision = replace(decision, gate_EFD=places.sin().view(sizes))
    return decision
