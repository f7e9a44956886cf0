"""Dispatch: send tokens to experts on devices, where the best expert for a token may have a queue.

One token arrives per step, at a random device. It has an affinity to each expert, high for the one of its topic. The
router picks an expert; the token crosses to the expert's device if it is another one, and waits in the expert's queue.
Every expert works off its queue at its own rate. Two things drift: a hot topic, which a share of all tokens has, and a
straggler, a device that runs slower than it should. An action is felt by the tokens that come later, so this is a
sequential problem, unlike TokenBandit.

Shape suffixes: C copies, T steps, N kinds of tokens, E experts, G devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from gymnasium import spaces

from rlroute.envs.drawing import Panel
from rlroute.envs.vector import RoutingVectorEnv
from rlroute.envs.world import Array, Infos, RoutingEnv, World
from rlroute.errors import ConfigError

KINDS_PER_TOPIC = 256
SLOWEST, FASTEST = 0.7, 1.3
ANCHOR_COPIES = 1024


@dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """Settings of Dispatch-v0.

    Raises:
        ConfigError: a value out of range.
    """

    experts: int = 8
    """E; also the number of topics."""
    devices: int = 4
    """G, which divides E: device g has the experts g * E / G and following."""
    capacity: int = 8
    """Tokens that an expert's queue holds."""
    load: float = 0.9
    """Tokens that arrive per token that all experts together can serve."""
    latency_weight: float = 0.02
    """Cost of a step of delay."""
    transfer: float = 8.0
    """Steps that the all-to-all takes to another device."""
    drop_cost: float = 4.0
    """Cost of sending a token to a full queue, where it is lost; above the cost of any delay by default."""
    hot: float = 0.5
    """Share of tokens that have the hot topic whatever the others have."""
    slowdown: float = 0.5
    """Speed of the straggler relative to its own when it is none; 1 for no straggler."""
    drift: int = 64
    """Steps after which the hot topic and the straggler move on."""
    episode_length: int = 256
    """Steps of an episode."""
    task_seed: int = 0
    """Of the kinds of tokens."""

    def __post_init__(self) -> None:
        integers = {"experts": 2, "devices": 1, "capacity": 1, "drift": 1, "episode_length": 1, "task_seed": 0}
        for name, low in integers.items():
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= low):
                raise ConfigError(f"dispatch: {name} = {getattr(self, name)!r}, legal are integers from {low}")
        if self.experts % self.devices:
            raise ConfigError(f"dispatch: devices = {self.devices}, legal are divisors of experts = {self.experts}")
        ranges = {"latency_weight": math.inf, "transfer": math.inf, "drop_cost": math.inf, "hot": 1.0}
        for name, high in ranges.items():
            if not 0 <= getattr(self, name) <= high or math.isinf(getattr(self, name)):
                raise ConfigError(f"dispatch: {name} = {getattr(self, name)!r}, legal are 0 to {high}")
        for name, high in {"load": math.inf, "slowdown": 1.0}.items():
            if not 0 < getattr(self, name) <= high or math.isinf(getattr(self, name)):
                raise ConfigError(f"dispatch: {name} = {getattr(self, name)!r}, legal are above 0 to {high}")


