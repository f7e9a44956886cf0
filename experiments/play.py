"""``rlroute play``: a router, a reference policy or a saved Stable-Baselines3 policy in an environment, with its score and regret.

A router sees what it sees in a transformer: features as hidden states, token ids, keys for its draws. It learns from rollouts of a few
steps in many copies: while acting, nothing is kept; to learn, the rollout is decided again in one forward, and because draws come from
keys, the decisions are the same. The reward takes the place of the negative loss, and a copy's steps that of a sequence.

Shape suffixes: C copies, L steps of a rollout, B tokens of a batch, T = C * L * B tokens (a copy's tokens adjacent), D features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlroute.config import DENSE, DataConfig, ModelConfig, RouterConfig, TrainConfig
from rlroute.envs import IDS
from rlroute.envs.dispatch import KINDS_PER_TOPIC, DispatchWorld
from rlroute.envs.references import Policy, reference_policies, score_interval
from rlroute.envs.references import play as play_episode
from rlroute.envs.token_bandit import BanditWorld
from rlroute.envs.vector import RoutingVectorEnv
from rlroute.envs.world import Array
from rlroute.errors import ConfigError, MissingDependencyError, StoreError
from rlroute.experiments.recipes import build_entry
from rlroute.registry import router_class, router_names
from rlroute.routing import Feedback, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.training.step import weighted

SB3 = "sb3:"


@dataclass(frozen=True)
class Learning:
    """How a router learns in an environment."""

    updates: int = 400
    """Rollouts, each one optimizer step."""
    copies: int = 32
    """Copies of the environment that are stepped together."""
    rollout: int = 8
    """Steps of a rollout; returns end with it, so that a discount sees no further."""
    lr: float = 0.02
    """Learning rate of Adam."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name} = {value}: must be above 0")


@dataclass(frozen=True)
class Spec:
    """What a router must know of an environment.

    Attributes:
        width, num_experts, vocabulary: D, E and the number of token ids.
        batched: whether a step shows a batch of tokens.
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
            layer=0,
            vocab_size=spec.vocabulary,
            seed=seed,
            token_counts_V=torch.ones(spec.vocabulary, dtype=torch.long),
        )
        self.router: Router = router_class(config.name)(config, shape)
        if not self.router.causal and not spec.batched:
            raise ConfigError(f"router {config.name!r} decides over a batch: legal is rlroute/TokenBandits-v0")
        if self.router.num_samples > 1 and not spec.counterfactual:
            raise ConfigError(
                f"router {config.name!r} wants {self.router.num_samples} outcomes of each token: legal is a TokenBandit, "
                "which knows what every expert would have cost"
            )
        self.learns = bool(self.router.learns_from & {"reward", "load"})

    def context(
        self, tokens: Tensor, ended: Tensor, *, step: int, first: int, explore: bool, samples: int = 1
    ) -> RoutingContext:
        """Return the context of tokens (C, L, B), the copies' steps from ``first`` on of a rollout.

        ``ended`` (C, L) counts the episodes that ended in the rollout before each step: another episode is another sequence.
        """
        copies, steps, batch = tokens.shape
        position_T = (first + torch.arange(steps))[None, :, None] * batch + torch.arange(batch)
        sequence_T = torch.arange(copies)[:, None, None].expand(tokens.shape)

        def rows(values: Tensor) -> Tensor:
            return values.expand(tokens.shape).reshape(-1).repeat(samples)

        return RoutingContext(
            seed=self.seed,
            layer=0,
            step=step,
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
            decision: RoutingDecision = self.router(
                x_TD, self.context(tokens, torch.from_numpy(ended_C)[:, None], **keys)
            )
        return decision

    def actions(self, decision: RoutingDecision, copies: int) -> Array:
        """Return the action of each copy: the expert of each token's strongest pair, E (none) for a token without one."""
        experts = self.spec.num_experts
        chosen_T = torch.full((decision.num_tokens,), experts)
        order_R = decision.gates_R.argsort(stable=True)
        runs_R = (decision.kept_R & (decision.expert_ids_R < experts))[order_R]
        order_R = order_R[runs_R]
        chosen_T[decision.token_ids_R[order_R]] = decision.expert_ids_R[order_R]  # the strongest comes last
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
        """Let the router learn from rollouts of a vector environment that resets finished copies in the same step."""
        parameters = list(self.router.parameters())
        optimizer = torch.optim.Adam(parameters, lr=how.lr) if parameters else None
        observations, infos = envs.reset(seed=self.seed)
        for update in range(how.updates):
            kept: list[tuple[Array, ...]] = []
            ended_C = np.zeros(envs.num_envs, dtype=np.int64)
            for position in range(how.rollout):
                decision = self.decide(observations, infos, ended_C, step=update, first=position, explore=True)
                actions = self.actions(decision, envs.num_envs)
                tokens, outcomes = _tokens(observations, infos), infos.get("expert_losses")
                following, rewards_C, terminated_C, truncated_C, next_infos = envs.step(actions)
                losses = _token_losses(outcomes, infos.get("skip_loss"), actions, rewards_C, self.spec.batched)
                outcomes = np.zeros((envs.num_envs, 0)) if outcomes is None else outcomes
                kept.append((observations, tokens, ended_C, losses, outcomes))
                observations, infos, ended_C = following, next_infos, ended_C + (terminated_C | truncated_C)
            self._update([np.stack(values, axis=1) for values in zip(*kept, strict=True)], update, optimizer)

    def _update(self, rollout: list[Array], update: int, optimizer: Any) -> None:
        """Decide the rollout again, with gradients, and learn from what came of it."""
        observations, tokens, ended, losses, outcomes = rollout
        samples, count = self.router.num_samples, tokens.size
        x_TD = torch.from_numpy(observations).reshape(-1, observations.shape[-1])
        ids = torch.from_numpy(tokens).reshape(tokens.shape[0], tokens.shape[1], -1)
        context = self.context(ids, torch.from_numpy(ended), step=update, first=0, explore=True, samples=samples)
        decision = self.router(x_TD.repeat(samples, 1), context)
        loss_T = torch.from_numpy(losses).reshape(-1).to(x_TD.dtype)
        loss_MT = loss_T.repeat(samples, 1)
        if samples > 1:
            outcomes_TE = torch.from_numpy(outcomes).reshape(count, -1).to(x_TD.dtype)
            loss_MT = outcomes_TE.gather(1, decision.expert_ids_R.view(samples, count).t()).t()
        feedback = Feedback(context=context, loss_MT=loss_MT, num_valid=count)
        total = weighted([self.router.objective(decision, feedback)])
        if optimizer is not None and isinstance(total, Tensor):
            optimizer.zero_grad()
            torch.autograd.backward(total)
            optimizer.step()
        sums = self.router.observe(decision, feedback)
        with torch.no_grad():
            self.router.adapt(sums)


