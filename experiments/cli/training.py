"""The commands that train: ``train``, ``compare``, ``sweep`` and ``tune``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rlroute.config import Budget
from rlroute.errors import ConfigError
from rlroute.experiments.cli.common import (
    FROM,
    LAUNCH,
    SHARED,
    From,
    Shared,
    command_line,
    open_results,
    publish,
    recipe,
    refuse_others,
    refuse_several,
    said,
    score,
)
from rlroute.experiments.cli.folders import make_way
from rlroute.experiments.cli.games import compare_clusters
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.cli.output import show
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.verdicts import MARGIN, Seeds
from rlroute.limits import Positive, Seed
from rlroute.machine import cores

TUNING = Launch(store=Path("tuning"))
"""Trials have a store of their own: they are no comparison."""


def train(
    entry: tyro.conf.Positional[str] = "",
    seed: Seed = 0,
    tuned: bool = True,
    preset: str | None = None,
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    start: Annotated[From, tyro.conf.arg(name="")] = FROM,
    shared: Annotated[Shared, tyro.conf.arg(name="")] = SHARED,
) -> None:
    """Train one run: ENTRY is a router, `router:field=value,...`, or `dense`. An unfinished run goes on where it stood.
    It is the run that `compare ENTRY` trains with this seed.

    With --workers, several processes train it together: as many micro-batches as there are workers, or
    --train.micro-batches, a multiple of it.

    Args:
        entry: what to train; with a preset by default its own.
        seed: of initial weights, data order and routing noise.
        tuned: use the entry's tuned settings; --no-tuned takes --train.lr and the router's defaults.
        preset: gpu-30m, gpu-124m, gpu-350m, or one of `rlroute presets`: the data, model and train options, but for
            those that are given; nothing is tuned.
    """
    from rlroute.experiments.recipes.presets import build_comparison

    refuse_several("train", launch)
    parts, own = recipe(preset, shared, tuned)
    if not (entry := entry or own):
        raise ConfigError("rlroute train wants an ENTRY: a router (rlroute routers), or dense")
    if (steps := parts["train"]).micro_batches == 1:
        parts["train"] = replace(steps, micro_batches=launch.workers)
    name_broken(entry)
    (config,) = build_comparison([entry], **parts)
    train_one(Job(replace(config, start=start.find(launch.store)), seed, command_line(), label=entry), launch)


def train_one(job: Job, launch: Launch) -> None:
    """Train a run by itself, and print what it came to."""
    from rlroute.experiments.comparison.marks import marks
    from rlroute.experiments.launch.runs import run_all
    from rlroute.records import RunFolder

    already = "already " if RunFolder(launch.store, job.config, job.seed).ended else ""
    (record,) = run_all([job], launch)
    print(f"{already}{record.summary['status']}: {score(record.summary)}; record in {launch.store / record.id}")
    for mark, figures in marks([record]).items():
        print(f"measured: {mark} ({figures})")


def compare(
    entries: tyro.conf.Positional[tuple[str, ...]] = (),
    seeds: Seeds = 3,
    task: Literal["text", "clusters"] = "text",
    reference: str | None = None,
    margin: Positive = MARGIN,
    budget: Budget = "tokens",
    seconds: Positive | None = None,
    tuned: bool = True,
    preset: str | None = None,
    out: Path = Path("results"),
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    start: Annotated[From, tyro.conf.arg(name="")] = FROM,
    shared: Annotated[Shared, tyro.conf.arg(name="")] = SHARED,
) -> None:
    """Train ENTRIES on the same seeds; print the table, write it and the report. By default these are seven, at what
    they were tuned to; with a preset that of the preset.

    Args:
        entries: routers, `router:field=value,...`, `router+router@SITES` (as `switch+hash@0-1`), or `dense`; `all`:
            the dense model and every router that takes the model's shapes.
        seeds: each entry is trained with seeds 0 to seeds - 1.
        task: text; or clusters: latent clusters whose best score is known, uniform and skewed, both gate forms, every
            router (of the other options it takes --seeds, --out and --concurrency).
        reference: the entry that differences are taken to, as the table labels it (default: switch, or the first by
            name); under budget flops, whose training FLOPs everyone gets.
        margin: a difference below it does not matter, in bits per byte; say it before the runs.
        budget: what is equal: tokens (--train.steps), training FLOPs, or time (--seconds).
        seconds: training time of each run under budget time; the figures are then not reproducible.
        tuned: use each entry's tuned settings; --no-tuned takes --train.lr and the routers' defaults.
        preset: gpu-30m, gpu-124m, gpu-350m, or one of `rlroute presets`: the data, model and train options, but for
            those that are given; nothing is tuned.
        out: folder for table.md, table.csv, verdicts.csv and report.html.
    """
    if task == "clusters":
        options = {
            "reference": reference,
            "margin": margin,
            "budget": budget,
            "seconds": seconds,
            "tuned": tuned,
            "preset": preset,
        }
        _refuse_of_text(options, launch, start, shared)
        compare_clusters(entries, seeds, out, launch.concurrency or cores())
        return
    from rlroute.experiments.comparison import compare as comparing

    parts, own = recipe(preset, shared, tuned)
    name_broken(*entries)
    results = open_results(out)
    found = comparing.compare(
        entries or ((own,) if own else ()),
        seeds=seeds,
        reference=reference,
        margin=margin,
        budget=budget,
        seconds=seconds,
        start=start.find(launch.store),
        how=launch,
        command=command_line(),
        **parts,
    )
    publish(found, out, results, launch.store)
    print(f"runs in {launch.store}/")


def _refuse_of_text(options: dict[str, Any], launch: Launch, start: From, shared: Shared) -> None:
    """Refuse what applies to ``--task text`` alone.

    Raises:
        ConfigError: naming the first option.
    """
    plain = {"reference": None, "margin": MARGIN, "budget": "tokens", "seconds": None, "tuned": True, "preset": None}
    takes = "ENTRIES, --seeds, --out and --concurrency"
    refuse_others("--task clusters", takes, options, plain)
    refuse_others("--task clusters", takes, replace(launch, concurrency=None), LAUNCH)
    refuse_others("--task clusters", takes, {"from": start.origin}, {"from": None})
    for part in ("data", "model", "train"):
        mine, other = ({f"{part}.{n}": v for n, v in vars(getattr(s, part)).items()} for s in (shared, SHARED))
        refuse_others("--task clusters", takes, mine, other)


def sweep(
    spec: tyro.conf.Positional[Path],
    out: Path | None = None,
    reference: str | None = None,
    margin: Positive = MARGIN,
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    start: Annotated[From, tyro.conf.arg(name="")] = FROM,
) -> None:
    """Train the runs that a TOML file describes; print their table. The same command goes on where it stopped, and
    tries again what failed.

    Args:
        spec: the file (docs/sweeps.md): entries, seeds, a grid, random draws, resources.
        out: folder for the table; results/NAME if none is given.
        reference: the entry that differences are taken to.
        margin: a difference below it does not matter, in bits per byte; say it before the runs.
    """
    from rlroute.experiments.comparison.compare import tabulate
    from rlroute.experiments.comparison.ladder_file import read_ladder
    from rlroute.experiments.launch import spec as sweeping
    from rlroute.experiments.launch.runs import run_jobs

    read = sweeping.read_spec(spec)
    name_broken(*read.entries)
    how = read.launch(launch, said())
    search = read.search(read.jobs(command_line()))
    if search is not None:
        given: dict[str, object] = {"out": out, "reference": reference, "margin": margin}
        plain = {"out": None, "reference": None, "margin": MARGIN}
        refuse_others("a search", "no option of a table, for it makes none", given, plain)
        how = sweeping.apart(how, read.name)
    jobs = read.jobs(command_line(), start.find(how.store))
    out = out or Path("results") / read.name
    ladder, results = read_ladder(how.store), open_results(out)
    records, failed = run_jobs(jobs, how, search)
    if search is not None:
        show(sweeping.ranking(jobs, how.store))
    elif records:
        publish(tabulate(records, reference, margin, ladder), out, results, how.store)
    for run, reason in failed.items():
        print(f"set aside: {run}: {reason}", file=sys.stderr)
    print(f"{len(records)} of {len(jobs)} runs ended, {len(failed)} set aside; runs in {how.store}/")
    if failed:
        sys.exit(1)


def tune(
    entries: tyro.conf.Positional[tuple[str, ...]] = (),
    out: Path = Path("results/tuning.json"),
    seeds: Literal[1, 2, 3] = 3,
    around: bool = False,
    launch: Annotated[Launch, tyro.conf.arg(name="")] = TUNING,
    start: Annotated[From, tyro.conf.arg(name="")] = FROM,
    shared: Annotated[Shared, tyro.conf.arg(name="")] = SHARED,
) -> None:
    """Run the committed grid of ENTRIES (default: all that have one) on the tuning seeds; print each one's best trial.

    Args:
        entries: routers or `dense`, as named in the grid.
        out: all trials, as JSON, in a new file or one that has some, which are not run again; `compare` reads those of
            the folder experiments/recipes/tuning.
        seeds: how many of the tuning seeds each trial is trained with.
        around: in place of whole grids, learning rates alone, beside what else ENTRIES were tuned to for the nearest
            other length; from that rate on to its neighbours, until the best has been tried between two others.
    """
    from rlroute.experiments.comparison import tune as tuning
    from rlroute.experiments.recipes import tuned
    from rlroute.experiments.recipes.grid import edges
    from rlroute.experiments.recipes.presets import fitting_entries

    name_broken(*entries)
    base = tuning.Base(**vars(shared), seeds=tuned.TUNING_SEEDS[:seeds], start=start.find(launch.store))
    entries = tuning.named(entries or fitting_entries(tuple(tuned.GRID), base.data, base.model), base, said("train"))
    if around:
        base = replace(base, around=tuned.around(entries, tuned.Length.of(base.train)))
    known = tuning.read_trials(out, base)
    make_way(out)
    trials = tuning.tune(entries, base, launch, command_line(), known)
    tuning.write_trials([*(trial for trial in known if trial.entry not in entries), *trials], base, out)
    for entry, found in tuning.best_trials(trials).items():
        print(f"{entry}: {found}")
        for field in edges(base.grid(entry), found):
            print(f"{entry}: {field} is at the edge of its grid: a better value may lie beyond", file=sys.stderr)
    print(f"{len(trials)} trials in {out}; runs of those that it did not have in {launch.store}/")
