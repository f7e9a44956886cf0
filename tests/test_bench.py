"""The benches compare like with like: every contender computes the same function, and ratios come from the same rounds."""

import json

import pytest
import torch

from rlroute.experiments.bench import (
    ROUTINGS,
    Shape,
    bench_kernels,
    choose_experts,
    make_problem,
    measure,
    ratio,
    write_bench,
)
from rlroute.experiments.peers import contenders

SHAPE = Shape(24, 16, 8, 4, 2)
PEERS = [name for name in contenders() if name not in ("dense", "loop")]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", PEERS)
def test_every_contender_computes_the_same_function(name, routing):
    problem = make_problem(SHAPE, routing, "cpu", torch.float32)
    leaves = problem.leaves[:4]
    upstream = torch.randn(24, 16)
    results = []
    for contender in ("loop", name):
        out_TD = contenders()[contender](problem)()
        results.append((out_TD, *torch.autograd.grad(out_TD, leaves, upstream)))
    for want, got in zip(*results, strict=True):
        assert torch.allclose(want, got, rtol=1e-4, atol=1e-5)


def test_dense_denominator_has_the_flops_of_the_pairs():
    problem = make_problem(SHAPE, "balanced", "cpu", torch.float32)
    dense_weights = sum(w.numel() for w in problem.dense)
    assert dense_weights * SHAPE.T == 3 * SHAPE.T * SHAPE.K * SHAPE.D * SHAPE.F


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_are_what_they_are_called(routing):
    shape = Shape(800, 16, 8, 8, 2)
    ids_TK = choose_experts(routing, shape, torch.Generator().manual_seed(0))
    assert bool((ids_TK[:, 0] != ids_TK[:, 1]).all())
    load_E = torch.bincount(ids_TK.flatten(), minlength=8)
    spread = int(load_E.max() - load_E.min())
    assert {"balanced": spread == 0, "zipf": spread > 200, "collapsed": int((load_E > 0).sum()) == 2}[routing]


def test_ratio_is_of_the_same_rounds():
    """A machine that slows down by the round disturbs both alike: paired, the ratio is exact."""
    base = [1.0, 2.0, 4.0, 8.0]
    twice = ratio([2 * s for s in base], base)
    assert twice["low"] == twice["mean"] == twice["high"] == pytest.approx(2)
    assert ratio([2.0, 2.0, 2.0, 2.0], base)["low"] < 1 < ratio([2.0, 2.0, 2.0, 2.0], base)["high"]


def test_rounds_and_rows_are_complete(tmp_path):
    problem = make_problem(SHAPE, "balanced", "cpu", torch.float32)
    calls = {name: prepare(problem) for name, prepare in contenders().items()}
    seconds = measure(problem, calls, rounds=2, backward=True)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(calls, 2)
    rows = list(bench_kernels("cpu", [SHAPE], 2))
    write_bench(rows, "cpu", 2, "rlroute bench kernels", tmp_path / "out" / "bench.json")
    stored = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(r["routing"], r["direction"]) for r in stored["rows"]] == [
        (routing, direction) for routing in ROUTINGS for direction in ("forward", "forward+backward")
    ]
    assert stored["environment"]["tile_table"] and stored["environment"]["kernel_backend"] == "cpu"
