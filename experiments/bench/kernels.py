"""``rlroute bench kernels``: the shared expert MLP beside every peer that is installed, and the dense MLP of the same
FLOPs.

Shape suffixes: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlroute.errors import ConfigError
from rlroute.experiments.bench.peers import Problem, contenders
from rlroute.experiments.bench.timing import Call, figures, measure, peak_bytes, reason
from rlroute.kernels import ExpertWeights
from rlroute.training.memory import memory_here

OURS, BASE, REFERENCE = "rlroute", "dense", "loop"
DIRECTIONS = {"forward": 6, "forward, training": 6, "forward+backward": 18}
"""FLOPs of each over T K D F."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Relative Frobenius error up to which a contender computes the same thing as the loop."""


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
"""The CPU shapes are those that one core runs in a second; the CUDA ones are SonicMoE's, Liger-Kernel's and a sweep
over k.
"""
ROUTINGS = ("balanced", "zipf", "collapsed")
ZIPF = 1.0
"""Exponent of the skewed routing: the popularity of expert i is proportional to (i + 1) ** -ZIPF."""


def choose_experts(routing: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return distinct expert ids for each token, int64 of shape (T, K): even, Zipf-skewed, or all tokens on the same k
    experts.
    """
    device = generator.device
    if routing == "collapsed":
        return torch.arange(shape.K, device=device).repeat(shape.T, 1)
    if routing == "balanced":  # a random order of experts, walked by the tokens in turn
        turns = torch.arange(shape.T * shape.K, device=device).view(shape.T, shape.K) % shape.E
        return torch.randperm(shape.E, generator=generator, device=device)[turns]
    popularity = torch.arange(1, shape.E + 1, dtype=torch.float64, device=device).pow(-ZIPF)
    return torch.multinomial(popularity.expand(shape.T, -1), shape.K, generator=generator)


def make_problem(shape: Shape, routing: str, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Draw a problem whose activations are of order 1, on its device: a CPU would draw for minutes what a card draws at
    once.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def leaf(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype).requires_grad_()

    tokens, width, hidden, experts, k = shape
    gates_TK = torch.rand(tokens, k, generator=generator, device=device).to(dtype).requires_grad_()
    return Problem(
        x_TD=leaf(tokens, width),
        ids_TK=choose_experts(routing, shape, generator),
        gates_TK=gates_TK,
        weights=ExpertWeights(
            leaf(experts, 2 * hidden, width, scale=width**-0.5), leaf(experts, width, hidden, scale=hidden**-0.5)
        ),
        dense=(leaf(2 * k * hidden, width, scale=width**-0.5), leaf(width, k * hidden, scale=(k * hidden) ** -0.5)),
    )


def passes(problem: Problem, call: Callable[[], Tensor]) -> dict[str, Call]:
    """Return the work of a forward pass, of one that keeps what backward needs, and of both passes, of a contender."""
    upstream_TD = torch.ones_like(problem.x_TD)

    def forward() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        torch.autograd.backward(call(), upstream_TD)
        for leaf in problem.leaves:  # at the end, so that the next call finds no memory of this one
            leaf.grad = None

    return {"forward": forward, "forward, training": call, "forward+backward": both}


def prepare(problem: Problem, names: Sequence[str]) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Return the contenders that run and agree with the loop over experts in the output and every gradient, and why
    the others do not.

    Raises:
        ValueError: ours does not.
    """
    calls, failed = {}, {}
    found = contenders(problem.x_TD.is_cuda)
    want = _outcome(problem, found[REFERENCE](problem))
    for name in names:
        try:
            call = found[name](problem)
            if name not in (REFERENCE, BASE):
                _hold_against(want, _outcome(problem, call), TOLERANCE[problem.x_TD.dtype])
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = reason(error)
        else:
            calls[name] = call
    return calls, failed


def _outcome(problem: Problem, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    out_TD = call()
    generator = torch.Generator(device=out_TD.device).manual_seed(1)
    upstream_TD = torch.randn(out_TD.shape, generator=generator, device=out_TD.device).to(out_TD.dtype)
    inputs = {"x": problem.x_TD, "gates": problem.gates_TK, "w_in": problem.weights.in_EHD}
    inputs["w_out"] = problem.weights.out_EDF
    gradients = torch.autograd.grad(out_TD, list(inputs.values()), upstream_TD)
    return {"output": out_TD.detach()} | dict(zip(inputs, gradients, strict=True))


def _hold_against(want: Mapping[str, Tensor], got: Mapping[str, Tensor], tolerance: float) -> None:
    for name, right in want.items():
        error = float((got[name].float() - right.float()).norm() / right.float().norm())
        if not error <= tolerance:
            raise ValueError(f"computes something else: {name} is off by {error:.1e}, allowed is {tolerance:.0e}")


def bench_kernels(
    device: str, shapes: Sequence[Shape], routings: Sequence[str], names: Sequence[str], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield one row per shape, routing and direction.

    Args:
        device: ``cpu`` in float32 or ``cuda`` in bfloat16.
        shapes, routings: the problems.
        names: the contenders beside ours and the dense MLP.
        rounds: rounds a row.
    """
    cuda = device == "cuda"
    names = [BASE, OURS, *(name for name in names if name not in (BASE, OURS))]
    for routing in routings:  # every shape, before a second routing: the time may end
        for shape in shapes:
            problem = make_problem(shape, routing, device, torch.bfloat16 if cuda else torch.float32)
            prepared, failed = prepare(problem, names)
            by_direction = {name: passes(problem, call) for name, call in prepared.items()}
            for direction, products in DIRECTIONS.items():
                calls = {name: work[direction] for name, work in by_direction.items()}
                contest = measure(calls, OURS, rounds, cuda)
                contest.failed |= failed
                flops = products * shape.T * shape.K * shape.D * shape.F
                rows = figures(contest, OURS, BASE, tokens=shape.T, flops=flops)
                for name in contest.seconds:
                    rows[name]["peak_bytes"] = peak_bytes(calls[name], cuda)
                sizes = " ".join(f"{letter}={size}" for letter, size in shape._asdict().items())
                yield {
                    "what": f"{sizes}, {routing}, {direction}",
                    "shape": shape._asdict(),
                    "routing": routing,
                    "direction": direction,
                    "ours": OURS,
                    "base": BASE,
                    "contenders": rows,
                }


def parse_shape(text: str) -> Shape:
    """Read a shape written as ``T,D,F,E,K``.

    Raises:
        ConfigError: it is not five positive numbers, K exceeds E, or no memory here holds the tokens and the experts.
    """
    parts = text.split(",")
    if len(parts) != 5 or not all(part.isdecimal() and len(part) < 10 and int(part) for part in parts):
        raise ConfigError(f"shape {text[:100]!r}: want T,D,F,E,K as five positive numbers below 10^9")
    shape = Shape(*map(int, parts))
    needed = 4 * (shape.T * (shape.D + shape.K * shape.F) + 3 * shape.E * shape.D * shape.F)
    if needed > (there := memory_here("cpu")):
        raise ConfigError(f"shape {text!r}: needs {needed / 2**30:.1f} GiB, this machine has {there / 2**30:.1f}")
    if shape.K > shape.E:
        raise ConfigError(f"shape {text!r}: K = {shape.K} exceeds E = {shape.E}")
    return shape
