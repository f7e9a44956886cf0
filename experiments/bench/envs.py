"""How fast the native vector environments step, with Gymnasium's own native CartPole beside them in the same rounds.

Shape suffixes: C copies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from rlroute.experiments.bench.timing import ratio

PEER = "CartPole-v1"
CONTENDERS = (PEER, "rlroute.envs:rlroute/TokenBandit-v0", "rlroute.envs:rlroute/Dispatch-v0")
"""TokenBandit in its default 16 dimensions; both with 8 experts."""
COPIES = (1, 64, 1024)
ACTION_SETS = 16


class Speed(NamedTuple):
    """What one environment did.

    Attributes:
        name, copies: the environment, and how many copies were stepped together.
        steps_per_second: the median over rounds of environment steps per second of CPU time.
        ratio: of its speed to CartPole's in the same round: geometric mean, low and high end of its 95 % interval.
    """

    name: str
    copies: int
    steps_per_second: float
    ratio: dict[str, float | None]


def bench_envs(rounds: int = 7, seconds: float = 0.5) -> Iterator[Speed]:
    """Step each environment for about ``seconds`` per round, in turn, with random actions, and yield its speeds.

    Steps that only reset a copy (NEXT_STEP) do not count; drawing the actions is not timed.
    """
    for copies in COPIES:
        stepped = {name: gymnasium.make_vec(name, num_envs=copies) for name in CONTENDERS}
        calls = {name: _calls_in(envs, seconds) for name, envs in stepped.items()}
        cost: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(rounds):
            for name, envs in stepped.items():
                cost[name].append(_seconds_per_step(envs, calls[name]))
        for name in CONTENDERS:
            yield Speed(name, copies, 1.0 / median(cost[name]), ratio(cost[PEER], cost[name]))


def speed_text(speed: Speed) -> str:
    """Return a result as one line."""
    name, copies, steps, times = speed
    interval = f"{times['mean']:.2f} [{times['low']:.2f}, {times['high']:.2f}]"
    shown = f"{steps / 1e3:7,.0f} k steps per CPU second, {interval} times {PEER}"
    return f"{name.rpartition('/')[2]:<16} n={copies:<5} {shown}"


def _calls_in(envs: Any, seconds: float) -> int:
    """Find out how many vector steps fill ``seconds``; this also warms up."""
    calls = 64
    while (spent := _seconds_per_step(envs, calls) * calls * envs.num_envs) < seconds / 8:
        calls *= 2
    return max(1, int(calls * seconds / spent))


def _seconds_per_step(envs: Any, calls: int) -> float:
    """Return the CPU seconds of one step of one copy, over ``calls`` vector steps from a reset."""
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(ACTION_SETS)]
    envs.reset(seed=0)
    steps, ended_C = 0, np.zeros(envs.num_envs, dtype=bool)
    start = time.process_time()
    for call in range(calls):
        steps += envs.num_envs - int(np.count_nonzero(ended_C))
        _, _, terminated_C, truncated_C, _ = envs.step(actions[call % ACTION_SETS])
        ended_C = terminated_C | truncated_C
    return (time.process_time() - start) / steps
