"""TokenBandit: route tokens through frozen experts, one token per step or a batch of them.

The tokens come from a :class:`~rlroute.envs.tables.TokenTable`: the latent clusters of :mod:`rlroute.envs.clusters`,
whose scores are known in closed form, or (``table="tokens.npz"``) the last MoE layer of a trained checkpoint, where the
loss of a token under every expert is exact. No action changes what comes next: train with a discount of 0. Episodes are
long although one step would do, because a vector environment in NEXT_STEP mode wastes a step per episode.

Shape suffixes: N tokens of the table, C copies, T steps, B tokens of a batch, D features, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
from gymnasium import spaces

from rlroute.envs.clusters import Clusters
from rlroute.envs.drawing import Panel
from rlroute.envs.tables import TokenTable, load_table
from rlroute.envs.vector import RoutingVectorEnv
from rlroute.envs.world import Array, Infos, RoutingEnv, World
from rlroute.errors import ConfigError
from rlroute.rewards import own_token_reward


@dataclass(frozen=True, kw_only=True)
class BanditConfig(Clusters):
    """Settings of TokenBandit-v0: those of the cluster task, or a table in its place, and the length of an episode.

    Raises:
        ConfigError: a value out of range, or settings of the cluster task beside a table.
    """

    table: str = ""
    """Path of a token table (.npz); empty: the cluster task."""
    episode_length: int = 256
    """Steps of an episode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.episode_length, int) and self.episode_length >= 1):
            raise ConfigError(f"episode_length = {self.episode_length!r}, legal are integers from 1")
        for field in fields(Clusters):
            if self.table and getattr(self, field.name) != field.default:
                value = getattr(self, field.name)
                raise ConfigError(
                    f"{field.name} = {value!r} beside table = {self.table!r}, which says it all: leave it out"
                )

    @property
    def clusters(self) -> Clusters:
        """The cluster task alone, the key that its table is kept under."""
        return Clusters(**{f.name: getattr(self, f.name) for f in fields(Clusters)})


@dataclass(frozen=True, kw_only=True)
class BatchConfig(BanditConfig):
    """Settings of TokenBandits-v0: those of TokenBandit-v0 (with shorter episodes), and the size of a batch."""

    batch: int = 32
    """Tokens of a batch, one batch a step."""
    episode_length: int = 64
    """Steps of an episode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.batch, int) and self.batch >= 1):
            raise ConfigError(f"batch = {self.batch!r}, legal are integers from 1")


class BanditWorld(World):
    """Each copy draws the tokens of an episode uniformly from the table, with replacement.

    Attributes:
        table: the tokens.
    """

    Config: ClassVar[type] = BanditConfig

    def __init__(self, config: BanditConfig, num_copies: int) -> None:
        super().__init__(config, num_copies)
        self.length = config.episode_length
        self.table: TokenTable = load_table(config.table) if config.table else config.clusters.draw_table()
        self.num_experts = self.table.losses_NE.shape[1]
        self._best_N = self.table.losses_NE.min(1)
        self._copies_C = np.arange(num_copies)
        self._tokens_TC = np.zeros((self.length + 1, num_copies, *self._batch), dtype=np.int32)
        shape = (*self._batch, self.table.x_ND.shape[1])
        self.observation_space = spaces.Box(-self.table.bound, self.table.bound, shape, np.float32)
        self.action_space = self._make_action_space()

    @property
    def _batch(self) -> tuple[int, ...]:
        return ()

    def _make_action_space(self) -> spaces.Space:
        return spaces.Discrete(self.num_experts)

    def draw(self, copies: Array, generators: Sequence[np.random.Generator]) -> None:
        """Draw each copy's tokens; one more than it routes, for the observation after the last step."""
        shape = (self.length + 1, *self._batch)
        for copy, generator in zip(copies, generators, strict=True):
            self._tokens_TC[:, copy] = generator.integers(len(self.table.x_ND), size=shape)

    def look_up(self) -> Array:
        """Return the rows of the current tokens, (C,) or (C, B)."""
        return np.asarray(self._tokens_TC[self.step_C, self._copies_C])

    def route(self, actions: Array) -> tuple[Array, Infos]:
        """Return the reward, the token's own negative loss, and ``regret``: what the best expert would have had
        more.
        """
        tokens = self.current
        losses = self._losses(tokens, actions)
        regret = losses - self._best_N[tokens]
        return _mean(own_token_reward(losses)), {"regret": _mean(regret)}

    def _losses(self, tokens: Array, actions: Array) -> Array:
        return self.table.losses_NE[tokens, actions]

    def observe(self) -> Array:
        """Return the features of the current tokens, (C, D) or (C, B, D)."""
        return np.asarray(self.table.x_ND[self.current])

    def describe(self) -> Infos:
        """Return ``token_id``, ``label`` (the cluster, or domain), ``expert_losses`` and ``action_mask``, which allows
        everything.
        """
        tokens = self.current
        return {
            "token_id": self.table.token_ids_N[tokens],
            "label": self.table.labels_N[tokens],
            "expert_losses": self.table.losses_NE[tokens],
            "action_mask": np.ones((*tokens.shape, self.num_experts), dtype=np.int8),
        }

    def anchors(self) -> tuple[float, float]:
        """Return the mean reward of uniform draws and of each token's best expert, exact for the table."""
        return -self.table.uniform, -self.table.oracle

    def panels(self, copy: int) -> list[Panel]:
        """Show the first current token's features, and its loss under each expert with the best one marked."""
        token = int(self.current[copy].flat[0])
        losses_E, x_D = self.table.losses_NE[token], self.table.x_ND[token]
        return [
            Panel("features", 0.5 + 0.5 * x_D / self.table.bound),
            Panel("loss of each expert", losses_E / max(float(losses_E.max()), 1e-9), int(losses_E.argmin())),
        ]


