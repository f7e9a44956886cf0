"""Experts of attention, the second routed site of a block, against a loop over pairs; and across processes.

Shape suffixes: B sequences, S sequence length, T = B * S tokens, D model width, H head width, E experts, P query width.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.errors import ConfigError
from rlroute.model.accounting import is_expert
from rlroute.model.attention import Attention, AttentionExperts, Rotary
from rlroute.parallel.local import run_ranks
from rlroute.routing import RoutingDecision
from rlroute.training.group import ALONE
from rlroute.training.step import backward_batch, forward, make_context
from rlroute.transfer import numbers
from tests.conftest import draw
from tests.tiny import CPU64, make_batch, make_model, run_batch, run_tokens, shake, small_config
from tests.toys import mesh_of, toy_model

CONFIG = small_config(num_layers=1, num_heads=4, d_model=8, attention_experts=5)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two experts of one head": ({}, {}),
    "one expert of two heads": ({"k": 1}, {}),
    "all experts": ({"attention_experts": 2}, {}),
    "more slots than k": ({}, {"rule": "soft"}),
    "unused slots": ({}, {"rule": "threshold"}),
    "nothing at all": ({}, {"rule": "nothing"}),
    "experts choose": ({}, {"rule": "experts"}),
    "drops": ({"capacity_factor": 0.6}, {}),
    "drops of what experts chose": ({"capacity_factor": 0.3}, {"rule": "experts"}),
    "a bound, and the own input": ({}, {"share": 0.8, "own": 0.5}),
}
each_case = pytest.mark.parametrize(("fields", "router"), CASES.values(), ids=CASES.keys())


def model_of(fields: dict[str, Any], router: dict[str, Any], **more: Any) -> Any:
    return shake(toy_model(replace(CONFIG, **fields), **more, **router))


def rotate(rotary: Rotary, x_H: Tensor, position: int) -> Tensor:
    """Turn a head's channels by a position."""
    turned: Tensor = rotary(x_H.expand(1, 1, position + 1, -1))[0, 0, position]
    return turned


def by_hand(model: Any, x_BSD: Tensor, decision: RoutingDecision) -> Tensor:
    """Each pair's heads attend to the earlier tokens of their sequence; the pairs of a token are added up."""
    site, (_, length, width) = model.layers[0].attention, x_BSD.shape
    x_TD, head = x_BSD.flatten(0, 1), width // model.layers[0].attention.config.num_heads
    key_T, value_T = ([w @ x_D for x_D in x_TD] for w in site.kv.weight.chunk(2))
    rows = [torch.zeros(width, dtype=x_BSD.dtype) + 0 * x_TD.sum() for _ in x_TD]
    if decision.self_T is not None:
        rows = [row + weight * x_D for row, weight, x_D in zip(rows, decision.self_T, x_TD, strict=True)]
    for pair in torch.nonzero(decision.kept_R & decision.used_R).flatten().tolist():
        token, expert = int(decision.token_ids_R[pair]), int(decision.expert_ids_R[pair])
        start, query_P = token // length * length, site.query_EPD[expert] @ x_TD[token]
        heads = []
        for part in range(0, len(query_P), head):
            query_H = rotate(site.rotary, query_P[part : part + head], token - start)
            keys = [rotate(site.rotary, key_T[t][part : part + head], t - start) for t in range(start, token + 1)]
            scores = torch.stack([query_H @ key_H for key_H in keys]) / math.sqrt(head)
            values = torch.stack([value_T[t][part : part + head] for t in range(start, token + 1)])
            heads.append(scores.softmax(0) @ values)
        rows[token] = rows[token] + decision.gates_R[pair] * (site.out_EDP[expert] @ torch.cat(heads))
    return torch.stack(rows).view_as(x_BSD)


def assert_same_gradients(out_BSD: Tensor, want_BSD: Tensor, leaves: list[Tensor]) -> None:
    """Two outputs have the same gradients, to 1e-10; what one does not depend on has 0."""
    found, want = (
        torch.autograd.grad((y_BSD * draw(*y_BSD.shape, seed=3)).sum(), leaves, retain_graph=True, allow_unused=True)
        for y_BSD in (out_BSD, want_BSD)
    )
    for leaf, one, other in zip(leaves, found, want, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if one is None else one, zero if other is None else other, rtol=0, atol=1e-10)


