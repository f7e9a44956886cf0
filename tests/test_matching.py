"""Routers that match tokens with experts: expert choice, Sinkhorn, BASE.

Shape suffixes: T tokens, D model width, E experts, K experts per token, C tokens per expert.
"""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from rlroute.baselines.base import BaseRouter, assign
from rlroute.baselines.expert_choice import ExpertChoiceRouter
from rlroute.baselines.sinkhorn import SinkhornRouter, balanced
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


# sinkhorn


@pytest.mark.parametrize("padded", [False, True])
def test_the_marginals_of_the_plan_are_equal(padded: bool) -> None:
    scores_TE = skewed(96, 8)
    mask_T = (torch.arange(96) % 3 != 0) | torch.tensor(not padded)
    plan_TE = balanced(scores_TE, mask_T, 100).exp()
    torch.testing.assert_close(plan_TE.sum(1), torch.ones(96).double(), rtol=0, atol=1e-12)
    loads_E = plan_TE[mask_T].sum(0)
    torch.testing.assert_close(loads_E, torch.full_like(loads_E, int(mask_T.sum()) / 8), rtol=0, atol=1e-6)


def test_the_plan_is_that_of_plain_scaling() -> None:
    """Without logarithms, as it is written down."""
    scores_TE = skewed(40, 5)
    kernel_TE, row_T, column_E = scores_TE.exp().numpy(), np.ones(40), np.ones(5)
    row_T = 1 / (kernel_TE @ column_E)
    for _ in range(7):
        column_E = (40 / 5) / (kernel_TE.T @ row_T)
        row_T = 1 / (kernel_TE @ column_E)
    want_TE = torch.from_numpy(row_T[:, None] * kernel_TE * column_E)
    torch.testing.assert_close(balanced(scores_TE, torch.ones(40).bool(), 7).exp(), want_TE)


def test_a_plan_of_great_scores_or_of_padding_alone_is_finite() -> None:
    mask_T = torch.ones(12).bool()
    assert bool(balanced(1e6 * draw(12, 4).float(), mask_T, 20).isfinite().all())
    assert bool(balanced(draw(12, 4).float(), ~mask_T, 20).isfinite().all())


@pytest.mark.parametrize("k", [1, 2])
def test_the_plan_chooses_in_training_and_the_logits_otherwise(k: int) -> None:
    router = make(SinkhornRouter, k=k)
    training, greedy = decide(router), decide(router, explore=False)
    logits_TE = greedy.logits_TE
    assert logits_TE is not None
    plan_TE = balanced(logits_TE, torch.ones(64).bool(), 20)
    assert torch.equal(training.expert_ids_R.view(-1, k).sort(1).values, plan_TE.topk(k).indices.sort(1).values)
    assert torch.equal(greedy.expert_ids_R.view(-1, k), logits_TE.topk(k).indices)
    want_TE = logits_TE.sigmoid() if k == 1 else logits_TE.softmax(1)  # Megatron-Core's
    ids_TK = training.expert_ids_R.view(-1, k)
    assert torch.equal(training.gates_R.view(-1, k), want_TE.gather(1, ids_TK))
    assert int(training.load_E().max()) < int(greedy.load_E().max())


# base


def best(scores_TE: Tensor, k: int) -> float:
    """The optimum of the linear program, by scipy."""
    tokens, experts = scores_TE.shape
    if k == 1:
        places = scores_TE.repeat_interleave(tokens // experts, dim=1).numpy()
        return float(places[linear_sum_assignment(places, maximize=True)].sum())
    rows = np.kron(np.eye(tokens), np.ones(experts)), np.kron(np.ones(tokens), np.eye(experts))
    equal = [k] * tokens + [k * tokens / experts] * experts
    return -float(linprog(-scores_TE.flatten().numpy(), A_eq=np.vstack(rows), b_eq=equal, bounds=(0, 1)).fun)


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(64, 4, 1), (256, 16, 1), (512, 16, 1), (48, 8, 2), (40, 8, 5)])
def test_base_comes_close_to_the_best_balanced_assignment(tokens: int, experts: int, k: int, skew: bool) -> None:
    scores_TE = skewed(tokens, experts) if skew else draw(tokens, experts)
    found, want = float((scores_TE * assign(scores_TE, k, 512, BaseRouter.Config().rounds)).sum()), best(scores_TE, k)
    assert want * (1 - 1e-3) < found < want + 1e-6


SCORES = {
    "skewed": skewed(1200, 8),
    "equal": torch.zeros(1200, 8),
    "all the same": draw(1, 8).expand(1200, 8),
    "two kinds": (torch.arange(1200)[:, None] + torch.arange(8)) % 2 * 1.0,
    "great": 1e6 * skewed(1200, 8).float(),
}


@pytest.mark.parametrize("rounds", [1, 20])
@pytest.mark.parametrize("scores", SCORES)
def test_base_is_exactly_balanced_whatever_the_scores(scores: str, rounds: int) -> None:
    """In every group of at most so many tokens, to 1 where they cannot be shared evenly; k different experts each."""
    for tokens, k, group in [(1200, 1, 512), (1200, 3, 400), (1199, 2, 512), (7, 1, 512), (1, 3, 512), (9, 8, 4)]:
        taken_TE = assign(SCORES[scores][:tokens], k, group, rounds)
        assert taken_TE.shape == (tokens, 8) and taken_TE.sum(1).tolist() == [k] * tokens
        groups = taken_TE.tensor_split(-(-tokens // group))
        for part_TE in groups:
            load_E = part_TE.sum(0)
            assert len(part_TE) <= group and int(load_E.max() - load_E.min()) == (len(part_TE) * k % 8 != 0)


@pytest.mark.parametrize("k", [1, 2])
def test_base_assigns_in_training_and_is_greedy_otherwise(k: int) -> None:
    router = make(BaseRouter, k=k, group=32)
    training, greedy = decide(router), decide(router, explore=False)
    assert training.load_E().tolist() == [8 * k] * 8 != greedy.load_E().tolist()
    logits_TE = greedy.logits_TE
    assert logits_TE is not None
    assert torch.equal(greedy.expert_ids_R.view(-1, k), logits_TE.topk(k).indices)
    for decision in (training, greedy):
        want_R = logits_TE[decision.token_ids_R, decision.expert_ids_R].sigmoid()
        assert torch.equal(decision.gates_R, want_R)
