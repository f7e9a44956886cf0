"""Benchmarks: speeds as ratios to a named peer, measured in interleaved rounds of one run on one device.

Shape suffixes: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlroute.config import RunConfig, TrainConfig
from rlroute.experiments.peers import Call, Problem, contenders
from rlroute.kernels import ExpertWeights, resolve_backend
from rlroute.kernels.tiles import table_hash
from rlroute.records import environment, storing, write_json


class Shape(NamedTuple):
    """An expert-MLP problem's size."""

    T: int
    D: int
    F: int
    E: int
    K: int


SHAPES = {
    "cpu": (
        Shape(4096, 256, 512, 8, 2),
        Shape(4096, 256, 512, 64, 1),
        Shape(4096, 256, 128, 64, 8),
        Shape(2048, 96, 96, 16, 2),
    ),
    "cuda": (
        Shape(24576, 1536, 256, 128, 8),
        Shape(32768, 4096, 512, 128, 8),
        Shape(32768, 4096, 1024, 64, 4),
        Shape(32768, 2048, 768, 128, 8),
        *(Shape(32768, 1024, 512, 64, k) for k in (1, 2, 4, 8)),
    ),
}
"""The CPU shapes are those that one core runs in a second; the CUDA ones are SonicMoE's, Liger-Kernel's and a sweep over k."""
ROUTINGS = ("balanced", "zipf", "collapsed")
ZIPF = 1.0
"""Exponent of the skewed routing: the popularity of expert i is proportional to (i + 1) ** -ZIPF."""


def choose_experts(routing: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return distinct expert ids for each token, int64 of shape (T, K): even, Zipf-skewed, or all tokens on the same k experts."""
    if routing == "collapsed":
        return torch.arange(shape.K).repeat(shape.T, 1)
    if routing == "balanced":  # a random order of experts, walked by the tokens in turn
        turns = torch.arange(shape.T * shape.K).view(shape.T, shape.K) % shape.E
        return torch.randperm(shape.E, generator=generator)[turns]
    popularity = torch.arange(1, shape.E + 1, dtype=torch.float64).pow(-ZIPF)
    return torch.multinomial(popularity.expand(shape.T, -1), shape.K, generator=generator)


def make_problem(shape: Shape, routing: str, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Draw a problem whose activations are of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(device, dtype).requires_grad_()

    tokens, width, hidden, experts, k = shape
    gates_TK = torch.rand(tokens, k, generator=generator).to(device, dtype).requires_grad_()
    return Problem(
        x_TD=leaf(tokens, width),
        ids_TK=choose_experts(routing, shape, generator).to(device),
        gates_TK=gates_TK,
        weights=ExpertWeights(
            leaf(experts, 2 * hidden, width, scale=width**-0.5), leaf(experts, width, hidden, scale=hidden**-0.5)
        ),
        dense=(leaf(2 * k * hidden, width, scale=width**-0.5), leaf(width, k * hidden, scale=(k * hidden) ** -0.5)),
    )


def measure(problem: Problem, calls: dict[str, Call], rounds: int, backward: bool) -> dict[str, list[float]]:
    """Time each call once per round, in turn, and return its seconds by round.

    On the CPU the seconds are the process's CPU time, which other work on the machine disturbs less than the clock.
    """
    upstream_TD = torch.randn_like(problem.x_TD)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for turn in range(rounds + 1):
        # In a new order each round: what a call finds in caches and allocator is what the one before it left there.
        for name, call in order.sample(list(calls.items()), len(calls)):
            for leaf in problem.leaves:
                leaf.grad = None
            elapsed = _timed(partial(_once, call, upstream_TD, backward), problem.x_TD.is_cuda)
            if turn:  # the first round warms up
                seconds[name].append(elapsed)
    return seconds


def _once(call: Call, upstream_TD: Tensor, backward: bool) -> None:
    if backward:
        torch.autograd.backward(call(), upstream_TD)
    else:
        with torch.no_grad():
            call()


def _timed(work: Callable[[], None], cuda: bool) -> float:
    if not cuda:
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Return the geometric mean over rounds of seconds over the base's, with its 95 % Student-t interval."""
    from scipy.stats import t

    logs = [math.log(a / b) for a, b in zip(seconds, base, strict=True)]
    mean, n = sum(logs) / len(logs), len(logs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / max(n - 1, 1) / n)
    half = float(t.ppf(0.975, n - 1)) * spread if n > 1 else math.nan
    return {"mean": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def peak_memory(call: Call, problem: Problem, backward: bool) -> int | None:
    """Return the most bytes that one call allocates on a GPU beyond its inputs; None on the CPU, where nobody counts them."""
    if not problem.x_TD.is_cuda:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _once(call, torch.ones_like(problem.x_TD), backward)
    return int(torch.cuda.max_memory_allocated() - before)


def bench_kernels(device: str, shapes: Sequence[Shape], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one row per shape, routing and direction: each contender's median seconds, throughput and ratios to the dense MLP."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = contenders()
    for shape in shapes:
        for routing in ROUTINGS:
            problem = make_problem(shape, routing, device, dtype)
            calls = {name: prepare(problem) for name, prepare in found.items()}
            for backward in (False, True):
                seconds = measure(problem, calls, rounds, backward)
                flops = (18 if backward else 6) * shape.T * shape.K * shape.D * shape.F
                row = {
                    "shape": shape._asdict(),
                    "routing": routing,
                    "direction": "forward+backward" if backward else "forward",
                }
                yield row | {
                    "contenders": {
                        name: _figures(values, seconds, flops, shape.T)
                        | {"peak_bytes": peak_memory(calls[name], problem, backward)}
                        for name, values in seconds.items()
                    }
                }


def _figures(values: list[float], seconds: dict[str, list[float]], flops: int, tokens: int) -> dict[str, Any]:
    median = sorted(values)[len(values) // 2]
    return {
        "seconds": median,
        "tokens_per_second": tokens / median,
        "gflops_per_second": flops / median / 1e9,
        "time_over_dense": ratio(values, seconds["dense"]),
        "time_over_rlroute": ratio(values, seconds["rlroute"]),
    }


def write_bench(rows: Sequence[dict[str, Any]], device: str, rounds: int, command: str, path: Path) -> None:
    """Write the rows with everything that they depend on."""
    run = RunConfig(train=TrainConfig(device="cuda" if device == "cuda" else "cpu"))
    where = environment(run, resolve_backend("auto", device)) | {"tile_table": table_hash()}
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"command": command, "environment": where, "rounds": rounds, "rows": list(rows)})


def row_text(row: dict[str, Any]) -> str:
    """Return a row as one line: time over the dense MLP of the same FLOPs, by contender."""
    shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    ratios = ", ".join(
        f"{name} {figures['time_over_dense']['mean']:.2f}"
        for name, figures in row["contenders"].items()
        if name != "dense"
    )
    return f"{shape} {row['routing']}, {row['direction']}, time over dense: {ratios}"
