"""REINFORCE's gradient is exact: enumerated over all draws it equals the gradient of the expected loss, and wrong ones
do not.

Shape suffixes: T tokens, D model width, M routing samples, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute import policies
from rlroute.agents.reinforce import ReinforceRouter
from rlroute.errors import ConfigError
from rlroute.model.work import measure
from rlroute.routing import Feedback, RouterShape, RoutingContext, Sums, Term
from rlroute.sampling import plackett_luce_log_prob, top_k
from rlroute.seeding import init_normal
from tests.conftest import capped, sums_of, terms_of

D, E = 5, 4
Draws = tuple[tuple[int, ...], ...]
BASELINES = ["none", "ema", "value"]


def make_router(k: int = 2, **fields: Any) -> ReinforceRouter:
    shape = RouterShape(d_model=D, num_experts=E, k=k, site=1, vocab_size=7, seed=3)
    return ReinforceRouter(ReinforceRouter.Config(**{"init_std": 0.5, "value_hidden": 6, **fields}), shape).double()


def with_a_past(router: ReinforceRouter) -> ReinforceRouter:
    """Give the router a running mean and, where it has a value head, values other than 0."""
    router.adapt(Sums({"return": torch.tensor(-5.2), "tokens": torch.tensor(4)}, []), 0.0)
    if router.value is not None:
        init_normal(router.get_parameter("value.4.weight"), 1.0, "test")
    return router


def make_context(tokens: int, length: int = 4, step: int = 0, explore: bool = True) -> RoutingContext:
    rows = torch.arange(tokens)
    return RoutingContext(
        seed=0,
        site=1,
        step=step,
        token_ids_T=rows % 7,
        position_T=rows % length,
        sequence_T=rows // length,
        mask_T=torch.ones(tokens, dtype=torch.bool),
        explore=explore,
    )


def make_feedback(loss_T: Tensor, context: RoutingContext | None = None, num_valid: int | None = None) -> Feedback:
    context = context or make_context(len(loss_T))
    return Feedback(context=context, loss_MT=loss_T[None], num_valid=num_valid or len(loss_T))


def inputs(tokens: int) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def losses(tokens: int) -> Tensor:
    return 3 * torch.rand(tokens, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gradients(router: ReinforceRouter, terms: dict[str, Term], *names: str) -> dict[str, Tensor | None]:
    """Return the gradient of the named terms (of all by default), unweighted, by parameter."""
    router.zero_grad()
    sum(terms[name].value for name in names or terms).backward()  # type: ignore[union-attr]
    return {name: parameter.grad for name, parameter in router.named_parameters()}


# The exact gradient, by enumeration.


def probability(logits_E: Tensor, draw: tuple[int, ...]) -> Tensor:
    """The probability of an ordered draw by its definition: take one out, renormalise, take the next."""
    prob_E = logits_E.softmax(0)
    result = torch.ones((), dtype=logits_E.dtype)
    for position, expert in enumerate(draw):
        result = result * prob_E[expert] / (1 - prob_E[list(draw[:position])].sum())
    return result


def all_draws(router: ReinforceRouter, x_TD: Tensor) -> Iterator[tuple[Draws, Tensor]]:
    """Yield what the tokens can draw, with its probability."""
    logits_TE = x_TD @ router.scores.weight.T / router.config.temperature
    for draws in product(permutations(range(E), router.shape.k), repeat=len(x_TD)):
        yield draws, torch.stack([probability(z_E, draw) for z_E, draw in zip(logits_TE, draws, strict=True)]).prod()


def exact_gradient(router: ReinforceRouter, x_TD: Tensor, loss_of: Callable[[Draws], Tensor]) -> Tensor:
    """The gradient of the expected mean loss with respect to the score weights."""
    expected = torch.stack([chance * loss_of(draws).mean() for draws, chance in all_draws(router, x_TD)]).sum()
    return torch.autograd.grad(expected, router.scores.weight)[0]


def expected_surrogate_gradient(router: ReinforceRouter, x_TD: Tensor, loss_of: Callable[[Draws], Tensor]) -> Tensor:
    """The policy term's gradient in expectation over all draws, from the router's own forward and objective."""
    context, expected = make_context(len(x_TD)), torch.zeros((), dtype=x_TD.dtype)
    for draws, chance in all_draws(router, x_TD):
        forced = replace(context, choices={context.site: torch.tensor(draws)})
        terms = router.objective(router(x_TD, forced), make_feedback(loss_of(draws), context))
        expected = expected + chance.detach() * terms["policy"].value
    return torch.autograd.grad(expected, router.scores.weight)[0]


def own_losses(tokens: int, k: int) -> Callable[[Draws], Tensor]:
    """A table of losses in which a token's loss hangs on its own draw alone."""
    draws = list(permutations(range(E), k))
    table_TN = losses(tokens * len(draws)).view(tokens, -1)
    return lambda chosen: torch.stack([table_TN[t, draws.index(draw)] for t, draw in enumerate(chosen)])


