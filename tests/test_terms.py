"""Terms that any router can have from its configuration: devices as receivers, importance, SimBal, and a weight that
holds a target of MaxVio.

Shape suffixes: T tokens, D model width, E experts, K experts per token, G devices.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.balance import communication_balance, cv_squared, device_balance, importance
from rlroute.config import RunConfig
from rlroute.coupling import erc, simbal
from rlroute.errors import ConfigError
from rlroute.experiments.laws.steps import same
from rlroute.experiments.recipes.entries import build_entry
from rlroute.learning import adapt, learn
from rlroute.model.accounting import fingerprints
from rlroute.model.work import measure
from rlroute.registry import make_router, router_class
from rlroute.routing import Router, RoutingDecision
from rlroute.training import loop
from rlroute.training.prepare import check
from rlroute.training.step import backward_batch
from tests.conftest import D, draw, make_context, make_feedback, make_shape, terms_of
from tests.runs import figures, interrupted
from tests.tiny import CPU64, DATA, MODEL, STEPS, TRAIN, make_batch, make_model, small_config


def make(name: str = "switch", experts: int = 8, k: int = 2, **fields: Any) -> Router:
    cls = router_class(name)
    return make_router(cls.Config(**fields), make_shape(experts, k)).double()


def choose(ids_TK: Tensor, experts: int, gates_TK: Tensor | None = None) -> RoutingDecision:
    gates_TK = torch.ones(ids_TK.shape, dtype=torch.float64) if gates_TK is None else gates_TK
    return RoutingDecision.token_choice(ids_TK, gates_TK, experts)


# Devices as receivers

DEVICE_E = torch.tensor([0, 0, 1, 1, 2, 2])


def test_a_device_receives_a_token_once_however_many_of_its_experts_take_it() -> None:
    ids_TK = torch.tensor([[0, 1, 6], [0, 2, 3], [1, 0, 4], [5, 2, 0]])  # the first token leaves a slot unused
    mask_T = torch.tensor([True, True, True, False])
    probs_TE = draw(4, 6).softmax(1).requires_grad_()
    context = replace(make_context(4, mask_T=mask_T), expert_device_E=DEVICE_E)
    value = communication_balance(probs_TE, choose(ids_TK, 6), context)
    sent_G, mass_G = torch.tensor([3, 1, 1]) / 5, probs_TE[:3].detach().view(3, 3, 2).sum(2).mean(0)
    assert float(value.detach()) == pytest.approx(float(3 * (sent_G * mass_G).sum()))
    (gradient_TE,) = torch.autograd.grad(value, probs_TE)
    assert not gradient_TE[3].any() and torch.allclose(gradient_TE[0].view(3, 2)[:, 0], 3 * sent_G.double() / 3)


def test_one_expert_a_token_is_received_as_it_is_loaded() -> None:
    probs_TE, ids_T1 = draw(12, 6).softmax(1), draw(12, 6, seed=1).argsort(1)[:, :1]
    context = replace(make_context(), expert_device_E=DEVICE_E)
    got, want = (loss(probs_TE, choose(ids_T1, 6), context) for loss in (communication_balance, device_balance))
    torch.testing.assert_close(got, want)
    assert communication_balance(probs_TE, choose(ids_T1, 6), make_context()) == 1


def test_what_runs_for_its_gradient_alone_is_not_sent() -> None:
    router, x_TD = make("dense_mixer", 6), draw(12, D)
    context = replace(make_context(), expert_device_E=DEVICE_E)
    decision = router(x_TD, context)
    assert decision.probs_TE is not None
    plain = choose(decision.expert_ids_R.view(12, 6)[:, :2], 6)
    assert communication_balance(decision.probs_TE, decision, context) == communication_balance(
        decision.probs_TE, plain, context
    )


# Importance


def test_importance_is_of_the_gates_of_valid_tokens_and_used_slots() -> None:
    ids_TK, gates_TK = torch.tensor([[0, 3], [2, 1], [1, 0]]), draw(3, 2).abs().requires_grad_()
    decision = choose(ids_TK, 3, gates_TK)  # the first token leaves a slot unused, the last is padding
    value = importance(decision, make_context(3, mask_T=torch.tensor([True, True, False])))
    sums_E = torch.stack([gates_TK[0, 0], gates_TK[1, 1], gates_TK[1, 0]]).detach()
    assert float(value.detach()) == pytest.approx(float(cv_squared(sums_E)))
    (gradient_TK,) = torch.autograd.grad(value, gates_TK)
    assert (gradient_TK != 0).tolist() == [[True, False], [True, True], [False, False]]


# Smooth load


@pytest.mark.parametrize(("k", "std"), [(1, 0.5), (2, None), (4, 2.0), (8, None)])
def test_the_smooth_load_supposes_noise_where_a_router_has_none(k: int, std: float | None) -> None:
    """By its definition, token by token: the normal distribution at what an expert has to beat."""
    router, mask_T = make("topk", k=k, load_weight=0.25, load_std=std, init_std=0.7), torch.arange(12) % 5 != 0
    context, x_TD = make_context(12, mask_T=mask_T), draw(12, D)
    decision = router(x_TD, context)
    assert decision.logits_TE is not None
    load_E = torch.zeros(8).double()
    for logits in decision.logits_TE[mask_T].tolist():
        for expert, logit in enumerate(logits):
            others = sorted(logits[:expert] + logits[expert + 1 :], reverse=True)
            z = (logit - others[k - 1]) / (std or 1 / 8) if k < 8 else math.inf
            load_E[expert] += 0.5 * math.erfc(-z / math.sqrt(2))
    term = terms_of(router, decision, make_feedback(context, num_valid=18))["load"]
    assert term.weight == 0.25 and router.batch_dependent
    assert float(term.value.detach()) == pytest.approx(int(mask_T.sum()) / 18 * float(cv_squared(load_E)))
    assert k == 8 or bool(torch.autograd.grad(term.value, router.score_weights)[0].any())


def test_the_smooth_load_alone_evens_out_what_is_chosen() -> None:
    x_TD, context, worst = draw(256, D) + 1.0, make_context(256), []
    router = make("unbalanced", init_std=0.5, load_weight=1.0, load_std=0.5)
    for _ in range(100):
        decision = router(x_TD, context)
        worst.append(float(metrics.max_vio(decision.demand_E())))
        (gradient_ED,) = torch.autograd.grad(
            terms_of(router, decision, make_feedback(context))["load"].value, router.score_weights
        )
        router.score_weights.data -= 0.05 * gradient_ED
    assert worst[0] > 1 and worst[-1] < 0.5 * worst[0]


# SimBal


def test_simbal_is_the_distance_of_the_gram_matrix_from_the_identity() -> None:
    weights_ED = draw(4, D).requires_grad_()
    want = sum(
        abs(float((weights_ED[i] * weights_ED[j]).sum().detach()) - (i == j)) for i in range(4) for j in range(4)
    )
    assert float(simbal(weights_ED).detach()) == pytest.approx(want)
    start = simbal(weights_ED).detach()
    for _ in range(300):
        (gradient_ED,) = torch.autograd.grad(simbal(weights_ED), weights_ED)
        weights_ED = (weights_ED - 0.003 * gradient_ED).detach().requires_grad_()
    assert simbal(weights_ED) < 0.1 * start


def test_a_term_of_weights_counts_once_however_the_step_is_cut() -> None:
    config = small_config()
    router = make_model("switch", config, simbal_weight=0.1).routers[0]
    values = [
        backward_batch(
            make_model("switch", config, simbal_weight=0.1), make_batch(), CPU64, seed=0, step=0, micro_batches=parts
        ).terms["simbal"]
        for parts in (1, 2)
    ]
    assert measure(router).adapt == 6 * 4 * 4 * 8  # a product and the two of its backward, once a step
    assert torch.allclose(values[0], values[1], atol=1e-12)
    assert values[0][0] == pytest.approx(float(simbal(router.score_weights).detach()))


@pytest.mark.parametrize("name", ["switch", "noisy_topk", "topk", "frozen", "reinforce"])
@pytest.mark.parametrize("experts", [3, 2 * D])
def test_an_orthogonal_start_keeps_lengths_as_far_as_there_is_room(name: str, experts: int) -> None:
    first, again, other = (
        make_router(router_class(name).Config(orthogonal=True), make_shape(experts, 2, seed=seed)).double()
        for seed in (0, 0, 1)
    )
    weights_ED = first.score_weights.detach()
    gram = weights_ED @ weights_ED.t() if experts <= D else weights_ED.t() @ weights_ED
    torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-6)
    assert torch.equal(weights_ED, again.score_weights) and not torch.equal(weights_ED, other.score_weights)
    assert simbal(weights_ED) < 1e-4 or experts > D


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("reinforce", {"importance_weight": 0.5}, "importance_weight = 0.5: .* legal is 0"),
        ("hash", {"importance_weight": 0.5}, "importance_weight = 0.5: .* legal is 0"),
        (
            "hash",
            {"load_weight": 0.5},
            "load_weight = 0.5: its decisions do not carry what that term reads, legal is 0",
        ),
        ("hash", {"simbal_weight": 0.5}, "simbal_weight = 0.5: .* legal is 0"),
        ("frozen", {"simbal_weight": 0.5}, "simbal_weight = 0.5: it has no linear scores that learn, legal is 0"),
        ("bandit", {"erc_weight": 0.5}, "erc_weight = 0.5: .* legal is 0"),
        ("bandit", {"orthogonal": True}, "orthogonal = True: it has no linear scores, legal is false"),
        ("uniform", {"target_max_vio": 1.0}, "target_max_vio = 1.0: .* legal is none"),
    ],
)
def test_what_a_router_cannot_have_is_refused_by_name_before_any_work(
    name: str, fields: dict[str, Any], message: str
) -> None:
    config = router_class(name).Config(**fields)
    with pytest.raises(ConfigError, match=f"router {name}: {message}"):
        check({RunConfig(router=config, data=DATA): [0]})


def test_another_reason_to_refuse_is_said_first() -> None:
    with pytest.raises(ConfigError, match="k = 9: legal are 1 to num_experts = 8"):
        make(k=9, simbal_weight=0.1)
    with pytest.raises(ConfigError, match="groups = 3"):
        make("topk", groups=3, orthogonal=True)


# Expert-router coupling


def coupling_by_hand(weights_ED: Tensor, gate_EFD: Tensor, uniform_ED: Tensor, alpha: float) -> Tensor:
    experts, lengths = len(weights_ED), {}
    for i in range(experts):
        others = [float((weights_ED[i] - weights_ED[j]).detach().norm()) for j in range(experts) if j != i]
        within = min(min(others) / (2 * float(weights_ED[i].detach().norm())), 1.0)
        proxy_D = weights_ED[i] * (1 - within + 2 * within * uniform_ED[i])
        for j in range(experts):
            lengths[i, j] = (gate_EFD[j] @ proxy_D).norm()
    total = torch.zeros(()).double()
    for i in range(experts):
        for j in range(experts):
            if i != j:
                total = total + (lengths[i, j] - alpha * lengths[i, i]).clamp(min=0)
                total = total + (lengths[j, i] - alpha * lengths[i, i]).clamp(min=0)
    return total / experts**2


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_coupling_is_that_of_the_loop(alpha: float) -> None:
    weights_ED, gate_EFD = leaves = draw(5, D).requires_grad_(), draw(5, 3, D, seed=1).requires_grad_()
    values = [loss(weights_ED, gate_EFD, draw(5, D, seed=2).sigmoid(), alpha) for loss in (coupling_by_hand, erc)]
    torch.testing.assert_close(values[1], values[0])
    for want, got in zip(*(torch.autograd.grad(value, leaves) for value in values), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_coupling_is_defined_for_one_expert_and_at_weights_of_0() -> None:
    for weights_ED in (draw(1, D), torch.zeros(4, D).double()):
        leaf_ED = weights_ED.requires_grad_()
        value = erc(leaf_ED, draw(len(weights_ED), 3, D), draw(len(weights_ED), D).sigmoid(), 1.0)
        assert float(value.detach()) == 0 and not torch.autograd.grad(value, leaf_ED)[0].any()


def test_coupling_teaches_router_and_experts_once_a_step_however_it_is_cut() -> None:
    found = []
    for parts in (1, 2):
        gradients = []
        for weight in (0.0, 2.0):
            model: Any = make_model("switch", small_config(), init_std=0.5, balance_weight=0.0, erc_weight=weight)
            result = backward_batch(model, make_batch(), CPU64, seed=0, step=3, micro_batches=parts)
            gradients.append({name: p.grad for name, p in model.layers[0].moe.named_parameters()})
        taught = {name: gradients[1][name] - plain for name, plain in gradients[0].items()}
        assert {name for name, change in taught.items() if change.any()} == {"router.scores.weight", "experts.in_EHD"}
        assert not taught["experts.in_EHD"][:, 6:].any(), "of a gated activation the gate's projection alone is read"
        found.append([result.terms["erc"], *taught.values()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert bool((found[0][0] > 0).all())


def test_coupling_is_refused_where_the_weights_are_not_at_hand() -> None:
    config = build_entry("switch:erc_weight=0.5", DATA, replace(MODEL, num_experts=4), replace(TRAIN, micro_batches=2))
    check({config: [0]}, workers=2, expert_shards=1)
    reason = "erc_weight = 0.5 wishes for weights of the experts, which site 0{} does not hand out"
    with pytest.raises(ConfigError, match=reason.format("")):
        check({config: [0]}, workers=2, expert_shards=2)
    with pytest.raises(ConfigError, match=reason.format(".attention")):
        check({replace(config, model=replace(config.model, attention_experts=4)): [0]})


# A weight that holds a target of MaxVio


def held(start: float, **fields: Any) -> Router:
    return make(balance_weight=start, target_max_vio=1.0, balance_rate=0.25, **fields)


def weight_of(router: Router) -> float:
    assert router.held_weight is not None
    return float(router.held_weight)


def moved(router: Router, loads: list[int]) -> float:
    sums = {"demand_E": torch.tensor(loads)}
    adapt([router], [sums], 0.0)
    return weight_of(router)


def test_the_weight_moves_by_its_rate_towards_the_target_and_stays_above_0() -> None:
    router = held(0.5)
    over, under, on = [4, 0, 0, 0, 0, 0, 0, 0], [1] * 8, [2, 2, 2, 2, 0, 0, 0, 0]
    assert [moved(router, loads) for loads in (over, under, under, under, on, over, on)] == [
        *(0.75, 0.5, 0.25, 0.0, 0.0, 0.25, 0.25)
    ]
    assert moved(router, [0] * 8) == 0.25, "MaxVio is not defined where nothing was chosen"
    assert moved(router, under) == 0.0 == moved(router, under)


def test_the_loss_is_weighed_by_it_and_a_router_without_target_has_no_such_state() -> None:
    x_TD, context = draw(12, D), make_context()
    gradients = []
    for router in (held(0.5), make(balance_weight=0.75)):
        if router.held_weight is not None:
            moved(router, [4, 0, 0, 0, 0, 0, 0, 0])
        terms = learn([router], [router(x_TD, context)], make_feedback(context)).terms_L[0]
        assert float(terms["balance"].weight) == 0.75
        gradients.append(router.score_weights.grad)
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
    assert same(*gradients)
    assert "held_weight" not in make().state_dict() and "load" not in make().learns_from
    assert "held_weight" in held(0.0).state_dict() and held(0.0).learns_from == {"gate", "load"}


def test_a_start_at_0_has_the_term_all_the_same() -> None:
    router, context = held(0.0), make_context()
    terms = terms_of(router, router(draw(12, D), context), make_feedback(context))
    assert float(terms["balance"].weight) == 0 and router.batch_dependent
    result = backward_batch(
        make_model("switch", small_config(), balance_weight=0.0, target_max_vio=0.0),
        make_batch(),
        CPU64,
        seed=0,
        step=0,
        micro_batches=1,
    )
    assert [float(weight) for weight in result.weights["balance"]] == [0.0, 0.0]


def test_the_weight_that_is_logged_is_that_of_the_step() -> None:
    model = make_model("switch", small_config(), balance_weight=0.5, target_max_vio=0.0, balance_rate=0.25)
    result = backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=2)
    adapt(model.routers, result.sums_L, 0.0)
    assert [float(weight) for weight in result.weights["balance"]] == [0.5, 0.5]
    assert [weight_of(router) for router in model.routers] == [0.75, 0.75]


def test_it_brings_max_vio_to_the_target() -> None:
    """Tokens that all like the same experts; the balance alone moves the scores."""
    x_TD, context = draw(256, D) + 1.0, make_context(256)
    reached = {}
    for target in (0.3, 1.5):
        router = make(init_std=0.5, balance_weight=0.0, target_max_vio=target, balance_rate=0.02)
        like = router.score_weights.detach().clone()
        seen = []
        for _ in range(250):
            decision = router(x_TD, context)
            learned = learn([router], [decision], make_feedback(context))
            weights = router.score_weights
            with torch.no_grad():
                assert weights.grad is not None
                weights -= 0.1 * weights.grad + 0.01 * (weights - like)  # something pulls the scores back
                weights.grad = None
            adapt([router], learned.sums_L, 0.0)
            seen.append(float(metrics.max_vio(decision.demand_E())))
        reached[target] = sum(seen[-80:]) / 80
    assert abs(reached[0.3] - 0.3) < 0.2 and abs(reached[1.5] - 1.5) < 0.3, reached


def test_it_is_resumed_and_no_part_of_the_shared_parameters(tmp_path: Path) -> None:
    fields = "target_max_vio=0.5,balance_rate=0.01"
    config = build_entry(f"switch:{fields}", DATA, MODEL, TRAIN)
    loop.train(config, 0, tmp_path / "whole")
    interrupted(config, tmp_path / "parts", STEPS - 3)
    loop.train(config, 0, tmp_path / "parts")
    whole, parts = (figures(tmp_path / name / config.run_id(0)) for name in ("whole", "parts"))
    assert whole == parts
    weights = [row["weights"]["balance"][0] for row in whole["metrics"] if row["kind"] == "train"]
    assert weights[0] == pytest.approx(0.01) and len(set(weights)) > 1
    models = [make_model("switch", small_config(), target_max_vio=target) for target in (None, 0.5)]
    assert fingerprints(models[0], small_config()) == fingerprints(models[1], small_config())
