"""What each baseline does beyond the contract: its paper's formulas, by hand or by simulation.

Shape suffixes: T tokens, D model width, V vocabulary, E experts, K experts per token.
"""

import math
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.balance import cv_squared, load_balance, router_z, sequence_balance
from rlroute.baselines.bias_balanced import BiasBalancedRouter
from rlroute.baselines.noisy_topk import NoisyTopKRouter
from rlroute.baselines.soft import SoftRouter
from rlroute.baselines.switch import SwitchRouter
from rlroute.baselines.unbalanced import UnbalancedRouter
from rlroute.baselines.uniform import UniformRouter
from rlroute.errors import ConfigError
from rlroute.experiments.laws.steps import gates_TE
from rlroute.routing import Router, RoutingDecision, Sums
from rlroute.seeding import init_normal
from tests.conftest import D, draw, make_context, make_feedback, make_shape, sums_of, terms_of

R = TypeVar("R", bound=Router)


def make(router: type[R], experts: int = 8, k: int = 2, shape: dict[str, Any] | None = None, **config: Any) -> R:
    return router(router.Config(**config), make_shape(experts, k, **(shape or {}))).double()


def decide(router: Router, tokens: int = 12, explore: bool = True, **context: Any) -> RoutingDecision:
    return router(draw(tokens, D), make_context(tokens, explore=explore, **context))


