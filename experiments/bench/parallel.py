"""``rlroute bench parallel``: two expert-parallel workers beside two independent ones, each with one thread and half
the batch.

What the difference buys is a model whose experts need not fit one device; what it costs is the all-to-all. Routing is
forced to be balanced, so that waiting for an uneven share is not part of it. Times are wall-clock, of the slower worker
in each round.

Shape suffixes: T tokens of one worker, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rlroute.config import ModelConfig, RouterConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.bench.kernels import Shape
from rlroute.experiments.bench.timing import Call, Contest, figures
from rlroute.kernels import PLAIN, ExpertWeights
from rlroute.model import ModelShape, Transformer
from rlroute.parallel.local import run_ranks
from rlroute.parallel.mesh import Mesh
from rlroute.routing import Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.training.batches import Batch
from rlroute.training.group import ALONE, Group
from rlroute.training.optimizer import Optimizer
from rlroute.training.step import Device, backward_batch

WORKERS, S, VOCABULARY = 2, 128, 256
SHAPES = (Shape(4096, 256, 512, 8, 2), Shape(4096, 96, 96, 16, 2))
BASE, OURS = "independent", "expert parallel"
SHARED = "training step, one shared expert"
CHUNKS = {OURS: 1, "2 chunks": 2, "4 chunks": 4}
WORKS = {"experts": CHUNKS, "training step": CHUNKS, SHARED: {OURS: 1, "no overlap": 0}}
"""What is measured, and in how many chunks rows travel in it."""
SECONDS = 600.0


class _ForcedBalance(Router):
    """Token t takes experts t k to t k + k - 1, modulo E."""

    def forward(self, x_TD: torch.Tensor, context: RoutingContext) -> RoutingDecision:
        return _balanced(len(x_TD), self.shape.k, self.shape.num_experts)


def _balanced(tokens: int, k: int, experts: int) -> RoutingDecision:
    ids_TK = (torch.arange(tokens * k) % experts).view(tokens, k)
    return RoutingDecision.token_choice(ids_TK, torch.full((tokens, k), 1 / k).requires_grad_(), experts)


def bench_parallel(shapes: Sequence[Shape], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one row per shape and work: the experts of one layer, forward and backward; a training step of two layers;
    the same with a shared expert, which is computed while rows travel, or apart.

    Args:
        shapes: tokens of *one* worker, and the layer's sizes.
        rounds: rounds a row.
    """
    for shape in shapes:
        sizes = " ".join(f"{letter}={size}" for letter, size in shape._asdict().items())
        for work, chunks in WORKS.items():
            ranks = run_ranks(_contest, WORKERS, work, tuple(shape), rounds, seconds=SECONDS)
            slower = Contest({name: list(map(max, *(r[0][name] for r in ranks))) for name in ranks[0][0]})
            rows = figures(slower, OURS, BASE, tokens=WORKERS * shape.T)
            for name in chunks:
                total = sum(slower.seconds[name]) * WORKERS
                rows[name]["all_to_all_share"] = sum(r[1][name] for r in ranks) / total
            yield {"what": f"{sizes}, {work}", "work": work, "ours": OURS, "base": BASE, "contenders": rows}


def check(shapes: Sequence[Shape]) -> None:
    """Refuse shapes that the workers cannot have.

    Raises:
        ConfigError: tokens that are no whole sequences, or experts that cannot be cut.
    """
    for shape in shapes:
        if shape.T % S or shape.E % WORKERS:
            raise ConfigError(
                f"shape T={shape.T} E={shape.E}: want tokens in sequences of {S}, and experts for {WORKERS} workers"
            )


def _contest(work: str, sizes: tuple[int, ...], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return this rank's seconds by contender and round, and those spent on the all-to-all over all rounds."""
    shape = Shape(*sizes)
    make = _experts if work == "experts" else partial(_training_step, shared=int(work == SHARED))
    meshes = {name: Mesh(WORKERS, chunks=chunks) for name, chunks in WORKS[work].items()}
    calls = {name: make(shape, group) for name, group in ({BASE: ALONE} | meshes).items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)  # the same on all ranks
    for turn in range(rounds + 1):
        for name in order.sample(list(calls), len(calls)):
            dist.barrier()
            start = time.perf_counter()
            calls[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
            elif name in meshes:
                meshes[name].exchange.traffic.seconds = 0.0
    return seconds, {name: mesh.exchange.traffic.seconds for name, mesh in meshes.items()}


def _experts(shape: Shape, group: Group) -> Call:
    held = len(group.placement.held(shape.E))
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*size, generator=generator).mul_(0.05).requires_grad_()
        for size in ((held, 2 * shape.F, shape.D), (held, shape.D, shape.F), (shape.T, shape.D))
    ]
    *weights, x_TD = leaves

    def call() -> None:
        decision = _balanced(shape.T, shape.K, shape.E)
        finish = group.placement.start(x_TD, decision, ExpertWeights(*weights), "cpu", "swiglu", PLAIN)
        torch.autograd.backward(finish().sum())
        for leaf in leaves:
            leaf.grad = None

    return call


def _training_step(shape: Shape, group: Group, shared: int) -> Call:
    config = ModelConfig(d_model=shape.D, num_experts=shape.E, k=shape.K, d_expert=shape.F, num_shared_experts=shared)
    model_shape = ModelShape(vocab_size=VOCABULARY, seq_len=S, seed=0, backend="cpu", placement=group.placement)
    model = Transformer(config, model_shape, _make_router)
    optimizer, sequences = Optimizer(model, TrainConfig(), group), shape.T // S * group.size
    tokens_BS = np.random.default_rng(0).integers(VOCABULARY, size=(sequences, S + 1))
    batch = Batch(tokens_BS[:, :-1].copy(), tokens_BS[:, 1:].copy(), np.arange(sequences), None)
    device = Device("cpu", torch.float32)

    def call() -> None:
        backward_batch(model, batch, device, seed=0, step=0, micro_batches=group.size, group=group)
        optimizer.step(0, 0.0)

    return call


def _make_router(shape: RouterShape) -> Router:
    return _ForcedBalance(RouterConfig(), shape)
