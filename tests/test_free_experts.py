"""Experts that cost nothing: what they add, what is counted of them, and what the kernels, capacities, devices and the
routers see of it.

Shape suffixes: T tokens, D model width, F expert width, E experts, K slots per token, J constant experts, R pairs.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlroute.balance import device_balance
from rlroute.baselines.topk import TopKRouter
from rlroute.config import ModelConfig
from rlroute.errors import ConfigError
from rlroute.kernels.activations import activate
from rlroute.learning import adapt, count
from rlroute.model import Transformer
from rlroute.model.accounting import costs, fingerprints
from rlroute.model.capacity import drop_over_capacity
from rlroute.registry import default_names
from rlroute.routing import RoutingDecision
from rlroute.training.evaluate import _Totals
from rlroute.training.step import backward_batch
from tests.conftest import draw, make_context, make_feedback, make_shape
from tests.tiny import CPU64, make_batch, make_model, run_batch, shake, small_config
from tests.toys import toy_model

FREE: dict[str, Any] = {"zero_experts": 1, "copy_experts": 2, "constant_experts": 2}
KINDS = ["zero", "copy", "copy", "constant", "constant"]

# What they add


def layer(model: Transformer, number: int = 0) -> Any:
    """Return one of a model's MoE layers, into which tests look."""
    return model.layers[number].moe


def by_hand(moe: Any, x_TD: Tensor, decision: RoutingDecision) -> Tensor:
    """The layer's output, pair by pair."""
    rows = [torch.zeros_like(x_D) for x_D in x_TD]
    real = len(moe.experts.in_EHD)
    pairs = zip(decision.token_ids_R.tolist(), decision.expert_ids_R.tolist(), decision.kept_R.tolist(), strict=True)
    for pair, (token, chosen, kept) in enumerate(pairs):
        x_D, y_D = x_TD[token], torch.zeros_like(x_TD[token])
        if not kept or chosen >= decision.num_experts:
            continue
        if chosen < real:
            in_HD, out_DF = moe.experts.in_EHD[chosen], moe.experts.out_EDF[chosen]
            y_D = out_DF @ activate((in_HD @ x_D)[None], "swiglu")[0]
        elif (kind := KINDS[chosen - real]) == "copy":
            y_D = x_D
        elif kind == "constant":
            row = chosen - real - 3
            a, b = (moe.free.mix_J2D[row] @ x_D).softmax(0)
            y_D = a * x_D + b * moe.free.vector_JD[row]
        rows[token] = rows[token] + decision.gates_R[pair] * y_D
    return torch.stack(rows)


RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top k": ({}, {"k": 4}),
    "more than the real ones": ({}, {"k": 8}),
    "unused slots": ({"rule": "threshold"}, {}),
    "a bound": ({"share": 1.5}, {"k": 4}),
    "experts choose": ({"rule": "experts"}, {}),
    "all": ({"rule": "soft"}, {"gate_form": "unit"}),
    "a tight capacity": ({}, {"k": 4, "capacity_factor": 0.5}),
}


