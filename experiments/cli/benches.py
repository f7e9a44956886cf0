"""The command ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from rlroute.experiments.cli.common import command_line, make_folder


def bench(
    what: tyro.conf.Positional[Literal["kernels", "layer", "parallel", "sweep", "envs", "scale", "table"]],
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 15,
    minutes: float = 60.0,
    shapes: tuple[str, ...] = (),
    routings: tuple[str, ...] = (),
    contenders: tuple[str, ...] = (),
    tune: bool = False,
    path: Path = Path("experiments/results/comparison.jsonl"),
    measured: Path = Path("experiments/results/parallel-cpu.json"),
    out: Path = Path("results/bench.json"),
) -> None:
    """Benchmark experts, MoE layers or environments: interleaved rounds, times as ratios, one thread. Run it alone on
    its machine.

    Args:
        what: kernels: the shared expert MLP, every installed peer, and the dense MLP of the same FLOPs; layer: the
            whole layer for each router; parallel: two expert-parallel workers beside two independent ones (on the CPU);
            envs: how fast the environments step, beside Gymnasium's CartPole (it takes --rounds alone); sweep: what Ray
            costs (it takes --out alone); scale: what expert parallelism would cost at 8 to 512 devices, calculated (it
            takes --path, --measured and --out alone); table: print the result in --out once more.
        device: cpu in float32, cuda in bfloat16.
        rounds: interleaved repetitions, after one that warms up.
        minutes: no new row is begun after so many.
        shapes: T,D,F,E,K each; the device's standard ones if none are given.
        routings: of kernels: balanced, zipf, collapsed; all if none are given.
        contenders: peers, or routers; all if none are given, but for routers that refuse a shape.
        tune: first search tiles for these shapes, and write the best into the engine's table (cuda).
        path: of scale: the run store or compact file whose loads are taken.
        measured: of scale: the result of bench parallel that its times are held against, where there is one.
        out: all figures, as JSON; the same as tables beside it, as Markdown.
    """
    from rlroute.experiments.bench import run as benches

    if what == "envs":
        benches.envs(rounds)
        return
    if what == "sweep":
        from rlroute.experiments.bench.sweep import bench_sweep

        make_folder(out.parent)
        print(bench_sweep(out, command_line()))
        return
    if what == "scale":
        from rlroute.experiments.bench import scale_page

        text = scale_page.write(path, measured, out, command_line())
        print(f"{text}\nfigures in {out}, tables in {out.with_suffix('.md')}")
        return
    if what == "table":
        print(benches.read_table(out))
        return
    if tune:
        benches.tune_tiles(device, shapes, rounds)
    bench_of = {"kernels": benches.kernels, "layer": benches.layer, "parallel": benches.parallel}[what]
    text = bench_of(
        benches.Wanted(
            device=device,
            shapes=shapes,
            routings=routings,
            names=contenders,
            rounds=rounds,
            minutes=minutes,
            out=out,
            command=command_line(),
        )
    )
    print(f"{text}\nfigures in {out}, tables in {out.with_suffix('.md')}")
