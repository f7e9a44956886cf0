"""The command ``upcycle``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import tyro

from rlroute.config import TrainConfig
from rlroute.experiments.cli.common import LAUNCH, From, command_line, refuse_several, run_folder, said
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.cli.training import train_one
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.limits import Count, Experts, NonNegative, Seed, Share, Whole


def upcycle(
    run: tyro.conf.Positional[str],
    router: str = "switch",
    experts: Experts = 8,
    k: Count = 2,
    pieces: Count = 1,
    noise: NonNegative = 0.0,
    drop: Share = 0.0,
    optimizer: Literal["fresh", "carried"] = "fresh",
    step: Whole | None = None,
    seed: Seed = 0,
    tuned: bool = True,
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
    train: Annotated[TrainConfig, tyro.conf.arg()] = TrainConfig(),  # noqa: B008 (frozen)
) -> None:
    """Make a mixture of a dense run and train it on: each expert is a copy of the MLP, or of one of its equal pieces,
    the router starts anew (docs/upcycling.md). `compare ROUTER --from RUN --upcycle` trains the same run in this model.

    Args:
        run: the dense run: its folder, or its id in the store.
        router: what decides: a router, or `router:field=value,...`.
        experts: of each layer.
        k: experts per token.
        pieces: into which the MLP is cut; a token that takes every piece in equal parts has the dense model's function.
        noise: added to each expert's weights, over their spread.
        drop: share of each expert's hidden units that is drawn anew (Drop-Upcycling).
        optimizer: carried: its moments go on from the dense run, which keeps them with --keep state.
        step: of the dense run's checkpoint; none: the last.
        seed: of the router's initial weights, data order and noise.
        tuned: use the router's tuned settings; --no-tuned takes --train.lr and its defaults.
    """
    from rlroute.experiments.checkpoints.upcycled import at_start, mixture_of
    from rlroute.experiments.recipes.presets import build_comparison
    from rlroute.records import RunFolder

    refuse_several("upcycle", launch)
    train.check()
    name_broken(router)
    data, model = mixture_of(run_folder(run, launch.store), experts, k, pieces)
    (config,) = build_comparison([router], data, model, train, tuned=tuned, said=said("train"))
    start = From(
        origin=run, from_step=step, from_optimizer=optimizer, upcycle=True, upcycle_noise=noise, upcycle_drop=drop
    )
    config = replace(config, start=start.find(launch.store))
    if not RunFolder(launch.store, config, seed).ended:
        dense, mixture = at_start(config, seed, launch.store)
        print(f"before its first step {mixture:.6f} bits per byte, the dense model {dense:.6f}")
    train_one(Job(config, seed, command_line(), label=router), launch)
