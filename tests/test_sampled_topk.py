"""sampled_topk: the draw is from the softmax, the gates are switch's, and without exploring it is switch.

Shape suffixes: T tokens, D model width, E experts, K experts per token.
"""

from typing import Any

import pytest
import torch

from rlroute.registry import router_class
from tests.conftest import D, make_context, make_shape

TOKENS, EXPERTS = 20_000, 4


@pytest.mark.parametrize("k", [1, 2])
def test_without_exploring_it_is_switch(k: int) -> None:
    x_TD, shape = torch.randn(64, D, generator=torch.Generator().manual_seed(0)), make_shape(EXPERTS, k)
    made = [router_class(name) for name in ("sampled_topk", "switch")]
    one, other = (cls(cls.Config(), shape)(x_TD, make_context(64, explore=False)) for cls in made)
    for name in ("expert_ids_R", "gates_R", "logits_TE", "probs_TE"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_choices_are_drawn_from_the_softmax_and_gates_are_its_shares(temperature: float) -> None:
    cls: Any = router_class("sampled_topk")
    router = cls(cls.Config(temperature=temperature), make_shape(EXPERTS, 2))
    with torch.no_grad():
        router.scores.weight.mul_(20)
    x_D = torch.randn(D, generator=torch.Generator().manual_seed(1))
    decision = router(x_D.expand(TOKENS, -1), make_context(TOKENS, explore=True))
    logits_E = (router.scores.weight @ x_D).detach()
    ids_TK = decision.expert_ids_R.view(TOKENS, 2)
    shares_E = torch.bincount(ids_TK[:, 0], minlength=EXPERTS) / TOKENS
    assert torch.allclose(shares_E, (logits_E / temperature).softmax(0), atol=4 * (0.25 / TOKENS) ** 0.5)
    probs_E = logits_E.softmax(0)
    wanted_TK = probs_E[ids_TK] / probs_E[ids_TK].sum(1, keepdim=True)
    assert torch.allclose(decision.gates_R.view(TOKENS, 2), wanted_TK, atol=1e-6)
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all()
