"""Routers that match tokens with experts: expert choice, Sinkhorn, BASE.

Shape suffixes: T tokens, D model width, E experts, K experts per token, C tokens per expert.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.baselines.expert_choice import ExpertChoiceRouter
from rlroute.experiments.laws.steps import gates_TE, spread
from rlroute.routing import Router, RoutingDecision
from tests.conftest import D, draw, make_context, make_shape


def make(router: type[Router], experts: int = 8, k: int = 2, **config: Any) -> Router:
    """A router whose scores differ."""
    return spread(router(router.Config(**config), make_shape(experts, k)).double())


def decide(router: Router, tokens: int = 64, **context: Any) -> RoutingDecision:
    decision: RoutingDecision = router(draw(tokens, D), make_context(tokens, **context))
    return decision


def skewed(tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Scores by which all tokens want much the same experts."""
    return draw(tokens, experts, seed=seed) + 2 * draw(1, experts, seed=seed + 1)


# expert_choice


@pytest.mark.parametrize("explore", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(64, 8, 2), (30, 8, 3), (5, 8, 1), (12, 4, 4)])
def test_each_expert_takes_exactly_c_tokens(tokens: int, experts: int, k: int, explore: bool) -> None:
    decision = decide(make(ExpertChoiceRouter, experts, k), tokens, explore=explore)
    each = max(1, tokens * k // experts)
    assert decision.load_E().tolist() == [each] * experts
    assert decision.probs_TE is not None
    probs_TE, want_TE = decision.probs_TE.detach(), torch.zeros(tokens, experts).double()
    for expert in range(experts):  # the C most probable, by their probabilities
        for token in sorted(range(tokens), key=lambda t: -float(probs_TE[t, expert]))[:each]:
            want_TE[token, expert] = probs_TE[token, expert]
    assert torch.equal(gates_TE(decision), want_TE)


def test_experts_never_take_padding() -> None:
    mask_T = torch.arange(64) % 4 == 0
    decision = decide(make(ExpertChoiceRouter, k=4), mask_T=mask_T)  # 32 places an expert, 16 tokens
    assert decision.load_E().tolist() == [16] * 8 and not bool(gates_TE(decision)[~mask_T].any())