def _tokens(observations: Array, infos: dict[str, Any]) -> Array:
    """Return the token ids that the environment tells, else zeros."""
    tokens = infos.get("token_id")
    return np.zeros(len(observations), dtype=np.int64) if tokens is None else np.asarray(tokens)


def _token_losses(outcomes: Array | None, skip: Array | None, actions: Array, rewards_C: Array, batched: bool) -> Array:
    """Return the loss of each token: of its expert where the environment tells, else its reward's negative."""
    if not batched or outcomes is None:
        return -rewards_C
    experts = outcomes.shape[-1]
    chosen = np.take_along_axis(outcomes, np.minimum(actions, experts - 1)[..., None], axis=-1)[..., 0]
    return chosen if skip is None else np.where(actions == experts, skip, chosen)


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
        names: reference policies, router entries, or ``sb3:FILE`` (``sb3:policy=FILE`` is the router); all reference policies if there
            are none.
        episodes: as many copies play one episode each.
        seed: of the episodes; training uses others.
        how: how routers learn.
        table: the tokens of a bandit; synthetic clusters without one.

    Raises:
        ConfigError: an unknown environment or policy, or a router that cannot play there; before any work.
    """
    if episodes < 2:
        raise ConfigError(f"episodes = {episodes}: want 2 or more, an interval needs them")
    make = partial(_make, environment, table)
    envs = make(episodes)
    references = reference_policies(envs, seed)
    played = []
    for name in names or tuple(references):
        played += list(_policies(name, make, references, seed, how).items())
    results = []
    for name, prepare in played:
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


def _policies(
    name: str,
    make: Callable[[int], RoutingVectorEnv],
    references: dict[str, Policy],
    seed: int,
    how: Learning,
) -> dict[str, Callable[[], Policy]]:
    """Return what a name means: functions that make the policy ready, by the name of its result."""
    if name in references:
        return {name: lambda: references[name]}
    if name.startswith(SB3) and not name.startswith("sb3:policy="):
        policy = _stable_baselines(Path(name.removeprefix(SB3)), make(1))
        return {name: lambda: policy}
    entry = name.partition(":")[0]
    if entry == DENSE or entry not in router_names():
        raise ConfigError(f"policy {name!r}: legal are {', '.join(references)}, sb3:FILE, {', '.join(router_names())}")
    config = build_entry(name, DataConfig(), ModelConfig(), TrainConfig()).router
    assert config is not None
    training = make(how.copies)
    player, taught = RouterPlayer(config, Spec.of(training), seed), list[bool]()

    def prepare(explore: bool) -> Policy:
        if player.learns and not taught:
            player.learn(training, how)
            taught.append(True)
        return player.policy(explore=explore)

    untaught = "" if player.learns else ", untaught: it learns through gates or not at all"
    greedy = {f"{name} (greedy{untaught})": lambda: prepare(False)}
    sampled = {f"{name} (sampled)": lambda: prepare(True)} if player.router.stochastic else {}
    return greedy | sampled


def _stable_baselines(path: Path, envs: RoutingVectorEnv) -> Policy:
    """Load a saved policy of Stable-Baselines3: its algorithm's name starts the file's, as in ``ppo-bandit.zip``."""
    try:
        import stable_baselines3
    except ImportError as error:
        raise MissingDependencyError("sb3:FILE needs the package stable_baselines3") from error
    algorithm = path.name.partition("-")[0].upper()
    if not hasattr(stable_baselines3, algorithm):
        raise ConfigError(f"policy {path}: want the algorithm's name, a hyphen and more, as in ppo-bandit.zip")
    if not path.exists():
        raise StoreError(f"{path} is not there")
    model = getattr(stable_baselines3, algorithm).load(path)
    for what in ("observation_space", "action_space"):
        saved, wanted = getattr(model, what), getattr(envs, f"single_{what}")
        if saved != wanted:
            raise ConfigError(f"policy {path} was trained with {what} {saved}: this environment has {wanted}")
    return lambda observations, infos: model.predict(observations, deterministic=True)[0]


def to_markdown(environment: str, results: list[Result]) -> str:
    """Return results as a table, best first."""
    rows = sorted(results, key=lambda result: -result.score)
    lines = [f"| {environment} | score | regret per step |", "|---|---:|---:|"]
    lines += [
        f"| {r.name} | {r.score:.3f} ± {r.half_width:.3f} | {r.regret:.4f} ± {r.regret_half_width:.4f} |" for r in rows
    ]
    return "\n".join(lines)
