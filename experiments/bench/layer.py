"""``rlroute bench layer``: the whole MoE layer, router included, for each router: what routing costs beside the dense
MLP.

Training is what the loop does with a layer: forward with exploration, the router's terms, backward, observe, adapt. The
reward is a constant, for there is no model around the layer.

Shape suffixes: T tokens, D model width, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlroute.config import DENSE, DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.experiments.bench.kernels import Shape
from rlroute.experiments.bench.timing import Call, figures, measure, peak_bytes
from rlroute.experiments.recipes.entries import build_entry
from rlroute.kernels import resolve_backend
from rlroute.learning import adapt, learn
from rlroute.model.moe import DenseMLP, Experts, MoELayer
from rlroute.registry import make_router
from rlroute.routing import Feedback, RouterShape, RoutingContext

OURS, S, VOCABULARY = "hash", 128, 256
"""The router that others are compared to: the one that computes least."""
SHAPES = {
    "cpu": (Shape(2048, 96, 96, 16, 2), Shape(4096, 256, 512, 8, 2)),
    "cuda": (Shape(32768, 1024, 512, 64, 4), Shape(32768, 2048, 768, 128, 8)),
}


def bench_layer(device: str, shapes: Sequence[Shape], entries: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one row per shape and direction.

    Args:
        device: ``cpu`` in float32 or ``cuda`` under autocast to bfloat16.
        shapes: the layer's sizes.
        entries: routers, or ``router:field=value,...``; the dense MLP and the hash router run in any case.
        rounds: rounds a row.
    """
    cuda = device == "cuda"
    for shape in shapes:
        x_TD = torch.randn(shape.T, shape.D, generator=torch.Generator().manual_seed(0)).to(device)
        configs = {entry: config_of(entry, shape, device) for entry in dict.fromkeys((DENSE, OURS, *entries))}
        experts = Experts(configs[OURS].model, 0, 0, range(shape.E), shape.F).to(device)
        works = {entry: _passes(config, shape, x_TD, experts) for entry, config in configs.items()}
        for direction in ("forward", "training"):
            calls = {entry: work[direction] for entry, work in works.items()}
            contest = measure(calls, OURS, rounds, cuda)
            rows = figures(contest, OURS, DENSE, tokens=shape.T)
            for entry in contest.seconds:
                rows[entry]["peak_bytes"] = peak_bytes(calls[entry], cuda)
            sizes = " ".join(f"{letter}={size}" for letter, size in shape._asdict().items())
            yield {
                "what": f"{sizes}, {direction}",
                "shape": shape._asdict(),
                "direction": direction,
                "ours": OURS,
                "base": DENSE,
                "contenders": rows,
            }


def config_of(entry: str, shape: Shape, device: str) -> RunConfig:
    """Return the configuration of an entry in a layer of this shape.

    Raises:
        ConfigError: an unknown router or field, a router that refuses the shape, or sizes that no transformer has.
    """
    model = ModelConfig(num_layers=1, d_model=shape.D, num_experts=shape.E, k=shape.K, d_expert=shape.F)
    train = TrainConfig(device="cuda" if device == "cuda" else "cpu")
    config = build_entry(entry, DataConfig(), model, train)
    if config.router is not None:
        with torch.device("meta"):  # it refuses what the real one would, and has no weights
            make_router(config.router, router_shape(shape))
    return config


def router_shape(shape: Shape) -> RouterShape:
    """Return what a router is built for in a layer of this shape."""
    return RouterShape(
        d_model=shape.D,
        num_experts=shape.E,
        k=shape.K,
        site=0,
        vocab_size=VOCABULARY,
        seed=0,
        token_counts_V=torch.ones(VOCABULARY, dtype=torch.long, device="cpu"),
    )


def _context(shape: Shape, device: str, samples: int, explore: bool) -> RoutingContext:
    rows_T = torch.arange(shape.T, device=device).repeat(samples)
    return RoutingContext(
        seed=0,
        site=0,
        step=1,
        token_ids_T=rows_T * 7919 % VOCABULARY,
        position_T=rows_T % S,
        sequence_T=rows_T // S,
        mask_T=torch.ones_like(rows_T, dtype=torch.bool),
        explore=explore,
        num_samples=samples,
    )


def _passes(config: RunConfig, shape: Shape, x_TD: Tensor, experts: Experts) -> dict[str, Call]:
    """Return the work of a layer, whose experts all routers share: greedy forward, and training."""
    device = x_TD.device.type
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")
    if config.router is None:
        dense = DenseMLP(config.model, 0, 0, config.model.active_width).to(device)
        leaf_TD = x_TD.clone().requires_grad_()

        def dense_forward() -> None:
            with torch.no_grad(), autocast():
                dense(x_TD)

        def dense_training() -> None:
            with autocast():
                out_TD = dense(leaf_TD)
            out_TD.sum().backward()
            _forget(dense, leaf_TD)

        return {"forward": dense_forward, "training": dense_training}
    return _routed_passes(config, shape, x_TD, experts, autocast)


def _forget(module: torch.nn.Module, leaf_TD: Tensor) -> None:
    """Drop all gradients, so that the next call finds no memory of this one."""
    module.zero_grad()
    leaf_TD.grad = None


def _routed_passes(
    config: RunConfig, shape: Shape, x_TD: Tensor, experts: Experts, autocast: Callable[[], torch.autocast]
) -> dict[str, Call]:
    assert config.router is not None
    device = x_TD.device.type
    router = make_router(config.router, router_shape(shape)).to(device)
    with torch.device("meta"):
        layer = MoELayer(config.model, router, 0, 0, resolve_backend("auto", device))
    layer.experts = experts
    greedy, sampled = (_context(shape, device, m, explore) for m, explore in ((1, False), (router.num_samples, True)))
    leaf_TD = x_TD.repeat(router.num_samples, 1).requires_grad_()
    loss_MT = torch.full((router.num_samples, shape.T), 2.0, device=device)
    feedback = Feedback(context=sampled, loss_MT=loss_MT, num_valid=shape.T)

    def forward() -> None:
        with torch.no_grad(), autocast():
            layer(x_TD, greedy)

    def training() -> None:
        with autocast():
            out_TD, decision = layer(leaf_TD, sampled)
        learned = learn([router], [decision], feedback, out_TD.float().sum())
        adapt([router], learned.sums_L, progress=0.0)
        _forget(layer, leaf_TD)

    return {"forward": forward, "training": training}
