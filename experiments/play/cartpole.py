"""Trust: our REINFORCE on CartPole-v1, through the code that plays routing environments. ``rlroute play CartPole-v1``.

Two "experts", push left and push right, and the four numbers of the pole as hidden state: if the agent is right, it
balances the pole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import gymnasium
import numpy as np

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.play.player import Learning, RouterPlayer, Spec
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.text import markdown

ENVIRONMENT = "CartPole-v1"
ENTRY = "reinforce:discount=0.98,policy_weight=1.0,value_weight=0.001,balance_weight=0.0,ema_decay=0.9"
HOW = Learning(updates=97, copies=16, rollout=256, lr=0.03)
"""97 * 16 * 256 steps: just under 400,000."""
EPISODES, LENGTH, SOLVED = 100, 500, 475.0


class Return(NamedTuple):
    """The mean greedy return over ``EPISODES`` episodes after training with a seed, and the environment steps it
    took.
    """

    seed: int
    mean: float
    steps: int


def play(entry: str, seeds: Sequence[int], how: Learning = HOW) -> list[Return]:
    """Train and evaluate a router on CartPole with each seed.

    Raises:
        ConfigError: it is no router that can play there.
    """
    config = build_entry(entry, DataConfig(), ModelConfig(), TrainConfig()).router
    if config is None:
        raise ConfigError(f"policy {entry!r}: legal are routers")
    results = []
    for seed in seeds:
        player = RouterPlayer(config, Spec(width=4, num_experts=2, vocabulary=1), seed)
        player.learn(_make(how.copies), how)
        results.append(Return(seed, _greedy_return(player, seed), how.updates * how.copies * how.rollout))
    return results


def _make(copies: int) -> gymnasium.vector.VectorEnv:
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    return gymnasium.make_vec(ENVIRONMENT, copies, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})


def _greedy_return(player: RouterPlayer, seed: int) -> float:
    envs, policy = _make(EPISODES), player.policy(explore=False)
    observations, infos = envs.reset(seed=10**6 + seed)
    returns_C, running_C = np.zeros(EPISODES), np.ones(EPISODES, dtype=bool)
    for _ in range(LENGTH):
        observations, rewards_C, terminated_C, truncated_C, infos = envs.step(policy(observations, infos))
        returns_C += running_C * rewards_C
        running_C &= ~(terminated_C | truncated_C)
    return float(returns_C.mean())


def to_markdown(entry: str, results: Sequence[Return]) -> str:
    """Return the results as a table."""
    head = (f"{ENVIRONMENT}, {entry}", "steps", f"greedy return, {EPISODES} episodes")
    lines = [(f"seed {r.seed}", f"{r.steps:,}", f"{r.mean:.1f}") for r in results]
    solved = sum(r.mean >= SOLVED for r in results)
    return f"{markdown(head, lines, tight=True)}\n\n{solved} of {len(results)} seeds reach {SOLVED:g}."
