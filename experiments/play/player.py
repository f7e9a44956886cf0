"""A router that plays: what it sees in an environment, and how it learns there.

A router sees what it sees in a transformer: features as hidden states, token ids, keys for its draws. It learns from
rollouts of a few steps in many copies: while acting, nothing is kept; to learn, the rollout is decided again in one
forward, and because draws come from keys, the decisions are the same. The reward takes the place of the negative loss,
and a copy's steps that of a sequence. A token goes to the expert of its strongest pair; gates themselves change
nothing here, so that their credit is 0.

Shape suffixes: C copies, L steps of a rollout, B tokens of a batch, T = C * L * B tokens (a copy's tokens adjacent),
D features, E experts, R pairs, M routing samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from rlroute.config import ModelConfig, RouterConfig
from rlroute.envs.dispatch import KINDS_PER_TOPIC, DispatchWorld
from rlroute.envs.references import Policy
from rlroute.envs.token_bandit import BanditWorld
from rlroute.envs.vector import RoutingVectorEnv
from rlroute.envs.world import Array
from rlroute.errors import ConfigError
from rlroute.learning import adapt, learn
from rlroute.limits import Between, Count, Positive, check_fields
from rlroute.model.moe import decide
from rlroute.registry import make_router
from rlroute.routing import Feedback, Router, RouterShape, RoutingContext, RoutingDecision


@dataclass(frozen=True)
class Learning:
    """How a router learns in an environment."""

    updates: Count = 400
    """Rollouts, each one optimizer step."""
    copies: Annotated[int, Between(1, 10**5)] = 32
    """Copies of the environment that are stepped together."""
    rollout: Annotated[int, Between(1, 10**5)] = 8
    """Steps of a rollout; returns end with it, so that a discount sees no further."""
    lr: Positive = 0.02
    """Learning rate of Adam."""

    def __post_init__(self) -> None:
        check_fields(self, None)


@dataclass(frozen=True)
class Spec:
    """What a router must know of an environment.

    Attributes:
        width, num_experts, vocabulary: D, E and the number of token ids.
        batched: whether a step shows a batch of tokens, each of which may go to no expert; else none may.
        counterfactual: whether it tells what every expert would have cost.
    """

    width: int
    num_experts: int
    vocabulary: int
    batched: bool = False
    counterfactual: bool = False

    @classmethod
    def of(cls, envs: RoutingVectorEnv) -> Spec:
        """Return an environment's."""
        world, observed = envs.world, envs.single_observation_space.shape
        bandit = isinstance(world, BanditWorld)
        if isinstance(world, DispatchWorld):
            vocabulary = world.num_experts * KINDS_PER_TOPIC
        else:
            assert isinstance(world, BanditWorld)
            vocabulary = int(world.table.token_ids_N.max()) + 1
        return cls(observed[-1], world.num_experts, vocabulary, batched=len(observed) == 2, counterfactual=bandit)


