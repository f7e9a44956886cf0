"""SwitchHead: experts of each head's value and output projection, against a loop over heads, tokens and experts.

Shape suffixes: B sequences, S sequence length, T = B * S tokens, D model width, N heads, H head width, E experts.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlroute import upload
from rlroute.alarms import alarms
from rlroute.config import ModelConfig, RunConfig, SitedRouter
from rlroute.errors import ConfigError, DecisionError
from rlroute.experiments.checkpoints.trained import open_routed
from rlroute.experiments.comparison.marks import marks
from rlroute.experiments.inspection import page, text
from rlroute.experiments.inspection.inspection import inspect_run
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.report.loads import loads_figure
from rlroute.experiments.report.page import write_report
from rlroute.experiments.traces.measure import measure
from rlroute.experiments.traces.reading import Layer, open_trace
from rlroute.experiments.traces.write import write
from rlroute.model.accounting import costs
from rlroute.model.attention import Attention
from rlroute.reading import read_runs, site_keys
from rlroute.registry import default_names, router_class, run_config
from rlroute.routing import RoutingDecision, Site
from rlroute.sites import families, sites
from rlroute.training.loop import train
from rlroute.training.prepare import check
from rlroute.training.step import Device, backward_batch, make_context
from tests.boards import board_of
from tests.conftest import draw
from tests.test_attention_experts import assert_same_gradients, context_of
from tests.tiny import CPU64, DATA, TRAIN, make_batch, make_model, run_batch, run_tokens, shake, small_config
from tests.toys import toy_model

HEADS: dict[str, Any] = {"attention_experts": 3, "attention_form": "switchhead"}
CONFIG = small_config(num_layers=1, num_heads=2, d_model=12, **HEADS)
KEYS: list[Site] = ["0.value.0", "0.value.1", "0.output.0", "0.output.1", 0]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two experts of each": ({}, {}),
    "heads wider than the model": ({"num_heads": 1, "head_width": 14}, {}),
    "unused slots": ({}, {"rule": "threshold"}),
    "nothing at all": ({}, {"rule": "nothing"}),
    "experts choose, and drops": ({"capacity_factor": 0.4}, {"rule": "experts"}),
    "a bound, and drops": ({"capacity_factor": 0.8}, {"rule": "soft", "share": 1.5}),
}


def gated(site: Any, x_TI: Tensor, decision: RoutingDecision) -> list[Tensor]:
    """Each token's sum over experts of gate * W_expert x, an expert at a time."""
    rows = [torch.zeros(site.weights_EOI.shape[1], dtype=x_TI.dtype) + 0 * x_TI.sum() for _ in x_TI]
    for pair in torch.nonzero(decision.kept_R & decision.used_R).flatten().tolist():
        token, expert = int(decision.token_ids_R[pair]), int(decision.expert_ids_R[pair])
        rows[token] = rows[token] + decision.gates_R[pair] * (site.weights_EOI[expert] @ x_TI[token])
    return rows


def by_hand(attention: Any, x_BSD: Tensor, made: Mapping[Site, RoutingDecision]) -> Tensor:
    """Add up what heads write that attend to what they read."""
    length, heads = x_BSD.shape[1], attention.config.num_heads
    x_TD, positions = x_BSD.flatten(0, 1), range(length)
    query_NHD, key_NHD = (part.unflatten(0, (heads, -1)) for part in attention.qk.weight.chunk(2))

    def turned(x_H: Tensor, position: int) -> Tensor:
        row_H: Tensor = attention.rotary(x_H.expand(1, 1, position + 1, -1))[0, 0, position]
        return row_H

    out_TD = torch.zeros_like(x_TD)
    for head in range(heads):
        values = gated(attention.value[head], x_TD, made[f"0.value.{head}"])
        read = []
        for start in range(0, len(x_TD), length):
            keys = [turned(key_NHD[head] @ x_TD[start + at], at) for at in positions]
            for at in positions:
                query_H = turned(query_NHD[head] @ x_TD[start + at], at) / math.sqrt(len(keys[0]))
                weight_S = torch.stack([query_H @ key_H for key_H in keys[: at + 1]]).softmax(0)
                read.append(weight_S @ torch.stack(values[start : start + at + 1]))
        out_TD = out_TD + torch.stack(gated(attention.output[head], torch.stack(read), made[f"0.output.{head}"]))
    return out_TD.view_as(x_BSD)


