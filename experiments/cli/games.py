"""The commands in which routers play: ``play``, and ``compare --task clusters``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from rlroute.errors import ConfigError
from rlroute.experiments.cli.common import command_line, refuse_others
from rlroute.experiments.cli.folders import make_folder
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.cli.output import show
from rlroute.limits import Between, Count, Positive, Seed


def play(
    environment: tyro.conf.Positional[str] = "rlroute/TokenBandit-v0",
    policies: tyro.conf.Positional[tuple[str, ...]] = (),
    table: Path | None = None,
    episodes: Annotated[int, Between(2, 10**6)] = 256,
    seed: Seed = 0,
    updates: Count = 400,
    copies: Annotated[int, Between(1, 10**5)] = 32,
    rollout: Annotated[int, Between(1, 10**5)] = 8,
    lr: Positive = 0.02,
) -> None:
    """Play an environment in which routing is the action; print scores (0 uniform, 1 oracle) and regrets with 95 %
    intervals.

    Args:
        environment: TokenBandit-v0, TokenBanditHard-v0, TokenBandits-v0 or Dispatch-v0; or CartPole-v1, on which
            REINFORCE shows on three seeds that it is right (it takes one router and none of the options).
        policies: reference policies, routers (`router:field=value,...`; they learn first) or sb3:FILE (a policy of
            Stable-Baselines3, as the router `sb3` reads it); all reference policies if none are given.
        table: the tokens of a bandit, from `rlroute export-tokens`; synthetic clusters without one.
        episodes: episodes per policy.
        seed: of episodes, initial weights and draws.
        updates: rollouts that a router learns from.
        copies: environments stepped together while it does.
        rollout: steps of a rollout.
        lr: learning rate of Adam.
    """
    name_broken(*policies)
    if environment == "CartPole-v1":
        from rlroute.experiments.play import cartpole

        given: dict[str, object] = {"table": table, "episodes": episodes, "seed": seed, "updates": updates}
        given |= {"copies": copies, "rollout": rollout, "lr": lr}
        plain = {"table": None, "episodes": 256, "seed": 0, "updates": 400, "copies": 32, "rollout": 8, "lr": 0.02}
        refuse_others("CartPole-v1", "one router and no option", given, plain)
        if len(policies) > 1:
            raise ConfigError(f"CartPole-v1 takes one router, not {', '.join(policies)}")
        entry = policies[0] if policies else cartpole.ENTRY
        show(cartpole.to_markdown(entry, cartpole.play(entry, range(3))))
        return
    from rlroute.experiments.play import games
    from rlroute.experiments.play.player import Learning

    results = games.play(environment, policies, episodes, seed, Learning(updates, copies, rollout, lr), table=table)
    show(games.to_markdown(environment, results))


def compare_clusters(entries: tuple[str, ...], seeds: int, out: Path, workers: int) -> None:
    from rlroute.experiments.play import ladder
    from rlroute.experiments.recipes.presets import routers_for
    from rlroute.provenance import environment
    from rlroute.records import write_atomically, write_json

    say = partial(print, file=sys.stderr)
    name_broken(*entries)
    entries = entries or tuple(routers_for([ladder.router_shape(task, 0) for task in ladder.TASKS.values()], say))
    make_folder(out)
    how = ladder.Ladder()
    rows = ladder.compare(entries, range(seeds), how, workers, say)
    text = ladder.to_markdown(rows)
    where = {"command": command_line(), "environment": environment("cpu", "cpu", 1)}
    write_json(out / "clusters.json", where | {"training": vars(how), "rows": rows})
    write_atomically(out / "clusters.md", text)
    show(text)
    print(f"figures in {out}/clusters.json, tables in {out}/clusters.md")
