"""REINFORCE: experts are sampled, and sampled experts of tokens that were predicted well become more likely.

RL-R of Clark et al. 2022 (arXiv 2202.01169), on Williams 1992 (doi 10.1007/BF00992696); the leave-one-out baseline is that of Kool et
al. 2019 (https://openreview.net/forum?id=r1lgTGL5DE).

The reward is the token's own negative loss, which is biased except after the last attention layer: a token's route changes what later
tokens attend to. ``discount`` adds what follows. Unlike Clark et al. the experts are drawn without nucleus truncation, and for k > 1
by Gumbel top-k, whose ordered draw has a Plackett-Luce log-probability. Advantages are not standardised: they are nats.

Shape suffixes: T tokens (rows of all routing samples), D model width, M routing samples, E experts, K experts per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlroute.agents._policy import RewardConfig, RewardRouter, RunningMean, critic, future_rewards, matrix_flops
from rlroute.errors import ConfigError
from rlroute.limits import Count
from rlroute.routing import Feedback, RouterShape, RoutingContext, RoutingDecision, Term


class ReinforceRouter(RewardRouter):
    """A policy-gradient router: the output is not scaled by a learned gate, so the reward alone teaches it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardConfig):
        """Fields of REINFORCE."""

        baseline: Literal["none", "batch", "ema", "value", "leave_one_out"] = "value"
        """What is subtracted from the return: nothing; the mean of the micro-batch's other rows; its running mean; that plus a learned
        value of the token; or the mean return of the same token in the other routing samples."""
        samples: Count | None = None
        """Routing samples of each token, each a forward and a backward; none: 2 where ``baseline`` or ``resample`` needs them, else 1."""
        resample: Literal["all", "one"] = "all"
        """Which layers differ between samples: all, or one per step in turn, the others held at the first sample's choice; only the
        layer that differs learns in that step."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.samples is not None and self.samples < self.fewest_samples:
                raise ConfigError(
                    f"router reinforce.samples = {self.samples}: legal are numbers from {self.fewest_samples}, or none"
                )

        @property
        def fewest_samples(self) -> int:
            """How many routing samples the baseline and the resampling need."""
            return 2 if self.baseline == "leave_one_out" or self.resample == "one" else 1

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.value = critic(shape, config.value_hidden) if config.baseline == "value" else None
        self.mean_return = RunningMean(config.ema_decay)

    @property
    def batch_dependent(self) -> bool:
        """The balance term and the batch baseline mix the tokens of a micro-batch."""
        return super().batch_dependent or self.config.baseline == "batch"

    @property
    def num_samples(self) -> int:
        """As configured."""
        return self.config.samples or self.config.fewest_samples

    def draw(self, policy_TE: Tensor, context: RoutingContext) -> Tensor:
        """Draw, and hold this layer at the first sample's choice where it is not its turn to be resampled.

        Held choices of later layers were drawn for the first sample's route, not for this one: what a route changes in later layers'
        routing is lost, so that ``resample=one`` is unbiased in the last layer only.
        """
        ids_TK = super().draw(policy_TE, context)
        if self._learns(context):
            return ids_TK
        return ids_TK.view(context.num_samples, -1, self.shape.k)[0].repeat(context.num_samples, 1)

    def _learns(self, context: RoutingContext) -> bool:
        """Whether the samples differ in this layer in this step."""
        turn = context.step % self.shape.moe_layers == self.shape.moe_index
        return self.config.resample == "all" or context.num_samples == 1 or turn

    def remember(self, x_TD: Tensor) -> dict[str, Tensor]:
        """Return the value of each row over the running mean."""
        return {} if self.value is None else {"value_T": self.value(x_TD).squeeze(1)}

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the policy-gradient surrogate, minus the entropy, the balance loss and the value head's squared error.

        Raises:
            ConfigError: fewer routing samples were run than the baseline or the resampling needs.
        """
        if feedback.context.num_samples < self.config.fewest_samples:
            raise ConfigError(
                f"router reinforce:baseline={self.config.baseline},resample={self.config.resample} needs "
                f"{self.config.fewest_samples} routing samples: {feedback.context.num_samples} was run"
            )
        config, terms = self.config, self.regularisers(decision, feedback)
        advantage_T = self._advantage(decision, feedback)
        if self.value is not None:
            value_T = decision.memo["value_T"]
            terms["value"] = Term(feedback.mean((advantage_T - value_T).square()), config.value_weight)
            advantage_T = advantage_T - value_T.detach()
        if not self._learns(feedback.context):
            advantage_T = torch.zeros_like(advantage_T)
        return {"policy": self.surrogate(decision, advantage_T, feedback)} | terms

    def _return(self, decision: RoutingDecision, feedback: Feedback) -> Tensor:
        return future_rewards(self.reward(decision, feedback), feedback, self.config.discount)

    def _advantage(self, decision: RoutingDecision, feedback: Feedback) -> Tensor:
        """Return each row's return less its baseline, without the learned value; shape (T,)."""
        return_MT, baseline = self._return(decision, feedback), self.config.baseline
        if baseline == "none":
            return return_MT.reshape(-1)
        if baseline == "leave_one_out":
            samples = len(return_MT)
            return ((return_MT - return_MT.mean(0)) * samples / (samples - 1)).reshape(-1)
        if baseline == "batch":
            valid_T = feedback.context.mask_T
            others = (valid_T.sum() - 1).clamp(min=1)
            return_T = return_MT.reshape(-1)
            return return_T - ((return_T * valid_T).sum() - return_T) / others
        return self.mean_return.centre(return_MT.reshape(-1))

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return the default sums and the sum of returns."""
        return_T = self._return(decision, feedback).reshape(-1) * feedback.context.mask_T
        return super().observe(decision, feedback) | {"return": return_T.sum()}

    def adapt(self, sums: Mapping[str, Tensor]) -> None:
        """Move the running mean of the return."""
        self.mean_return.update(sums, "return")

    def training_flops_per_token(self) -> int:
        """The value head runs in training only."""
        return matrix_flops(self.value)
