"""What the environments share: a world that steps C copies of one routing problem together, and the environment of a
single copy.

A world is the only place where a problem's rules stand. :class:`RoutingEnv` runs one with a single copy and
:class:`~rlroute.envs.vector.RoutingVectorEnv` one with many, so the two agree bit for bit: all that is random in an
episode is drawn at its start from the copy's own generator, and each step is elementwise arithmetic whose rounding no
batch size changes.

Shape suffixes: C copies, T steps of an episode, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from rlroute.envs.drawing import Panel, ansi_frame, rgb_frame
from rlroute.errors import ConfigError

Array = NDArray[Any]
Infos = dict[str, Array]

METADATA: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}


class World(ABC):
    """C copies of one routing problem.

    Attributes:
        config: the problem's settings.
        num_copies: C.
        num_experts: E.
        length: T, after which an episode is truncated; none ends before.
        step_C: the steps that each copy has taken in its episode.
        observation_space, action_space: of a single copy.
    """

    Config: ClassVar[type]
    config: Any
    num_experts: int
    length: int
    observation_space: Any
    action_space: Any

    def __init__(self, config: Any, num_copies: int) -> None:
        self.config, self.num_copies = config, num_copies
        self.step_C = np.zeros(num_copies, dtype=np.int64)
        self._current: Any = None

    @abstractmethod
    def draw(self, copies: Array, generators: Sequence[np.random.Generator]) -> None:
        """Draw a new episode for each of ``copies`` from its generator, with one call of the same kind per
        generator.
        """

    @abstractmethod
    def look_up(self) -> Any:
        """Return what :meth:`route`, :meth:`observe` and :meth:`describe` need of the current tokens; they find it in
        ``current``.
        """

    @abstractmethod
    def route(self, actions: Array) -> tuple[Array, Infos]:
        """Route the current token (or batch of tokens) of every copy, without going on to the next.

        Args:
            actions: legal actions, shape (C,) or (C, tokens of a batch).

        Returns:
            Float64 rewards of shape (C,), and what came of the actions, arrays of shape (C, ...).
        """

    @abstractmethod
    def observe(self) -> Array:
        """Return what a router sees of the current tokens, float32 of shape (C, ...), in memory of its own."""

    @abstractmethod
    def describe(self) -> Infos:
        """Return what else is known of the current tokens, arrays of shape (C, ...) in memory of their own."""

    @abstractmethod
    def anchors(self) -> tuple[float, float]:
        """Return the mean reward per step that scores 0 (experts drawn uniformly) and the one that scores 1 (the
        oracle).
        """

    @abstractmethod
    def panels(self, copy: int) -> list[Panel]:
        """Return what a picture of a copy shows."""

    def restart(self, copies: Array, generators: Sequence[np.random.Generator]) -> None:
        """Begin a new episode in each of ``copies``."""
        self.draw(copies, generators)
        self.step_C[copies] = 0
        self._current = None

    def advance(self, actions: Array) -> tuple[Array, Infos]:
        """Route the current tokens and go on to the next ones."""
        outcome = self.route(actions)
        self.step_C += 1
        self._current = None
        return outcome

    @property
    def current(self) -> Any:
        """What :meth:`look_up` said of the current tokens, looked up once per step."""
        if self._current is None:
            self._current = self.look_up()
        return self._current

    def score(self, reward: float) -> float:
        """Return a mean reward per step as a score: 0 for experts drawn uniformly, 1 for the oracle."""
        uniform, oracle = self.anchors()
        return (reward - uniform) / (oracle - uniform)


def make_world(kind: type[World], num_copies: int, settings: dict[str, Any]) -> World:
    """Return a world of ``num_copies`` copies.

    Raises:
        ConfigError: a setting that the world does not have, or an illegal value.
    """
    legal = [f.name for f in fields(kind.Config)]
    for name in settings:
        if name not in legal:
            raise ConfigError(f"{kind.__name__}: no setting {name!r}; legal are {', '.join(legal)}, render_mode")
    if not (isinstance(num_copies, int) and num_copies >= 1):
        raise ConfigError(f"{kind.__name__}: num_envs = {num_copies!r}, legal are integers from 1")
    return kind(kind.Config(**settings), num_copies)


def check_render_mode(render_mode: str | None) -> str | None:
    """Return the render mode.

    Raises:
        ConfigError: there is no such mode.
    """
    legal = [None, *METADATA["render_modes"]]
    if render_mode not in legal:
        raise ConfigError(f"render_mode = {render_mode!r}, legal are {', '.join(map(repr, legal))}")
    return render_mode


def check_actions(space: Any, actions: Any, shape: tuple[int, ...]) -> Array:
    """Return actions as an integer array of ``shape``.

    Raises:
        gymnasium.error.InvalidAction: another shape, no integers, or an expert that is not there.
    """
    array = np.asarray(actions)
    experts = int(space.n if hasattr(space, "n") else space.nvec[0])
    if array.shape != shape or array.dtype.kind not in "iu":
        raise gymnasium.error.InvalidAction(
            f"actions are {array.dtype} of shape {array.shape}, want integers of {shape}"
        )
    if array.min() < 0 or array.max() >= experts:
        raise gymnasium.error.InvalidAction(
            f"actions reach from {array.min()} to {array.max()}, legal are 0 to {experts - 1}"
        )
    return array


def draw_frame(world: World, copy: int, render_mode: str) -> str | Array:
    """Return the picture of a copy: text for ``ansi``, uint8 of shape (height, width, 3) for ``rgb_array``."""
    panels = world.panels(copy)
    return ansi_frame(panels) if render_mode == "ansi" else rgb_frame(panels)


class RoutingEnv(gymnasium.Env):  # type: ignore[misc]
    """The environment of one copy of a world.

    ``info`` describes the token (or batch) that the observation shows and the next action routes; after a step it also
    holds what came of the last action. Episodes are truncated after the world's length and never terminate.
    """

    metadata: ClassVar[dict[str, Any]] = dict(METADATA)
    world_type: ClassVar[type[World]]

    def __init__(self, render_mode: str | None = None, **settings: Any) -> None:
        self.render_mode = check_render_mode(render_mode)
        self.world = make_world(self.world_type, 1, settings)
        self.observation_space, self.action_space = self.world.observation_space, self.world.action_space
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self.world.restart(np.zeros(1, dtype=np.int64), [self.np_random])
        self._running = True
        return self.world.observe()[0], _single(self.world.describe())

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Route the current token (or batch) and go on to the next.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over.
            gymnasium.error.InvalidAction: no such action.
        """
        if not self._running:
            raise gymnasium.error.ResetNeeded("the episode is over or was never begun: call reset")
        actions = check_actions(self.action_space, np.asarray(action)[None], (1, *self.action_space.shape))
        rewards_C, outcome = self.world.advance(actions)
        truncated = bool(self.world.step_C[0] >= self.world.length)
        self._running = not truncated
        info = _single(self.world.describe() | outcome)
        return self.world.observe()[0], float(rewards_C[0]), False, truncated, info

    def action_masks(self) -> Array:
        """Return which actions are legal now, as sb3-contrib's MaskablePPO asks for it: bool of shape (E,)."""
        mask_E: Array = self.world.describe()["action_mask"][0].astype(bool)
        return mask_E

    def score(self, reward: float) -> float:
        """Return a mean reward per step as a score: 0 for experts drawn uniformly, 1 for the oracle."""
        return self.world.score(reward)

    def render(self) -> str | Array | None:
        """Return a picture of the current state."""
        if self.render_mode is None:
            gymnasium.logger.warn('render() without a mode: gym.make(..., render_mode="ansi" or "rgb_array")')
            return None
        return draw_frame(self.world, 0, self.render_mode)


def _single(infos: Infos) -> dict[str, Any]:
    """Take the only copy's info out of arrays; plain Python numbers, which vector environments give a dtype."""
    return {name: values[0].item() if values.ndim == 1 else values[0] for name, values in infos.items()}