class BatchWorld(BanditWorld):
    """A batch of tokens per step. An action is an expert for each token; the value E sends a token to none of them."""

    Config: ClassVar[type] = BatchConfig

    @property
    def _batch(self) -> tuple[int, ...]:
        return (self.config.batch,)

    def _make_action_space(self) -> spaces.Space:
        return spaces.MultiDiscrete([self.num_experts + 1] * self.config.batch)

    def _losses(self, tokens: Array, actions: Array) -> Array:
        served = actions < self.num_experts
        losses = self.table.losses_NE[tokens, np.where(served, actions, 0)]
        return np.where(served, losses, self.table.skip_N[tokens])

    def describe(self) -> Infos:
        """Return what TokenBandit-v0 does for each token, and ``skip_loss``, that of a token which no expert serves."""
        infos, tokens = super().describe(), self.current
        mask = np.ones((*tokens.shape, self.num_experts + 1), dtype=np.int8)
        return infos | {"skip_loss": self.table.skip_N[tokens], "action_mask": mask}


class TokenBanditEnv(RoutingEnv):
    """Route one token per step to one of E frozen experts.

    ## Action
    ``Discrete(E)``: the expert.

    ## Observation
    ``Box(-b, b, (D,), float32)``: the token's features; b is the power of two that none of the table's features passes.

    ## Reward
    The token's own negative loss under the expert (:func:`rlroute.rewards.own_token_reward`).

    ## Info
    Of the token observed: ``token_id``, ``label``, ``expert_losses`` (E,), ``action_mask`` (E,). Of the last action:
    ``regret``.

    ## Episode
    ``episode_length`` tokens, then truncation; no termination.

    ## Arguments
    Those of :class:`BanditConfig`.
    """

    world_type = BanditWorld


class TokenBanditVectorEnv(RoutingVectorEnv):
    """Many copies of :class:`TokenBanditEnv`."""

    world_type = BanditWorld


class TokenBanditsEnv(RoutingEnv):
    """Route a batch of B tokens per step, for routers that look at a whole batch.

    As :class:`TokenBanditEnv`, but for

    ## Action
    ``MultiDiscrete([E + 1] * B)``: an expert for each token, or E for none (a dropped token, or one that no expert
    chose).

    ## Observation
    ``Box(-b, b, (B, D), float32)``.

    ## Reward
    The mean of the tokens' rewards; a token without an expert has its ``skip_loss``.

    ## Info
    As above with a leading axis B; ``action_mask`` is (B, E + 1), ``skip_loss`` (B,).
    """

    world_type = BatchWorld


class TokenBanditsVectorEnv(RoutingVectorEnv):
    """Many copies of :class:`TokenBanditsEnv`."""

    world_type = BatchWorld


def _mean(values: Array) -> Array:
    """Average over the batch, if there is one, in float64."""
    return values.astype(np.float64) if values.ndim == 1 else values.mean(1, dtype=np.float64)