@each_case
def test_it_is_a_loop_over_pairs(fields: dict[str, Any], router: dict[str, Any]) -> None:
    model = model_of(fields, router)
    site, x_BSD = model.layers[0].attention, draw(2, 6, 8).requires_grad_()
    out_BSD, made = site(x_BSD, context_of(model, 2, 6))
    decision = made["0.attention"]
    want_BSD = by_hand(model, x_BSD, decision)
    torch.testing.assert_close(out_BSD, want_BSD, rtol=0, atol=1e-12)
    assert_same_gradients(out_BSD, want_BSD, [x_BSD, *site.parameters()])


def context_of(model: Any, sequences: int, length: int) -> Any:
    """Return the context of a batch of that shape."""
    seen: list[Any] = []
    hook = model.routers[0].register_forward_hook(lambda router, inputs, decision: seen.append(inputs[1]))
    run_tokens(model, torch.zeros(sequences, length, dtype=torch.long))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("rule", ["top", "threshold", "soft"])
def test_a_later_token_changes_no_earlier_logits(rule: str) -> None:
    model = model_of({"num_layers": 2}, {"rule": rule})
    tokens_BS = torch.from_numpy(make_batch().tokens_BS)
    logits_BSV, _ = run_tokens(model, tokens_BS)
    for position in range(1, 8):
        changed_BS = tokens_BS.clone()
        changed_BS[0, position] = (changed_BS[0, position] + 1) % 11
        moved_BSV = (run_tokens(model, changed_BS)[0] - logits_BSV).abs()
        assert moved_BSV[1].max() < 1e-12 and moved_BSV[0, :position].max() < 1e-12
        assert moved_BSV[0, position:].max() > 1e-9


def test_one_expert_of_all_heads_is_plain_attention() -> None:
    """The same weights, k = 1 of one expert; its gate, a softmax over one expert, is 1."""
    config = small_config(num_layers=1, k=1, attention_experts=1)
    routed, plain = toy_model(config).layers[0].attention, Attention(config, 8, 0, 5).double()
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([routed.query_EPD[0], routed.kv.weight]))
        plain.out.weight.copy_(routed.out_EDP[0])
    x_BSD = draw(2, 6, 8)
    y_BSD, _ = routed(x_BSD, context_of(toy_model(config), 2, 6))
    torch.testing.assert_close(y_BSD, plain(x_BSD), rtol=0, atol=1e-12)


def test_two_sites_of_a_block_start_and_draw_apart() -> None:
    model = make_model("reinforce", small_config(attention_experts=4, num_experts=4))
    weights = [router.get_parameter("scores.weight") for router in model.routers]
    assert len({tuple(w.flatten().tolist()) for w in weights}) == 4
    contexts_L: list[Any] = []
    for router in model.routers:
        router.register_forward_hook(lambda router, inputs, decision: contexts_L.append(inputs[1]))
    run_batch(model, make_batch(), explore=True)
    assert [context.site for context in contexts_L] == ["0.attention", 0, "1.attention", 1]
    draws = [context.noise("reinforce", (4,)) for context in contexts_L]
    assert not any(torch.equal(draws[a], draws[b]) for a in range(4) for b in range(a))


def test_experts_of_attention_start_apart_and_do_not_move_the_feed_forward_layer() -> None:
    routed: Any = make_model("switch", small_config(attention_experts=4))
    plain: Any = make_model("switch", small_config())
    query_EPD = routed.layers[0].attention.query_EPD
    assert len({tuple(q.flatten().tolist()) for q in query_EPD}) == 4
    assert torch.equal(routed.layers[0].moe.experts.in_EHD, plain.layers[0].moe.experts.in_EHD)
    assert torch.equal(routed.layers[1].moe.router.scores.weight, plain.layers[1].moe.router.scores.weight)
    assert query_EPD.numel() // 4 * 2 == plain.layers[0].attention.qkv.weight.numel() // 3, (
        "k experts are as wide as it"
    )


@pytest.mark.parametrize("fields", [{"attention_experts": 1}, {"attention_experts": 4, "k": 3}])
def test_heads_that_cannot_be_shared_out_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention_experts = .* k must divide the heads"):
        small_config(**fields).check()


# Many processes