def in_columns(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Return ids_TK and gates_TK."""
    assert decision.k is not None
    return decision.expert_ids_R.view(-1, decision.k), decision.gates_R.detach().view(-1, decision.k)


def scores_of(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Return logits_TE and probs_TE."""
    assert decision.logits_TE is not None and decision.probs_TE is not None
    return decision.logits_TE.detach(), decision.probs_TE.detach()


# switch and unbalanced


@pytest.mark.parametrize("router", [SwitchRouter, UnbalancedRouter])
@pytest.mark.parametrize(("k", "normalize"), [(1, True), (1, False), (2, True), (2, False)])
def test_softmax_gates(router: type[Router], k: int, normalize: bool) -> None:
    decision = decide(make(router, k=k, normalize=normalize))
    ids_TK, gates_TK = in_columns(decision)
    _, probs_TE = scores_of(decision)
    want_TK, want_ids_TK = probs_TE.topk(k)
    if normalize and k > 1:  # a single gate is never normalised: it would be 1 for good
        want_TK = want_TK / want_TK.sum(1, keepdim=True)
    assert torch.equal(ids_TK, want_ids_TK)
    torch.testing.assert_close(gates_TK, want_TK)


def test_unbalanced_is_switch_without_what_balances() -> None:
    switch, control = make(SwitchRouter), make(UnbalancedRouter)
    a, b = decide(switch), decide(control)
    assert torch.equal(a.expert_ids_R, b.expert_ids_R) and torch.equal(a.gates_R, b.gates_R)
    assert terms_of(switch, a, make_feedback(make_context()))
    assert not terms_of(control, b, make_feedback(make_context()))


def test_switch_terms() -> None:
    router, context = make(SwitchRouter, balance_weight=0.3, z_weight=0.2), make_context()
    decision = decide(router)
    logits_TE, probs_TE = scores_of(decision)
    terms = terms_of(router, decision, make_feedback(context, num_valid=48))  # a quarter of the step
    assert {name: term.weight for name, term in terms.items()} == {"balance": 0.3, "z": 0.2}
    assert float(terms["balance"].value.detach()) == pytest.approx(float(load_balance(probs_TE, decision, context)) / 4)
    assert float(terms["z"].value.detach()) == pytest.approx(float(router_z(logits_TE).mean()) / 4)


def test_jitter_is_bounded_and_only_in_training() -> None:
    router, plain = make(SwitchRouter, jitter=0.1), make(SwitchRouter)
    torch.nn.init.eye_(router.scores.weight)
    torch.nn.init.eye_(plain.scores.weight)
    jittered_TE, clean_TE = scores_of(decide(router))[0][:, :D], scores_of(decide(plain))[0][:, :D]
    ratio_TE = jittered_TE / clean_TE  # with the identity as weights, logits are inputs
    assert float(ratio_TE.min()) < 0.95 and float(ratio_TE.max()) > 1.05
    assert bool((ratio_TE > 0.9 - 1e-9).all()) and bool((ratio_TE < 1.1 + 1e-9).all())
    assert torch.equal(scores_of(decide(router, explore=False))[0][:, :D], clean_TE)


# noisy_topk


def trained_noisy(k: int, experts: int = 5) -> NoisyTopKRouter:
    router = make(NoisyTopKRouter, experts=experts, k=k)
    for name, parameter in router.named_parameters():
        init_normal(parameter, 0.5, "test", name)
    return router


def test_noise_alone_chooses_at_first() -> None:
    router = make(NoisyTopKRouter)
    assert all(not parameter.any() for parameter in router.parameters())
    loads_E = decide(router, tokens=4096).demand_E()
    assert float(metrics.max_vio(loads_E)) < 0.15
    torch.testing.assert_close(
        router(draw(9, D), make_context(9)).memo["std_TE"], torch.full((9, 8), math.log(2)).double()
    )


@pytest.mark.parametrize("k", [2, 3])
def test_gates_are_the_softmax_of_the_chosen_noisy_logits(k: int) -> None:
    router = trained_noisy(k)
    for explore in (True, False):
        decision = decide(router, explore=explore)
        scores_TE = decision.memo["noisy_TE"].detach() if explore else scores_of(decision)[0]
        ids_TK, gates_TK = in_columns(decision)
        largest_TK, want_TK = scores_TE.topk(k)
        assert torch.equal(ids_TK, want_TK)
        torch.testing.assert_close(gates_TK, largest_TK.softmax(1))


def test_a_single_noisy_gate_is_not_constant() -> None:
    _, gates_TK = in_columns(decide(trained_noisy(1)))
    assert bool((gates_TK < 1).all()) and float(gates_TK.std()) > 0


def chosen_probability(noisy_E: list[float], clean_E: list[float], std_E: list[float], expert: int, k: int) -> float:
    """P(x, i) by its definition: the normal distribution at the k-th largest noisy logit of the others."""
    others = sorted((value for i, value in enumerate(noisy_E) if i != expert), reverse=True)
    z = (clean_E[expert] - others[k - 1]) / std_E[expert]
    return 0.5 * math.erfc(-z / math.sqrt(2))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_importance_and_load_losses_are_those_of_the_paper(k: int) -> None:
    router, context = trained_noisy(k), make_context()
    decision = decide(router)
    ids_TK, gates_TK = in_columns(decision)
    parts = (decision.memo["noisy_TE"], scores_of(decision)[0], decision.memo["std_TE"])
    probability_TE = [
        [chosen_probability(noisy_E, clean_E, std_E, expert, k) for expert in range(5)]
        for noisy_E, clean_E, std_E in zip(*(part.tolist() for part in parts), strict=True)
    ]
    load_E = torch.tensor(probability_TE, dtype=torch.float64).sum(0)
    importance_E = torch.zeros(12, 5).double().scatter(1, ids_TK, gates_TK).sum(0)
    terms = terms_of(
        router, decision, make_feedback(context, num_valid=48)
    )  # this micro-batch is a quarter of the step
    assert {name: term.weight for name, term in terms.items()} == {"importance": 0.1, "load": 0.1}
    for name, values_E in {"importance": importance_E, "load": load_E}.items():
        assert float(terms[name].value.detach()) == pytest.approx(float(cv_squared(values_E)) / 4, rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_the_smooth_load_is_unbiased(k: int) -> None:
    """Over the draws of the others' noise, the mean of P(x, i) is the chance that i is chosen."""
    router, tokens = trained_noisy(k), 20_000
    decision = router(draw(1, D).expand(tokens, -1), make_context(tokens))
    chosen_E = decision.demand_E() / tokens
    error_E = (router.chosen_probability(decision).mean(0) - chosen_E).abs()
    assert bool((error_E < 4.5 * (0.25 / tokens) ** 0.5).all())
    assert k == 5 or float(chosen_E.max() - chosen_E.min()) > 0.1


# bias_balanced


def test_the_bias_moves_the_choice_and_never_the_gate() -> None:
    router = make(BiasBalancedRouter)
    router.bias_E[3] = 100.0
    decision = decide(router)
    ids_TK, gates_TK = in_columns(decision)
    assert bool((ids_TK[:, 0] == 3).all())
    scores_TK = scores_of(decision)[0].sigmoid().gather(1, ids_TK)
    torch.testing.assert_close(gates_TK, scores_TK / scores_TK.sum(1, keepdim=True))
    assert not router.bias_E.requires_grad and "bias_E" in router.state_dict()


def test_a_bias_below_all_scores_forbids_nothing() -> None:
    router = make(BiasBalancedRouter)
    free = decide(router)
    router.bias_E -= 50.0
    assert torch.equal(decide(router).expert_ids_R, free.expert_ids_R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_whose_sigmoids_all_underflow_has_a_finite_gradient(dtype: torch.dtype) -> None:
    router = make(BiasBalancedRouter).to(dtype)
    torch.nn.init.constant_(router.scores.weight, -1.0)
    decision = router(torch.full((3, D), 1000.0, dtype=dtype), make_context(3))
    (decision.gates_R * torch.arange(6)).sum().backward()
    assert not decision.gates_R.any() and router.scores.weight.grad is not None
    assert bool(router.scores.weight.grad.isfinite().all())


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_single_gate_is_the_score_itself(scale: float) -> None:
    decision = decide(make(BiasBalancedRouter, k=1, route_scale=scale))
    ids_TK, gates_TK = in_columns(decision)
    torch.testing.assert_close(gates_TK, scale * scores_of(decision)[0].sigmoid().gather(1, ids_TK))


def test_a_bias_moves_by_the_rate_towards_the_mean() -> None:
    router = make(BiasBalancedRouter, experts=4, update_rate=0.25)
    router.adapt(Sums({"demand_E": torch.tensor([9, 3, 6, 6]), "load_E": torch.tensor([3, 9, 3, 3])}, []), 0.0)
    assert router.bias_E.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.adapt(Sums({"demand_E": torch.tensor([9, 3, 7, 5])}, []), 0.0)
    assert router.bias_E.tolist() == [-0.5, 0.5, -0.25, 0.25]


SMEBU_MEAN = sum(math.tanh(2 * v) for v in (-1, 2 / 3, 1 / 3, 0)) / 4


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        ("sign", [-0.5, 0.5, 0.5, 0.0]),
        ("centred", [-0.625, 0.375, 0.375, -0.125]),
        ("magnitude", [-0.5, 1 / 3, 1 / 6, 0.0]),
        ("smebu", [0.25 * (math.tanh(2 * v) - SMEBU_MEAN) for v in (-1, 2 / 3, 1 / 3, 0)]),
    ],
)
def test_the_step_of_each_rule_is_that_of_its_definition(rule: str, steps: list[float]) -> None:
    """None hangs on the size of the batch, and where nothing was chosen, none moves."""
    for batch in (1, 1000):
        router = make(BiasBalancedRouter, experts=4, update_rate=0.5, rule=rule)
        router.adapt(Sums({"demand_E": batch * torch.tensor([12, 2, 4, 6])}, []), 0.0)
        assert router.bias_E.tolist() == pytest.approx(steps)
    router = make(BiasBalancedRouter, experts=4, rule=rule)
    router.adapt(Sums({"demand_E": torch.zeros(4, dtype=torch.int64)}, []), 0.0)
    assert router.bias_E.tolist() == [0.0] * 4


def test_smebu_adds_a_moving_average_of_clamped_steps() -> None:
    router = make(BiasBalancedRouter, experts=4, update_rate=0.5, rule="smebu", kappa=3.0, momentum=0.75)
    bias, moving = [0.0] * 4, [0.0] * 4
    for demand in ([12, 2, 4, 6], [0, 0, 0, 8], [3, 3, 3, 3]):
        mean = sum(demand) / 4
        clamped = [0.5 * math.tanh(3 * (mean - n) / mean) for n in demand]
        moving = [0.75 * m + 0.25 * (d - sum(clamped) / 4) for m, d in zip(moving, clamped, strict=True)]
        bias = [b + m for b, m in zip(bias, moving, strict=True)]
        router.adapt(Sums({"demand_E": torch.tensor(demand)}, []), 0.0)
        assert router.bias_E.tolist() == pytest.approx(bias)
    assert "step_E" in router.state_dict() and make(BiasBalancedRouter).step_E is None


def test_biases_stay_after_their_share_of_the_budget() -> None:
    moved = []
    for until, progress in ((1.0, 0.99), (0.5, 0.49), (0.5, 0.5), (0.5, 0.51), (0.0, 0.0)):
        router = make(BiasBalancedRouter, until=until)
        router.adapt(Sums({"demand_E": torch.arange(8)}, []), progress)
        moved.append(bool(router.bias_E.any()))
    assert moved == [True, True, False, False, False]


@pytest.mark.parametrize("rule", ["sign", "magnitude", "centred", "smebu"])
def test_the_bias_alone_balances_collapsed_scores(rule: str) -> None:
    router, x_TD, context = (
        make(BiasBalancedRouter, update_rate=0.01, init_std=0.3, rule=rule),
        draw(512, D) + 2,
        make_context(512),
    )
    loads = []
    for _ in range(150):
        decision = router(x_TD, context)
        loads.append(decision.demand_E())
        router.adapt(sums_of(router, decision, make_feedback(context)), 0.0)
    assert float(metrics.max_vio(loads[0])) > 1.5 and float(metrics.max_vio(loads[-1])) < 0.3
    assert int(metrics.dead_experts(loads[0])) > 0 and int(metrics.dead_experts(loads[-1])) == 0


def test_the_sequence_wise_loss_is_there_where_it_has_a_weight() -> None:
    context = make_context()
    router = make(BiasBalancedRouter, sequence_balance_weight=1e-4)
    decision = decide(router)
    (term,) = terms_of(router, decision, make_feedback(context, num_valid=24)).values()
    assert float(term.value.detach()) == pytest.approx(
        float(sequence_balance(scores_of(decision)[1], decision, context)) / 2
    )
    assert term.weight == 1e-4 and not terms_of(make(BiasBalancedRouter), decision, make_feedback(context))


# soft


@pytest.mark.parametrize("k", [1, 2, 8])
def test_every_token_runs_every_expert_whatever_k(k: int) -> None:
    router = make(SoftRouter, k=k)
    decision = decide(router)
    assert decision.k == 8 and torch.equal(decision.expert_ids_R, decide(make(SoftRouter, k=3)).expert_ids_R)
    torch.testing.assert_close(gates_TE(decision), scores_of(decision)[1], rtol=0, atol=0)
    counted = sums_of(router, decision, make_feedback(make_context()))
    assert counted["demand_E"].tolist() == counted["load_E"].tolist() == [12] * 8 and int(counted["without"]) == 0


# uniform


def test_uniform_routing_sees_nothing_and_spreads_evenly() -> None:
    router, tokens = make(UniformRouter), 8000
    decision = decide(router, tokens)
    assert torch.equal(router(draw(tokens, D, seed=7), make_context(tokens)).expert_ids_R, decision.expert_ids_R)
    fair = tokens * 2 / 8
    chi_square = float(((decision.demand_E() - fair) ** 2 / fair).sum())
    assert chi_square < 24.3  # the 99.9 % quantile at 7 degrees of freedom; draws without replacement spread less
    for other in (decide(router, tokens, step=1), decide(router, tokens, site=2), decide(router, tokens, seed=1)):
        assert float(metrics.overlap(decision, other)) == pytest.approx(2 / 8, abs=0.02)


@pytest.mark.parametrize(
    ("router", "config", "message"),
    [
        (SwitchRouter, {"jitter": 1.0}, r"switch\.jitter = 1\.0: legal are numbers from 0 to below 1"),
        (SwitchRouter, {"z_weight": -1.0}, r"switch\.z_weight = -1\.0: legal are numbers from 0"),
        (UnbalancedRouter, {"init_std": math.nan}, r"unbalanced\.init_std = nan: legal are numbers from 0"),
        (NoisyTopKRouter, {"load_weight": -0.1}, r"noisy_topk\.load_weight = -0\.1: legal are numbers from 0"),
        (BiasBalancedRouter, {"update_rate": -1.0}, r"bias_balanced\.update_rate = -1\.0: legal are numbers from 0"),
        (BiasBalancedRouter, {"route_scale": 0.0}, r"bias_balanced\.route_scale = 0\.0: legal are numbers above 0"),
        (BiasBalancedRouter, {"rule": "step"}, r"rule = 'step': legal are 'sign', 'magnitude', 'centred', 'smebu'"),
        (BiasBalancedRouter, {"momentum": 1.0}, r"bias_balanced\.momentum = 1\.0: legal are numbers from 0 to below 1"),
        (BiasBalancedRouter, {"until": 1.5}, r"bias_balanced\.until = 1\.5: legal are numbers from 0 to 1"),
    ],
)
def test_bad_values_are_refused_by_name(router: type[Router], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        router.Config(**config)
