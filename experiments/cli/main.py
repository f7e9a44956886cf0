"""The command line. Every command that writes says where; bad input is one line on stderr and exit code 2.

Longer than most files: one function per command, each little more than its options and what they mean.

Heavy packages are imported inside the commands, so that ``rlroute --help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rlroute.config import Budget, DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ComparisonError, ConfigError, RlrouteError, StoreError
from rlroute.experiments.launch.launcher import Job, Launch

if TYPE_CHECKING:
    from rlroute.experiments.gradients.instrument import Sweep
    from rlroute.records import RunRecord

app = tyro.extras.SubcommandApp()
LAUNCH = Launch()


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all runs of a command have in common."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@app.command
def train(
    entry: tyro.conf.Positional[str],
    seed: int = 0,
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    shared: Annotated[Shared, tyro.conf.arg(name="")] = Shared(),
) -> None:
    """Train one run: ENTRY is a router, `router:field=value,...`, or `dense`. An unfinished run goes on where it stood.

    With --workers, several processes train it together: as many micro-batches as there are workers, or --train.micro-batches, a
    multiple of it.
    """
    from rlroute.experiments.comparison.budget import run_all
    from rlroute.experiments.recipes.entries import build_entry
    from rlroute.records import RunFolder

    steps = shared.train
    if steps.micro_batches == 1:
        steps = replace(steps, micro_batches=launch.workers)
    config = build_entry(entry, shared.data, shared.model, steps)
    already = "already " if RunFolder(launch.store, config, seed).ended else ""
    (record,) = run_all([Job(config, seed, _command())], launch)
    print(f"{already}{record.summary['status']}: {_score(record.summary)}; record in {launch.store / record.id}")


@app.command
def compare(
    entries: tyro.conf.Positional[tuple[str, ...]] = (),
    seeds: int = 3,
    task: Literal["text", "clusters"] = "text",
    reference: str | None = None,
    budget: Budget = "tokens",
    seconds: float | None = None,
    tuned: bool = True,
    out: Path = Path("results"),
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    shared: Annotated[Shared, tyro.conf.arg(name="")] = Shared(),
) -> None:
    """Train ENTRIES (default: every router and the dense model) on the same seeds; print the table, write it and the report.

    Args:
        entries: routers, `router:field=value,...`, or `dense`.
        seeds: each entry is trained with seeds 0 to seeds - 1.
        task: text; or clusters: latent clusters whose best score is known, uniform and skewed, both gate forms, every router (of the
            other options it takes --seeds, --out and --concurrency).
        reference: the entry that differences are taken to, as the table labels it (default: switch, or the first by name);
            under budget flops, whose training FLOPs everyone gets.
        budget: what is equal: tokens (--train.steps), training FLOPs, or time (--seconds).
        seconds: training time of each run under budget time; the figures are then not reproducible.
        tuned: use each entry's tuned settings; --no-tuned takes --train.lr and the routers' defaults.
        out: folder for table.md, table.csv and report.html.
    """
    if task == "clusters":
        if (reference, budget, seconds, tuned, shared) != (None, "tokens", None, True, Shared()):
            raise ConfigError("--task clusters takes ENTRIES, --seeds, --out and --concurrency, and no other option")
        _compare_clusters(entries, seeds, out, launch.concurrency or len(os.sched_getaffinity(0)))
        return
    from rlroute.experiments.comparison.budget import find_reference, run_all, with_budget
    from rlroute.experiments.recipes.entries import build_comparison, default_entries

    configs = build_comparison(entries or default_entries(), shared.data, shared.model, shared.train, tuned=tuned)
    configs = with_budget(configs, budget, find_reference(configs, reference), seconds)
    _make_folder(out)
    jobs = [Job(config, seed, _command()) for seed in range(seeds) for config in configs]
    records = run_all(jobs, launch)
    print(_publish(records, out, reference))
    print(f"runs in {launch.store}/, table in {out}/table.md and table.csv, report in {out}/report.html")


@app.command
def sweep(
    spec: tyro.conf.Positional[Path],
    out: Path | None = None,
    reference: str | None = None,
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
) -> None:
    """Train the runs that a TOML file describes; print their table. The same command goes on where it stopped, and tries again what failed.

    Args:
        spec: the file (docs/sweeps.md): entries, seeds, a grid, random draws, resources.
        out: folder for the table; results/NAME if none is given.
        reference: the entry that differences are taken to.
    """
    from rlroute.experiments.comparison.budget import run_jobs
    from rlroute.experiments.launch import spec as sweeping

    read = sweeping.read_spec(spec)
    said = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in sys.argv if word.startswith("--")}
    jobs, how = read.jobs(_command()), read.launch(launch, said)
    search = read.search(jobs)
    if search is not None:
        how = sweeping.apart(how, read.name)
    out = out or Path("results") / read.name
    _make_folder(out)
    records, failed = run_jobs(jobs, how, search)
    if search is not None:
        print(sweeping.ranking(jobs, how.store))
    elif records:
        _publish_if_comparable(records, out, reference)
    for run, reason in failed.items():
        print(f"set aside: {run}: {reason}", file=sys.stderr)
    print(f"{len(records)} of {len(jobs)} runs ended, {len(failed)} set aside; runs in {how.store}/")
    if failed:
        sys.exit(1)


@app.command
def routers() -> None:
    """List the routers: where each comes from, its paper, what it learns from and its fields."""
    from rlroute.experiments.report.listing import routers_text

    print(routers_text())


@app.command
def runs(path: tyro.conf.Positional[Path] = Path("runs"), run: tyro.conf.Positional[str] = "") -> None:
    """List the runs of a store (or of a compact file), or inspect one: RUN is its id or the start of it."""
    from rlroute.experiments.report.listing import run_text, runs_text

    print(run_text(path, run) if run else runs_text(path))


@app.command
def table(
    path: tyro.conf.Positional[Path] = Path("runs"),
    reference: str | None = None,
    csv: bool = False,
    timings: bool = True,
    only: tuple[str, ...] = (),
) -> None:
    """Print the table of stored runs, as Markdown or CSV; a pure function of the records.

    Args:
        path: a run store or a compact file.
        reference: the entry that differences are taken to.
        csv: CSV instead of Markdown.
        timings: --no-timings leaves out the columns that differ from run to run.
        only: ids (or their starts) of the runs to take; all if none are given.
    """
    from rlroute.experiments.comparison.table import build_table, to_csv, to_markdown

    built = build_table(_select(path, only), reference)
    print(to_csv(built, timings=timings) if csv else to_markdown(built, timings=timings))


@app.command
def report(
    path: tyro.conf.Positional[Path] = Path("runs"),
    out: Path = Path("results/report.html"),
    reference: str | None = None,
    only: tuple[str, ...] = (),
) -> None:
    """Write one self-contained HTML page about stored runs: table, curves, expert loads, quality against balance, provenance.

    Args:
        path: a run store or a compact file.
        out: the page.
        reference: the entry that differences are taken to.
        only: ids (or their starts) of the runs to take; all if none are given.
    """
    from rlroute.experiments.report.page import write_report

    write_report(_select(path, only), out, reference=reference)
    print(f"report in {out}")


@app.command
def export(out: tyro.conf.Positional[Path], path: Path = Path("runs"), only: tuple[str, ...] = ()) -> None:
    """Write the ended runs of a store into one compact file for publication.

    Args:
        out: the compact file, one JSON object a line.
        path: the run store.
        only: ids (or their starts) of the runs to take; all if none are given.
    """
    from rlroute.records import write_compact

    records = _select(path, only)
    write_compact(records, out)
    print(f"{len(records)} runs in {out}")


@app.command
def export_tokens(
    run: tyro.conf.Positional[str],
    out: tyro.conf.Positional[Path] = Path("results/tokens.npz"),
    path: Path = Path("runs"),
    tokens: int = 16_384,
) -> None:
    """Write the last MoE layer of a trained run as a table that TokenBandit-v0 plays: what each expert would cost each token.

    Args:
        run: the run's id or the start of it.
        out: the table, a .npz file.
        path: the run store.
        tokens: about how many validation tokens.
    """
    from rlroute.errors import ConfigError
    from rlroute.experiments.play.token_table import token_table
    from rlroute.records import storing

    records = _select(path, (run,))
    if len(records) > 1:
        raise ConfigError(f"run {run!r}: {len(records)} start so, the first {records[0].id}")
    _make_folder(out.parent)
    table = token_table(records[0], path, tokens)
    with storing(out):
        table.save(out)
    print(
        f"{len(table.x_ND)} tokens in {out}; loss uniform {table.uniform:.4f}, fixed {table.fixed:.4f}, oracle {table.oracle:.4f}"
    )


@app.command
def tune(
    entries: tyro.conf.Positional[tuple[str, ...]] = (),
    out: Path = Path("results/tuning.json"),
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    train: Annotated[TrainConfig, tyro.conf.arg()] = TrainConfig(),  # noqa: B008 (frozen)
) -> None:
    """Run the committed grid of ENTRIES (default: all that have one) on the tuning seeds; print each one's best trial.

    Args:
        entries: routers or `dense`, as named in the grid.
        out: all trials, as JSON.
    """
    from rlroute.experiments.comparison import tune as tuning
    from rlroute.experiments.recipes.entries import GRID

    _make_folder(out.parent)
    rows = tuning.tune(entries or tuple(GRID), train, launch, _command())
    tuning.write_trials(rows, train, out, _command())
    for entry, overrides in tuning.best(rows).items():
        print(f"{entry}: {overrides}")
    print(f"{len(rows)} trials in {out}")


@app.command
def play(
    environment: tyro.conf.Positional[str] = "rlroute/TokenBandit-v0",
    policies: tyro.conf.Positional[tuple[str, ...]] = (),
    table: Path | None = None,
    episodes: int = 256,
    seed: int = 0,
    updates: int = 400,
    copies: int = 32,
    rollout: int = 8,
    lr: float = 0.02,
) -> None:
    """Play an environment in which routing is the action; print scores (0 uniform, 1 oracle) and regrets with 95 % intervals.

    Args:
        environment: TokenBandit-v0, TokenBandits-v0 or Dispatch-v0; or CartPole-v1, on which REINFORCE shows on three seeds that it is
            right (it takes one router and none of the options).
        policies: reference policies, routers (`router:field=value,...`; they learn first) or sb3:FILE; all reference policies if none
            are given.
        table: the tokens of a bandit, from `rlroute export-tokens`; synthetic clusters without one.
        episodes: episodes per policy.
        seed: of episodes, initial weights and draws.
        updates: rollouts that a router learns from.
        copies: environments stepped together while it does.
        rollout: steps of a rollout.
        lr: learning rate of Adam.
    """
    if environment == "CartPole-v1":
        from rlroute.experiments.play import cartpole

        if len(policies) > 1:
            raise ConfigError(f"CartPole-v1 takes one router, not {', '.join(policies)}")
        entry = policies[0] if policies else cartpole.ENTRY
        print(cartpole.to_markdown(entry, cartpole.play(entry, range(3))))
        return
    from rlroute.experiments.play import player as playing

    results = playing.play(
        environment, policies, episodes, seed, playing.Learning(updates, copies, rollout, lr), table=table
    )
    print(playing.to_markdown(environment, results))


@app.command
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
    """Benchmark experts, MoE layers or environments: interleaved rounds, times as ratios, one thread. Run it alone on its machine.

    Args:
        what: kernels: the shared expert MLP, every installed peer, and the dense MLP of the same FLOPs; layer: the whole layer for
            each router; parallel: two expert-parallel workers beside two independent ones (on the CPU); envs: how fast the
            environments step, beside Gymnasium's CartPole (it takes --rounds alone); sweep: what Ray costs (it takes --out alone);
            scale: what expert parallelism would cost at 8 to 512 devices, calculated (it takes --path, --measured and --out alone);
            table: print the result in --out once more.
        device: cpu in float32, cuda in bfloat16.
        rounds: interleaved repetitions, after one that warms up.
        minutes: no new row is begun after so many.
        shapes: T,D,F,E,K each; the device's standard ones if none are given.
        routings: of kernels: balanced, zipf, collapsed; all if none are given.
        contenders: peers, or routers; all if none are given.
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

        _make_folder(out.parent)
        print(bench_sweep(out, _command()))
        return
    if what == "scale":
        from rlroute.experiments.bench import scale_page

        text = scale_page.write(path, measured, out, _command())
        print(f"{text}\nfigures in {out}, tables in {out.with_suffix('.md')}")
        return
    if what == "table":
        print(benches.read_table(out))
        return
    if tune:
        benches.tune_tiles(device, shapes, rounds)
    bench_of = {"kernels": benches.kernels, "layer": benches.layer, "parallel": benches.parallel}[what]
    text = bench_of(device, shapes, routings, contenders, rounds=rounds, minutes=minutes, out=out, command=_command())
    print(f"{text}\nfigures in {out}, tables in {out.with_suffix('.md')}")


