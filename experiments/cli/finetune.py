"""The command ``finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlroute.config import Parts
from rlroute.errors import ConfigError
from rlroute.experiments.cli.common import (
    LAUNCH,
    SHARED,
    From,
    Shared,
    command_line,
    open_results,
    publish,
    run_folder,
    said_of_parts,
)
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.launch.jobs import Job, Launch, together
from rlroute.experiments.verdicts import MARGIN, Seeds
from rlroute.limits import BelowOne, Count, Positive, Whole, option


def finetune(
    run: tyro.conf.Positional[str],
    entries: tyro.conf.Positional[tuple[str, ...]] = (),
    parts: Annotated[tuple[Parts, ...], tyro.conf.arg(name="train")] = ("all",),
    expert_dropout: tuple[BelowOne, ...] = (),
    tokens: tuple[Count, ...] = (),
    seeds: Seeds = 3,
    from_step: Whole | None = None,
    from_router: Literal["kept", "fresh"] = "kept",
    reference: str | None = None,
    margin: Positive = MARGIN,
    out: Path = Path("results"),
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    shared: Annotated[Shared, tyro.conf.arg(name="")] = SHARED,
) -> None:
    """Train RUN on: its weights, data, model and training are the defaults, slower and shorter, with training tokens
    evaluated beside validation tokens. Print the table of all modes, each on the same seeds (docs/finetuning.md).

    Args:
        run: a run's folder, or its id in the store.
        entries: routers as of `compare`, in place of the run's; of the same name, what an entry leaves out is as the
            run has it.
        parts: what trains, each in runs of its own; all else is frozen. --train.router-lr-scale 0 freezes routers.
        expert_dropout: the share of activations inside experts that is dropped in training, each in runs of its own.
        tokens: training tokens, each number in runs of its own; fewer are contained in more.
        seeds: each mode is trained with seeds 0 to seeds - 1.
        from_step: of the run's checkpoint; none: the last.
        from_router: kept: what the checkpoint holds of routers is taken where it has a place; fresh: they start anew.
        reference: the mode that differences are taken to, as the table labels it; the first by default.
        margin: a difference below it does not matter, in bits per byte; say it before the runs.
        out: folder for table.md, table.csv, verdicts.csv and report.html.
    """
    from rlroute.experiments.comparison.compare import tabulate
    from rlroute.experiments.comparison.entries import labels
    from rlroute.experiments.comparison.ladder_file import read_ladder
    from rlroute.experiments.launch.runs import run_all
    from rlroute.experiments.recipes.finetuning import defaults, variants
    from rlroute.experiments.recipes.sizes import over
    from rlroute.reading import read_described
    from rlroute.registry import run_config

    given = said_of_parts()
    for part, field, way in (("train", "parts", "--train"), ("data", "train_tokens", "--tokens")):
        if field in given[part]:
            raise ConfigError(f"{option(f'{part}.{field}')}: finetune takes {way}")
    name_broken(*entries)
    source = run_config(read_described(run_folder(run, launch.store))["config"])
    size = over(defaults(source), shared.data, shared.model, shared.train, given)
    start = From(origin=run, from_step=from_step, from_router=from_router).find(launch.store)
    assert start is not None
    named = variants(entries, source, size, start, parts=parts, expert_dropout=expert_dropout, tokens=tokens)
    called = labels({config.content_hash(): config.to_dict() for _, config in named})
    reference = reference or called[named[0][1].content_hash()]
    if reference not in called.values():
        raise ConfigError(f"--reference {reference!r}: legal are {', '.join(called.values())}")
    ladder, results = read_ladder(launch.store), open_results(out)
    jobs = [Job(config, seed, command_line(), label=label) for seed in range(seeds) for label, config in named]
    publish(tabulate(run_all(together(jobs), launch), reference, margin, ladder), out, results, launch.store)
    print(f"runs in {launch.store}/")
