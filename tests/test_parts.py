"""What is frozen keeps its bits, has no state, and costs no more than the gradients that pass through it.

Shape suffixes: L routed sites.
"""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlroute.config import ModelConfig, Parts, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.learning import adapt
from rlroute.model import Transformer
from rlroute.model.accounting import costs, is_router
from rlroute.model.parts import freeze
from rlroute.training.checkpoint import load_weights
from rlroute.training.data import load_corpus
from rlroute.training.loop import train
from rlroute.training.memory import expected_memory, least_bytes
from rlroute.training.optimizer import Optimizer
from rlroute.training.prepare import build_model, meta_model
from rlroute.training.step import Device, backward_batch
from tests.runs import figures, interrupted
from tests.tiny import CPU64, DATA, MODEL, TRAIN, make_batch, make_model, small_config

PARTS: tuple[Parts, ...] = get_args(Parts)
MIXED = small_config(num_layers=3, num_dense_layers=1, num_shared_experts=1, num_experts=6, attention_experts=4)
BOTH = replace(TRAIN, weight_decay=0.5)


def trains(name: str, parts: Parts) -> bool:
    """Whether a parameter of ``MIXED`` trains, by its name alone; its first block has no experts."""
    routed = ".moe." in name or (".attention." in name and not name.startswith("layers.0."))
    return {
        "all": True,
        "moe": routed,
        "non-moe": not routed,
        "attention": ".attention." in name and ".router." not in name,
        "router": ".router." in name,
    }[parts]


def whole_state(model: Transformer) -> dict[str, Tensor]:
    """Return all of a model, buffers that checkpoints leave out among it."""
    named = chain(model.named_parameters(), model.named_buffers())
    return {name: value.detach().clone() for name, value in named}


def trained(model: Transformer, config: TrainConfig, device: Device = CPU64, steps: int = 3) -> Optimizer:
    """Freeze, take some steps, and return the optimizer."""
    freeze(model, config)
    optimizer = Optimizer(model, config)
    for step in range(steps):
        result = backward_batch(model, make_batch(seed=step), device, seed=0, step=step, micro_batches=1)
        optimizer.step(step, step / steps)
        adapt(model.routers, result.sums_L, step / steps)
    return optimizer


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("router", ["switch", "bias_balanced", "reinforce", "actor_critic"])
def test_what_is_frozen_keeps_its_bits_and_has_no_state_and_all_else_moves(router: str, parts: Parts) -> None:
    """Buffers as well: biases and running means are a router's, whatever moves them."""
    model = make_model(router, MIXED)
    before, config = whole_state(model), replace(BOTH, parts=parts)
    state = trained(model, config).state()
    moved = {name for name, value in whole_state(model).items() if not torch.equal(value, before[name])}
    parameters = {name for name, _ in model.named_parameters()}
    assert moved & parameters == {name for name in parameters if trains(name, parts)} == state.keys()
    buffers = {name for name, _ in model.named_buffers() if "rotary" not in name}
    assert moved - parameters == (buffers if config.routers_train else set())
    assert bool(buffers) == (router in ("bias_balanced", "reinforce", "actor_critic"))


@pytest.mark.parametrize("parts", ["all", "moe"])
def test_a_router_learning_rate_of_zero_freezes_routers_and_nothing_else(parts: Parts) -> None:
    model = make_model("bias_balanced", MIXED, balance_weight=0.1)
    before = whole_state(model)
    state = trained(model, replace(BOTH, parts=parts, router_lr_scale=0.0)).state()
    after = whole_state(model)
    assert all(torch.equal(after[name], before[name]) for name in before if is_router(name))
    assert state.keys() == {n for n, _ in model.named_parameters() if trains(n, parts) and not is_router(n)}


