"""Reference policies and their scores: what a learned router is to be compared with.

A policy looks at observations and infos of a vector environment and answers with an action per copy.

Shape suffixes: C copies, T steps, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from rlroute.envs.dispatch import DispatchConfig, DispatchWorld
from rlroute.envs.token_bandit import BanditWorld
from rlroute.envs.vector import RoutingVectorEnv
from rlroute.envs.world import Array

Policy = Callable[[Array, dict[str, Any]], Array]

PUBLISHED = {
    "rlroute/TokenBandit-v0": {"uniform": 0.0, "fixed": 0.005, "bayes": 1.0, "oracle": 1.0},
    "rlroute/TokenBandits-v0": {"uniform": 0.0, "fixed": 0.005, "bayes": 1.0, "oracle": 1.0},
    "rlroute/Dispatch-v0": {
        "uniform": 0.009,
        "round_robin": 0.239,
        "affinity": 0.398,
        "join_shortest_queue": 0.555,
        "least_delay": 0.615,
        "greedy": 0.775,
        "priced": 0.794,
    },
}
"""Scores in the default environments: means of 256 episodes from seed 0. Half widths of 95 % intervals: at most 0.005,
but 0.013 and 0.008 for Dispatch's uniform and affinity. Dispatch's 1 is a bound that no policy attains."""

PRICE = 1.75
"""How often the priced policy counts a token's own delay, for what its place in the queue costs later tokens.

The best of 1, 1.25, 1.5, 1.75, 2, 2.5, 3 and 4 in the default environment, on 256 episodes from seed 0 and again from
seed 1000.
"""


def reference_policies(envs: RoutingVectorEnv, seed: int = 0) -> dict[str, Policy]:
    """Return the environment's reference policies by name, worst first; those that draw do so from ``seed``."""
    world, generator = envs.world, np.random.default_rng([seed, 3])
    if isinstance(world, DispatchWorld):
        return _dispatch_policies(world, generator)
    assert isinstance(world, BanditWorld)
    return _bandit_policies(world, generator)


def play(envs: RoutingVectorEnv, policy: Policy, seed: int = 0) -> Array:
    """Play one episode in every copy and return the mean reward per step of each, shape (C,)."""
    observations, infos = envs.reset(seed=seed)
    rewards_TC = []
    for _ in range(envs.world.length):
        observations, rewards_C, _, _, infos = envs.step(policy(observations, infos))
        rewards_TC.append(rewards_C)
    return np.asarray(np.mean(rewards_TC, axis=0))


def score_interval(envs: RoutingVectorEnv, rewards_C: Array) -> tuple[float, float]:
    """Return the score of episodes' mean rewards and the half width of its 95 % interval (normal; nan for one
    episode).
    """
    scores_C = np.array([envs.score(reward) for reward in rewards_C.tolist()])
    if len(scores_C) == 1:
        return float(scores_C[0]), float("nan")
    return float(scores_C.mean()), float(1.96 * scores_C.std(ddof=1) / len(scores_C) ** 0.5)


def _bandit_policies(world: BanditWorld, generator: np.random.Generator) -> dict[str, Policy]:
    """uniform: any expert. fixed: the best single one. bayes (clusters): the likeliest cluster's. oracle: the token's
    best.
    """
    fixed = int(world.table.losses_NE.mean(0, dtype=np.float64).argmin())
    policies: dict[str, Policy] = {
        "uniform": lambda _, infos: generator.integers(world.num_experts, size=infos["token_id"].shape),
        "fixed": lambda _, infos: np.full(infos["token_id"].shape, fixed),
        "bayes": lambda observations, _: world.config.clusters.bayes_actions(observations),
        "oracle": lambda _, infos: infos["expert_losses"].argmin(-1),
    }
    if world.config.table:
        del policies["bayes"]  # nobody knows a checkpoint's
    return policies


def _dispatch_policies(world: DispatchWorld, generator: np.random.Generator) -> dict[str, Policy]:
    """All but the first two choose the expert with the highest index among those with room.

    uniform: any expert. round_robin: the next expert, in turn. affinity: the highest affinity. join_shortest_queue: the
    shortest queue. least_delay: the least delay. greedy: the highest reward for this token. priced: greedy, with the
    delay counted PRICE times.
    """
    config = world.config
    return {
        "uniform": lambda observations, _: generator.integers(config.experts, size=len(observations)),
        "round_robin": lambda *_: world.step_C % config.experts,
        **{name: partial(_highest, index, config, world, generator) for name, index in DISPATCH_INDICES.items()},
    }


Index = Callable[[DispatchConfig, Array, Array, Array], Array]

DISPATCH_INDICES: dict[str, Index] = {
    "affinity": lambda config, affinity, queue, delay: affinity,
    "join_shortest_queue": lambda config, affinity, queue, delay: -queue,
    "least_delay": lambda config, affinity, queue, delay: -delay,
    "greedy": lambda config, affinity, queue, delay: affinity - config.latency_weight * delay,
    "priced": lambda config, affinity, queue, delay: affinity - PRICE * config.latency_weight * delay,
}
"""What each policy looks at, from a token's affinities, the queues (in tokens) and its delays (in steps), all (C,
E).
"""


def _highest(
    index: Index,
    config: DispatchConfig,
    world: DispatchWorld,
    generator: np.random.Generator,
    observations: Array,
    infos: dict[str, Any],
) -> Array:
    affinity, fill, rate, away = observations.astype(np.float64).reshape(len(observations), 4, -1).swapaxes(0, 1)
    queue = fill * config.capacity
    delay = (queue + 1.0) / (rate * world.rates_GE.max()) + config.transfer * away
    tie_break = 1e-9 * generator.random(queue.shape)
    value_CE = np.where(infos["action_mask"] > 0, index(config, affinity, queue, delay) + tie_break, -np.inf)
    return np.asarray(value_CE.argmax(1))
