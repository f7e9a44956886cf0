"""What sampled policies share, as functions: draws, their decision, rewards, the policy-gradient surrogate, a running
mean, a critic.

Shape suffixes: T tokens (rows of all routing samples), D model width, M routing samples, E experts, K experts per
token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlroute.balance import overload_T
from rlroute.config import RouterConfig
from rlroute.gates import constant_gates
from rlroute.limits import BelowOne, Count, NonNegative, Positive, Share
from rlroute.rewards import discounted_return, own_token_reward
from rlroute.routing import Feedback, RouterShape, RoutingContext, RoutingDecision
from rlroute.sampling import perturbed, plackett_luce_log_prob


@dataclass(frozen=True, kw_only=True)
class DrawConfig(RouterConfig):
    """Fields of everything that draws from a softmax."""

    temperature: Positive = 1.0
    """Of the sampling distribution; logits are divided by it."""
    final_temperature: Positive | None = None
    """Reached linearly after ``temperature_steps``; none: the temperature stays."""
    temperature_steps: Count = 1000
    """Optimizer steps until ``final_temperature``."""

    def temperature_at(self, step: int) -> float:
        """Return the temperature of a step."""
        if self.final_temperature is None:
            return self.temperature
        return self.temperature + (self.final_temperature - self.temperature) * min(1.0, step / self.temperature_steps)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(DrawConfig):
    """Fields of every sampled policy that learns."""

    balance_weight: NonNegative = 0.01
    """Weight of the f.P balance loss."""
    shape_body: bool = False
    """Let the router's losses shape the hidden states too. Off: the router reads them detached."""
    init_std: NonNegative = 0.02
    """Standard deviation of the initial score weights."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(PolicyConfig):
    """Fields of policies that learn from rewards."""

    policy_weight: NonNegative = 0.1
    """Weight of the policy-gradient term."""
    charge_weight: NonNegative = 0.0
    """Charge on the reward for full experts, in nats: times the mean over a token's experts of E f_e - 1."""
    discount: Share = 0.0
    """Discount per token of the rewards that follow in the sequence; 0 is the token's own reward alone."""
    value_weight: NonNegative = 0.01
    """Weight of the value head's squared error."""
    value_hidden: Count = 128
    """Width of the value head's two hidden layers."""
    ema_decay: BelowOne = 0.99
    """Decay per step of running means; they start at the first step's mean."""


def perturb(policy_TE: Tensor, context: RoutingContext, name: str) -> Tensor:
    """Return scores whose k largest are a policy's choice: a draw from it where exploring, else the most probable;
    shape (T, E).

    ``name`` keys the noise.
    """
    if not context.explore:
        return policy_TE.detach()
    return perturbed(policy_TE, context.noise(name, (policy_TE.shape[1],)))


def policy_decision(
    logits_TE: Tensor,
    policy_TE: Tensor,
    ids_TK: Tensor,
    context: RoutingContext,
    memo: Mapping[str, Tensor] | None = None,
) -> RoutingDecision:
    """Return the decision of a policy: gates of 1/k, and where exploring the draw's log-probabilities.

    Args:
        logits_TE: clean scores.
        policy_TE: unnormalised log-probabilities, from which was drawn.
        ids_TK: what was drawn, in its order.
        context: of the decision.
        memo: for the router's own use.
    """
    return RoutingDecision.token_choice(
        ids_TK,
        constant_gates(ids_TK, logits_TE),
        logits_TE.shape[1],
        log_prob_TK=plackett_luce_log_prob(policy_TE, ids_TK) if context.explore else None,
        logits_TE=logits_TE,
        probs_TE=policy_TE.softmax(1),
        memo=memo or {},
    )


def reward(decision: RoutingDecision, feedback: Feedback, charge_weight: float) -> Tensor:
    """Return each row's reward, 0 where it does not count: its own negative loss, less a charge for full experts; shape
    (M, T).
    """
    loss_MT = feedback.loss_MT.detach()
    reward_MT = own_token_reward(loss_MT)
    if charge_weight:
        charge_T = overload_T(decision, feedback.context).to(loss_MT.dtype)
        reward_MT = reward_MT - charge_weight * charge_T.view_as(loss_MT)
    return reward_MT * feedback.context.mask_T.view_as(loss_MT)


def returns(reward_MT: Tensor, feedback: Feedback, discount: float) -> Tensor:
    """Return each row's reward plus the discounted ones that follow it in its sequence, shape (M, T)."""
    if not discount:
        return reward_MT
    return discounted_return(reward_MT, feedback.context.sequence_T[: reward_MT.shape[1]], discount)


def surrogate(decision: RoutingDecision, advantage_T: Tensor, feedback: Feedback) -> Tensor:
    """Return -advantage * log pi(draw), averaged over valid tokens; the advantage carries no gradient.

    A token counts if all its pairs were kept: what ran is otherwise not what was drawn.
    """
    assert decision.log_prob_R is not None
    credit_T = decision.all_kept_T() * advantage_T
    return feedback.mean(-credit_T * decision.token_sum(decision.log_prob_R))


class RunningMean(nn.Module):
    """An exponential running mean that starts at the first value seen."""

    mean: Tensor
    started: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def centre(self, values: Tensor) -> Tensor:
        """Return values less the mean; zeros before the first update, when there is nothing to compare with."""
        return self.started * (values - self.mean)

    def update(self, sums: Mapping[str, Tensor], name: str) -> None:
        """Move towards a step's mean: ``sums[name]`` over ``sums["tokens"]``."""
        mean = (sums[name] / sums["tokens"]).to(self.mean.dtype)
        self.mean.copy_(torch.where(self.started, torch.lerp(mean, self.mean, self.decay), mean))
        self.started.fill_(True)


def critic(shape: RouterShape, hidden: int) -> nn.Sequential:
    """An MLP of two hidden layers from a token's state to a number; it starts at 0."""
    inner, outer = nn.Linear(shape.d_model, hidden), nn.Linear(hidden, 1)
    head = nn.Sequential(inner, nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), outer)
    for name, parameter in head.named_parameters():
        starts_at_0 = parameter.dim() == 1 or parameter is outer.weight
        shape.init(parameter, f"value.{name}", 0.0 if starts_at_0 else (2 / parameter.shape[1]) ** 0.5)
    return head
