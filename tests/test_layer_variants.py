"""Variants of the MoE layer against a loop over pairs, in value and gradient; what they cost; what is refused.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows, E experts, R pairs.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute import seeding
from rlroute.config import ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError, DecisionError
from rlroute.kernels import Form, expert_mlp
from rlroute.kernels.activations import activate
from rlroute.learning import adapt
from rlroute.model.accounting import costs, fingerprints
from rlroute.model.attention import AttentionExperts
from rlroute.registry import default_names, router_class
from rlroute.routing import RoutingContext, RoutingDecision
from rlroute.sites import sites
from rlroute.training.loop import train
from rlroute.training.optimizer import Optimizer
from rlroute.training.step import Device, backward_batch
from tests.conftest import draw, make_context
from tests.runs import figures, interrupted
from tests.test_flops import counted, expected
from tests.tiny import DATA, MODEL, TRAIN, make_batch, make_model, run_batch, shake, small_config
from tests.toys import toy_model

CPU = Device("cpu", torch.float32)
VARIANTS: dict[str, dict[str, Any]] = {
    "gate of shared experts": {"num_shared_experts": 2, "shared_gate": "sigmoid"},
    "biases": {"expert_bias": True},
    "clamped swiglu": {"activation": "swiglu_clamped"},
    "geglu": {"activation": "geglu", "num_shared_experts": 1},
    "squared relu": {"activation": "relu_squared"},
    "gates at the input": {"gate_at": "input"},
    "dropout": {"expert_dropout": 0.4},
    "a latent width": {"d_latent": 3, "num_shared_experts": 1},
    "all of it": {
        "d_latent": 5,
        "num_shared_experts": 1,
        "shared_gate": "sigmoid",
        "expert_bias": True,
        "activation": "swiglu_clamped",
        "gate_at": "input",
        "expert_dropout": 0.25,
    },
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top": ({}, {}),
    "unused slots, own input": ({"rule": "threshold", "own": 0.5}, {}),
    "experts choose, unit gates": ({"rule": "experts"}, {"gate_form": "unit"}),
    "a bound, and drops": ({"share": 0.8}, {"capacity_factor": 0.7}),
    "tiles": ({}, {"round_to": 3, "gate_form": "unit"}),
}
"""Routers, and what else the layer does."""
BLOCKS: dict[str, dict[str, Any]] = {
    "every second block": {"moe_every": 2},
    "every second after a dense one": {"num_dense_layers": 1, "moe_every": 2},
    "wide dense blocks": {"num_dense_layers": 1, "d_dense": 20},
    "every third, narrow dense ones": {"moe_every": 3, "d_dense": 5, "num_shared_experts": 1, "attention_experts": 4},
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


# Values and gradients


def formula(name: str, hidden_H: Tensor) -> Tensor:
    """The activations, as their papers write them."""
    if name == "relu_squared":
        return hidden_H.clamp(min=0) ** 2
    gate_F, up_F = hidden_H.chunk(2)
    if name == "geglu":
        return gate_F * 0.5 * (1 + torch.erf(gate_F / math.sqrt(2))) * up_F
    if name == "swiglu_clamped":
        gate_F, up_F = torch.minimum(gate_F, torch.tensor(7.0)), up_F.clamp(-7, 7)
        return gate_F / (1 + torch.exp(-1.702 * gate_F)) * (up_F + 1)
    return gate_F / (1 + torch.exp(-gate_F)) * up_F


def expert(moe: Any, number: int, x_D: Tensor, gate: Tensor, kept_F: Tensor | float) -> Tensor:
    """What a pair adds to its token."""
    config, experts = moe.config, moe.experts
    before, after = (gate, 1.0) if config.gate_at == "input" else (1.0, gate)
    inner_D = x_D if config.d_latent is None else moe.down.weight @ x_D
    hidden_H = experts.in_EHD[number] @ (before * inner_D)
    if config.expert_bias:
        hidden_H = hidden_H + experts.in_bias_EH[number]
    y_D = experts.out_EDF[number] @ (formula(config.activation, hidden_H) * kept_F)
    y_D = after * (y_D + experts.out_bias_ED[number] if config.expert_bias else y_D)
    return y_D if config.d_latent is None else moe.up.weight @ y_D


def kept(moe: Any, decision: RoutingDecision, context: RoutingContext, pair: int) -> Tensor | float:
    """What dropout multiplies the activations of a pair by: drawn from the keys of its token and its expert."""
    share, token = moe.config.expert_dropout, decision.token_ids_R[pair : pair + 1]
    if not share or context.micro_batch is None:
        return 1.0
    key = seeding.derive_key(context.seed, "expert dropout", context.site, context.step)
    rows = (context.sample_T[token], context.sequence_T[token], context.position_T[token])
    drawn_F = seeding.keyed_uniform(key, (*rows, decision.expert_ids_R[pair : pair + 1]), (6,))[0]
    return (drawn_F >= share).double() / (1 - share)


def shared_experts(moe: Any, x_D: Tensor) -> Tensor:
    """What all tokens run."""
    in_HD, out_DF = moe.shared.experts.in_EHD[0], moe.shared.experts.out_EDF[0]
    y_D = out_DF @ formula(moe.config.activation, in_HD @ x_D)
    return y_D if moe.config.shared_gate == "none" else y_D * torch.sigmoid(moe.shared_gate.weight[0] @ x_D)


def by_hand(moe: Any, x_TD: Tensor, decision: RoutingDecision, context: RoutingContext) -> Tensor:
    """The layer's output, token by token and pair by pair."""
    rows = [0 * x_D for x_D in x_TD]
    for pair in torch.nonzero(decision.kept_R & decision.used_R).flatten().tolist():
        token, number = int(decision.token_ids_R[pair]), int(decision.expert_ids_R[pair])
        y_D = expert(moe, number, x_TD[token], decision.gates_R[pair], kept(moe, decision, context, pair))
        rows[token] = rows[token] + y_D
    for token, x_D in enumerate(x_TD):
        if decision.self_T is not None:
            rows[token] = rows[token] + decision.self_T[token] * x_D
        if moe.shared is not None:
            rows[token] = rows[token] + shared_experts(moe, x_D)
    return torch.stack(rows)