@pytest.mark.parametrize(("fields", "router"), CASES.values(), ids=CASES.keys())
def test_it_is_a_loop_over_heads_and_experts(fields: dict[str, Any], router: dict[str, Any]) -> None:
    model = shake(toy_model(replace(CONFIG, **fields), **router))
    attention: Any = model.layers[0].attention
    x_BSD = draw(2, 5, 12).requires_grad_()
    out_BSD, made = attention(x_BSD, context_of(model, 2, 5))
    want_BSD = by_hand(attention, x_BSD, made)
    torch.testing.assert_close(out_BSD, want_BSD, rtol=0, atol=1e-10)
    assert_same_gradients(out_BSD, want_BSD, [x_BSD, *attention.parameters()])


def test_one_expert_of_gate_one_is_plain_attention() -> None:
    """A softmax over one expert is 1."""
    config = replace(CONFIG, k=1, attention_experts=1)
    routed, plain = toy_model(config).layers[0].attention, Attention(config, 8, 0, 5).double()
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([routed.qk.weight, *(site.weights_EOI[0] for site in routed.value)]))
        plain.out.weight.copy_(torch.cat([site.weights_EOI[0] for site in routed.output], dim=1))
    x_BSD = draw(2, 6, 12)
    y_BSD, _ = routed(x_BSD, context_of(toy_model(config), 2, 6))
    torch.testing.assert_close(y_BSD, plain(x_BSD), rtol=0, atol=1e-12)


