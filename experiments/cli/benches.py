"""The command ``bench``: one subcommand for each bench, with the options that apply to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rlroute.experiments import RESULTS
from rlroute.experiments.cli.common import Shared, command_line, said, with_preset
from rlroute.experiments.cli.folders import make_way
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.cli.output import show
from rlroute.limits import Between, Positive, check_fields

OUT = Path("results/bench.json")
Rounds = Annotated[int, Between(2, 10**6)]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What every bench has that is measured in interleaved rounds and written."""

    rounds: Rounds = 15
    """Interleaved repetitions, after one that warms up."""
    minutes: Positive = 60.0
    """No new row is begun after so many."""
    shapes: tuple[str, ...] = ()
    """T,D,F,E,K each; the device's standard ones if none are given."""
    out: Path = OUT
    """All figures, as JSON; the same as tables beside it, as Markdown."""

    def how(self) -> dict[str, Any]:
        """Return how a bench is run and where its result goes."""
        how = {"shapes": self.shapes, "rounds": self.rounds, "minutes": self.minutes, "out": self.out}
        return how | {"command": command_line()}


@dataclass(frozen=True, kw_only=True)
class Kernels(Measured):
    """The shared expert MLP, every installed peer, and the dense MLP of the same FLOPs."""

    device: Literal["cpu", "cuda"] = "cpu"
    """cpu in float32, cuda in bfloat16."""
    routings: tuple[str, ...] = ()
    """balanced, zipf, collapsed; all if none are given."""
    contenders: tuple[str, ...] = ()
    """Peers; all if none are given."""
    tune: bool = False
    """First search tiles for these shapes, and write the best into the engine's table (cuda)."""

    def run(self) -> None:
        """Measure, and print the tables."""
        from rlroute.experiments.bench import run as benches

        if self.tune:
            benches.tune_tiles(self.device, self.shapes, self.rounds)
        chosen: dict[str, Any] = {"device": self.device, "routings": self.routings, "names": self.contenders}
        _say(benches.kernels(benches.Wanted(**chosen, **self.how())), self.out)


@dataclass(frozen=True, kw_only=True)
class Layer(Measured):
    """The whole MoE layer, router included, for each router."""

    device: Literal["cpu", "cuda"] = "cpu"
    """cpu in float32, cuda in bfloat16."""
    contenders: tuple[str, ...] = ()
    """Entries; every router that takes the shapes if none are given."""

    def run(self) -> None:
        """Measure, and print the tables."""
        from rlroute.experiments.bench import run as benches

        name_broken(*self.contenders)
        wanted = benches.Wanted(device=self.device, names=self.contenders, **self.how())
        _say(benches.layer(wanted), self.out)


@dataclass(frozen=True, kw_only=True)
class Step(Shared):
    """A whole training step, optimizer included, of the dense model and of routers (--train.device cuda: on a GPU)."""

    rounds: Rounds = 15
    """Interleaved repetitions, after two that warm up."""
    minutes: Positive = 60.0
    """No new round is begun after so many, once there are two."""
    out: Path = OUT
    """All figures, as JSON; the same as a table beside it, as Markdown."""
    contenders: tuple[str, ...] = ("switch",)
    """Entries besides the dense model."""
    variants: tuple[str, ...] = ("eager",)
    """eager, compiled, deterministic, both."""
    steps: Annotated[int, Between(1, 10**4)] = 4
    """Steps in a row of each repetition."""
    preset: str | None = None
    """gpu-30m, gpu-124m, gpu-350m, or one of `rlroute presets`: the data, model and train options, but for those that
    are given, and the contender where none is.
    """

    def run(self) -> None:
        """Measure, and print the table."""
        from rlroute.experiments.bench import run as benches

        size = with_preset(self.preset, self)
        contenders = (size.entry,) if size.entry and "contenders" not in said() else self.contenders
        name_broken(*contenders)
        how: dict[str, Any] = {"rounds": self.rounds, "minutes": self.minutes, "out": self.out, "steps": self.steps}
        wanted = benches.Wanted(names=contenders, command=command_line(), **how)
        what = self.preset or ""
        _say(benches.step(wanted, size.data, size.model, size.train, self.variants, what), self.out)


@dataclass(frozen=True, kw_only=True)
class Parallel(Measured):
    """Two expert-parallel workers beside two independent ones, on the CPU."""

    def run(self) -> None:
        """Measure, and print the tables."""
        from rlroute.experiments.bench import run as benches

        _say(benches.parallel(benches.Wanted(**self.how())), self.out)


@dataclass(frozen=True, kw_only=True)
class Envs:
    """How fast the environments step, beside Gymnasium's CartPole."""

    rounds: Rounds = 15
    """Interleaved repetitions."""

    def run(self) -> None:
        """Measure, and print each speed as it is known."""
        from rlroute.experiments.bench import run as benches

        benches.envs(self.rounds)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What Ray costs: the same runs with it and without."""

    out: Path = OUT
    """All figures, as JSON."""

    def run(self) -> None:
        """Measure, and print the figures."""
        from rlroute.experiments.bench.sweep import bench_sweep

        make_way(self.out)
        print(bench_sweep(self.out, command_line()))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What expert parallelism would cost at 8 to 512 devices, calculated from recorded loads."""

    store: Path = RESULTS / "comparison.jsonl"
    """The run store or compact file whose loads are taken."""
    measured: Path = RESULTS / "parallel-cpu.json"
    """The result of bench parallel that its times are held against, where there is one."""
    out: Path = OUT
    """All figures, as JSON; the same as tables beside it, as Markdown."""

    def run(self) -> None:
        """Calculate, and print the tables."""
        from rlroute.experiments.bench import scale_page

        _say(scale_page.write(self.store, self.measured, self.out, command_line()), self.out)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Print the result of a bench once more."""

    out: Path = OUT
    """The JSON file that a bench wrote."""

    def run(self) -> None:
        """Print its tables."""
        from rlroute.experiments.bench import run as benches

        show(benches.read_table(self.out))


def bench(
    what: Annotated[
        Annotated[Kernels, tyro.conf.subcommand("kernels", prefix_name=False)]
        | Annotated[Layer, tyro.conf.subcommand("layer", prefix_name=False)]
        | Annotated[Step, tyro.conf.subcommand("step", prefix_name=False)]
        | Annotated[Parallel, tyro.conf.subcommand("parallel", prefix_name=False)]
        | Annotated[Envs, tyro.conf.subcommand("envs", prefix_name=False)]
        | Annotated[Sweep, tyro.conf.subcommand("sweep", prefix_name=False)]
        | Annotated[Scale, tyro.conf.subcommand("scale", prefix_name=False)]
        | Annotated[Stored, tyro.conf.subcommand("table", prefix_name=False)],
        tyro.conf.arg(name=""),
    ],
) -> None:
    """Benchmark experts, MoE layers, training steps or environments: interleaved rounds, times as ratios, one thread.
    Run it alone on its machine.
    """
    check_fields(what, None)
    what.run()


def _say(text: str, out: Path) -> None:
    show(text)
    print(f"figures in {out}, tables in {out.with_suffix('.md')}")