def _compare_clusters(entries: tuple[str, ...], seeds: int, out: Path, workers: int) -> None:
    from rlroute.config import RunConfig
    from rlroute.experiments.play import ladder as clusters
    from rlroute.records import environment, write_atomically, write_json
    from rlroute.registry import default_names

    _make_folder(out)
    how = clusters.Ladder()
    rows = clusters.compare(
        entries or default_names(), range(seeds), how, workers, lambda text: print(text, file=sys.stderr)
    )
    text = clusters.to_markdown(rows)
    write_json(
        out / "clusters.json",
        {"command": _command(), "environment": environment(RunConfig(), "cpu"), "training": vars(how), "rows": rows},
    )
    write_atomically(out / "clusters.md", text)
    print(f"{text}\nfigures in {out}/clusters.json, tables in {out}/clusters.md")


@app.command
def gradients(
    entries: tyro.conf.Positional[tuple[str, ...]] = (),
    experts: str = "4",
    k: str = "1",
    layers: str = "1,2",
    tokens: str = "3",
    one_at_a_time: bool = False,
    train_steps: str = "0,50",
    draws: int = 1000,
    samples: int = 32,
    warm_up: int = 20,
    seeds: int = 4,
    gate_form: Literal["own", "unit"] = "own",
    corpus: str = "synth:documents=512,vocab=32,domains=4",
    out: Path = Path("results/gradients"),
) -> None:
    """Measure the learning signal at the router's logits: what training micro-batches give ENTRIES against the exact gradient.

    Args:
        entries: routers or estimators, as `reinforce:baseline=ema`; by default every router, and the estimators of reinforce.
        experts: numbers of experts, as `2,4`; this and the next four make a sweep over all combinations.
        k: experts per token.
        layers: MoE layers of the model.
        tokens: tokens of the measured micro-batch, one sequence. Exact to 4096 joint choices: for k = 1, E^(tokens * layers).
        one_at_a_time: vary one of these four sizes at a time, the others at their first value.
        train_steps: measure after so many steps of real training.
        draws: micro-batches drawn per measurement, where what they can give is not enumerated as well.
        samples: sampled joint choices of a conditional gradient, beyond 4096.
        warm_up: steps for running means and value heads before a measurement.
        seeds: seeds 0 to seeds - 1: weights, data, measured tokens and draws.
        gate_form: own: the router's gate; unit: value 1/k, gradient of the router's gate.
        corpus: what is trained and measured on.
        out: folder for gradients.md, gradients.json and gradients.html.
    """
    import torch

    from rlroute.experiments.gradients import instrument

    numbers = instrument.parse_numbers
    sweep = instrument.Sweep(
        entries=entries or instrument.default_entries(),
        experts=numbers("experts", experts),
        k=numbers("k", k),
        layers=numbers("layers", layers),
        tokens=numbers("tokens", tokens),
        one_at_a_time=one_at_a_time,
        train_steps=numbers("train_steps", train_steps),
        draws=draws,
        samples=samples,
        warm_up=warm_up,
        seeds=seeds,
        gate_form=gate_form,
        corpus=corpus,
    )
    _make_folder(out)
    torch.set_num_threads(1)
    print(_publish_gradients(sweep, out))
    print(f"table in {out}/gradients.md, all figures in {out}/gradients.json, page in {out}/gradients.html")


