"""Actor-critic: a sampled policy taught by a critic of the rest of the sequence.

Advantages are generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438) along the tokens of a sequence:
a token's state is its hidden state at this layer, its reward its own negative loss, the next state the next token's.
With ``trace`` 1 they are discounted returns over the critic, with 0 one-step differences: the critic answers for what a
token's route changes later, at the price of its own error, which is the bias.

Every batch is used for one gradient step by the policy that drew it: no old policies, no clipping. A step of a router
flips a tenth of its choices, and importance ratios do not survive that.

Shape suffixes: T tokens (rows of all routing samples), D model width, M routing samples.
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.limits import Share
from rlroute.policies import (
    RewardConfig,
    RunningMean,
    critic,
    perturb,
    policy_decision,
    returns,
    reward,
    surrogate,
)
from rlroute.rewards import temporal_differences
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums, Term


class ActorCriticRouter(Router):
    """A policy with a bootstrapping critic, detached from the trunk."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardConfig):
        """Fields of the actor-critic."""

        discount: Share = 0.9
        """Discount per token of the rewards that follow."""
        trace: Share = 0.9
        """lambda of the generalised advantage: 0 trusts the critic, 1 the returns."""

    learns_from = frozenset({"reward"})
    gate_meaning = "1/k"
    stochastic = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.value = critic(shape, config.value_hidden)
        self.mean_reward = RunningMean(config.ema_decay)
        self.batch_dependent |= config.charge_weight > 0

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Sample k experts in order where exploring, else take the k most probable."""
        logits_TE = self.scores(x_TD if self.config.shape_body else x_TD.detach())
        policy_TE = logits_TE / self.config.temperature_at(context.step)
        ids_TK = context.choose(perturb(policy_TE, context, "actor_critic"), self.shape.k)
        memo = {"value_T": self.value(x_TD.detach()).squeeze(1)} if context.explore else {}
        return policy_decision(logits_TE, policy_TE, ids_TK, context, memo)

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the policy-gradient surrogate and the critic's squared error."""
        config, mask_MT = self.config, feedback.context.mask_T.view_as(feedback.loss_MT)
        value_MT = decision.memo["value_T"].view_as(feedback.loss_MT)
        reward_MT = self.mean_reward.centre(reward(decision, feedback, config.charge_weight)) * mask_MT
        differences_MT = temporal_differences(
            reward_MT, value_MT.detach() * mask_MT, feedback.context.sequence_T[: mask_MT.shape[1]], config.discount
        )
        advantage_MT = returns(differences_MT, feedback, config.discount * config.trace)
        error_MT = advantage_MT + value_MT.detach() - value_MT
        return {
            "policy": Term(surrogate(decision, advantage_MT.reshape(-1), feedback), config.policy_weight),
            "value": Term(feedback.mean(error_MT.reshape(-1).square()), config.value_weight),
        }

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return the sum of rewards."""
        return {"reward": reward(decision, feedback, self.config.charge_weight).sum()}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Move the running mean reward."""
        self.mean_reward.update(sums, "reward")
