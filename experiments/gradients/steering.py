"""How a router is steered without being edited, and what it has to answer for the gradient instrument to apply to it.

Shape suffixes: T tokens, E columns of logits, K choices per token, R routed pairs, S shared experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlroute.routing import Router, RoutingDecision

OTHER_LOGITS = "its logits are not what its module `scores` returns"
VARIABLE_K = "not a token choice of fixed k"


class Unmeasurable(Exception):
    """The instrument does not apply to a router; ``str`` says why, in words for a table."""


def log_policy(decision: RoutingDecision) -> Tensor:
    """Return logits of the policy whose gradient is measured: the router's published distribution, else softmax of its
    logits.
    """
    assert decision.logits_TE is not None
    if decision.probs_TE is None:
        return decision.logits_TE
    return decision.probs_TE.clamp(min=torch.finfo(decision.probs_TE.dtype).tiny).log()


def weights(decision: RoutingDecision) -> dict[str, Tensor]:
    """Return what a token's output is weighted by: the gates of its pairs and, where there are any, those of its own
    input and of shared experts, and what is added as it is.
    """
    named = {name: getattr(decision, name) for name in ("gates_R", "self_T", "shared_gates_TS", "fill_TD")}
    return {name: value for name, value in named.items() if value is not None}


def scores_of(router: Router) -> nn.Module:
    """Return the module whose output are a router's logits.

    Raises:
        Unmeasurable: it has none.
    """
    scores = getattr(router, "scores", None)
    if not isinstance(scores, nn.Module):
        raise Unmeasurable("no scores, so no gradient at logits")
    return scores


def size_of(decision: RoutingDecision) -> tuple[int, int]:
    """Return a decision's slots per token and its columns of logits.

    Raises:
        Unmeasurable: it has no fixed number of them.
    """
    if decision.k is None:
        raise Unmeasurable(VARIABLE_K)
    if decision.logits_TE is None:
        raise Unmeasurable("no logits in its decision")
    columns = decision.logits_TE.shape[1]
    if decision.probs_TE is not None and decision.probs_TE.shape[1] != columns:
        raise Unmeasurable(f"its distribution has {decision.probs_TE.shape[1]} columns, and its logits {columns}")
    return decision.k, columns


def shift_by(shift_TE: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a forward hook for a ``scores`` module, which adds a shift to its rows, over and over."""

    def shifted(module: nn.Module, inputs: Any, logits_TE: Tensor) -> Tensor:
        if logits_TE.shape[1] != shift_TE.shape[1]:
            raise Unmeasurable(OTHER_LOGITS)
        return logits_TE + shift_TE.repeat(len(logits_TE) // len(shift_TE), 1)

    return shifted


def hold(router: nn.Module, inputs: Any, decision: RoutingDecision) -> RoutingDecision:
    """The forward hook of a router whose gates are to carry no gradient."""
    cut: dict[str, Any] = {name: value.detach() for name, value in weights(decision).items()}
    return replace(decision, **cut)


def check_answer(decision: RoutingDecision, ids_TK: Tensor) -> None:
    """Refuse a decision that is not the forced one; columns beyond the experts run none, which leaves a slot unused.

    Raises:
        Unmeasurable: it is not.
    """
    if not torch.equal(decision.expert_ids_R, ids_TK.clamp(max=decision.num_experts).flatten()):
        raise Unmeasurable("its choice cannot be forced: it does not answer with what `context.choose` returns")