def _publish_gradients(sweep: Sweep, out: Path) -> str:
    """Measure, write the table, the figures and the page, and return the table's text."""
    from rlroute.experiments.gradients import page
    from rlroute.experiments.gradients.instrument import run
    from rlroute.experiments.report.page import new_figure
    from rlroute.records import write_atomically
    from rlroute.training.data import load_corpus

    new_figure("", "", 100)  # without Plotly this fails now rather than after the work
    rows, unmeasured = run(sweep, lambda text: print(text, file=sys.stderr, flush=True))
    text = page.to_markdown(rows, unmeasured)
    provenance = load_corpus(sweep.corpus).provenance
    write_atomically(out / "gradients.md", text + "\n")
    write_atomically(out / "gradients.json", page.to_json(sweep, rows, unmeasured, _command(), provenance))
    write_atomically(out / "gradients.html", page.render(rows, unmeasured, sweep, _command()))
    return text


def _select(path: Path, only: tuple[str, ...]) -> list[RunRecord]:
    """Return the ended runs of a store whose ids start as ``only`` says.

    Raises:
        StoreError: there are none, or they are trials of a search.
    """
    from rlroute.experiments.launch.spec import SEARCH
    from rlroute.records import read_runs

    if (path / SEARCH).exists():
        raise StoreError(f"{path} holds trials of a search, which stopped some of them early: they make no comparison")
    records = [r for r in read_runs(path) if not only or r.id.startswith(only)]
    if not records:
        wanted = f" whose id starts with {' or '.join(map(repr, only))}" if only else ""
        raise StoreError(f"{path} holds no ended run{wanted}")
    return records


