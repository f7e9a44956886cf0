"""Variants of the MoE layer against a loop over pairs, in value and gradient; what they cost; what is refused.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows, E experts, R pairs.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.config import ModelConfig
from rlroute.errors import ConfigError, DecisionError
from rlroute.kernels.activations import activate
from rlroute.model.accounting import costs, fingerprints
from rlroute.model.attention import AttentionExperts
from rlroute.model.transformer import sites
from rlroute.routing import RoutingContext, RoutingDecision
from tests.conftest import draw, make_context
from tests.test_flops import counted, expected
from tests.tiny import make_model, shake, small_config
from tests.toys import toy_model

VARIANTS: dict[str, dict[str, Any]] = {
    "gate of shared experts": {"num_shared_experts": 2, "shared_gate": "sigmoid"},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "top": {},
    "unused slots, own input": {"rule": "threshold", "own": 0.5},
    "experts choose": {"rule": "experts"},
    "a bound": {"share": 0.8},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "every second block": {"moe_every": 2},
    "every second after a dense one": {"num_dense_layers": 1, "moe_every": 2},
    "wide dense blocks": {"num_dense_layers": 1, "d_dense": 20},
    "every third, narrow dense ones": {"moe_every": 3, "d_dense": 5, "num_shared_experts": 1, "attention_experts": 4},
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


# Values and gradients


def expert(moe: Any, number: int, x_D: Tensor) -> Tensor:
    """One expert's output for one row."""
    config, experts = moe.config, moe.experts
    return experts.out_EDF[number] @ activate((experts.in_EHD[number] @ x_D)[None], config.activation)[0]


def shared_experts(moe: Any, x_D: Tensor) -> Tensor:
    """What all tokens run."""
    in_HD, out_DF = moe.shared.experts.in_EHD[0], moe.shared.experts.out_EDF[0]
    y_D = out_DF @ activate((in_HD @ x_D)[None], moe.config.activation)[0]
    return y_D if moe.config.shared_gate == "none" else y_D * torch.sigmoid(moe.shared_gate.weight[0] @ x_D)


def by_hand(moe: Any, x_TD: Tensor, decision: RoutingDecision) -> Tensor:
    """The layer's output, token by token and pair by pair."""
    rows = [0 * x_D for x_D in x_TD]
    for pair in torch.nonzero(decision.kept_R & decision.used_R).flatten().tolist():
        token = int(decision.token_ids_R[pair])
        rows[token] = rows[token] + decision.gates_R[pair] * expert(moe, int(decision.expert_ids_R[pair]), x_TD[token])
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
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("layers", [{}, {"gate_form": "unit", "capacity_factor": 0.7}], ids=["plain", "unit, drops"])
def test_a_variant_is_a_loop_over_pairs(fields: dict[str, Any], router: dict[str, Any], layers: dict[str, Any]) -> None:
    moe, x_TD, context = layer(fields | layers, router)
    out_TD, decision = moe(x_TD, context)
    want_TD = by_hand(moe, x_TD, decision)
    torch.testing.assert_close(out_TD, want_TD, rtol=0, atol=1e-12)
    leaves = [x_TD, *moe.parameters()]
    found, want = (
        torch.autograd.grad((y_TD * draw(12, 8, seed=4)).sum(), leaves, retain_graph=True) for y_TD in (out_TD, want_TD)
    )
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


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
    others, changed = dict(plain.named_parameters()), {"experts", "shared_gate"}
    for name, parameter in make_model("switch", config).named_parameters():
        if name in others and parameter.shape == others[name].shape:
            assert torch.equal(parameter, others[name]), name
        else:
            assert changed & set(name.split(".")), name


@each_variant
def test_the_backbone_is_what_the_dense_model_shares(fields: dict[str, Any]) -> None:
    config = small_config(**fields)
    routed, dense = (fingerprints(make_model(name, config), config)["backbone"] for name in ("switch", None))
    assert routed == dense


# What is refused


def test_a_router_that_gates_shared_experts_itself_is_refused_beside_the_models_gate() -> None:
    moe, x_TD, context = layer({"num_shared_experts": 2, "shared_gate": "sigmoid"}, {"shared": True})
    with pytest.raises(DecisionError, match=r"router toys at site 0: shared_gates_TS with model\.shared_gate = 'sigm"):
        moe(x_TD, context)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"shared_gate": "sigmoid"}, r"model\.shared_gate = 'sigmoid' with model\.num_shared_experts = 0"),
    (
        {"num_layers": 4, "num_dense_layers": 1, "moe_every": 4},
        r"model\.moe_every = 4: legal are 1 to 3, the layers aft",
    ),
    ({"num_layers": 2, "moe_every": 0}, r"model\.moe_every = 0: legal are"),
    ({"num_layers": 2, "d_dense": 8}, r"model\.d_dense = 8: no layer is dense, legal is none"),
    ({"shared_gate": "softmax"}, r"model\.shared_gate = 'softmax': legal are 'none', 'sigmoid'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**fields).check()
