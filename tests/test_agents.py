"""The agents beyond plain REINFORCE: leave-one-out and batch baselines, held layers, charges, actor-critic, credit,
bandit.

Shape suffixes: T tokens, D model width, M routing samples, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlroute import policies
from rlroute.agents.actor_critic import ActorCriticRouter
from rlroute.agents.bandit import BanditRouter
from rlroute.agents.credit import CreditRouter
from rlroute.agents.reinforce import ReinforceRouter
from rlroute.balance import overload_T
from rlroute.errors import ConfigError
from rlroute.learning import weighted
from rlroute.routing import Feedback, Router, RouterShape, RoutingContext
from rlroute.seeding import init_normal
from tests.conftest import sums_of
from tests.test_reinforce import (
    D,
    Draws,
    E,
    exact_gradient,
    inputs,
    losses,
    make_context,
    make_feedback,
    own_losses,
    probability,
)


def make(router: type[Router], k: int = 1, site_index: int = 0, num_sites: int = 1, **fields: Any) -> Any:
    shape = RouterShape(
        d_model=D, num_experts=E, k=k, site=1, vocab_size=7, seed=3, site_index=site_index, num_sites=num_sites
    )
    return router(router.Config(**fields), shape).double()


def sampled(tokens: int, samples: int, step: int = 0) -> RoutingContext:
    """The context of ``samples`` routing samples of the same tokens."""
    one = make_context(tokens, step=step)
    per_token = {n: getattr(one, n).repeat(samples) for n in ("token_ids_T", "position_T", "sequence_T", "mask_T")}
    return replace(one, **per_token, num_samples=samples)


def force(draws: Draws, context: RoutingContext) -> RoutingContext:
    return replace(context, choices={context.site: torch.tensor(draws)})


def expected_gradient(router: Any, x_TD: Tensor, loss_of: Callable[[Draws], Tensor], samples: int) -> Tensor:
    """The policy term's gradient in expectation over the draws of all samples, k = 1, from the router's own code."""
    context, tokens = sampled(len(x_TD), samples), len(x_TD)
    expected = torch.zeros((), dtype=x_TD.dtype)
    rows_TD = x_TD.repeat(samples, 1)
    logits_TE = (rows_TD @ router.scores.weight.T).detach()
    for chosen in product(range(E), repeat=len(rows_TD)):
        draws = tuple((expert,) for expert in chosen)
        chance = torch.stack([probability(z_E, draw) for z_E, draw in zip(logits_TE, draws, strict=True)]).prod()
        loss_MT = torch.stack([loss_of(draws[m * tokens : (m + 1) * tokens]) for m in range(samples)])
        feedback = Feedback(context=context, loss_MT=loss_MT, num_valid=tokens)
        expected = (
            expected + chance * router.objective(router(rows_TD, force(draws, context)), feedback)["policy"].value
        )
    return torch.autograd.grad(expected, router.scores.weight)[0]


def coupled_losses(draws: Draws) -> Tensor:
    """The second token's loss hangs on the first token's route too."""
    table_EE = losses(E * E).view(E, E)
    (first,), (second,) = draws
    return torch.stack([table_EE[first, 0], table_EE[first, second]])


def error_of(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).abs().max())


# Leave-one-out and batch baselines.


def test_leave_one_out_is_exact() -> None:
    router = make(ReinforceRouter, baseline="leave_one_out", discount=1.0, init_std=0.5)
    estimate = expected_gradient(router, inputs(2), coupled_losses, 2)
    assert error_of(estimate, exact_gradient(router, inputs(2), coupled_losses)) < 1e-10


def test_the_own_sample_in_the_baseline_shrinks_the_gradient_by_half() -> None:
    """The negative control, with its known bias: the mean over both samples takes half of what there is to learn."""
    router, x_TD = make(ReinforceRouter, baseline="leave_one_out", init_std=0.5), inputs(1)

    def with_own_sample(decision: Any, feedback: Feedback) -> Tensor:
        return (feedback.loss_MT.mean(0) - feedback.loss_MT).reshape(-1)

    router._advantage = with_own_sample
    estimate = expected_gradient(router, x_TD, own_losses(1, 1), 2)
    assert error_of(2 * estimate, exact_gradient(router, x_TD, own_losses(1, 1))) < 1e-10


def test_the_mean_of_the_other_tokens_is_unbiased_where_routes_do_not_reach_them() -> None:
    router, x_TD = make(ReinforceRouter, baseline="batch", init_std=0.5), inputs(2)
    estimate = expected_gradient(router, x_TD, own_losses(2, 1), 1)
    assert error_of(estimate, exact_gradient(router, x_TD, own_losses(2, 1))) < 1e-10
    router = make(ReinforceRouter, baseline="batch", discount=1.0, init_std=0.5)
    estimate = expected_gradient(router, x_TD, coupled_losses, 1)
    assert error_of(estimate, exact_gradient(router, x_TD, coupled_losses)) > 1e-3


def test_the_batch_mean_leaves_padding_out() -> None:
    router, context = make(ReinforceRouter, baseline="batch"), make_context(4)
    context = replace(context, mask_T=torch.tensor([True, True, False, True]))
    decision = router(inputs(4), context)
    loss_T = torch.tensor([1.0, 2.0, 50.0, 6.0], dtype=torch.float64)
    advantage_T = router._advantage(decision, make_feedback(loss_T, context))
    assert advantage_T[context.mask_T].tolist() == pytest.approx([3.0, 1.5, -4.5])


@pytest.mark.parametrize("fields", [{"baseline": "leave_one_out"}, {"resample": "one"}])
def test_what_needs_two_samples_asks_for_them_and_refuses_one(fields: dict[str, Any]) -> None:
    router = make(ReinforceRouter, **fields)
    assert router.num_samples == 2
    with pytest.raises(ConfigError, match=r"router reinforce\.samples = 1: legal are numbers from 2"):
        make(ReinforceRouter, samples=1, **fields)
    with pytest.raises(ConfigError, match="needs 2 routing samples: 1 was run"):
        router.objective(router(inputs(8), make_context(8)), make_feedback(losses(8)))


def test_more_samples_of_other_baselines_are_averaged() -> None:
    router = make(ReinforceRouter, baseline="none", samples=3)
    context, x_TD = sampled(8, 3), inputs(8).repeat(3, 1)
    feedback = Feedback(context=context, loss_MT=losses(24).view(3, 8), num_valid=8)
    decision = router(x_TD, context)
    want = (losses(24) * decision.token_sum(decision.log_prob_R)).sum() / 24
    assert float(router.objective(decision, feedback)["policy"].value.detach()) == pytest.approx(
        float(want.detach()), rel=1e-12
    )


# One layer resampled, the others held.


def test_one_layer_at_a_time_differs_between_samples_and_learns() -> None:
    x_TD = inputs(16).repeat(2, 1)
    for step in range(4):
        for index in range(2):
            router = make(
                ReinforceRouter,
                site_index=index,
                num_sites=2,
                resample="one",
                baseline="leave_one_out",
                init_std=0.5,
            )
            context = sampled(16, 2, step=step)
            decision = router(x_TD, context)
            first_T, second_T = decision.expert_ids_R.view(2, 16)
            feedback = Feedback(context=context, loss_MT=losses(32).view(2, 16), num_valid=16)
            policy = router.objective(decision, feedback)["policy"].value
            turn = step % 2 == index
            assert torch.equal(first_T, second_T) != turn
            assert bool(policy != 0) == turn


def test_a_held_layer_is_drawn_as_if_there_were_one_sample() -> None:
    held = make(ReinforceRouter, site_index=1, num_sites=2, resample="one", init_std=0.5)
    alone = make(ReinforceRouter, site_index=1, num_sites=2, init_std=0.5)
    rows_T = held(inputs(16).repeat(2, 1), sampled(16, 2)).expert_ids_R.view(2, 16)
    assert torch.equal(rows_T[0], alone(inputs(16), make_context(16)).expert_ids_R)


# The schedule and the charge.


def test_temperature_moves_in_a_line_and_stays() -> None:
    router = make(ReinforceRouter, temperature=2.0, final_temperature=0.5, temperature_steps=100)
    assert [router.config.temperature_at(step) for step in (0, 50, 100, 1000)] == [2.0, 1.25, 0.5, 0.5]
    assert make(ReinforceRouter, temperature=2.0).config.temperature_at(1000) == 2.0
    logits_TE = inputs(8) @ router.scores.weight.detach().T
    for step, temperature in ((0, 2.0), (100, 0.5)):
        decision = router(inputs(8), make_context(8, step=step))
        torch.testing.assert_close(decision.probs_TE, (logits_TE / temperature).softmax(1))


def test_full_experts_are_charged_for() -> None:
    router = make(ReinforceRouter, k=2, charge_weight=0.5)
    decision, feedback = router(inputs(8), make_context(8)), make_feedback(losses(8))
    over_E = E * decision.demand_E().double() / 16 - 1
    want_T = -losses(8) - 0.5 * over_E[decision.expert_ids_R].view(8, 2).mean(1)
    torch.testing.assert_close(policies.reward(decision, feedback, 0.5)[0], want_T)
    torch.testing.assert_close(policies.reward(decision, feedback, 0.0)[0], -losses(8))
    per_pair = float((over_E * decision.demand_E()).sum())
    assert per_pair >= 0 and float(overload_T(decision, feedback.context).sum() * 2) == pytest.approx(per_pair)


# Actor-critic.


def critic_with_values(router: Any) -> Any:
    init_normal(router.get_parameter("value.4.weight"), 1.0, "test")
    router.mean_reward.started.fill_(True)
    return router


def test_with_full_trace_the_actor_critic_is_exact_whatever_the_critic_says() -> None:
    router = critic_with_values(make(ActorCriticRouter, discount=1.0, trace=1.0, init_std=0.5, value_hidden=6))
    estimate = expected_gradient(router, inputs(2), coupled_losses, 1)
    assert error_of(estimate, exact_gradient(router, inputs(2), coupled_losses)) < 1e-10


def test_without_trace_the_critic_s_error_is_the_bias() -> None:
    router = critic_with_values(make(ActorCriticRouter, discount=1.0, trace=0.0, init_std=0.5, value_hidden=6))
    estimate = expected_gradient(router, inputs(2), coupled_losses, 1)
    assert error_of(estimate, exact_gradient(router, inputs(2), coupled_losses)) > 1e-3


def test_the_critic_learns_the_return() -> None:
    router = make(ActorCriticRouter, discount=0.9, trace=1.0, value_hidden=32)
    router.mean_reward.started.fill_(True)
    optimizer, x_TD = torch.optim.Adam(router.value.parameters(), lr=0.02), inputs(8)
    for _ in range(300):
        optimizer.zero_grad()
        router.objective(router(x_TD, make_context(8)), make_feedback(losses(8)))["value"].value.backward()
        optimizer.step()
    returns_T = torch.zeros(8, dtype=torch.float64)
    for token in reversed(range(8)):  # two sequences of four
        following = 0.9 * returns_T[token + 1] if token % 4 != 3 else 0.0
        returns_T[token] = -losses(8)[token] + following
    torch.testing.assert_close(router.value(x_TD)[:, 0].detach(), returns_T, rtol=0, atol=0.1)


# Credit.


def credit_gradient(router: CreditRouter, x_TD: Tensor, loss_of_gates: Callable[[Tensor, Draws], Tensor]) -> Tensor:
    """The gradient that runs from a loss through the gates, in expectation over all draws of one token, k = 2."""
    context, expected = make_context(1), torch.zeros_like(router.scores.weight)
    logits_E = (x_TD @ router.scores.weight.T).detach()[0]
    for draw in [(a, b) for a in range(E) for b in range(E) if a != b]:
        decision = router(x_TD, force((draw,), context))
        loss = loss_of_gates(decision.gates_R, (draw,))
        expected = expected + probability(logits_E, draw) * torch.autograd.grad(loss, router.scores.weight)[0].detach()
    return expected


COST_E = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)


def test_credit_is_exact_where_the_loss_is_linear_in_the_outputs() -> None:
    router, x_TD = make(CreditRouter, k=2, init_std=0.5), inputs(1)

    def linear(gates_R: Tensor, draws: Draws) -> Tensor:
        return (gates_R * COST_E[list(draws[0])]).sum()

    estimate = credit_gradient(router, x_TD, linear)
    exact = exact_gradient(router, x_TD, lambda draws: linear(torch.full((2,), 0.5).double(), draws)[None])
    assert error_of(estimate, exact) < 1e-10


def test_credit_is_first_order_where_it_is_not() -> None:
    router, x_TD = make(CreditRouter, k=2, init_std=0.5), inputs(1)

    def squared(gates_R: Tensor, draws: Draws) -> Tensor:
        return (gates_R * COST_E[list(draws[0])]).sum().square()

    estimate = credit_gradient(router, x_TD, squared)
    exact = exact_gradient(router, x_TD, lambda draws: squared(torch.full((2,), 0.5).double(), draws)[None])
    assert error_of(estimate, exact) > 1e-3


def test_credit_leaves_the_value_of_the_gates_alone() -> None:
    router = make(CreditRouter, k=2)
    sampled_R = router(inputs(8), make_context(8)).gates_R
    greedy_R = router(inputs(8), make_context(8, explore=False)).gates_R
    assert sampled_R.requires_grad and not greedy_R.requires_grad
    assert torch.allclose(sampled_R, torch.full_like(sampled_R, 0.5)) and bool((greedy_R == 0.5).all())


# The bandit.


def test_the_posterior_is_ridge_regression() -> None:
    router = make(BanditRouter, forget=0.0, ridge=2.0, features=3, charge_weight=0.0)
    x_TD, context = inputs(64), make_context(64)
    decision = router(x_TD, context)
    router.mean_reward.started.fill_(True)
    router.adapt(sums_of(router, decision, make_feedback(losses(64), context)), 0.0)
    features_TP = router._features(x_TD).numpy()
    for expert in range(E):
        rows = (decision.expert_ids_R == expert).numpy()
        gram = features_TP[rows].T @ features_TP[rows] + 2.0 * np.eye(4)
        moment = features_TP[rows].T @ -losses(64).numpy()[rows] + 2.0 * router.prior_EP[expert].numpy()
        np.testing.assert_allclose(router.mean_EP[expert].numpy(), np.linalg.solve(gram, moment), atol=1e-10)
        np.testing.assert_allclose(router.covariance_EPP[expert].numpy(), np.linalg.inv(gram), atol=1e-10)


def test_optimism_prefers_what_is_little_known() -> None:
    router = make(BanditRouter, exploration="optimism", width=5.0, init_std=0.0)
    router.covariance_EPP[2] *= 4
    assert bool((router(inputs(16), make_context(16)).expert_ids_R == 2).all())
    router.mean_EP[1, -1] = 1.0
    assert bool((router(inputs(16), make_context(16, explore=False)).expert_ids_R == 1).all())


# All of them learn.

LEARNERS = {
    "leave-one-out": (ReinforceRouter, {"baseline": "leave_one_out"}),
    "batch": (ReinforceRouter, {"baseline": "batch"}),
    "actor-critic": (ActorCriticRouter, {"discount": 0.0, "trace": 0.0}),
    "credit": (CreditRouter, {}),
    "thompson": (BanditRouter, {"charge_weight": 0.0}),
    "optimism": (BanditRouter, {"exploration": "optimism", "charge_weight": 0.0}),
}


@pytest.mark.parametrize(("kind", "fields"), LEARNERS.values(), ids=LEARNERS.keys())
@pytest.mark.parametrize("sign", [1, -1])
def test_agents_find_the_better_expert(kind: type[Router], fields: dict[str, Any], sign: int) -> None:
    """Two of four experts serve a token well, by the sign of a feature; with the loss negated they are the ones
    avoided.
    """
    router = make(kind, **fields)
    parameters = list(router.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.05) if parameters else None
    samples, x_TD = router.num_samples, inputs(128)
    good_T = (x_TD[:, 0] > 0).long()
    for step in range(150):
        context = sampled(128, samples, step=step)
        decision = router(x_TD.repeat(samples, 1), context)
        missed_T = (decision.expert_ids_R != good_T.repeat(samples)).double()
        loss_MT = (3.0 + sign * missed_T).view(samples, 128)
        feedback = Feedback(context=context, loss_MT=loss_MT, num_valid=128)
        through_gates = (decision.gates_R * sign * missed_T).mean()
        total = through_gates + weighted([router.objective(decision, feedback)])
        if optimizer:
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        router.adapt(sums_of(router, decision, feedback), 0.0)
    greedy_T = router(x_TD, make_context(128, explore=False)).expert_ids_R
    hit_rate = float((greedy_T == good_T).double().mean())
    assert hit_rate > 0.85 if sign == 1 else hit_rate < 0.15


BAD = [
    (ReinforceRouter, "resample", "some"),
    (ReinforceRouter, "samples", 0),
    (ReinforceRouter, "charge_weight", -1.0),
    (ReinforceRouter, "final_temperature", 0.0),
    (ActorCriticRouter, "trace", 1.5),
    (ActorCriticRouter, "discount", -0.1),
    (CreditRouter, "scale", 0.0),
    (CreditRouter, "temperature", -1.0),
    (BanditRouter, "exploration", "greedy"),
    (BanditRouter, "forget", 1.0),
    (BanditRouter, "features", 0),
    (BanditRouter, "width", -1.0),
]


@pytest.mark.parametrize(("kind", "field", "value"), BAD)
def test_bad_values_are_refused_by_name(kind: type[Router], field: str, value: Any) -> None:
    name = kind.Config.name
    with pytest.raises(ConfigError, match=rf"^router {name}\.{field} = '?{value}'?: "):
        make(kind, **{field: value})