@pytest.mark.parametrize(("k", "tokens"), [(1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("baseline", BASELINES)
def test_gradient_is_exact(baseline: str, k: int, tokens: int) -> None:
    router, x_TD = with_a_past(make_router(k, baseline=baseline, temperature=0.7)), inputs(tokens)
    loss_of = own_losses(tokens, k)
    estimate = expected_surrogate_gradient(router, x_TD, loss_of)
    assert float((estimate - exact_gradient(router, x_TD, loss_of)).abs().max()) < 1e-10


@pytest.mark.parametrize(("discount", "exact"), [(1.0, True), (0.0, False)])
def test_own_reward_is_biased_where_routes_change_later_losses_and_the_full_return_is_not(
    discount: float, exact: bool
) -> None:
    router, x_TD, table_EE = make_router(1, baseline="none", discount=discount), inputs(2), losses(E * E).view(E, E)

    def loss_of(draws: Draws) -> Tensor:
        (first,), (second,) = draws
        return torch.stack([table_EE[first, 0], table_EE[first, second]])

    estimate = expected_surrogate_gradient(router, x_TD, loss_of)
    error = float((estimate - exact_gradient(router, x_TD, loss_of)).abs().max())
    assert error < 1e-10 if exact else error > 1e-3


def attached(router: ReinforceRouter) -> Tensor:
    """Zero, with a gradient into the router: what a reward drags in that is not detached."""
    total = router.scores.weight.sum()
    return total - total.detach()


WRONG: dict[str, Callable[[ReinforceRouter], tuple[str, Callable[..., Tensor]]]] = {
    "sign": lambda _: ("own_token_reward", lambda loss_MT: loss_MT),
    "arg-max is not a sample": lambda router: (
        "plackett_luce_log_prob",
        lambda z_TE, _: plackett_luce_log_prob(z_TE, top_k(z_TE, router.shape.k)),
    ),
    "sum of log-softmax": lambda _: (
        "plackett_luce_log_prob",
        lambda z_TE, ids_TK: z_TE.log_softmax(1).gather(1, ids_TK),
    ),
    "reward not detached": lambda router: ("own_token_reward", lambda loss_MT: attached(router) - loss_MT),
    "baseline with the own reward in it": lambda _: ("own_token_reward", lambda loss_MT: loss_MT.mean() - loss_MT),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_estimators_fail_the_same_check(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    router, x_TD, loss_of = make_router(baseline="none"), inputs(2), own_losses(2, 2)
    monkeypatch.setattr(policies, *WRONG[mistake](router))
    estimate = expected_surrogate_gradient(router, x_TD, loss_of)
    assert float((estimate - exact_gradient(router, x_TD, loss_of)).abs().max()) > 1e-3


# What the gradient reaches, and what it does not.


def test_an_attached_loss_is_detached() -> None:
    router, x_TD = make_router(baseline="none"), inputs(8)
    decision = router(x_TD, make_context(8))
    clean = gradients(router, router.objective(decision, make_feedback(losses(8))), "policy")["scores.weight"]
    feedback = make_feedback(losses(8) + attached(router))
    dirty = gradients(router, router.objective(router(x_TD, make_context(8)), feedback), "policy")["scores.weight"]
    assert clean is not None and dirty is not None and torch.equal(clean, dirty)


def test_with_no_weight_nothing_reaches_the_router() -> None:
    router = with_a_past(make_router(policy_weight=0.0, value_weight=0.0, entropy_weight=0.0, balance_weight=0.0))
    decision = router(inputs(8), make_context(8))
    terms = terms_of(router, decision, make_feedback(losses(8)))
    outputs_R = torch.ones(16, dtype=torch.float64, requires_grad=True)
    loss = (decision.gates_R * outputs_R).sum()
    (loss + sum(term.weight * term.value for term in terms.values() if term.weight)).backward()
    assert set(terms) == {"policy", "value"} and outputs_R.grad is not None
    assert all(parameter.grad is None for parameter in router.parameters())


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_body_gets_no_gradient(baseline: str) -> None:
    router, x_TD = with_a_past(make_router(baseline=baseline)), inputs(8).requires_grad_()
    gradients(router, router.objective(router(x_TD, make_context(8)), make_feedback(losses(8))))
    assert x_TD.grad is None


def test_shape_body_lets_the_policy_but_never_the_value_head_into_the_body() -> None:
    router, x_TD = with_a_past(make_router(shape_body=True)), inputs(8).requires_grad_()
    gradients(router, router.objective(router(x_TD, make_context(8)), make_feedback(losses(8))), "value")
    assert x_TD.grad is None
    gradients(router, router.objective(router(x_TD, make_context(8)), make_feedback(losses(8))), "policy")
    assert x_TD.grad is not None and float(x_TD.grad.norm()) > 0


def test_policy_and_value_terms_move_their_own_parameters_alone() -> None:
    router = with_a_past(make_router(entropy_weight=0.1))
    terms = terms_of(router, router(inputs(8), make_context(8)), make_feedback(losses(8)))
    sum(terms[name].value for name in ("policy", "entropy", "balance")).backward()  # type: ignore[union-attr]
    moved = {name for name, parameter in router.named_parameters() if parameter.grad is not None}
    assert moved == {"scores.weight"}
    found = gradients(router, {"value": terms["value"]})
    assert {name for name, grad in found.items() if grad is not None} == set(found) - {"scores.weight"}


def test_a_forward_without_gradient_in_between_cuts_nothing() -> None:
    router, x_TD = with_a_past(make_router()), inputs(8)
    decision = router(x_TD, make_context(8))
    with torch.no_grad():
        router(x_TD, make_context(8, explore=False))
    grad = gradients(router, router.objective(decision, make_feedback(losses(8))), "policy")["scores.weight"]
    assert grad is not None and float(grad.norm()) > 0


def test_dropped_and_padded_tokens_do_not_count() -> None:
    router, context = with_a_past(make_router()), make_context(16)
    decision = capped(router(inputs(16), context), 5)
    out_T = ~decision.all_kept_T()
    assert out_T.any() and not out_T.all()

    def policy(loss_T: Tensor, mask_T: Tensor) -> float:
        feedback = make_feedback(loss_T, replace(context, mask_T=mask_T))
        return float(router.objective(decision, feedback)["policy"].value.detach())

    everything_T, some_T = torch.ones_like(out_T), torch.arange(16) != 3
    assert policy(losses(16), everything_T) == policy(losses(16) + 9 * out_T, everything_T)
    assert policy(losses(16), some_T) == policy(losses(16) + 9 * ~some_T, some_T)


def test_two_micro_batches_equal_one_batch_but_for_the_balance_loss() -> None:
    assert make_router().batch_dependent and not make_router(balance_weight=0.0).batch_dependent
    router = with_a_past(make_router(discount=0.5, entropy_weight=0.1))
    x_TD, loss_T, context = inputs(8), losses(8), make_context(8)

    def part(rows: slice) -> RoutingContext:
        keys = ("token_ids_T", "position_T", "sequence_T", "mask_T")
        return replace(context, **{name: getattr(context, name)[rows] for name in keys})

    def step(parts: list[slice]) -> tuple[dict[str, Tensor], Tensor]:
        totals = {name: torch.zeros_like(p) for name, p in router.named_parameters()}
        returns = torch.zeros((), dtype=x_TD.dtype)
        for rows in parts:
            decision, feedback = router(x_TD[rows], part(rows)), make_feedback(loss_T[rows], part(rows), num_valid=8)
            found = gradients(router, terms_of(router, decision, feedback), "policy", "value", "entropy")
            totals = {name: totals[name] + grad for name, grad in found.items() if grad is not None}
            returns = returns + router.observe(decision, feedback)["return"]
        return totals, returns

    torch.testing.assert_close(step([slice(0, 4), slice(4, 8)]), step([slice(0, 8)]), rtol=1e-12, atol=1e-14)


# Baselines.


def test_the_first_step_only_measures() -> None:
    for baseline in ("ema", "value"):
        router = make_router(baseline=baseline)
        terms = router.objective(router(inputs(8), make_context(8)), make_feedback(losses(8)))
        grad = gradients(router, terms, "policy")["scores.weight"]
        assert not terms["policy"].value.any() and grad is not None and not grad.any()


@pytest.mark.parametrize("baseline", ["ema", "value"])
def test_a_shift_of_all_rewards_changes_nothing(baseline: str) -> None:
    def policy_gradient(shift: float) -> Tensor:
        router, feedback = make_router(baseline=baseline), make_feedback(losses(8) + shift)
        router.adapt(sums_of(router, router(inputs(8), make_context(8)), feedback), 0.0)
        terms = router.objective(router(inputs(8), make_context(8, step=1)), feedback)
        grad = gradients(router, terms, "policy")["scores.weight"]
        assert grad is not None and float(grad.norm()) > 0
        return grad

    torch.testing.assert_close(policy_gradient(0.0), policy_gradient(7.0), rtol=1e-9, atol=1e-12)


def test_the_running_mean_starts_at_the_first_mean_and_moves_in_adapt_alone() -> None:
    router = make_router(ema_decay=0.9)
    for step, expected in enumerate([-2.0, 0.9 * -2.0 + 0.1 * -4.0]):
        loss_T = torch.full((8,), 2.0 + 2 * step, dtype=torch.float64)
        before = {name: value.clone() for name, value in router.state_dict().items()}
        decision = router(inputs(8), make_context(8, step=step))
        router.objective(decision, make_feedback(loss_T))
        sums = sums_of(router, decision, make_feedback(loss_T))
        assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
        router.adapt(sums, 0.0)
        assert float(router.mean_return.mean) == pytest.approx(expected, abs=1e-12)


def test_the_value_head_predicts_what_the_running_mean_leaves_over() -> None:
    router, x_TD = with_a_past(make_router(value_hidden=32)), inputs(16)
    head = router.value
    assert head is not None
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        router.objective(router(x_TD, make_context(16)), make_feedback(losses(16)))["value"].value.backward()
        optimizer.step()
    residual_T = -losses(16) - router.mean_return.mean
    torch.testing.assert_close(head(x_TD)[:, 0].detach(), residual_T, rtol=0, atol=0.1)


# The policy.


def test_exploring_draws_by_key_and_greedy_takes_the_most_probable() -> None:
    router, x_TD = make_router(), inputs(64)
    first, again = router(x_TD, make_context(64)), router(x_TD, make_context(64))
    other = router(x_TD, make_context(64, step=1))
    greedy = router(x_TD, make_context(64, explore=False))
    assert torch.equal(first.expert_ids_R, again.expert_ids_R)
    assert not torch.equal(first.expert_ids_R, other.expert_ids_R)
    assert greedy.probs_TE is not None and greedy.log_prob_R is None and not greedy.memo
    assert torch.equal(greedy.expert_ids_R.view(64, 2), top_k(greedy.probs_TE, 2))
    assert (first.gates_R == 0.5).all() and (greedy.gates_R == 0.5).all()


def test_temperature_sharpens_the_policy() -> None:
    x_TD, context = inputs(64), make_context(64)
    cold, hot = (make_router(1, temperature=t)(x_TD, context) for t in (0.1, 10.0))
    greedy = make_router(1)(x_TD, make_context(64, explore=False)).expert_ids_R
    agreement = [float((decision.expert_ids_R == greedy).double().mean()) for decision in (cold, hot)]
    assert agreement[0] > 0.8 and agreement[1] < 0.5
    assert torch.equal(cold.logits_TE, hot.logits_TE)


def test_the_entropy_term_is_minus_the_mean_entropy() -> None:
    router = make_router(entropy_weight=0.1)
    decision = router(inputs(8), make_context(8))
    entropy = terms_of(router, decision, make_feedback(losses(8)))["entropy"].value
    assert decision.probs_TE is not None
    torch.testing.assert_close(-entropy, torch.distributions.Categorical(decision.probs_TE).entropy().mean())


@pytest.mark.parametrize("flip", [False, True])
def test_it_finds_the_better_expert(flip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    router = make_router(1, baseline="ema", init_std=0.02)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    x_TD = inputs(128)
    best_T = (x_TD[:, 0] > 0).long()
    if flip:
        monkeypatch.setattr(policies, "own_token_reward", lambda loss_MT: loss_MT)
    for step in range(150):
        context = make_context(128, step=step)
        decision = router(x_TD, context)
        feedback = make_feedback(3.0 - (decision.expert_ids_R == best_T).double(), context)
        optimizer.zero_grad()
        router.objective(decision, feedback)["policy"].value.backward()
        optimizer.step()
        router.adapt(sums_of(router, decision, feedback), 0.0)
    greedy = router(x_TD, make_context(128, explore=False)).expert_ids_R
    hit_rate = float((greedy == best_T).double().mean())
    assert hit_rate < 0.1 if flip else hit_rate > 0.85


def test_initial_weights_come_from_keys() -> None:
    torch.manual_seed(0)
    one = make_router().state_dict()
    torch.manual_seed(1)
    two, plain = make_router().state_dict(), make_router(baseline="none").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(one["scores.weight"], plain["scores.weight"])
    assert not one["value.4.weight"].any() and one["value.0.weight"].any() and one["value.2.weight"].any()


def test_flops_of_the_value_head_are_training_only_and_differentiated_where_they_are() -> None:
    """Neither the scores nor the head's first layer pass a gradient on to the hidden states."""
    scores, head = 2 * D * E, (2 * D * 6, 2 * 6 * 6, 2 * 6)
    works = [measure(make_router(baseline=b)) for b in BASELINES]
    assert [work.greedy for work in works] == [scores] * 3
    assert [work.forward for work in works] == [scores, scores, scores + sum(head)]
    assert [work.training for work in works] == [2 * scores, 2 * scores, 2 * scores + 3 * sum(head) - head[0]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("baseline", "mean"),
        ("policy_weight", -0.1),
        ("value_weight", float("nan")),
        ("entropy_weight", -1.0),
        ("balance_weight", -1.0),
        ("init_std", -1.0),
        ("value_hidden", 0),
        ("temperature", 0.0),
        ("ema_decay", 1.0),
        ("discount", 1.1),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^router reinforce\.{field} = '?{value}'?: "):
        make_router(**{field: value})
