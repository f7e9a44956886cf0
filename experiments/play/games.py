"""``rlroute play``: a router, a reference policy or a saved Stable-Baselines3 policy in an environment, with its score
and regret. Such a policy plays as the router ``sb3``, which reads it without running anything in it.

Shape suffix: C copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium

from rlroute.agents.sb3 import Sb3Router
from rlroute.config import DENSE, DataConfig, ModelConfig, RouterConfig, TrainConfig
from rlroute.envs import IDS
from rlroute.envs.references import Policy, reference_policies, score_interval
from rlroute.envs.references import play as play_episode
from rlroute.envs.vector import RoutingVectorEnv
from rlroute.errors import ConfigError
from rlroute.experiments.play.player import Learning, RouterPlayer, Spec
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.text import markdown, plus_minus
from rlroute.limits import option
from rlroute.registry import router_names

SB3 = "sb3:"


@dataclass(frozen=True)
class Result:
    """What a policy scored.

    Attributes:
        name: the policy, and for routers whether greedy or sampled.
        score, half_width: 0 uniform, 1 oracle; and half the 95 % interval over episodes.
        regret, regret_half_width: the oracle's mean reward per step less the policy's; and half its 95 % interval.
    """

    name: str
    score: float
    half_width: float
    regret: float
    regret_half_width: float


def play(
    environment: str, names: tuple[str, ...], episodes: int, seed: int, how: Learning, table: Path | None = None
) -> list[Result]:
    """Play episodes with each policy; routers learn first.

    Args:
        environment: an id, with or without ``rlroute/``.
        names: reference policies, router entries, or ``sb3:FILE`` for ``sb3:policy=FILE``, which may hold a comma; all
            reference policies if there are none.
        episodes: as many copies play one episode each.
        seed: of the episodes; training uses others.
        how: how routers learn.
        table: the tokens of a bandit; synthetic clusters without one.

    Raises:
        ConfigError: an unknown environment or policy, a router that cannot play there, or a way of learning where
            nobody learns; before any work, unless it is only what it learns that makes a router leave a token without
            an expert where there is no action for that.
    """
    if episodes < 2:
        raise ConfigError(f"episodes = {episodes}: want 2 or more, an interval needs them")
    make = partial(_make, environment, table)
    envs = make(episodes)
    references = reference_policies(envs, seed)
    played, learn = dict[str, Callable[[], Policy]](), False
    for name in names or tuple(references):
        policies, learns = _policies(name, make, references, seed, how)
        played, learn = played | policies, learn or learns
    if not learn:
        _refuse_learning(how)
    results = []
    for name, prepare in played.items():
        rewards_C = play_episode(envs, prepare(), seed=10**6 + seed)
        score, half_width = score_interval(envs, rewards_C)
        uniform, oracle = envs.world.anchors()
        regret, unit = float(oracle - rewards_C.mean()), float(oracle - uniform)  # a score of 1 is as much reward
        results.append(Result(name, score, half_width, regret, half_width * unit))
    return results


def _make(environment: str, table: Path | None, copies: int) -> RoutingVectorEnv:
    name = environment if environment.startswith("rlroute/") else f"rlroute/{environment}"
    if name not in IDS:
        raise ConfigError(f"environment {environment!r}: legal are {', '.join(IDS)}")
    settings = {} if table is None else {"table": str(table)}
    # SAME_STEP: under the default, a finished copy's next action would be ignored and its reward mean nothing.
    envs: RoutingVectorEnv = gymnasium.make_vec(
        f"rlroute.envs:{name}", num_envs=copies, autoreset_mode="SameStep", **settings
    ).unwrapped
    return envs


def _refuse_learning(how: Learning) -> None:
    for name, value in vars(how).items():
        if value != getattr(Learning(), name):
            raise ConfigError(f"{option(name)} {value} does not apply: none of these policies learns here")


def _policies(
    name: str,
    make: Callable[[int], RoutingVectorEnv],
    references: dict[str, Policy],
    seed: int,
    how: Learning,
) -> tuple[dict[str, Callable[[], Policy]], bool]:
    """Return what a name means: functions that make the policy ready, by the name of its result; and whether it
    learns.
    """
    if name in references:
        return {name: lambda: references[name]}, False
    training = make(how.copies)
    player, taught = RouterPlayer(_config(name, references), Spec.of(training), seed), list[bool]()
    if not player.spec.batched:
        for explore in (False, True):  # an episode shows whether tokens stay without an expert, which has no action
            play_episode(training, player.policy(explore=explore), seed)

    def prepare(explore: bool) -> Policy:
        if player.learns and not taught:
            player.learn(training, how)
            taught.append(True)
        return player.policy(explore=explore)

    untaught = "" if player.learns else ", untaught: it learns through gates or not at all"
    greedy = {f"{name} (greedy{untaught})": lambda: prepare(False)}
    sampled = {f"{name} (sampled)": lambda: prepare(True)} if player.router.stochastic else {}
    return greedy | sampled, player.learns


def _config(name: str, references: Iterable[str]) -> RouterConfig:
    """Return the configuration of the router that a name means."""
    if name.startswith(SB3) and not name.startswith(f"{SB3}policy="):
        return Sb3Router.Config(policy=name.removeprefix(SB3))
    entry = name.partition(":")[0]
    if entry == DENSE or entry not in router_names():
        raise ConfigError(f"policy {name!r}: legal are {', '.join(references)}, sb3:FILE, {', '.join(router_names())}")
    config = build_entry(name, DataConfig(), ModelConfig(), TrainConfig()).router
    assert config is not None
    return config


def to_markdown(environment: str, results: list[Result]) -> str:
    """Return results as a table, best first."""
    rows = sorted(results, key=lambda result: -result.score)
    lines = [(r.name, plus_minus(r.score, r.half_width, 3), plus_minus(r.regret, r.regret_half_width)) for r in rows]
    return markdown((environment, "score", "regret per step"), lines, tight=True)
