"""Many copies of a world as one Gymnasium vector environment.

It equals ``SyncVectorEnv`` over as many :class:`~rlroute.envs.world.RoutingEnv` with the same seeds bit for bit, infos
included, in every autoreset mode: NEXT_STEP (a finished copy's next step resets it and ignores its action), SAME_STEP
(it is reset at once, its last observation and info stand in ``final_obs`` and ``final_info``) and DISABLED (the caller
resets it by ``options={"reset_mask": mask}``).

Shape suffixes: C copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rlroute.envs.world import (
    METADATA,
    Array,
    Infos,
    World,
    check_actions,
    check_render_mode,
    draw_frame,
    make_world,
)
from rlroute.errors import ConfigError


class RoutingVectorEnv(gymnasium.vector.VectorEnv):  # type: ignore[misc]
    """The vector environment of a world.

    Attributes:
        autoreset_mode: the mode, also in ``metadata``; torchrl reads the attribute.
        world: the copies.
    """

    metadata: dict[str, Any]
    world_type: ClassVar[type[World]]

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        **settings: Any,
    ) -> None:
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = METADATA | {"autoreset_mode": self.autoreset_mode}
        self.render_mode = check_render_mode(render_mode)
        self.num_envs = num_envs
        self.world = make_world(self.world_type, num_envs, settings)
        self.single_observation_space = self.world.observation_space
        self.single_action_space = self.world.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._ended_C = np.ones(num_envs, dtype=bool)  # until the first reset
        self._begun = False
        self._all_C = np.ones(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every copy, or in those of ``options["reset_mask"]``.

        Args:
            seed: of copy 0, copy i getting ``seed + i``; or one for each copy. A copy without one goes on with its
                generator.
            options: ``reset_mask``, a bool array of shape (C,).

        Raises:
            ValueError: not as many seeds as copies, or a mask of another shape or dtype, or an empty one.
        """
        mask_C = self._reset_mask(options)
        self._restart(mask_C, self._seeds(seed))
        self._ended_C &= ~mask_C
        self._begun = not self._ended_C.any() or self._begun
        return self.world.observe(), _spread(self.world.describe(), mask_C)

    def step(self, actions: Any) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Route the current token (or batch) of every copy and go on to the next.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset, or autoreset is DISABLED and an episode is over.
            gymnasium.error.InvalidAction: no such action.
        """
        actions = check_actions(self.single_action_space, actions, self.action_space.shape)
        ended_C = self._ended_C
        resets = bool(ended_C.any())
        if resets and (self.autoreset_mode == AutoresetMode.DISABLED or not self._begun):
            raise gymnasium.error.ResetNeeded(
                f"copies {np.flatnonzero(ended_C).tolist()} are over or never begun: call reset"
            )
        rewards_C, outcome = self.world.advance(actions)
        if resets:  # NEXT_STEP: the action of a finished copy was ignored
            rewards_C[ended_C] = 0.0
            self._restart(ended_C)
        truncated_C = self.world.step_C >= self.world.length
        infos: dict[str, Any] = {}
        live_C = ~ended_C
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            if truncated_C.any():
                infos = self._final(truncated_C, outcome)
                self._restart(truncated_C)
                live_C = ~truncated_C
        else:
            self._ended_C = truncated_C.copy()
        infos |= _spread(self.world.describe(), self._all_C) | _spread(outcome, live_C)
        return self.world.observe(), rewards_C, np.zeros(self.num_envs, dtype=bool), truncated_C, infos

    def score(self, reward: float) -> float:
        """Return a mean reward per step as a score: 0 for experts drawn uniformly, 1 for the oracle."""
        return self.world.score(reward)

    def render(self) -> tuple[str | Array, ...] | None:
        """Return a picture of each copy."""
        if self.render_mode is None:
            gymnasium.logger.warn('render() without a mode: gym.make_vec(..., render_mode="ansi" or "rgb_array")')
            return None
        return tuple(draw_frame(self.world, copy, self.render_mode) for copy in range(self.num_envs))

    def _restart(self, mask_C: Array, seeds: Sequence[int | None] | None = None) -> None:
        copies = np.flatnonzero(mask_C)
        generators = []
        for copy in copies.tolist():
            generator, seed = self._generators[copy], None if seeds is None else seeds[copy]
            if generator is None or seed is not None:
                generator, _ = gymnasium.utils.seeding.np_random(seed)
                self._generators[copy] = generator
            generators.append(generator)
        self.world.restart(copies, generators)

    def _final(self, truncated_C: Array, outcome: Infos) -> dict[str, Any]:
        observations, final_obs = self.world.observe(), np.full(self.num_envs, None, dtype=object)
        for copy in np.flatnonzero(truncated_C):
            final_obs[copy] = observations[copy].copy()
        final = {"final_obs": final_obs, "final_info": _spread(self.world.describe() | outcome, truncated_C)}
        return final | {f"_{name}": truncated_C.copy() for name in final}

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None] | None:
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + copy for copy in range(self.num_envs)]
        if seed is not None and len(seed) != self.num_envs:
            raise ValueError(f"{len(seed)} seeds for {self.num_envs} copies")
        return seed

    def _reset_mask(self, options: dict[str, Any] | None) -> Array:
        if options is None or "reset_mask" not in options:
            return np.ones(self.num_envs, dtype=bool)
        mask_C = np.asarray(options["reset_mask"])
        if mask_C.shape != (self.num_envs,) or mask_C.dtype != bool or not mask_C.any():
            raise ValueError(
                f"reset_mask = {options['reset_mask']!r}: want bool of shape ({self.num_envs},), one at least true"
            )
        return mask_C


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError:
        legal = ", ".join(repr(m.value) for m in AutoresetMode)
        raise ConfigError(f"autoreset_mode = {mode!r}, legal are {legal}") from None


def _spread(values: Infos, mask_C: Array) -> dict[str, Array]:
    """Return infos as vector environments give them: each with a mask of the copies that have it, and zeros
    elsewhere.
    """
    infos: dict[str, Array] = {}
    if not mask_C.any():
        return infos
    lacks_C = None if mask_C.all() else ~mask_C
    for name, array in values.items():
        if lacks_C is not None:
            array = array.copy()
            array[lacks_C] = 0
        infos[name], infos[f"_{name}"] = array, mask_C.copy()
    return infos
