"""The command ``ladder``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from rlroute.experiments.cli.common import LAUNCH, SHARED, Shared, command_line, recipe
from rlroute.experiments.cli.folders import make_folder
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.cli.output import show
from rlroute.experiments.launch.jobs import Launch
from rlroute.experiments.verdicts import Seeds
from rlroute.limits import Positive, Size


def ladder(
    entries: tyro.conf.Positional[tuple[str, ...]],
    against: str = "switch",
    budgets: tuple[Positive, ...] = (),
    widths: tuple[Size, ...] = (),
    seeds: Seeds = 3,
    tuned: bool = True,
    preset: str | None = None,
    out: Path = Path("results"),
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    shared: Annotated[Shared, tyro.conf.arg(name="")] = SHARED,
) -> None:
    """Train ENTRIES and a reference at several budgets of compute and several widths; print each entry's compute
    multiplier: how much more compute the reference needs for the same loss (docs/ladder.md).

    Args:
        entries: as of `compare`, or a router's file.
        against: the reference.
        budgets: at least three shares of the training FLOPs that the reference takes at the model's width and
            --train.steps; by default 0.25, 0.5 and 1.
        widths: of the model; by default half, once and three halves of --model.d-model. Experts are as much wider.
        seeds: each run is trained with seeds 0 to seeds - 1.
        tuned: use tuned settings, the same at all rungs; --no-tuned takes --train.lr and the routers' defaults.
        preset: gpu-30m, gpu-124m, gpu-350m, or one of `rlroute presets`: the data, model and train options, but for
            those that are given; nothing is tuned.
        out: folder for ladder.json, ladder.md and ladder.html.
    """
    from rlroute.experiments.comparison.ladder import climb
    from rlroute.experiments.comparison.ladder_file import FILE
    from rlroute.experiments.comparison.ladder_text import to_markdown
    from rlroute.experiments.report.ladder_page import render
    from rlroute.records import write_atomically, write_json

    parts, _ = recipe(preset, shared, tuned)
    name_broken(against, *entries)
    make_folder(out)
    found = climb(
        entries, against, budgets=budgets, widths=widths, seeds=seeds, how=launch, command=command_line(), **parts
    )
    text = to_markdown(found)
    for folder in (launch.store, out):
        write_json(folder / FILE, found.to_dict())
    write_atomically(out / "ladder.md", text)
    write_atomically(out / "ladder.html", render(found))
    show(text)
    print(f"ladder in {out}/ladder.json, ladder.md and ladder.html, runs in {launch.store}/")