def layer(fields: dict[str, Any], router: dict[str, Any]) -> tuple[Any, Tensor, RoutingContext]:
    """Return a layer whose weights differ, its input and the context of a training step."""
    model = shake(toy_model(small_config(num_layers=1, **fields), **router))
    return model.layers[0].moe, draw(12, 8).requires_grad_(), replace(make_context(12, micro_batch=0), site=0)


@each_variant
@pytest.mark.parametrize(("router", "layers"), CASES.values(), ids=CASES)
def test_a_variant_is_a_loop_over_pairs(fields: dict[str, Any], router: dict[str, Any], layers: dict[str, Any]) -> None:
    moe, x_TD, context = layer(fields | layers, router)
    out_TD, decision = moe(x_TD, context)
    want_TD = by_hand(moe, x_TD, decision, context)
    torch.testing.assert_close(out_TD, want_TD, rtol=0, atol=1e-12)
    leaves = [x_TD, *moe.parameters()]
    found, want = (
        torch.autograd.grad((y_TD * draw(12, 8, seed=4)).sum(), leaves, retain_graph=True) for y_TD in (out_TD, want_TD)
    )
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["swiglu", "swiglu_clamped", "geglu", "relu_squared"])
def test_activations_are_their_formulas_at_large_inputs_too(name: str) -> None:
    hidden_NH = (20 * draw(40, 6)).requires_grad_()
    outputs = activate(hidden_NH, name), torch.stack([formula(name, hidden_H) for hidden_H in hidden_NH])
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), hidden_NH)[0] for y in outputs), rtol=1e-12, atol=1e-12)


def test_dropout_is_of_training_alone_and_keeps_the_mean() -> None:
    moe, x_TD, context = layer({"expert_dropout": 0.4}, {})
    for other in (replace(context, micro_batch=None), replace(context, micro_batch=None, explore=True)):
        assert torch.equal(moe(x_TD, other)[0], layer({}, {})[0](x_TD, other)[0]), "evaluation, greedy or sampled"
    steps = torch.stack([moe(x_TD, replace(context, step=step, explore=False))[0] for step in range(100)])
    assert len({float(step.detach().sum()) for step in steps}) == 100, "every step drops others"
    greedy_TD = moe(x_TD, replace(context, micro_batch=None, explore=False))[0]
    spread_TD = steps.std(0) / 10 + 1e-9
    assert ((steps.mean(0) - greedy_TD) / spread_TD).abs().max() < 5


def test_biases_have_no_weight_decay_and_projections_have() -> None:
    optimizer = Optimizer(make_model("switch", small_config(expert_bias=True)), TRAIN)
    decayed = {optimizer.names[p] for p in optimizer.adamw.param_groups[0]["params"]}
    experts = {name.rpartition(".")[2]: name in decayed for name in optimizer.names.values() if "experts" in name}
    assert experts == {"in_EHD": True, "out_EDF": True, "in_bias_EH": False, "out_bias_ED": False}


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    model = replace(MODEL, num_layers=2, num_dense_layers=1, d_dense=12, **VARIANTS["all of it"])
    config = RunConfig(data=DATA, model=model, router=router_class("switch").Config(), train=TRAIN)
    stopped = interrupted(config, tmp_path / "stopped", at=6)
    train(config, 0, tmp_path / "stopped")
    train(config, 0, tmp_path / "whole")
    assert figures(stopped) == figures(tmp_path / "whole" / stopped.name)