class RouterPlayer:
    """A router in an environment.

    Args:
        config: the router's configuration.
        spec: the environment.
        seed: its initial weights and its draws derive from it.

    Raises:
        ConfigError: the router cannot play there, named with the reason.
    """

    def __init__(self, config: RouterConfig, spec: Spec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        shape = RouterShape(
            d_model=spec.width,
            num_experts=spec.num_experts,
            k=1,
            site=0,
            vocab_size=spec.vocabulary,
            seed=seed,
            token_counts_V=torch.ones(spec.vocabulary, dtype=torch.long),
            grants=frozenset(),
        )
        self.model = ModelConfig(num_experts=spec.num_experts, k=1)
        self.router: Router = make_router(config, shape)
        if not self.router.causal and not spec.batched:
            raise ConfigError(f"router {config.name!r} decides over a batch: legal is rlroute/TokenBandits-v0")
        if self.router.num_samples > 1 and not spec.counterfactual:
            raise ConfigError(
                f"router {config.name!r} wants {self.router.num_samples} outcomes of each token: legal is a "
                "TokenBandit, which knows what every expert would have cost"
            )
        self.learns = bool(self.router.learns_from & {"reward", "load"})

    def context(
        self,
        tokens: Tensor,
        ended: Tensor,
        *,
        step: int,
        first: int,
        explore: bool,
        progress: float = 1.0,
        samples: int = 1,
    ) -> RoutingContext:
        """Return the context of tokens (C, L, B), the copies' steps from ``first`` on of a rollout.

        ``ended`` (C, L) counts the episodes that ended in the rollout before each step: another episode is another
        sequence.
        """
        copies, steps, batch = tokens.shape
        position_T = (first + torch.arange(steps))[None, :, None] * batch + torch.arange(batch)
        sequence_T = torch.arange(copies)[:, None, None].expand(tokens.shape)

        def rows(values: Tensor) -> Tensor:
            return values.expand(tokens.shape).reshape(-1).repeat(samples)

        return RoutingContext(
            seed=self.seed,
            site=0,
            step=step,
            progress=progress,
            token_ids_T=rows(tokens),
            position_T=rows(position_T),
            sequence_T=rows(sequence_T + copies * (step + (ended[..., None] << 32))),
            mask_T=rows(torch.ones(tokens.shape, dtype=torch.bool)),
            explore=explore,
            num_samples=samples,
        )

    def decide(self, observations: Array, infos: dict[str, Any], ended_C: Array, **keys: Any) -> RoutingDecision:
        """Route what C copies show now."""
        x_TD = torch.from_numpy(observations).reshape(-1, observations.shape[-1])
        tokens = torch.from_numpy(_tokens(observations, infos)).reshape(len(observations), 1, -1)
        with torch.no_grad():
            context = self.context(tokens, torch.from_numpy(ended_C)[:, None], **keys)
            return decide(self.router, x_TD, context, self.model)

    def chosen(self, decision: RoutingDecision) -> Tensor:
        """Return the expert of each row's strongest pair that runs, E (none) for a row without one; shape (T,).

        Raises:
            ConfigError: there is a row without one, and the environment has no action for that.
        """
        none = self.spec.num_experts
        chosen_T = torch.full((decision.num_tokens,), none)
        order_R = decision.gates_R.argsort(stable=True)
        order_R = order_R[(decision.kept_R & decision.used_R)[order_R]]
        chosen_T[decision.token_ids_R[order_R]] = decision.expert_ids_R[order_R]  # the strongest comes last
        if not self.spec.batched and bool((chosen_T == none).any()):
            raise ConfigError(
                f"router {self.router.config.name!r} left a token without an expert, for which there is no action "
                "here: legal is rlroute/TokenBandits-v0"
            )
        return chosen_T

    def actions(self, decision: RoutingDecision, copies: int) -> Array:
        """Return the action of each copy: an expert, or one for each token of its batch.

        Raises:
            ConfigError: a token has no expert, and the environment has no action for that.
        """
        chosen_T = self.chosen(decision)
        return chosen_T.view(copies, -1).numpy() if self.spec.batched else chosen_T.numpy()

    def policy(self, *, explore: bool) -> Policy:
        """Return the router as a policy, greedy or sampled."""
        step = 10**6 if explore else 0  # draws of its own, not those of training

        def act(observations: Array, infos: dict[str, Any]) -> Array:
            nonlocal step
            never_C = np.zeros(len(observations), dtype=np.int64)
            decision = self.decide(observations, infos, never_C, step=step, first=0, explore=explore)
            step += 1
            return self.actions(decision, len(observations))

        return act

    def learn(self, envs: Any, how: Learning) -> None:
        """Let the router learn from rollouts of a vector environment that resets finished copies in the same step.

        Raises:
            ConfigError: it leaves a token without an expert, and the environment has no action for that.
        """
        parameters = list(self.router.parameters())
        optimizer = torch.optim.Adam(parameters, lr=how.lr) if parameters else None
        observations, infos = envs.reset(seed=self.seed)
        for update in range(how.updates):
            kept: list[tuple[Array, ...]] = []
            keys: dict[str, Any] = {"step": update, "progress": update / how.updates, "explore": True}
            ended_C = np.zeros(envs.num_envs, dtype=np.int64)
            for position in range(how.rollout):
                decision = self.decide(observations, infos, ended_C, first=position, **keys)
                actions = self.actions(decision, envs.num_envs)
                tokens, outcomes = _tokens(observations, infos), _outcomes(observations, infos)
                following, rewards_C, terminated_C, truncated_C, next_infos = envs.step(actions)
                losses = _token_losses(outcomes, actions, rewards_C)
                kept.append((observations, tokens, ended_C, losses, outcomes))
                observations, infos, ended_C = following, next_infos, ended_C + (terminated_C | truncated_C)
            self._update([np.stack(values, axis=1) for values in zip(*kept, strict=True)], optimizer, **keys)

    def _update(self, rollout: list[Array], optimizer: torch.optim.Adam | None, **keys: Any) -> None:
        """Decide the rollout again, with gradients, and learn from what came of it."""
        observations, tokens, ended, losses, outcomes = rollout
        samples, count = self.router.num_samples, tokens.size
        x_TD = torch.from_numpy(observations).reshape(-1, observations.shape[-1])
        ids = torch.from_numpy(tokens).reshape(tokens.shape[0], tokens.shape[1], -1)
        context = self.context(ids, torch.from_numpy(ended), first=0, samples=samples, **keys)
        decision = decide(self.router, x_TD.repeat(samples, 1), context, self.model)
        loss_MT = torch.from_numpy(losses).reshape(1, -1).to(x_TD.dtype)
        if samples > 1:
            outcomes_TX = torch.from_numpy(outcomes).reshape(count, -1).to(x_TD.dtype)
            loss_MT = outcomes_TX.gather(1, self.chosen(decision).view(samples, count).t()).t()
        feedback = Feedback(context=context, loss_MT=loss_MT, num_valid=count)
        if optimizer is not None:
            optimizer.zero_grad()
        learned = learn([self.router], [decision], feedback, 0.0 * decision.gates_R.sum())  # a credit of 0, but there
        if optimizer is not None:
            optimizer.step()
        adapt([self.router], learned.sums_L, keys["progress"])


def _tokens(observations: Array, infos: dict[str, Any]) -> Array:
    """Return the token ids that the environment tells, else zeros."""
    tokens = infos.get("token_id")
    return np.zeros(len(observations), dtype=np.int64) if tokens is None else np.asarray(tokens)


def _outcomes(observations: Array, infos: dict[str, Any]) -> Array:
    """Return what each action would cost each token (none is the last one, where it is legal).

    There are no columns where the environment does not tell.
    """
    losses, skip = infos.get("expert_losses"), infos.get("skip_loss")
    if losses is None:
        return np.zeros((len(observations), 0))
    return np.asarray(losses) if skip is None else np.concatenate([losses, skip[..., None]], axis=-1)


def _token_losses(outcomes: Array, actions: Array, rewards_C: Array) -> Array:
    """Return the loss of each token: its reward's negative, or in a batch, which has one reward, its action's cost."""
    if actions.ndim == 1:
        return -rewards_C
    return np.take_along_axis(outcomes, actions[..., None], axis=-1)[..., 0]