def test_what_is_frozen_has_no_share_in_the_norm_and_the_rest_has_the_gradients_that_it_had() -> None:
    whole, part = make_model("switch", MIXED), make_model("switch", MIXED)
    freeze(part, replace(TRAIN, parts="attention"))
    for model in (whole, part):
        backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=1)
    gradients = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, _ in part.named_parameters() if trains(name, "attention")}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole.get_parameter(name).grad, rtol=1e-12, atol=1e-15)
    wanted = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    norms = Optimizer(part, TRAIN).step(0, 0.0)
    assert norms["grad_norm"] == pytest.approx(float(wanted), rel=1e-9) and norms["router_grad_norm"] == 0


def test_terms_of_a_frozen_router_move_the_hidden_states_that_it_reads() -> None:
    plain, pulled = (make_model("switch", MIXED, balance_weight=weight) for weight in (0.0, 10.0))
    for model in (plain, pulled):
        trained(model, replace(TRAIN, parts="non-moe"))
    assert not torch.equal(plain.embed.weight, pulled.embed.weight)


@pytest.mark.parametrize("parts", ["non-moe", "moe", "router"])
@pytest.mark.parametrize("options", [{"recompute": True}, {"loss_chunk": 5}, {"micro_batches": 2}], ids=str)
def test_options_change_neither_what_is_frozen_nor_what_is_learnt(parts: Parts, options: dict[str, Any]) -> None:
    ends = []
    for more in ({}, options):
        train_config = replace(TRAIN, parts=parts, dtype="float64", **more)
        config = build_entry("switch:balance_weight=0", DATA, MODEL, train_config)
        model = build_model(config, load_corpus(DATA.spec), 0)
        optimizer = Optimizer(model, config.train)
        batch = make_batch(4, 16)
        backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=config.train.micro_batches)
        optimizer.step(0, 0.0)
        ends.append(whole_state(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_masters_are_those_of_what_trains() -> None:
    config = build_entry(
        "switch", DATA, MODEL, replace(TRAIN, parts="attention", dtype="bfloat16", param_dtype="bfloat16")
    )
    model = build_model(config, load_corpus(DATA.spec), 0)
    before = whole_state(model)
    state = trained(model, config.train, Device("cpu", torch.bfloat16), steps=2).state()
    assert state.keys() == {f"layers.0.attention.{part}.weight" for part in ("qkv", "out")}
    assert all("master" in each for each in state.values())
    frozen = before.keys() - state.keys()
    assert all(torch.equal(value, before[name]) for name, value in whole_state(model).items() if name in frozen)


# What cannot be


@pytest.mark.parametrize(
    ("entry", "train", "said"),
    [
        ("dense", {"parts": "moe"}, r"train\.parts = 'moe': nothing of the model trains, which has no router"),
        ("dense", {"parts": "router"}, "no router"),
        ("hash", {"parts": "router"}, "which has hash"),
        ("frozen", {"parts": "router"}, "which has frozen"),
        ("switch", {"parts": "router", "router_lr_scale": 0}, r"train\.router_lr_scale = 0 .*legal is above 0"),
        ("switch", {"parts": "experts"}, r"train\.parts = 'experts'"),
        ("switch", {"router_lr_scale": -0.5}, r"train\.router_lr_scale = -0\.5"),
    ],
)
def test_nothing_to_train_is_refused_before_any_work(entry: str, train: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        meta_model(build_entry(entry, DATA, MODEL, replace(TRAIN, **train)), load_corpus(DATA.spec))


# What it costs


@pytest.mark.parametrize("router", [None, "switch", "reinforce", "bias_balanced"])
@pytest.mark.parametrize(
    "config",
    [
        small_config(),
        MIXED,
        small_config(d_latent=4, num_shared_experts=1),
        small_config(tie_embeddings=True, kv_rank=4),
        small_config(mixers="mamba2,gated_delta+attention"),
    ],
    ids=str,
)
def test_where_everything_trains_three_forwards_are_charged(router: str | None, config: ModelConfig) -> None:
    booked = costs(make_model(router, config), config, 8)
    assert booked.step.pair_flops_L == tuple(3 * each for each in booked.pair_flops_L)
    routers = sum(work.training - 3 * work.greedy for work in booked.work_L)
    assert booked.step.fixed_flops == 3 * booked.fixed_flops + routers
    assert booked.trained_parameters == sum(p.numel() for p in make_model(router, config).parameters())


def ran(parts: Parts, config: ModelConfig, router: str, **fields: Any) -> tuple[float, float, float]:
    """Return the FLOPs of a step, as booked and as PyTorch counts its products (less those of keys that the mask
    hides), and those of the first part that trains, one forward.
    """
    model, batch = make_model(router, config, backend="reference", **fields), make_batch(4)
    freeze(model, TrainConfig(parts=parts))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=1)
    booked, tokens = costs(model, config, 8), batch.tokens_BS.size
    layers = config.num_layers
    products = 3 * layers if parts != "router" else 1 + 3 * (layers - 1) if router == "switch" else layers
    masked = 2 * (8 - 1) * config.d_model * products
    counted = counter.get_total_flops() / tokens - masked
    first = max(2 * 4 * config.d_model**2, 2 * booked.pair_flops_L[0]) + 2 * 9 * config.d_model
    return booked.of_training(tokens, result.pairs_L.tolist()) / tokens, counted, first


@pytest.mark.parametrize("parts", PARTS)
def test_what_is_booked_is_what_gradients_take(parts: Parts) -> None:
    """The first part that trains needs no gradient of its input, which is booked all the same."""
    config = small_config(num_layers=4, d_expert=40)
    booked, counted, first = ran(parts, config, "switch")
    assert counted <= booked * (1 + 1e-9) and booked - counted <= first


def test_a_reward_that_teaches_routers_alone_takes_no_backward_through_the_model() -> None:
    config = small_config(num_layers=4, d_expert=40)
    booked, counted, _ = ran("router", config, "reinforce", baseline="batch")
    model = make_model("reinforce", config, baseline="batch")
    freeze(model, TrainConfig(parts="router"))
    each = costs(model, config, 8)
    assert each.step.pair_flops_L == each.pair_flops_L
    assert booked == pytest.approx(counted, rel=0.02)


def test_memory_is_that_of_what_trains() -> None:
    config = build_entry("switch", DATA, MODEL, TRAIN)
    part = replace(config, train=replace(TRAIN, parts="router"))
    assert least_bytes(part, 257) < least_bytes(config, 257) / 2
    whole, less = expected_memory(config, 1000, 257), expected_memory(part, 1000, 257, trained=10)
    assert (less.gradients, less.moments, less.weights) == (40, 80, whole.weights)


# Runs


def run_of(**fields: Any) -> RunConfig:
    return build_entry("bias_balanced", DATA, MODEL, replace(TRAIN, **fields))


def test_a_run_that_was_killed_gives_the_same_bits_and_what_is_frozen_those_that_it_began_with(tmp_path: Path) -> None:
    config = run_of(parts="non-moe")
    train(config, 0, tmp_path / "whole")
    folder = interrupted(config, tmp_path / "cut", 6)
    train(config, 0, tmp_path / "cut")
    assert figures(folder) == figures(tmp_path / "whole" / folder.name)
    began, ended = (build_model(config, load_corpus(DATA.spec), 0) for _ in range(2))
    load_weights(folder, ended, folder.name)
    same = {name for name, value in whole_state(ended).items() if torch.equal(value, whole_state(began)[name])}
    assert {name for name in same if "rotary" not in name} == {n for n in whole_state(began) if ".moe." in n}


def test_parts_are_of_the_id() -> None:
    ids = {run_of(parts=parts).run_id(0) for parts in PARTS} | {run_of(router_lr_scale=0).run_id(0)}
    assert len(ids) == len(PARTS) + 1