# Routers in bfloat16


@pytest.mark.parametrize("name", default_names())
def test_every_router_decides_and_learns_in_bfloat16(name: str) -> None:
    model = make_model(name, small_config(num_layers=1, router_dtype="bfloat16"), dtype=torch.float32)
    result = backward_batch(model, make_batch(4), CPU, seed=0, step=0, micro_batches=2)
    adapt(model.routers, result.sums_L, 0.5)
    _, decisions = run_batch(model, make_batch(), CPU)
    values = (getattr(decisions[0], field) for field in ("gates_R", "logits_TE", "probs_TE"))
    assert all(value.dtype == torch.float32 for value in values if value is not None)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_scores_in_bfloat16_are_rounded_products_of_rounded_factors() -> None:
    seen: list[Tensor] = []
    model = make_model("switch", small_config(num_layers=1, router_dtype="bfloat16"), dtype=torch.float32)
    model.routers[0].register_forward_hook(lambda router, inputs, decision: seen.append(inputs[0]))
    _, (decision,) = run_batch(shake(model), make_batch(), CPU)
    weight: Any = model.routers[0].get_parameter("scores.weight")
    exact_TE, logits_TE = seen[0] @ weight.t(), decision.logits_TE
    assert logits_TE is not None and torch.equal(logits_TE, logits_TE.bfloat16().float())
    rounded_TE = (seen[0].bfloat16() @ weight.bfloat16().t()).float()
    assert torch.equal(logits_TE, rounded_TE) and 1e-4 < (logits_TE - exact_TE).abs().max() < 0.2


def test_routers_in_bfloat16_are_refused_in_a_model_of_float64() -> None:
    model, train = ModelConfig(router_dtype="bfloat16"), TrainConfig(dtype="float64")
    with pytest.raises(
        ConfigError, match=r"model\.router_dtype = 'bfloat16' with train\.dtype 'float64': legal is 'fl"
    ):
        RunConfig(model=model, train=train)


# Which blocks have experts


@pytest.mark.parametrize(
    ("layers", "dense", "every", "want"),
    [
        (6, 0, 1, [0, 1, 2, 3, 4, 5]),
        (6, 0, 2, [1, 3, 5]),
        (6, 1, 2, [2, 4]),
        (6, 2, 3, [4]),
        (6, 2, 4, [5]),
        (3, 3, 1, []),
    ],
)
def test_the_blocks_with_experts_are_every_m_th_after_the_first_n(
    layers: int, dense: int, every: int, want: list[int]
) -> None:
    config = small_config(num_layers=layers, num_dense_layers=dense, moe_every=every, attention_experts=4)
    config.check()
    model = make_model("switch", config)
    assert [n for n, block in enumerate(model.blocks) if block.moe is not None] == want
    assert [n for n, block in enumerate(model.blocks) if isinstance(block.attention, AttentionExperts)] == want
    assert list(sites(config)) == [site for n in want for site in (f"{n}.attention", n)]
    assert [router.shape.site for router in model.routers] == list(sites(config))


@pytest.mark.parametrize(("router", "want"), [("switch", [7, None, 7, None]), (None, [7, 18, 7, 18])])
def test_dense_blocks_have_a_width_of_their_own(router: str | None, want: list[int | None]) -> None:
    """And where the model is dense throughout, its other blocks have the active width of those with experts."""
    config = small_config(num_layers=4, moe_every=2, d_dense=7, num_shared_experts=1)
    widths = [block.mlp and block.mlp.experts.out_EDF.shape[2] for block in make_model(router, config).blocks]
    assert widths == want


@pytest.mark.parametrize("name", ["biases", "clamped swiglu", "dropout"])
def test_outputs_by_pair_are_those_of_the_variant(name: str) -> None:
    """A router that wishes for them: each pair runs as a token of its own."""
    moe, x_TD, context = layer(VARIANTS[name], {"rule": "threshold"})
    moe.router.wishes = frozenset({"outputs"})
    out_TD, decision = moe(x_TD, context)
    torch.testing.assert_close(out_TD, by_hand(moe, x_TD, decision, context), rtol=0, atol=1e-12)
    pair = int(torch.nonzero(decision.kept_R & decision.used_R)[3])
    token, number = int(decision.token_ids_R[pair]), int(decision.expert_ids_R[pair])
    one = torch.ones((), dtype=torch.float64)
    want_D = expert(moe, number, x_TD[token], one, kept(moe, decision, context, pair))
    torch.testing.assert_close(decision.outputs_RD[pair], want_D, rtol=0, atol=1e-12)


