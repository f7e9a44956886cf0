"""Balance and stability losses: their values at known loads, what their gradients run through, and what must not count.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlroute.balance import cv_squared, device_balance, entropy_T, load_balance, router_z, sequence_balance
from rlroute.routing import RoutingContext, RoutingDecision
from tests.conftest import capped, draw, make_context


def choose(ids_TK: Tensor, experts: int) -> RoutingDecision:
    return RoutingDecision.token_choice(ids_TK, torch.ones(ids_TK.shape, dtype=torch.float64), experts)


def make_random(tokens: int = 12, experts: int = 4, k: int = 2) -> tuple[Tensor, RoutingDecision]:
    """Probabilities and the top-k choice of other scores, so that the two are not tied to one another."""
    ids_TK = draw(tokens, experts, seed=1).argsort(1)[:, :k]
    return draw(tokens, experts, seed=2).softmax(1).requires_grad_(), choose(ids_TK, experts)


def by_hand(probs_TE: Tensor, decision: RoutingDecision, tokens: list[int]) -> float:
    """E * sum_i f_i P_i over the listed tokens, by its definition."""
    ids_TK = decision.expert_ids_R.view(decision.num_tokens, -1)[tokens]
    total = 0.0
    for expert in range(decision.num_experts):
        chosen = float((ids_TK == expert).sum()) / ids_TK.numel()
        total += chosen * float(probs_TE[tokens, expert].detach().mean())
    return decision.num_experts * total


# The f.P loss


@pytest.mark.parametrize("k", [1, 2, 4])
def test_perfect_balance_costs_one_for_every_k(k: int) -> None:
    ids_TK = (torch.arange(8)[:, None] + torch.arange(k)) % 4
    assert load_balance(torch.full((8, 4), 0.25), choose(ids_TK, 4), make_context(8)) == pytest.approx(1.0)


@pytest.mark.parametrize(("k", "cost"), [(1, 8.0), (2, 4.0), (4, 2.0)])
def test_total_collapse_costs_experts_over_k(k: int, cost: float) -> None:
    probs_TE = torch.where(torch.arange(8) < k, 1 / k, 0.0).expand(12, 8)
    assert load_balance(probs_TE, choose(torch.arange(k).expand(12, k), 8), make_context()) == pytest.approx(cost)


def test_balance_by_device_is_that_of_experts_merged_by_device() -> None:
    probs_TE, decision = make_random(experts=6)
    device_E = torch.tensor([2, 0, 1, 1, 0, 2])
    value = device_balance(probs_TE, decision, replace(make_context(), expert_device_E=device_E))
    merged_TG = probs_TE.new_zeros(12, 3).index_add(1, device_E, probs_TE)
    same = choose(device_E[decision.expert_ids_R].view(12, 2), 3)
    expected = by_hand(merged_TG, same, list(range(12)))
    assert float(value.detach()) == pytest.approx(expected, abs=1e-12)
    (gradient_TE,) = torch.autograd.grad(value, probs_TE)
    assert torch.equal(gradient_TE[:, [0, 1, 2]], gradient_TE[:, [5, 4, 3]]) and gradient_TE.abs().max() > 0


def test_one_device_is_always_in_balance() -> None:
    probs_TE, decision = make_random()
    assert device_balance(probs_TE, decision, make_context()) == 1
    alone = device_balance(
        probs_TE, decision, replace(make_context(), expert_device_E=torch.zeros(4, dtype=torch.long))
    )
    (gradient_TE,) = torch.autograd.grad(alone, probs_TE)
    assert float(alone.detach()) == pytest.approx(1.0) and torch.equal(gradient_TE, gradient_TE[0, 0].expand(12, 4))


def test_value_and_gradient_are_those_of_the_definition() -> None:
    probs_TE, decision = make_random()
    value = load_balance(probs_TE, decision, make_context())
    assert float(value.detach()) == pytest.approx(by_hand(probs_TE, decision, list(range(12))), abs=1e-12)
    (gradient_TE,) = torch.autograd.grad(value, probs_TE)
    fractions_E = decision.demand_E() / decision.demand_E().sum()
    torch.testing.assert_close(gradient_TE, (4 * fractions_E / 12).expand(12, 4).double(), rtol=1e-6, atol=0)


def test_padding_does_not_count() -> None:
    probs_TE, decision = make_random()
    mask_T = torch.arange(12) % 4 != 3
    value = load_balance(probs_TE, decision, make_context(mask_T=mask_T))
    assert float(value.detach()) == pytest.approx(
        by_hand(probs_TE, decision, mask_T.nonzero()[:, 0].tolist()), abs=1e-12
    )
    (gradient_TE,) = torch.autograd.grad(value, probs_TE)
    assert not gradient_TE[~mask_T].any() and bool(gradient_TE[mask_T].all())


def test_drops_do_not_hide_an_imbalance() -> None:
    probs_TE = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(12, 4)
    decision = choose(torch.tensor([0] * 9 + [1, 2, 3])[:, None], 4)
    dropped = capped(decision, 1)
    assert dropped.load_E().tolist() == [1, 1, 1, 1]  # counted after drops this would be perfect balance
    for one in (decision, dropped):
        assert load_balance(probs_TE, one, make_context()) == pytest.approx(4 * (0.75 * 0.7 + 0.25 * 0.1))


def test_layers_pooled_hide_a_collapse_that_each_layer_shows() -> None:
    collapsed = [choose(torch.full((12, 1), expert), 4) for expert in range(4)]
    probs = [torch.eye(4)[expert].expand(12, 4) for expert in range(4)]
    assert all(load_balance(p, d, make_context()) == 4 for p, d in zip(probs, collapsed, strict=True))
    pooled = choose(torch.arange(4).repeat_interleave(12)[:, None], 4)
    assert load_balance(torch.cat(probs), pooled, make_context(48)) == 1


def test_a_scope_of_two_ranks_equals_one_batch() -> None:
    probs_TE, decision = make_random()
    whole = load_balance(probs_TE, decision, make_context())
    (want_TE,) = torch.autograd.grad(whole, probs_TE)
    parts = [slice(0, 4), slice(4, 12)]
    ranks = [choose(decision.expert_ids_R.view(12, 2)[rows], 4) for rows in parts]
    sums = [[d.demand_E().double(), probs_TE.detach()[r].sum(0)] for d, r in zip(ranks, parts, strict=True)]
    for rank, rows in enumerate(parts):
        others = iter(sums[1 - rank])  # demand is summed first, then probability mass
        context = make_context(ranks[rank].num_tokens, sum_over_scope=lambda x, others=others: x + next(others))
        value = load_balance(probs_TE[rows], ranks[rank], context)
        assert float(value.detach()) == pytest.approx(float(whole.detach()), abs=1e-12)
        torch.testing.assert_close(torch.autograd.grad(value, probs_TE)[0][rows], want_TE[rows])


# The sequence-wise loss


def rows_of(context: RoutingContext) -> list[list[int]]:
    """The valid rows of each sequence of each sample."""
    keys = list(zip(context.sample_T.tolist(), context.sequence_T.tolist(), strict=True))
    valid = context.mask_T.tolist()
    return [[t for t, key in enumerate(keys) if key == which and valid[t]] for which in sorted(set(keys))]


SEQUENCES = {
    "adjacent": make_context(),
    "interleaved": make_context(sequence_T=torch.tensor([9, 3, 7] * 4)),
    "padded": make_context(mask_T=torch.arange(12) < 10),
    "one all padding": make_context(mask_T=torch.arange(12) < 8),
    "two samples": make_context(6, length=3, samples=2),
}


@pytest.mark.parametrize("context", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_sequence_balance_is_the_weighted_mean_over_sequences(context: RoutingContext) -> None:
    probs_TE, decision = make_random()
    costs = [(len(rows), by_hand(probs_TE, decision, rows)) for rows in rows_of(context) if rows]
    want = sum(count * cost for count, cost in costs) / sum(count for count, _ in costs)
    value = sequence_balance(probs_TE, decision, context)
    assert float(value.detach()) == pytest.approx(want, abs=1e-12)
    assert bool(torch.autograd.grad(value, probs_TE)[0].isfinite().all())


def test_sequence_balance_sees_what_the_batch_evens_out() -> None:
    ids_TK = torch.arange(12)[:, None] // 4  # each sequence goes to an expert of its own
    probs_TE = torch.eye(3)[ids_TK[:, 0]]
    assert load_balance(probs_TE, choose(ids_TK, 3), make_context()) == pytest.approx(1.0)
    assert sequence_balance(probs_TE, choose(ids_TK, 3), make_context()) == pytest.approx(3.0)


def test_unused_slots_and_drops_do_not_count_in_sequences() -> None:
    probs_TE, decision = make_random()
    padded_TK = torch.cat([decision.expert_ids_R.view(12, 2), torch.full((12, 1), 4)], 1)
    spare = choose(padded_TK, 4)
    want = sequence_balance(probs_TE, decision, make_context())
    for other in (spare, replace(spare, k=None), capped(decision, 2)):
        torch.testing.assert_close(sequence_balance(probs_TE, other, make_context()), want)


# The others


def test_router_z_is_the_squared_log_partition() -> None:
    assert router_z(torch.zeros(3, 8)).tolist() == pytest.approx([math.log(8) ** 2] * 3)
    assert float(router_z(torch.full((1, 8), 1000.0))) == pytest.approx((1000 + math.log(8)) ** 2)
    assert torch.autograd.gradcheck(router_z, (draw(3, 4).requires_grad_(),))


def test_cv_squared_is_variance_over_squared_mean_at_any_scale() -> None:
    values_E = draw(16).abs()
    want = float(np.var(values_E.numpy()) / np.mean(values_E.numpy()) ** 2)
    assert float(cv_squared(values_E)) == pytest.approx(want) == pytest.approx(float(cv_squared(1000 * values_E)))


@pytest.mark.parametrize("level", [0.0, 1.0, 37.0])
def test_cv_squared_has_a_gradient_of_zero_at_perfect_balance(level: float) -> None:
    values_E = torch.full((8,), level, requires_grad=True)
    value = cv_squared(values_E)
    value.backward()
    assert value == 0 and values_E.grad is not None and not values_E.grad.any()


def test_entropy_in_nats() -> None:
    probs_TE = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert entropy_T(probs_TE).tolist() == pytest.approx([math.log(4), 0.0, math.log(2)])
