"""The benches as one call each, for the command line and for ``make gpu``: check what is wanted, measure, write,
print.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.bench import kernels as bench_kernels
from rlroute.experiments.bench import layer as bench_layer
from rlroute.experiments.bench import parallel as bench_parallel
from rlroute.experiments.bench import step as bench_step
from rlroute.experiments.bench.kernels import Shape, parse_shape
from rlroute.experiments.bench.peers import contenders
from rlroute.experiments.bench.results import read_result
from rlroute.experiments.bench.timing import choose, run_bench, to_markdown
from rlroute.experiments.recipes.presets import routers_for
from rlroute.kernels import resolve_backend, tiles
from rlroute.machine import keep_freed_memory
from rlroute.records import storing, write_atomically
from rlroute.training.prepare import check


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a bench.

    Attributes:
        device: ``cpu`` or ``cuda``.
        shapes: as text, T,D,F,E,K each; the bench's standard ones if there are none.
        routings: of ``kernels``; all if there are none.
        names: contenders of ``kernels``, entries of ``layer``; all if there are none.
        rounds: interleaved repetitions.
        steps: training steps of a repetition, of ``step``.
        minutes: no new row is begun after so many.
        out: the JSON file to write; tables go beside it.
        command: what is recorded as the command.
    """

    device: str = "cpu"
    shapes: Sequence[str] = ()
    routings: Sequence[str] = ()
    names: Sequence[str] = ()
    rounds: int
    steps: int = 4
    minutes: float
    out: Path
    command: str


def kernels(wanted: Wanted) -> str:
    """Run ``bench kernels`` and return its tables.

    Raises:
        ConfigError: an unknown shape, routing, contender or device, before any work.
        StoreError: the result cannot be written, before any work.
    """
    _check(wanted.device, wanted.rounds)
    shapes = _shapes(wanted.shapes, bench_kernels.SHAPES[wanted.device])
    routings = choose(wanted.routings, bench_kernels.ROUTINGS, "routing")
    names = choose(wanted.names, list(contenders(wanted.device == "cuda")), "contender")
    return _run("kernels", bench_kernels.bench_kernels(wanted.device, shapes, routings, names, wanted.rounds), wanted)


def layer(wanted: Wanted) -> str:
    """Run ``bench layer`` and return its tables; routers that nobody named and that refuse a shape are left out.

    Raises:
        ConfigError: an unknown shape, router or device, a router that refuses a shape, or a routing, which is the
            routers' own here; before any work.
        StoreError: the result cannot be written, before any work.
    """
    _check(wanted.device, wanted.rounds)
    if wanted.routings:
        raise ConfigError(f"routing {wanted.routings[0]!r}: bench layer takes none, its routers decide")
    shapes = _shapes(wanted.shapes, bench_layer.SHAPES[wanted.device])
    say = partial(print, file=sys.stderr)
    entries = wanted.names or routers_for([bench_layer.router_shape(shape) for shape in shapes], say)
    for shape, entry in product(shapes, entries):
        bench_layer.config_of(entry, shape, wanted.device)
    return _run("layer", bench_layer.bench_layer(wanted.device, shapes, entries, wanted.rounds), wanted)


def parallel(wanted: Wanted) -> str:
    """Run ``bench parallel`` and return its tables.

    Raises:
        ConfigError: an unknown shape, one that two workers cannot share, or a choice that this bench does not have,
            before any work.
        StoreError: the result cannot be written, before any work.
    """
    _check(wanted.device, wanted.rounds)
    if wanted.device != "cpu" or wanted.routings or wanted.names:
        raise ConfigError("bench parallel runs on device 'cpu', with balanced routing and all its contenders")
    shapes = _shapes(wanted.shapes, bench_parallel.SHAPES)
    bench_parallel.check(shapes)
    return _run("parallel", bench_parallel.bench_parallel(shapes, wanted.rounds), wanted)


