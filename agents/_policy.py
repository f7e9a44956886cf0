"""What routers with a sampled softmax policy share: the draw, its temperature, entropy and balance terms, a running mean, a critic.

Shape suffixes: T tokens (rows of all routing samples), D model width, M routing samples, E experts, K experts per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlroute import seeding
from rlroute.balance import entropy_T, load_balance, overload_T
from rlroute.config import RouterConfig
from rlroute.limits import BelowOne, Count, NonNegative, Positive, Share
from rlroute.rewards import discounted_return, own_token_reward
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Term
from rlroute.sampling import gumbel_top_k, plackett_luce_log_prob, top_k


@dataclass(frozen=True, kw_only=True)
class DrawConfig(RouterConfig):
    """Fields of everything that draws from a softmax."""

    temperature: Positive = 1.0
    """Of the sampling distribution; logits are divided by it."""
    final_temperature: Positive | None = None
    """Reached linearly after ``temperature_steps``; none: the temperature stays."""
    temperature_steps: Count = 1000


class DrawingRouter(Router):
    """Draws k experts in order from softmax(scores / temperature), without replacement; gates are 1/k."""

    stochastic = True
    gate_meaning = "1/k"

    def __init__(self, config: DrawConfig, shape: RouterShape, scores: nn.Module) -> None:
        super().__init__(config, shape)
        self.policy = config
        self.scores = scores

    def temperature(self, step: int) -> float:
        """Return the temperature of a step."""
        first, last = self.policy.temperature, self.policy.final_temperature
        if last is None:
            return first
        return first + (last - first) * min(1.0, step / self.policy.temperature_steps)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Sample k experts in order where exploring, else take the k most probable."""
        k, experts = self.shape.k, self.shape.num_experts
        logits_TE = self.scores(self.seen(x_TD))
        policy_TE = logits_TE / self.temperature(context.step)
        log_prob_TK, memo = None, dict[str, Tensor]()
        if context.explore:
            ids_TK = self.draw(policy_TE, context)
            log_prob_TK = plackett_luce_log_prob(policy_TE, ids_TK)
            memo = self.remember(x_TD.detach())
        else:
            ids_TK = top_k(policy_TE, k)
        return RoutingDecision.token_choice(
            ids_TK,
            self.gates(ids_TK, log_prob_TK, x_TD.dtype),
            experts,
            log_prob_TK=log_prob_TK,
            logits_TE=logits_TE,
            probs_TE=policy_TE.softmax(1),
            memo=memo,
        )

    def seen(self, x_TD: Tensor) -> Tensor:
        """Return what the scores are of."""
        return x_TD.detach()

    def draw(self, policy_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return the sampled ids, int64 of shape (T, K)."""
        noise_TE = context.noise(type(self.policy).name, (self.shape.num_experts,))
        return gumbel_top_k(policy_TE, self.shape.k, noise_TE)

    def gates(self, ids_TK: Tensor, log_prob_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the gates, of shape (T, K)."""
        return torch.full_like(ids_TK, 1 / self.shape.k, dtype=dtype)

    def remember(self, x_TD: Tensor) -> dict[str, Tensor]:
        """Return what :meth:`objective` will want to know of the hidden states (detached)."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(DrawConfig):
    """Fields of every sampled policy that learns."""

    entropy_weight: NonNegative = 0.0
    """Weight of the entropy bonus."""
    balance_weight: NonNegative = 0.01
    """Weight of the f.P balance loss."""
    shape_body: bool = False
    """Let the router's losses shape the hidden states too. Off: the router reads them detached."""
    init_std: NonNegative = 0.02
    """Standard deviation of the initial score weights."""


class PolicyRouter(DrawingRouter):
    """A drawing router with linear scores of its own."""

    policy: PolicyConfig
    scores: LinearScores

    def __init__(self, config: PolicyConfig, shape: RouterShape) -> None:
        super().__init__(config, shape, LinearScores(shape, "scores", config.init_std))

    @property
    def batch_dependent(self) -> bool:
        """The balance term mixes the tokens of a micro-batch."""
        return self.policy.balance_weight > 0

    def seen(self, x_TD: Tensor) -> Tensor:
        """Return the hidden states, attached where the policy may shape them."""
        return x_TD if self.policy.shape_body else super().seen(x_TD)

    def regularisers(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return minus the entropy, and the f.P balance loss."""
        assert decision.probs_TE is not None
        balance = feedback.share * load_balance(decision.probs_TE, decision, feedback.context)
        return {
            "entropy": Term(feedback.mean(-entropy_T(decision.probs_TE)), self.policy.entropy_weight),
            "balance": Term(balance, self.policy.balance_weight),
        }


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


class RewardRouter(PolicyRouter):
    """A policy that learns from the loss as a number."""

    learns_from = frozenset({"reward"})

    def __init__(self, config: RewardConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.rewards = config

    @property
    def batch_dependent(self) -> bool:
        """The balance loss and the charge for full experts mix the tokens of a micro-batch."""
        return super().batch_dependent or self.rewards.charge_weight > 0

    def reward(self, decision: RoutingDecision, feedback: Feedback) -> Tensor:
        """Return each row's reward, 0 where it does not count: its own negative loss, less the charge for full experts; (M, T)."""
        context, loss_MT = feedback.context, feedback.loss_MT.detach()
        reward_MT = own_token_reward(loss_MT)
        if self.rewards.charge_weight:
            charge_T = overload_T(decision, context).to(loss_MT.dtype)
            reward_MT = reward_MT - self.rewards.charge_weight * charge_T.view_as(loss_MT)
        return reward_MT * context.mask_T.view_as(loss_MT)

    def surrogate(self, decision: RoutingDecision, advantage_T: Tensor, feedback: Feedback) -> Term:
        """Return -advantage * log pi(draw), averaged over valid tokens; the advantage carries no gradient.

        A token counts if all its pairs were kept: what ran is otherwise not what was drawn.
        """
        assert decision.log_prob_R is not None
        credit_T = decision.all_kept_T() * advantage_T
        value = feedback.mean(-credit_T * decision.token_sum(decision.log_prob_R))
        return Term(value, self.rewards.policy_weight)


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


def future_rewards(reward_MT: Tensor, feedback: Feedback, discount: float) -> Tensor:
    """Return each row's reward plus the discounted ones that follow it in its sequence, shape (M, T)."""
    if not discount:
        return reward_MT
    return discounted_return(reward_MT, feedback.context.sequence_T[: reward_MT.shape[1]], discount)


def critic(shape: RouterShape, hidden: int) -> nn.Sequential:
    """An MLP of two hidden layers from a token's state to a number; it starts at 0."""
    inner, outer = nn.Linear(shape.d_model, hidden), nn.Linear(hidden, 1)
    head = nn.Sequential(inner, nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), outer)
    for name, parameter in head.named_parameters():
        starts_at_0 = parameter.dim() == 1 or parameter is outer.weight
        std = 0.0 if starts_at_0 else (2 / parameter.shape[1]) ** 0.5
        seeding.init_normal(parameter, std, shape.seed, f"layers.{shape.layer}.router.value.{name}")
    return head


def matrix_flops(module: nn.Module | None) -> int:
    """Return the forward FLOPs per token of a module's matrices."""
    return 0 if module is None else 2 * sum(p.numel() for p in module.parameters() if p.dim() == 2)
