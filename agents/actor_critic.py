"""Actor-critic: a sampled policy taught by a critic of the rest of the sequence.

Advantages are generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438) along the tokens of a sequence: a token's state is
its hidden state at this layer, its reward its own negative loss, the next state the next token's. With ``trace`` 1 they are
discounted returns over the critic, with 0 one-step differences: the critic answers for what a token's route changes later, at the
price of its own error, which is the bias.

Every batch is used for one gradient step by the policy that drew it: no old policies, no clipping. A step of a router flips a tenth of
its choices, and importance ratios do not survive that.

Shape suffixes: T tokens (rows of all routing samples), D model width, M routing samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rlroute.agents._policy import RewardConfig, RewardRouter, RunningMean, critic, future_rewards, matrix_flops
from rlroute.limits import Share
from rlroute.rewards import temporal_differences
from rlroute.routing import Feedback, RouterShape, RoutingDecision, Term


class ActorCriticRouter(RewardRouter):
    """A policy with a bootstrapping critic, detached from the trunk."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardConfig):
        """Fields of the actor-critic."""

        discount: Share = 0.9
        """Discount per token of the rewards that follow."""
        trace: Share = 0.9
        """lambda of the generalised advantage: 0 trusts the critic, 1 the returns."""

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.value = critic(shape, config.value_hidden)
        self.mean_reward = RunningMean(config.ema_decay)

    def remember(self, x_TD: Tensor) -> dict[str, Tensor]:
        """Return the critic's value of each row."""
        return {"value_T": self.value(x_TD).squeeze(1)}

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the policy-gradient surrogate, minus the entropy, the balance loss and the critic's squared error."""
        config, mask_MT = self.config, feedback.context.mask_T.view_as(feedback.loss_MT)
        value_MT = decision.memo["value_T"].view_as(feedback.loss_MT)
        reward_MT = self.mean_reward.centre(self.reward(decision, feedback)) * mask_MT
        differences_MT = temporal_differences(
            reward_MT, value_MT.detach() * mask_MT, feedback.context.sequence_T[: mask_MT.shape[1]], config.discount
        )
        advantage_MT = future_rewards(differences_MT, feedback, config.discount * config.trace)
        error_MT = advantage_MT + value_MT.detach() - value_MT
        return {
            "policy": self.surrogate(decision, advantage_MT.reshape(-1), feedback),
            "value": Term(feedback.mean(error_MT.reshape(-1).square()), config.value_weight),
        } | self.regularisers(decision, feedback)

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return the default sums and the sum of rewards."""
        return super().observe(decision, feedback) | {"reward": self.reward(decision, feedback).sum()}

    def adapt(self, sums: Mapping[str, Tensor]) -> None:
        """Move the running mean reward."""
        self.mean_reward.update(sums, "reward")

    def training_flops_per_token(self) -> int:
        """The critic runs in training only."""
        return matrix_flops(self.value)
