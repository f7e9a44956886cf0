"""The command ``judge``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from rlroute.config import Budget
from rlroute.experiments.cli.common import FROM, LAUNCH, SHARED, From, Shared, command_line, recipe
from rlroute.experiments.cli.folders import make_folder
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.launch.jobs import Launch
from rlroute.experiments.verdicts import MARGIN, MAX_SEEDS, MaxSeeds
from rlroute.limits import Positive

UNRESOLVED = 3
"""The exit code where all seeds are spent, or a run diverged, without a verdict."""


def judge(
    candidate: tyro.conf.Positional[str],
    against: str = "switch",
    margin: Positive = MARGIN,
    max_seeds: MaxSeeds = MAX_SEEDS,
    budget: Budget = "tokens",
    seconds: Positive | None = None,
    tuned: bool = True,
    preset: str | None = None,
    out: Path = Path("results"),
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    start: Annotated[From, tyro.conf.arg(name="")] = FROM,
    shared: Annotated[Shared, tyro.conf.arg(name="")] = SHARED,
) -> None:
    """Judge one routing change: better, worse, equivalent within the margin, or unresolved. What is compared, margin,
    seeds and rule are registered before the first run; seeds are added until there is a verdict (docs/judge.md).

    Exit code 0 with a verdict, 3 without.

    Args:
        candidate: an entry as of `compare`, or a router's file as in `./my_router.py` or `./my_router.py:field=value`.
        against: the entry that it is held against.
        margin: a difference below it does not matter, in bits per byte.
        max_seeds: the most seeds, from 0 on; it looks after 3, 4, 6, 8, 12, 16, ... of them.
        budget: what is equal: tokens (--train.steps), the training FLOPs of the entry that it is held against, or time
            (--seconds).
        seconds: training time of each run under budget time; the figures are then not reproducible.
        tuned: use tuned settings; a candidate that was never tuned gets those of the other entry. --no-tuned takes
            --train.lr and the routers' defaults.
        preset: gpu-30m, gpu-124m, gpu-350m, or one of `rlroute presets`: the data, model and train options, but for
            those that are given; nothing is tuned.
        out: folder for judgement.json.
    """
    from rlroute.experiments.comparison.judge import judge as judged
    from rlroute.records import write_json

    parts, _ = recipe(preset, shared, tuned)
    name_broken(candidate, against)
    make_folder(out)
    found = judged(
        candidate,
        against,
        margin=margin,
        max_seeds=max_seeds,
        budget=budget,
        seconds=seconds,
        start=start.find(launch.store),
        how=launch,
        command=command_line(),
        **parts,
    )
    write_json(out / "judgement.json", found.to_dict())
    print(f"{found}\njudgement in {out}/judgement.json, runs in {launch.store}/")
    if not found.verdict.resolved:
        sys.exit(UNRESOLVED)
