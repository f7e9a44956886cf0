"""REINFORCE: experts are sampled, and sampled experts of tokens that were predicted well become more likely.

RL-R of Clark et al. 2022 (arXiv 2202.01169), on Williams 1992 (doi 10.1007/BF00992696).

The reward is the token's own negative loss, which is biased except after the last attention layer: a token's route changes what later
tokens attend to. ``discount`` adds what follows. Unlike Clark et al. the experts are drawn without nucleus truncation, and for k > 1
by Gumbel top-k, whose ordered draw has a Plackett-Luce log-probability. Advantages are not standardised: they are nats.

Shape suffixes: T tokens (rows of all routing samples), D model width, M routing samples, E experts, K experts per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rlroute import seeding
from rlroute.balance import entropy_T, load_balance
from rlroute.config import RouterConfig
from rlroute.errors import ConfigError
from rlroute.rewards import discounted_return, own_token_reward
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Term
from rlroute.sampling import gumbel_top_k, plackett_luce_log_prob, top_k


class ReinforceRouter(Router):
    """A policy-gradient router: the output is not scaled by a learned gate, so the reward alone teaches it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of REINFORCE."""

        policy_weight: float = 0.1
        """Weight of the policy-gradient term."""
        baseline: Literal["none", "ema", "value"] = "value"
        """What is subtracted from the reward: nothing, its running mean, or that plus a learned value of the token."""
        value_weight: float = 0.01
        """Weight of the value head's squared error."""
        value_hidden: int = 128
        """Width of the value head's two hidden layers."""
        ema_decay: float = 0.99
        """Decay of the running mean per step; it starts at the first step's mean."""
        discount: float = 0.0
        """Discount per token of the rewards that follow in the sequence; 0 is the token's own reward alone."""
        entropy_weight: float = 0.0
        """Weight of the entropy bonus."""
        balance_weight: float = 0.01
        """Weight of the f.P balance loss."""
        temperature: float = 1.0
        """Of the sampling distribution; logits are divided by it."""
        shape_body: bool = False
        """Let the router's losses shape the hidden states too. Off: the router reads them detached."""
        init_std: float = 0.02
        """Standard deviation of the initial score weights."""

        def __post_init__(self) -> None:
            if self.baseline not in ("none", "ema", "value"):
                raise ConfigError(f"router reinforce.baseline = {self.baseline!r}: legal are 'none', 'ema', 'value'")
            for name in ("policy_weight", "value_weight", "entropy_weight", "balance_weight", "init_std"):
                if not getattr(self, name) >= 0:
                    raise ConfigError(f"router reinforce.{name} = {getattr(self, name)}: legal are numbers from 0")
            for name in ("value_hidden", "temperature"):
                if not getattr(self, name) > 0:
                    raise ConfigError(f"router reinforce.{name} = {getattr(self, name)}: must be above 0")
            if not 0 <= self.ema_decay < 1:
                raise ConfigError(f"router reinforce.ema_decay = {self.ema_decay}: legal are 0 to below 1")
            if not 0 <= self.discount <= 1:
                raise ConfigError(f"router reinforce.discount = {self.discount}: legal are 0 to 1")

    learns_from = frozenset({"reward"})
    gate_meaning = "1/k"
    stochastic = True
    mean_return: Tensor
    started: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.value = _value_head(shape, config.value_hidden) if config.baseline == "value" else None
        self.register_buffer("mean_return", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))  # whether mean_return has seen a step

    @property
    def batch_dependent(self) -> bool:
        """The balance loss mixes the tokens of a micro-batch."""
        return self.config.balance_weight > 0

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Sample k experts in order where exploring, else take the k most probable; gates are 1/k."""
        k, experts = self.shape.k, self.shape.num_experts
        logits_TE = self.scores(x_TD if self.config.shape_body else x_TD.detach())
        policy_TE = logits_TE / self.config.temperature
        log_prob_TK, memo = None, {}
        if context.explore:
            ids_TK = gumbel_top_k(policy_TE, k, context.noise("reinforce", (experts,)))
            log_prob_TK = plackett_luce_log_prob(policy_TE, ids_TK)
            if self.value is not None:
                memo["value_T"] = self.value(x_TD.detach()).squeeze(1)
        else:
            ids_TK = top_k(policy_TE, k)
        gates_TK = torch.full_like(ids_TK, 1 / k, dtype=x_TD.dtype)
        probs_TE = policy_TE.softmax(1)
        return RoutingDecision.token_choice(
            ids_TK, gates_TK, experts, log_prob_TK=log_prob_TK, logits_TE=logits_TE, probs_TE=probs_TE, memo=memo
        )

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the policy-gradient surrogate, minus the entropy, the balance loss and the value head's squared error.

        The surrogate is -advantage * log pi(draw), averaged over valid tokens; a token counts if all its pairs were kept, for what
        ran is otherwise not what was drawn.
        """
        assert decision.log_prob_R is not None and decision.probs_TE is not None
        config, advantage_T, terms = self.config, self._advantage(feedback), {}
        if self.value is not None:
            value_T = decision.memo["value_T"]
            terms["value"] = Term(feedback.mean((advantage_T - value_T).square()), config.value_weight)
            advantage_T = advantage_T - value_T.detach()
        credit_T = decision.all_kept_T() * advantage_T
        policy_T = -credit_T * decision.token_sum(decision.log_prob_R)
        balance = feedback.share * load_balance(decision.probs_TE, decision, feedback.context)
        return {
            "policy": Term(feedback.mean(policy_T), config.policy_weight),
            "entropy": Term(feedback.mean(-entropy_T(decision.probs_TE)), config.entropy_weight),
            "balance": Term(balance, config.balance_weight),
        } | terms

    def _advantage(self, feedback: Feedback) -> Tensor:
        """Return each row's return less its running mean where a baseline is wanted; shape (T,).

        Before the first step has been seen there is nothing to compare with: that step only measures.
        """
        return_T = self._return(feedback)
        if self.config.baseline == "none":
            return return_T
        return self.started * (return_T - self.mean_return)

    def _return(self, feedback: Feedback) -> Tensor:
        context, loss_MT = feedback.context, feedback.loss_MT.detach()
        reward_MT = own_token_reward(loss_MT) * context.mask_T.view_as(loss_MT)
        if self.config.discount:
            sequence_T = context.sequence_T[: loss_MT.shape[1]]
            reward_MT = discounted_return(reward_MT, sequence_T, self.config.discount)
        return reward_MT.reshape(-1)

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return the default sums and the sum of returns."""
        return_T = self._return(feedback) * feedback.context.mask_T
        return super().observe(decision, feedback) | {"return": return_T.sum()}

    def adapt(self, sums: Mapping[str, Tensor]) -> None:
        """Move the running mean of the return; it starts at the first step's mean."""
        mean = (sums["return"] / sums["tokens"]).to(self.mean_return.dtype)
        moved = torch.lerp(mean, self.mean_return, self.config.ema_decay)
        self.mean_return.copy_(torch.where(self.started, moved, mean))
        self.started.fill_(True)

    def training_flops_per_token(self) -> int:
        """The value head runs in training only."""
        return 0 if self.value is None else 2 * sum(p.numel() for p in self.value.parameters() if p.dim() == 2)


def _value_head(shape: RouterShape, hidden: int) -> nn.Sequential:
    """An MLP from a token's state to its expected return over the running mean; it starts at 0."""
    inner, outer = nn.Linear(shape.d_model, hidden), nn.Linear(hidden, 1)
    head = nn.Sequential(inner, nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), outer)
    for name, parameter in head.named_parameters():
        starts_at_0 = parameter.dim() == 1 or parameter is outer.weight
        std = 0.0 if starts_at_0 else (2 / parameter.shape[1]) ** 0.5
        seeding.init_normal(parameter, std, shape.seed, f"layers.{shape.layer}.router.value.{name}")
    return head