class DispatchWorld(World):
    """Tokens, queues and servers.

    Attributes:
        affinity_NE: of each kind of token to each expert, in [0, 1]; kinds n with the same n // KINDS_PER_TOPIC share a
            topic.
        rates_GE: tokens that each expert serves per step while device g is the straggler.
        away_GE: 1.0 where expert e is not on device g.
        queue_CE: tokens in each queue; a fraction is a token half served.
    """

    Config: ClassVar[type] = DispatchConfig

    def __init__(self, config: DispatchConfig, num_copies: int) -> None:
        super().__init__(config, num_copies)
        self.length = config.episode_length
        self.num_experts = experts = config.experts
        generator = np.random.default_rng(config.task_seed)
        topic_N = np.arange(experts * KINDS_PER_TOPIC) // KINDS_PER_TOPIC
        own_NE = topic_N[:, None] == np.arange(experts)
        self.affinity_NE = 0.5 * own_NE + 0.5 * generator.random(own_NE.shape)
        self.device_E = np.arange(experts) * config.devices // experts
        self.away_GE = (np.arange(config.devices)[:, None] != self.device_E).astype(np.float64)
        self.rates_GE = _rates(config, self.device_E)
        self._relative_GE = self.rates_GE / self.rates_GE.max()
        self.queue_CE = np.zeros((num_copies, experts))
        self._copies_C = np.arange(num_copies)
        shape = (self.length + 1, num_copies)
        self._kind_TC, self._source_TC, self._straggler_TC = (np.zeros(shape, dtype=np.int32) for _ in range(3))
        self.observation_space = spaces.Box(0.0, 1.0, (4 * experts,), np.float32)
        self.action_space = spaces.Discrete(experts)

    def draw(self, copies: Array, generators: Sequence[np.random.Generator]) -> None:
        """Empty the queues and draw the tokens of each copy, the hot topic, the straggler and when they move on."""
        config, steps = self.config, self.length + 1
        uniform = np.stack([generator.random(4 * steps + 3) for generator in generators], 1)
        is_hot, topic, kind, source = uniform[:-3].reshape(4, steps, -1)
        hot, straggler, phase = uniform[-3:]
        moves = (np.arange(steps)[:, None] + _pick(phase, config.drift)) // config.drift
        hot_topic = (_pick(hot, config.experts) + moves) % config.experts
        topic = np.where(is_hot < config.hot, hot_topic, _pick(topic, config.experts))
        self._kind_TC[:, copies] = topic * KINDS_PER_TOPIC + _pick(kind, KINDS_PER_TOPIC)
        self._source_TC[:, copies] = _pick(source, config.devices)
        self._straggler_TC[:, copies] = (_pick(straggler, config.devices) + moves) % config.devices
        self.queue_CE[copies] = 0.0

    def look_up(self) -> tuple[Array, Array, Array]:
        """Return the kind and the source of each copy's token, and the straggler, each (C,)."""
        at = (self.step_C, self._copies_C)
        return self._kind_TC[at], self._source_TC[at], self._straggler_TC[at]

    def route(self, actions: Array) -> tuple[Array, Infos]:
        """Return the reward and its parts, and let every expert serve for a step.

        A token that joins a queue of q at an expert of rate r is done after (q + 1) / r steps, and ``transfer`` more
        from another device: its ``delay``, at the rates of the moment. The reward is ``quality``, the affinity, less
        latency_weight * delay; or -drop_cost where the queue had no room (``dropped``, quality and delay are then 0).
        """
        config, at = self.config, (self._copies_C, actions)
        kind_C, source_C, straggler_C = self.current
        rates_CE, queue_C = self.rates_GE[straggler_C], self.queue_CE[at]
        served_C = queue_C + 1.0 <= config.capacity
        delay_C = served_C * ((queue_C + 1.0) / rates_CE[at] + config.transfer * self.away_GE[source_C, actions])
        quality_C = served_C * self.affinity_NE[kind_C, actions]
        self.queue_CE[at] = queue_C + served_C
        np.maximum(self.queue_CE - rates_CE, 0.0, out=self.queue_CE)
        reward_C = quality_C - config.latency_weight * delay_C - config.drop_cost * ~served_C
        return reward_C, {"quality": quality_C, "delay": delay_C, "dropped": ~served_C}

    def observe(self) -> Array:
        """Return affinity, queue over capacity, rate over the highest rate, and whether the expert is away; (C, 4 E),
        in [0, 1].
        """
        kind_C, source_C, straggler_C = self.current
        seen_CFE = np.empty((self.num_copies, 4, self.config.experts), dtype=np.float32)
        seen_CFE[:, 0] = self.affinity_NE[kind_C]
        np.divide(self.queue_CE, self.config.capacity, out=seen_CFE[:, 1], casting="same_kind")
        seen_CFE[:, 2] = self._relative_GE[straggler_C]
        seen_CFE[:, 3] = self.away_GE[source_C]
        return seen_CFE.reshape(self.num_copies, -1)

    def describe(self) -> Infos:
        """Return ``token_id`` (the kind of token), ``label`` (its topic) and ``action_mask``: the experts whose queue
        has room.
        """
        kind_C, mask_CE = self.current[0].astype(np.int64), self.queue_CE + 1.0 <= self.config.capacity
        return {"token_id": kind_C, "label": kind_C // KINDS_PER_TOPIC, "action_mask": mask_CE.astype(np.int8)}

    def anchors(self) -> tuple[float, float]:
        """Return the mean reward of uniform draws (1,024 episodes) and a bound that no policy passes.

        The bound gives each token its best expert in an idle system, in expectation over tokens, devices and
        stragglers.
        """
        return _uniform_reward(self.config), self._idle_reward()

    def _idle_reward(self) -> float:
        rewards = []
        for rates_E in self.rates_GE:
            for away_E in self.away_GE:
                cost_E = self.config.latency_weight * (1.0 / rates_E + self.config.transfer * away_E)
                rewards.append((self.affinity_NE - cost_E).max(1).mean())
        return float(np.mean(rewards))

    def panels(self, copy: int) -> list[Panel]:
        """Show the token's affinities, the queues and the rates; the best affinity, the longest queue and the straggler
        are marked.
        """
        affinity_E, queue_E, rate_E, away_E = self.observe()[copy].reshape(4, -1)
        return [
            Panel("affinity", affinity_E, int(affinity_E.argmax())),
            Panel("queue / capacity", queue_E, int(queue_E.argmax())),
            Panel("rate / highest", rate_E, int(rate_E.argmin())),
            Panel("on another device", away_E),
        ]


def _pick(uniform: Array, count: int) -> Array:
    """Turn uniform draws from [0, 1) into integers from 0 to count - 1."""
    return (uniform * count).astype(np.int64)


def _rates(config: DispatchConfig, device_E: Array) -> Array:
    """Return the rates of all experts for each straggler, shape (G, E), whose overall mean serves 1 / load tokens per
    step.
    """
    speed_G = np.linspace(SLOWEST, FASTEST, config.devices) if config.devices > 1 else np.ones(1)
    speed_GG = speed_G * np.where(np.eye(config.devices, dtype=bool), config.slowdown, 1.0)
    rates_GE = speed_GG[:, device_E]
    served: float = rates_GE.sum(1).mean() * config.load
    return np.asarray(rates_GE / served)


@lru_cache(maxsize=16)
def _uniform_reward(config: DispatchConfig) -> float:
    world, copies = DispatchWorld(config, ANCHOR_COPIES), np.arange(ANCHOR_COPIES)
    world.restart(copies, [np.random.default_rng([config.task_seed, 1, copy]) for copy in range(ANCHOR_COPIES)])
    generator = np.random.default_rng([config.task_seed, 2])
    rewards = [world.advance(generator.integers(config.experts, size=ANCHOR_COPIES))[0] for _ in range(world.length)]
    return float(np.mean(rewards))


class DispatchEnv(RoutingEnv):
    """Send one token per step to one of E experts on G devices.

    ## Action
    ``Discrete(E)``: the expert.

    ## Observation
    ``Box(0, 1, (4 E,), float32)``: the token's affinity to each expert, each queue over its capacity, each expert's
    rate over the highest rate, and 1 for each expert that is not on the token's device.

    ## Reward
    affinity - latency_weight * delay, where delay = (queue + 1) / rate + transfer if away; -drop_cost where the queue
    is full.

    ## Info
    Of the token observed: ``token_id``, ``label`` (its topic), ``action_mask`` (E,), 0 for full queues. Of the last
    action: ``quality``, ``delay`` and ``dropped``.

    ## Episode
    ``episode_length`` tokens from empty queues, then truncation; no termination.

    ## Arguments
    Those of :class:`DispatchConfig`.
    """

    world_type = DispatchWorld


class DispatchVectorEnv(RoutingVectorEnv):
    """Many copies of :class:`DispatchEnv`."""

    world_type = DispatchWorld