def test_the_kernels_compute_what_the_plain_engine_does() -> None:
    """In the interpreter, with pairs over capacity."""
    outcomes = []
    for backend in ("cpu", "triton"):
        config = replace(CONFIG, capacity_factor=0.8)
        model = make_model("topk", config, dtype=torch.float32, backend=backend, score="sigmoid", normalize=False)
        device = Device("cpu", torch.float32)
        result = backward_batch(model, make_batch(1, 6), device, seed=0, step=0, micro_batches=1)
        outcomes.append([result.loss.float(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(outcomes[0]) == len(outcomes[1])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_every_routing_sample_has_the_logits_that_it_has_alone() -> None:
    model, batch = shake(make_model("switch", CONFIG)), make_batch(3)
    twice = make_context(batch, CPU64, samples=2, seed=0, step=0, explore=False)
    logits_BSV, _ = model(twice.token_ids_T.view(6, -1), twice)
    alone_BSV, _ = run_batch(model, batch)
    torch.testing.assert_close(logits_BSV, alone_BSV.repeat(2, 1, 1), rtol=0, atol=1e-12)


def test_a_later_token_changes_no_earlier_logits() -> None:
    model = shake(toy_model(replace(CONFIG, num_layers=2), rule="threshold"))
    tokens_BS = torch.from_numpy(make_batch().tokens_BS)
    logits_BSV, _ = run_tokens(model, tokens_BS)
    for position in (1, 4, 7):
        changed_BS = tokens_BS.clone()
        changed_BS[0, position] = (changed_BS[0, position] + 1) % 11
        moved_BSV = (run_tokens(model, changed_BS)[0] - logits_BSV).abs()
        assert moved_BSV[1].max() < 1e-12 and moved_BSV[0, :position].max() < 1e-12
        assert moved_BSV[0, position:].max() > 1e-9


def test_every_site_starts_and_draws_apart_and_the_feed_forward_layer_stays() -> None:
    model = make_model("reinforce", CONFIG)
    contexts: list[Any] = []
    for router in model.routers:
        router.register_forward_hook(lambda router, inputs, decision: contexts.append(inputs[1]))
    run_batch(model, make_batch(), explore=True)
    assert [context.site for context in contexts] == list(sites(CONFIG)) == KEYS
    assert [list(context.earlier) for context in contexts] == [KEYS[:number] for number in range(5)]
    draws = [context.noise("reinforce", (4,)) for context in contexts]
    weights = [router.get_parameter("scores.weight")[:3] for router in model.routers]
    experts = [expert_OI for site in model.routed[:4] for expert_OI in site.pair_weights[0].flatten(1)]
    for alike in (draws, weights, experts):
        assert not any(torch.equal(alike[a], alike[b]) for a in range(len(alike)) for b in range(a))
    plain: Any = make_model("reinforce", replace(CONFIG, attention_experts=0, attention_form="moa"))
    routed: Any = model.layers[0]
    assert torch.equal(routed.moe.experts.in_EHD, plain.layers[0].moe.experts.in_EHD)
    assert torch.equal(routed.moe.router.scores.weight, plain.layers[0].moe.router.scores.weight)


@pytest.mark.parametrize("name", default_names())
def test_every_router_decides_at_its_sites_and_learns(name: str) -> None:
    model = make_model(name, CONFIG)
    with torch.no_grad():
        backward_free = run_batch(model, make_batch())[1]
    assert len(backward_free) == 5
    result = backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=1)
    assert len(result.pairs_L) == 5 and bool(result.loss.isfinite())
    for site in model.routed:
        assert any(p.grad is not None and bool(p.grad.any()) for p in site.pair_weights)


def test_default_outputs_of_values_are_as_wide_as_a_head() -> None:
    widths = [router.get_buffer("default_ED").shape[1] for router in make_model("default_moe", CONFIG).routers]
    assert widths == [6, 6, 12, 12, 12]


def test_a_token_is_no_value() -> None:
    model = toy_model(CONFIG, own=0.5)
    with pytest.raises(
        DecisionError, match=r"router .* at site 0\.value\.0: self_T: what experts give here are a head"
    ):
        costs(model, CONFIG, 8)


# What it costs


@pytest.mark.parametrize("fields", [{}, {"num_layers": 3, "num_dense_layers": 1}, {"head_width": 8, "k": 1}], ids=str)
def test_booked_flops_are_those_that_run(fields: dict[str, Any]) -> None:
    """Of a forward those that PyTorch counts, less those of keys that the mask hides; of a step three times as many."""
    config = replace(CONFIG, **fields)
    model, batch = toy_model(config, backend="reference"), make_batch(3)
    booked = costs(model, config, 8)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run_batch(model, batch)
    with FlopCounterMode(display=False) as step, sdpa_kernel(SDPBackend.MATH):
        backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=1)
    masked, tokens = 2 * (8 - 1) * config.attention_width * config.num_layers, batch.tokens_BS.size
    pairs_L = [config.k] * len(sites(config))
    greedy = booked.per_token(pairs_L)["flops_per_token"]
    assert forward.get_total_flops() / tokens - masked == pytest.approx(greedy, abs=1)
    charged = booked.of_training(tokens, [config.k * tokens] * len(pairs_L)) / tokens
    assert step.get_total_flops() / tokens - 3 * masked == pytest.approx(charged, rel=0.01)


def test_active_parameters_are_those_of_k_experts_of_each_head() -> None:
    model, plain = (toy_model(c) for c in (CONFIG, replace(CONFIG, attention_experts=0, attention_form="moa")))
    found, other = (costs(m, CONFIG, 8) for m in (model, plain))
    router, projection = 3 * 12, 12 * 6
    assert found.total_parameters - other.total_parameters == 4 * (3 * projection + router) - 4 * projection
    active = (c.per_token([2] * len(c.pair_flops_L))["active_parameters"] for c in (found, other))
    assert next(active) - next(active) == 4 * (2 * projection + router) - 4 * projection
    assert found.total_parameters == sum(p.numel() for p in model.parameters())


# Configurations


def test_patterns_name_parts_of_attention_and_families_are_shown_as_one() -> None:
    router, model = router_class("switch").Config(), replace(CONFIG, num_layers=2)
    who = {"value": "vv", "output1": "oo", "attention0": "vvoo", "0": "vvoom", "mlp": "m"}
    for pattern, parts in who.items():
        served = [key for key in sites(model) if SitedRouter(sites=pattern, router=router).serves(key)]
        blocks = [list(keys) for _, keys in groupby(served, lambda key: str(key).split(".")[0])]
        assert len(blocks) == (2 if pattern in ("value", "mlp") else 1)
        assert all("".join((str(key).split(".")[1:] or "m")[0][0] for key in keys) == parts for keys in blocks)
    assert families(sites(model)) == {
        "0.value": [0, 1], "0.output": [2, 3], "0": [4], "1.value": [5, 6], "1.output": [7, 8], "1": [9]
    }  # fmt: skip
    config = RunConfig(data=DATA, model=CONFIG, router=router, others=(SitedRouter(sites="value1", router=router),))
    with pytest.raises(ConfigError, match=r"sites 'value1': the model has 0\.value, 0\.output, 0$"):
        check({config: [0]})


def test_a_configuration_without_it_is_what_it_was() -> None:
    plain = RunConfig(data=DATA, model=ModelConfig(), train=TRAIN, router=router_class("switch").Config())
    heads = replace(plain, model=CONFIG)
    assert "attention_form" not in plain.to_dict()["model"]
    assert heads.to_dict()["model"]["attention_form"] == "switchhead" and run_config(heads.to_dict()) == heads


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"attention_experts": 1},
            "attention_experts = 1 with k = 2 and model.attention_form 'switchhead': legal are 2",
        ),
        (
            {"attention_experts": 0},
            "attention_experts = 0 with k = 2 and model.attention_form 'switchhead': legal are 2",
        ),
        ({"num_kv_heads": 1}, "num_kv_heads = 1 with model.attention_experts: legal is 0"),
        ({"num_heads": 2**14, "head_width": 2, "attention_experts": 16}, "legal are up to 131072 experts of a proj"),
        (
            {"num_heads": 2**13, "head_width": 2, "num_layers": 2},
            "num_heads = 8192: 32770 routed sites, legal are 10000",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(CONFIG, **fields).check()
    assert reason in str(error.value)


# What shows sites


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = build_entry("switch", DATA, replace(CONFIG, num_heads=3), replace(TRAIN, record_choices=True))
    train(config, 0, folder)
    return folder


def test_records_have_every_site_and_pages_one_line_for_all_heads(store: Path, tmp_path: Path) -> None:
    (record,) = read_runs(store)
    assert [len(row["load_LE"]) for row in record.loads] == [7] * len(record.loads)
    assert record.summary["measured"] and len(record.summary["measured"]["causal_L"]) == 7
    assert marks([record]) == {}, "neither a leak nor uncounted work"
    write_report([record], tmp_path / "report.html")
    picker = re.search(r'<select id="site".*?</select>', (tmp_path / "report.html").read_text(), re.DOTALL)
    assert picker and re.findall(r">([^<]+)</option>", picker[0]) == ["0.value", "0.output", "0"]
    heads = loads_figure(board_of([record]).groups, "0.output").data[0].z
    last = record.loads[-1]["load_LE"]
    assert [row[-1] for row in heads] == [round(3 * load, 2) for load_E in last[3:6] for load in load_E]


def test_alarms_and_pictures_are_of_all_heads_together() -> None:
    model = replace(RunConfig().model, **vars(CONFIG) | {"num_heads": 3})
    vio_L = [0.0, 0.4, 0.1, 0.0, 0.0, 0.0, 0.0]
    row = {"kind": "eval", "load_LE": [[0.0, 0.5, 0.5]] * 6 + [[0.25] * 4], "dead_L": [1] * 6 + [0], "max_vio_L": vio_L}
    found = alarms("a", asdict(model), [row | {"step": step} for step in (1, 2, 3)])
    assert {(alarm.kind, alarm.site, alarm.value) for alarm in found} == {
        ("dead experts", "0.value", 3), ("dead experts", "0.output", 3), ("collapse", "0.value", 0.4)
    }  # fmt: skip
    pictures = upload.loads_by_site([row | {"step": 1}], site_keys(asdict(model)))
    assert {site: shares_NE.shape for site, (shares_NE, _) in pictures.items()} == {
        "0.value": (1, 9), "0.output": (1, 9), "0": (1, 4)
    }  # fmt: skip
    assert all(shares_NE.sum() == pytest.approx(1) for shares_NE, _ in pictures.values())


def test_a_trace_has_heads_in_the_order_of_sites_and_shows_them_as_one(store: Path, tmp_path: Path) -> None:
    (run,) = store.glob("switch-*")
    write(open_trace(str(run), store), tmp_path / "trace.jsonl")
    for word in (str(run), str(tmp_path / "trace.jsonl")):
        loads = measure(open_trace(word, store))
        names = [f"{part}.{head} 0" for part in ("value", "output") for head in range(3)]
        assert [of.layer for of in loads.layers] == [*names, "0"]
        assert [of.layer for of in loads.shown] == ["value 0", "output 0", "0"]
        heads, shown = loads.layers[:3], loads.shown[0]
        assert shown.load_E == [load for of in heads for load in of.load_E] and shown.tokens == heads[0].tokens
        assert shown.max_vio == max(of.max_vio for of in heads)
    assert sorted(Layer.of(number, f"value.{head}") for head in (10, 9) for number in (1, 0))[1].block == "value.10"


def test_an_inspection_has_a_line_for_all_heads(store: Path) -> None:
    (record,) = read_runs(store)
    found = inspect_run(open_routed(record, store), 64, 16)
    assert [view.site for view in found.sites] == list(sites(replace(CONFIG, num_heads=3)))
    lines = text.sites_grid(found).lines
    assert [line[:2] for line in lines] == [["0.value", "9"], ["0.output", "9"], ["0", "4"]]
    experts = [line[0] for line in text.experts_grid(found, found.families["0.value"]).lines]
    assert experts == [f"{head}.{expert}" for head in range(3) for expert in range(3)]
    assert page.render(found, "rlroute inspect").count("Site 0.") == 2