# What they cost, and where they start


@pytest.mark.parametrize("fields", [*VARIANTS.values(), *BLOCKS.values()], ids=[*VARIANTS, *BLOCKS])
@pytest.mark.parametrize("router", [None, "switch"])
def test_booked_flops_and_parameters_are_those_that_run(fields: dict[str, Any], router: str | None) -> None:
    config = small_config(num_layers=3, **fields)
    model = make_model(router, config)
    booked = expected(model, config, 8)["flops_per_token"]
    masked = 2 * config.d_model * 7 * config.num_layers
    assert booked + masked == counted(router, config, 8, 11)
    assert costs(model, config, 8).total_parameters == sum(p.numel() for p in model.parameters())


@each_variant
def test_a_variant_moves_no_other_weight_at_the_start(fields: dict[str, Any]) -> None:
    config = small_config(**fields)
    plain = make_model("switch", small_config(num_shared_experts=config.num_shared_experts))
    others, added = dict(plain.named_parameters()), {"shared_gate", "in_bias_EH", "out_bias_ED", "down", "up"}
    for name, parameter in make_model("switch", config).named_parameters():
        if name not in others:
            assert added & set(name.split(".")), name
        elif parameter.shape == others[name].shape:
            assert torch.equal(parameter, others[name]), name
        else:
            assert "experts." in name and (config.d_latent or config.activation == "relu_squared"), "of another shape"


@each_variant
def test_the_backbone_is_what_the_dense_model_shares(fields: dict[str, Any]) -> None:
    config = small_config(**fields)
    routed, dense = (fingerprints(make_model(name, config), config)["backbone"] for name in ("switch", None))
    assert routed == dense


def test_projections_of_a_latent_width_count_once_a_token() -> None:
    """Whatever its k; a pair runs the narrow experts alone."""
    config = small_config(num_layers=1, d_latent=3)
    model = make_model("hash", config)
    booked = costs(model, config, 8)
    plain = costs(make_model("hash", small_config(num_layers=1)), small_config(num_layers=1), 8)
    assert booked.fixed_flops - plain.fixed_flops == 2 * 2 * 3 * 8
    assert booked.pair_flops_L == (2 * 3 * 6 * 3,) and plain.pair_flops_L == (2 * 3 * 6 * 8,)


# What is refused


def test_a_router_that_gates_shared_experts_itself_is_refused_beside_the_models_gate() -> None:
    moe, x_TD, context = layer({"num_shared_experts": 2, "shared_gate": "sigmoid"}, {"shared": True})
    with pytest.raises(DecisionError, match=r"router toys at site 0: shared_gates_TS with model\.shared_gate = 'sigm"):
        moe(x_TD, context)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"in_bias_EH": draw(4, 6)}, r"in_bias_EH is \(4, 6\): want \(4, 12\)"),
        ({"out_bias_ED": draw(3, 8)}, r"out_bias_ED is \(3, 8\): want \(4, 8\)"),
        ({"out_bias_ED": draw(4, 8).float()}, r"out_bias_ED is torch\.float32, x_TD torch\.float64"),
        ({"out_bias_ED": draw(8, 4).t()}, r"out_bias_ED has strides"),
    ],
)
def test_biases_that_do_not_fit_are_refused(bias: dict[str, Any], message: str) -> None:
    moe, x_TD, context = layer({}, {})
    _, decision = moe(x_TD, context)
    with pytest.raises(DecisionError, match=message):
        expert_mlp(x_TD, decision, moe.experts.weights(torch.float64), form=Form(**bias))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"shared_gate": "sigmoid"}, r"model\.shared_gate = 'sigmoid' with model\.num_shared_experts = 0"),
    (
        {"num_layers": 4, "num_dense_layers": 1, "moe_every": 4},
        r"model\.moe_every = 4: legal are 1 to 3, the layers aft",
    ),
    ({"num_layers": 2, "moe_every": 0}, r"model\.moe_every = 0: legal are"),
    ({"num_layers": 2, "d_dense": 8}, r"model\.d_dense = 8: no layer is dense, legal is none"),
    ({"rounding": "nearest"}, r"model\.rounding = 'nearest' with model\.round_to = 0: legal is 'down'"),
    ({"expert_dropout": 1.0}, r"model\.expert_dropout = 1\.0: legal are numbers from 0 to below 1"),
    ({"shared_gate": "softmax"}, r"model\.shared_gate = 'softmax': legal are 'none', 'sigmoid'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**fields).check()