def step(
    wanted: Wanted, data: DataConfig, model: ModelConfig, train: TrainConfig, variants: Sequence[str], what: str = ""
) -> str:
    """Run ``bench step`` and return its tables.

    Args:
        wanted: of the bench; its names are entries, the device is that of ``train``.
        data, model, train: what is trained, and how.
        variants: ``eager``, ``compiled``, ``deterministic`` or ``both``; eager if there are none.
        what: what the model is called; its sizes if nothing is said.

    Raises:
        ConfigError, DataError: an unknown entry, variant or device, a model that cannot be trained here; before any
            work.
        StoreError: the result cannot be written, before any work.
    """
    _check(train.device, wanted.rounds)
    if wanted.shapes or wanted.routings:
        raise ConfigError("bench step takes no shapes and no routings: it trains a whole model")
    chosen = choose(variants, list(bench_step.VARIANTS), "variant") if variants else [bench_step.EAGER]
    configs = bench_step.contenders(wanted.names or ("switch",), chosen, data, model, train)
    check({config: [0] for config in configs.values()})
    what = what or f"L={model.num_layers} D={model.d_model} F={model.d_expert} E={model.num_experts} K={model.k}"
    rows = bench_step.bench_step(f"{what}, {train.dtype}", configs, wanted.rounds, wanted.steps, wanted.minutes)
    return _run("step", rows, replace(wanted, device=train.device), bench_step.to_page)


def envs(rounds: int) -> None:
    """Run ``bench envs`` and print each speed as it is known.

    Raises:
        ConfigError: too few rounds.
        MissingDependencyError: Gymnasium is not installed.
    """
    _check("cpu", rounds)
    from rlroute.experiments.bench.envs import bench_envs, speed_text  # Gymnasium is not there on every machine

    for speed in bench_envs(rounds):
        print(speed_text(speed), flush=True)


def tune_tiles(device: str, shapes: Sequence[str], rounds: int) -> None:
    """Search tiles for each shape and write the best into the table that the engine reads.

    Raises:
        ConfigError: the device's engine has no tiles.
        StoreError: the table cannot be written, as in a read-only installation.
    """
    _check(device, rounds)
    resolve_backend("triton", device)
    from rlroute.experiments.bench.tiles import tune

    for shape in _shapes(shapes, bench_kernels.SHAPES[device]):
        found = tune(shape, device, torch.bfloat16 if device == "cuda" else torch.float32, rounds, print)
        print(f"{' '.join(map(str, shape))}: {found.tiles}")
        with storing(tiles.PATH):
            tiles.write_table(list(tiles.pinned()))
    print(f"table in {tiles.PATH}, hash {tiles.table_hash()}; `make aot` compiles it for other chips")


def read_table(path: Path) -> str:
    """Return the tables of a result file.

    Raises:
        StoreError: it is none.
    """
    result = read_result(path, "a bench's result")
    if result["bench"] == "scale":
        from rlroute.experiments.bench import scale_page  # SciPy is not there on every machine

        return scale_page.to_markdown(result)
    return bench_step.to_page(result) if result["bench"] == "step" else to_markdown(result)


def _check(device: str, rounds: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': no CUDA device is there, legal is 'cpu'")
    if rounds < 2:
        raise ConfigError(f"rounds = {rounds}: want 2 or more, an interval needs them")


def _shapes(wanted: Sequence[str], standard: Sequence[Shape]) -> list[Shape]:
    return [parse_shape(text) for text in wanted] or list(standard)


def _run(
    kind: str,
    rows: Iterator[dict[str, Any]],
    wanted: Wanted,
    page: Callable[[Mapping[str, Any]], str] = to_markdown,
) -> str:
    torch.set_num_threads(1)
    keep_freed_memory()  # peers have it too
    result = run_bench(
        rows,
        wanted.out,
        kind=kind,
        device=wanted.device,
        rounds=wanted.rounds,
        minutes=wanted.minutes,
        command=wanted.command,
    )
    text = page(result)
    write_atomically(wanted.out.with_suffix(".md"), text)
    return text
