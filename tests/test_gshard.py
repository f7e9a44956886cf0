"""GShard: how often the second expert runs, its gates, and its places under local groups.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlroute.baselines.gshard import GShardRouter
from rlroute.config import ModelConfig
from rlroute.errors import ConfigError
from rlroute.model.capacity import limit
from rlroute.routing import RoutingDecision
from tests.conftest import D, draw, make_context, make_shape


def make(experts: int = 8, k: int = 2, init_std: float = 0.7) -> GShardRouter:
    return GShardRouter(GShardRouter.Config(init_std=init_std), make_shape(experts, k)).double()


def best_two(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Return the ids of the best two, and their shares of the two."""
    assert decision.probs_TE is not None
    best_TK = decision.probs_TE.detach().topk(2)
    return best_TK.indices, best_TK.values / best_TK.values.sum(1, keepdim=True)


def test_the_second_expert_runs_with_twice_its_gate() -> None:
    router, tokens, kinds = make(), 20_000, 5
    x_TD = draw(kinds, D, seed=4).repeat(tokens // kinds, 1)
    decision = router(x_TD, make_context(tokens))
    ids_TK, shares_TK = best_two(decision)
    got_TK, run_T = decision.expert_ids_R.view(-1, 2), decision.used_R.view(-1, 2)[:, 1]
    assert torch.equal(got_TK[:, 0], ids_TK[:, 0]) and torch.equal(got_TK[run_T, 1], ids_TK[run_T, 1])
    wanted = 2 * shares_TK[:kinds, 1]
    found = run_T.double().view(-1, kinds).mean(0)
    bound = 4.5 * (wanted * (1 - wanted) / (tokens // kinds)).sqrt()
    assert bool(((found - wanted).abs() < bound).all()) and float(wanted.min()) < 0.5 < 0.8 < float(wanted.max())
    assert int(decision.demand_E().sum()) == tokens + int(run_T.sum())


def test_equal_experts_both_run() -> None:
    decision = make(init_std=0.0)(draw(200, D), make_context(200))
    assert bool(decision.used_R.all()) and bool((decision.gates_R == 0.5).all())


def test_gates_are_over_the_best_two_whether_the_second_runs_or_not() -> None:
    router, x_TD = make(), draw(200, D)
    greedy, drawn = (router(x_TD, make_context(200, explore=explore)) for explore in (False, True))
    ids_TK, shares_TK = best_two(greedy)
    assert torch.equal(greedy.expert_ids_R, ids_TK.flatten())
    torch.testing.assert_close(greedy.gates_R.detach(), shares_TK.flatten())
    run_R = drawn.used_R
    assert 200 < int(run_R.sum()) < 400
    torch.testing.assert_close(drawn.gates_R.detach(), shares_TK.flatten() * run_R)
    again = router(x_TD, make_context(200, explore=False, choices={1: drawn.expert_ids_R.view(-1, 2)}))
    assert torch.equal(again.gates_R, drawn.gates_R), "what is replayed has the gates that it had"


def test_a_second_expert_that_is_forced_to_be_first_keeps_its_share() -> None:
    router, x_TD = make(), draw(50, D)
    context = make_context(50, explore=False)
    ids_TK, shares_TK = best_two(router(x_TD, context))
    forced_TK = torch.stack([ids_TK[:, 1], torch.full((50,), 8)], dim=1)
    got = router(x_TD, replace(context, choices={1: forced_TK}))
    torch.testing.assert_close(got.gates_R.view(-1, 2)[:, 0].detach(), shares_TK[:, 1])


def test_a_single_expert_is_that_of_a_plain_softmax() -> None:
    router = make(k=1)
    decision = router(draw(50, D), make_context(50))
    assert not router.stochastic and decision.probs_TE is not None
    torch.testing.assert_close(decision.gates_R, decision.probs_TE.max(1).values)


@pytest.mark.parametrize("groups", [1, 4])
def test_local_groups_have_places_of_their_own_and_first_choices_come_first(groups: int) -> None:
    tokens, experts = 64, 4
    context = make_context(tokens, length=tokens)
    decision = make(experts)(draw(tokens, D) + 1, context)
    kept = limit(decision, ModelConfig(num_experts=experts, capacity_factor=1.0, capacity_groups=groups), context)
    places = 2 * tokens // groups // experts
    kept_GTK = kept.kept_R.view(groups, -1, 2)
    ids_GTK = decision.expert_ids_R.view(groups, -1, 2)
    assert int(kept.kept_R.sum()) < int(decision.used_R.sum())
    for kept_TK, ids_TK in zip(kept_GTK, ids_GTK, strict=True):
        for expert in range(experts):
            first, second = (int((ids_TK[:, slot] == expert).sum()) for slot in (0, 1))
            ran = [int(((ids_TK[:, slot] == expert) & kept_TK[:, slot]).sum()) for slot in (0, 1)]
            assert ran == [min(first, places), min(second, places - min(first, places))]


def test_a_third_expert_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="router gshard: k = 3: legal are 1 and 2"):
        make(k=3)