def _publish(records: list[RunRecord], out: Path, reference: str | None) -> str:
    """Write table and report, and return the table's text."""
    from rlroute.experiments.comparison.table import build_table, to_csv, to_markdown
    from rlroute.experiments.report.page import write_report
    from rlroute.records import write_atomically

    built = build_table(records, reference)
    text = to_markdown(built)
    write_atomically(out / "table.md", text)
    write_atomically(out / "table.csv", to_csv(built))
    write_report(records, out / "report.html", reference=reference)
    return text


def _publish_if_comparable(records: list[RunRecord], out: Path, reference: str | None) -> None:
    """Print and write the table; of runs that differ in more than their router say so, and list them."""
    from rlroute.experiments.report.listing import records_text

    try:
        print(_publish(records, out, reference))
        print(f"table in {out}/table.md and table.csv, report in {out}/report.html")
    except ComparisonError as error:
        print(f"{records_text(records)}\nno table: {error}")


def _make_folder(path: Path) -> None:
    """Make the folder that a command will write into, before its work."""
    from rlroute.records import storing

    with storing(path):
        path.mkdir(parents=True, exist_ok=True)


def _score(summary: dict[str, Any]) -> str:
    final = summary["final"]
    return f"{final['bits_per_byte']:.4f} bits per byte" if final else str(summary["diverged"])


def _command() -> str:
    return shlex.join(["rlroute", *sys.argv[1:]])


def main() -> None:
    """Run the command line."""
    try:
        app.cli(
            prog="rlroute",
            description="Compare the routers of mixture-of-experts transformers inside identical models.",
        )
    except RlrouteError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what ended is kept, and the same command goes on", file=sys.stderr)
        sys.exit(130)