@pytest.mark.parametrize(("rule", "model"), RULES.values(), ids=RULES.keys())
def test_a_layer_adds_what_each_pair_says_and_so_does_its_gradient(rule: dict[str, Any], model: dict[str, Any]) -> None:
    moe = layer(shake(toy_model(small_config(num_layers=1, **FREE, **model), **rule)))
    x_TD = draw(12, 8, seed=3).requires_grad_()
    context = make_context(12).at(moe.router.shape, {})
    out_TD, decision = moe(x_TD, context)
    free_R = decision.used_R & (decision.expert_ids_R >= 4)
    assert len(decision.expert_ids_R[free_R].unique()) > 3 and bool(decision.runs_R.any()), "shows nothing"
    want_TD, weights_TD = by_hand(moe, x_TD, decision), draw(12, 8, seed=4)
    torch.testing.assert_close(out_TD, want_TD, rtol=0, atol=1e-12)
    leaves = [x_TD, *moe.parameters()]
    got, want = (torch.autograd.grad((out * weights_TD).sum(), leaves, retain_graph=True) for out in (out_TD, want_TD))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_copy_experts_are_mlps_that_compute_the_identity() -> None:
    """relu(x) - relu(-x) = x: real experts of such weights, chosen alike, give the same."""
    sizes: dict[str, Any] = {"num_layers": 1, "d_expert": 16, "activation": "relu", "k": 3}
    copies = toy_model(small_config(**sizes, num_experts=3, copy_experts=2)).layers[0].moe
    mlps = toy_model(small_config(**sizes, num_experts=5)).layers[0].moe
    eye_DD, x_TD = torch.eye(8).double(), draw(12, 8)
    with torch.no_grad():
        mlps.experts.in_EHD[3:] = torch.cat([eye_DD, -eye_DD])
        mlps.experts.out_EDF[3:] = torch.cat([eye_DD, -eye_DD], dim=1)
    (one_TD, chosen), (other_TD, same) = (m(x_TD, make_context(12).at(m.router.shape, {})) for m in (copies, mlps))
    assert torch.equal(chosen.expert_ids_R, same.expert_ids_R) and bool((chosen.expert_ids_R > 2).any())
    torch.testing.assert_close(one_TD, other_TD, rtol=0, atol=1e-12)


def test_zero_experts_alone_leave_nothing() -> None:
    moe = layer(make_model("switch", small_config(num_layers=1, zero_experts=2)))
    ids_TK = torch.tensor([[4, 5]]).expand(3, 2)
    context = replace(make_context(3).at(moe.router.shape, {}), choices={0: ids_TK})
    assert not moe(draw(3, 8), context)[0].any()


def test_weights_of_constant_experts_are_the_models_and_come_from_keys() -> None:
    config = small_config(**FREE)
    model, more, other = (make_model("switch", replace(config, constant_experts=n)) for n in (2, 3, 0))
    first, second = (layer(model, number).free.vector_JD for number in (0, 1))
    assert torch.equal(layer(more, 1).free.vector_JD[:2], second) and not torch.equal(first, second)
    marks = [fingerprints(m, config) for m in (model, more, other, make_model("switch", small_config()))]
    assert len({mark["backbone"] for mark in marks}) == 1
    assert marks[2]["shared"] == marks[3]["shared"] and len({mark["shared"] for mark in marks}) == 3
    assert marks[0] == fingerprints(make_model("hash", config), config)
    assert marks[0]["backbone"] == fingerprints(make_model(None, config), config)["backbone"]


# What is counted


@torch.no_grad()
def test_booked_flops_are_those_that_run() -> None:
    config = small_config(**FREE, k=3)
    model = shake(make_model("switch", config, backend="reference"))
    batch = make_batch(3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, decisions = run_batch(model, batch)
    pairs_L = [int(d.runs_R.sum()) / d.num_tokens for d in decisions]
    assert all(0 < pairs < 3 for pairs in pairs_L)
    masked = 2 * config.d_model * 7 * config.num_layers
    booked = costs(model, config, 8).per_token(pairs_L)["flops_per_token"]
    assert booked + masked == round(counter.get_total_flops() / batch.tokens_BS.size)


def test_total_and_active_parameters_are_those_there() -> None:
    config = small_config(**FREE)
    model = make_model("switch", config)
    counted = costs(model, config, 8)
    assert counted.total_parameters == sum(p.numel() for p in model.parameters())
    plain = small_config()
    bare = costs(make_model("switch", plain), plain, 8)
    columns = 2 * 5 * config.d_model
    constants = 2 * 2 * 3 * config.d_model
    assert counted.fixed_parameters - bare.fixed_parameters == columns + constants
    assert counted.pair_flops_L == bare.pair_flops_L


def test_pairs_of_free_experts_count_as_demand_and_load_and_run_nothing() -> None:
    config = small_config(**FREE, k=3, capacity_factor=1.0)
    model = shake(make_model("switch", config))
    seen: list[RoutingDecision] = []
    for site in model.routed:
        site.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    result = backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=1)
    adapt(model.routers, result.sums_L, 0.0)
    for index, decision in enumerate(seen):
        real_TK = (decision.expert_ids_R < 4).view(-1, 3) & decision.kept_R.view(-1, 3)
        assert len(result.demand_L[index]) == 9 and int(result.demand_L[index].sum()) == 3 * 16
        assert int(result.pairs_L[index]) == int(real_TK.sum())
        assert int(result.without_L[index]) == int((~real_TK.any(1)).sum())
    totals = _Totals(model, 1)
    totals.add_decisions([decision.detach() for decision in seen])
    balance = totals.balance()
    assert torch.equal(balance["pairs_L"], result.per_token()["pairs_L"])
    dropped = sum(int((~d.kept_R).sum()) for d in seen)
    assert float(balance["drop_rate"]) == pytest.approx(dropped / (2 * 3 * 16)) and dropped > 0


