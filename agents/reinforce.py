"""REINFORCE: experts are sampled, and sampled experts of tokens that were predicted well become more likely.

RL-R of Clark et al. 2022 (arXiv 2202.01169), on Williams 1992 (doi 10.1007/BF00992696); the leave-one-out baseline is
that of Kool et al. 2019 (https://openreview.net/forum?id=r1lgTGL5DE).

The reward is the token's own negative loss, which is biased except after the last attention layer: a token's route
changes what later tokens attend to. ``discount`` adds what follows. Unlike Clark et al. the experts are drawn without
nucleus truncation, and for k > 1 by Gumbel top-k, whose ordered draw has a Plackett-Luce log-probability. Advantages
are not standardised: they are nats.

Shape suffixes: T tokens (rows of all routing samples), D model width, M routing samples, E experts, K experts per
token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlroute.errors import ConfigError
from rlroute.limits import Count
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
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums, Term


class ReinforceRouter(Router):
    """A policy-gradient router: the output is not scaled by a learned gate, so the reward alone teaches it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardConfig):
        """Fields of REINFORCE."""

        baseline: Literal["none", "batch", "ema", "value", "leave_one_out"] = "value"
        """What is subtracted from the return: nothing; the mean of the micro-batch's other rows; its running mean; that
        plus a learned value of the token; or the mean return of the same token in the other routing samples."""
        samples: Count | None = None
        """Routing samples of each token, each a forward and a backward; none: 2 where ``baseline`` or ``resample``
        needs them, else 1.
        """
        resample: Literal["all", "one"] = "all"
        """Which sites differ between samples: all, or one per step in turn, the others held at the first sample's
        choice; only the site that differs learns in that step."""

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

    learns_from = frozenset({"reward"})
    gate_meaning = "1/k"
    stochastic = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.value = critic(shape, config.value_hidden) if config.baseline == "value" else None
        self.mean_return = RunningMean(config.ema_decay)
        self.batch_dependent |= config.charge_weight > 0 or config.baseline == "batch"

    @property
    def num_samples(self) -> int:
        """As configured."""
        return self.config.samples or self.config.fewest_samples

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Sample k experts in order where exploring, else take the k most probable."""
        logits_TE = self.scores(x_TD if self.config.shape_body else x_TD.detach())
        policy_TE = logits_TE / self.config.temperature_at(context.step)
        ids_TK = context.choose(self._hold(perturb(policy_TE, context, "reinforce"), context), self.shape.k)
        memo = {}
        if context.explore and self.value is not None:
            memo = {"value_T": self.value(x_TD.detach()).squeeze(1)}
        return policy_decision(logits_TE, policy_TE, ids_TK, context, memo)

    def _hold(self, scores_TE: Tensor, context: RoutingContext) -> Tensor:
        """Hold this site at the first sample's draw where it is not its turn to be resampled.

        Held choices of later sites were drawn for the first sample's route, not for this one: what a route changes in
        later sites' routing is lost, so that ``resample=one`` is unbiased in the last one only.
        """
        if self._learns(context):
            return scores_TE
        return scores_TE.view(context.num_samples, -1, scores_TE.shape[1])[0].repeat(context.num_samples, 1)

    def _learns(self, context: RoutingContext) -> bool:
        """Whether the samples differ at this site in this step."""
        turn = context.step % self.shape.num_sites == self.shape.site_index
        return self.config.resample == "all" or context.num_samples == 1 or turn

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the policy-gradient surrogate, and the value head's squared error.

        Raises:
            ConfigError: fewer routing samples were run than the baseline or the resampling needs.
        """
        config, terms = self.config, dict[str, Term]()
        if feedback.context.num_samples < config.fewest_samples:
            raise ConfigError(
                f"router reinforce:baseline={config.baseline},resample={config.resample} needs "
                f"{config.fewest_samples} routing samples: {feedback.context.num_samples} was run"
            )
        advantage_T = self._advantage(decision, feedback)
        if self.value is not None:
            value_T = decision.memo["value_T"]
            terms["value"] = Term(feedback.mean((advantage_T - value_T).square()), config.value_weight)
            advantage_T = advantage_T - value_T.detach()
        if not self._learns(feedback.context):
            advantage_T = torch.zeros_like(advantage_T)
        return {"policy": Term(surrogate(decision, advantage_T, feedback), config.policy_weight)} | terms

    def _return(self, decision: RoutingDecision, feedback: Feedback) -> Tensor:
        return returns(reward(decision, feedback, self.config.charge_weight), feedback, self.config.discount)

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
        """Return the sum of returns."""
        return {"return": (self._return(decision, feedback).reshape(-1) * feedback.context.mask_T).sum()}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Move the running mean of the return."""
        self.mean_return.update(sums, "return")