EVERYWHERE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"attention_experts": 4}, {}),
    ({"attention_experts": 4, "num_shared_experts": 2}, {"rule": "threshold", "own": 0.3, "shared": True}),
    ({"attention_experts": 4}, {"rule": "experts", "balance_weight": 0.1}),
    ({"attention_experts": 4}, {"rule": "carry", "share": 1.5}),
    (
        {"attention_experts": 4, "attention_form": "switchhead", "capacity_factor": 0.8},
        {"rule": "carry", "balance_weight": 0.1},
    ),
    ({"capacity_factor": 0.7, "capacity_order": "gate", "capacity_groups": 2}, {"rule": "soft"}),
    (
        {"num_experts": 8, "devices": 4, "capacity_factor": 0.7, "capacity_of": "device"},
        {"rule": "devices", "device_balance_weight": 0.5},
    ),
    (
        {"expert_bias": True, "activation": "swiglu_clamped", "num_shared_experts": 1, "shared_gate": "sigmoid"}
        | {"round_to": 3},
        {"rule": "threshold"},
    ),
    (
        {
            "expert_bias": True,
            "d_latent": 5,
            "gate_at": "input",
            "expert_dropout": 0.3,
            "num_layers": 3,
            "moe_every": 2,
        },
        {},
    ),
]
"""Models and routers that one process and two must compute alike."""


def stepped(shards: int) -> list[dict[str, Any]]:
    """Return loss, terms, sums and gradients of a step of each of :data:`EVERYWHERE`."""
    group = mesh_of(shards) if shards else ALONE
    outcomes = []
    for fields, router in EVERYWHERE:
        model = shake(toy_model(small_config(**fields), group=group, **router), std=0.0)
        result = backward_batch(model, make_batch(4), CPU64, seed=0, step=0, micro_batches=2, group=group)
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        gradients = {name: group.whole(grad) if is_expert(name) else grad for name, grad in named}
        loss, terms = numbers((result.loss, result.terms))
        outcomes.append({"loss": loss, "terms": terms, "sums": result.sums_L, "gradients": gradients})
    return outcomes


@pytest.mark.processes
@pytest.mark.parametrize("shards", [2, 1], ids=["expert parallel", "data parallel"])
def test_two_processes_compute_what_one_does(shards: int) -> None:
    alone = stepped(0)
    for rank in run_ranks(stepped, 2, shards):
        for (fields, _), one, two in zip(EVERYWHERE, alone, rank, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-12), fields
            for name, values in one["terms"].items():
                assert two["terms"][name] == pytest.approx(values, abs=1e-12), name
            for here, there in zip(one["sums"], two["sums"], strict=True):
                assert here.keys() == there.keys()
                for name, value in here.items():
                    torch.testing.assert_close(there[name], value, rtol=0, atol=1e-10, msg=name)
            assert one["gradients"].keys() == two["gradients"].keys()
            for name, gradient in one["gradients"].items():
                torch.testing.assert_close(two["gradients"][name], gradient, rtol=0, atol=1e-12, msg=name)


def test_the_device_case_above_routes_by_devices_and_drops_by_them() -> None:
    """Four devices of two experts, whatever processes hold them: else it would show nothing."""
    fields, router = next(case for case in EVERYWHERE if "devices" in case[0])
    model = toy_model(small_config(**fields), **router)
    batch = make_batch(4)
    _, decisions = forward(model, batch, make_context(batch, CPU64, seed=0, step=0, explore=True), CPU64)
    result = backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=1)
    for decision in decisions:
        device_TK = (decision.expert_ids_R // 2).view(-1, 2)
        used_TK = decision.used_R.view(-1, 2)
        assert bool((~used_TK.all(1) | (device_TK[:, 0] == device_TK[:, 1])).all())
        runs = torch.bincount((decision.expert_ids_R // 2)[decision.kept_R & decision.used_R], minlength=4)
        assert int(runs.max()) <= math.ceil(0.7 * 2 * 32 / 4)
    assert not all(bool(decision.kept_R[decision.used_R].all()) for decision in decisions)
    assert min(result.terms["device_balance"]) > 1


def test_the_width_of_heads_is_free_and_their_number_of_keys_is_not() -> None:
    (attention,) = make_model("switch", replace(CONFIG, head_width=6)).routed[:1]
    assert isinstance(attention, AttentionExperts)
    assert attention.query_EPD.shape == (5, 12, 8) and attention.kv.weight.shape == (24, 8)
    with pytest.raises(ConfigError, match=r"model\.num_kv_heads = 2 with model\.attention_experts: legal is 0"):
        replace(CONFIG, num_kv_heads=2).check()