def test_a_token_whose_pairs_are_all_of_free_experts_is_one_without() -> None:
    ids_TK = torch.tensor([[4, 5], [0, 4], [6, 6]])
    decision = RoutingDecision.token_choice(ids_TK, torch.ones(3, 2), 6, num_free_experts=2)
    sums = count(decision, make_feedback(make_context(3)))
    assert int(sums["without"]) == 2 and sums["load_E"].tolist() == [1, 0, 0, 0, 2, 1]
    assert decision.real().expert_ids_R.tolist() == [4, 4, 0, 4, 4, 4] and decision.real().num_experts == 4


# Capacities and devices


def test_a_capacity_drops_no_pair_of_a_free_expert() -> None:
    """Fair shares are over all experts: 6 rows of 2 pairs, of 4 + 2 experts, are 2 pairs each."""
    ids_TK = torch.tensor([[0, 4]] * 6)
    decision = RoutingDecision.token_choice(ids_TK, torch.ones(6, 2), 6, num_free_experts=2)
    dropped = drop_over_capacity(decision, 2.0, 6)
    assert dropped.load_E().tolist() == [2, 0, 0, 0, 6, 0]
    device_E = torch.tensor([0, 0, 1, 1, -1, -1])
    by_device = drop_over_capacity(decision, 2.0, 2 * 6 / 4, device_E=device_E)
    assert by_device.load_E().tolist() == [4, 0, 0, 0, 6, 0]


def test_real_experts_alone_are_on_devices() -> None:
    shape = replace(make_shape(10, 2), num_free_experts=2, devices=4)
    context = make_context(6).at(shape, {})
    assert context.expert_device_E is not None
    assert context.expert_device_E.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, -1, -1]
    ids_TK = torch.tensor([[0, 8], [2, 9], [4, 8], [6, 9]])
    decision = RoutingDecision.token_choice(ids_TK, torch.ones(4, 2), 10)
    probs_TE = torch.full((4, 10), 0.1)
    context = make_context(4).at(shape, {})
    assert float(device_balance(probs_TE, decision, context)) == pytest.approx(1.0)


# Routers


@pytest.mark.parametrize("name", default_names())
def test_every_router_chooses_among_them_or_refuses_by_name(name: str) -> None:
    config = small_config(**FREE, num_layers=1, attention_experts=4)
    model = shake(make_model(name, config))
    result = backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=2)
    adapt(model.routers, result.sums_L, 0.5)
    assert [len(demand_E) for demand_E in result.demand_L] == [4, 9]
    assert bool(result.loss.isfinite()) and bool(result.demand_L[1][4:].any())
    rest = name != "dense_mixer"  # which runs those that it did not choose, too
    assert int(result.pairs_L[1]) < int(result.demand_L[1].sum()) or not rest
    grads = [p.grad for p in layer(model).free.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)


def test_groups_of_experts_hold_no_free_ones() -> None:
    reason = TopKRouter.refuses(TopKRouter.Config(groups=2), replace(make_shape(8, 2), num_free_experts=2))
    assert reason is not None and "groups = 2: legal is 1" in reason


def test_illegal_numbers_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model.copy_experts = -1: legal are numbers from 0 to 1024"):
        ModelConfig(copy_experts=-1).check()
    with pytest.raises(ConfigError, match=r"model.k = 19: legal are 1 to model.num_experts = 16 and 2 free ones"):
        ModelConfig(k=19, zero_experts=2).check()
    ModelConfig(k=18, zero_experts=2).check()
