"""REINFORCE: experts are sampled, and sampled experts of tokens that were predicted well become more likely.

RL-R of Clark et al. 2022 (arXiv 2202.01169), on Williams 1992 (doi 10.1007/BF00992696).

The reward is the token's own negative loss, which is biased except after the last attention layer: a token's route changes what later
tokens attend to. Unlike Clark et al. the experts are drawn without nucleus truncation, and for k > 1 by Gumbel top-k.

Shape suffixes: T tokens (rows of all routing samples), D model width, E experts, K experts per token, R pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute import seeding
from rlroute.balance import entropy_T, load_balance
from rlroute.config import RouterConfig
from rlroute.errors import ConfigError
from rlroute.rewards import own_token_reward
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
        entropy_weight: float = 0.0
        """Weight of the entropy bonus."""
        balance_weight: float = 0.01
        """Weight of the f.P balance loss."""
        temperature: float = 1.0
        """Of the sampling distribution; logits are divided by it."""
        shape_body: bool = False
        """Let the router's losses shape the hidden states too. Off: the router reads them detached."""
        init_std: float = 0.02

        def __post_init__(self) -> None:
            if self.baseline not in ("none", "ema", "value"):
                raise ConfigError(f"router reinforce.baseline = {self.baseline!r}: legal are 'none', 'ema', 'value'")
            if not self.temperature > 0:
                raise ConfigError(f"router reinforce.temperature = {self.temperature}: must be above 0")
            if not 0 <= self.ema_decay < 1:
                raise ConfigError(f"router reinforce.ema_decay = {self.ema_decay}: legal are 0 to below 1")

    learns_from = frozenset({"reward"})
    gate_meaning = "1/k"
    stochastic = True
    mean_reward: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.value = _value_head(shape, config.value_hidden) if config.baseline == "value" else None
        self.register_buffer("mean_reward", torch.tensor(float("nan")))  # nan until the first step has been seen

    @property
    def batch_dependent(self) -> bool:
        """The balance loss mixes the tokens of a micro-batch."""
        return self.config.balance_weight > 0

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Sample k experts in order where exploring, else take the k most probable; gates are 1/k."""
        k = self.shape.k
        inputs_TD = x_TD if self.config.shape_body else x_TD.detach()
        logits_TE = self.scores(inputs_TD) / self.config.temperature
        log_prob_TK, memo = None, {}
        if context.explore:
            ids_TK = gumbel_top_k(logits_TE, k, context.noise("reinforce", (self.shape.num_experts,)))
            log_prob_TK = plackett_luce_log_prob(logits_TE, ids_TK)
            if self.value is not None:
                memo["value_T"] = self.value(x_TD.detach()).squeeze(1)
        else:
            ids_TK = top_k(logits_TE, k)
        return RoutingDecision.token_choice(
            ids_TK,
            torch.full(ids_TK.shape, 1 / k, dtype=x_TD.dtype, device=x_TD.device),
            self.shape.num_experts,
            log_prob_TK=log_prob_TK,
            logits_TE=logits_TE,
            probs_TE=logits_TE.softmax(1),
            memo=memo,
        )

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the policy-gradient surrogate, the value head's error, the negative entropy and the balance loss."""
        config = self.config
        assert decision.log_prob_R is not None and decision.probs_TE is not None
        reward_T = own_token_reward(feedback.loss_MT).reshape(-1)
        # Before the first step has been seen there is no mean to compare with: that step only measures.
        excess_T = torch.where(torch.isnan(self.mean_reward), 0.0, reward_T - self.mean_reward)
        advantage_T = reward_T if config.baseline == "none" else excess_T
        terms = {}
        if self.value is not None:
            value_T = decision.memo["value_T"]
            advantage_T = excess_T - value_T.detach()
            terms["value"] = Term(
                feedback.mean(functional.mse_loss(value_T, excess_T, reduction="none")), config.value_weight
            )
        executed_T = torch.where(decision.all_kept_T(), advantage_T, torch.zeros_like(advantage_T))
        log_prob_T = decision.token_sum(decision.log_prob_R)
        terms["policy"] = Term(feedback.mean(-executed_T * log_prob_T), config.policy_weight)
        terms["entropy"] = Term(feedback.mean(-entropy_T(decision.probs_TE)), config.entropy_weight)
        balance = feedback.share * load_balance(decision.probs_TE, decision, feedback.context)
        return terms | {"balance": Term(balance, config.balance_weight)}

    def adapt(self, sums: Mapping[str, Tensor]) -> None:
        """Move the running mean of the reward; it starts at the first mean seen."""
        reward = (-sums["loss"] / sums["tokens"]).to(self.mean_reward.dtype)
        moved = torch.lerp(reward, self.mean_reward, self.config.ema_decay)
        self.mean_reward.copy_(torch.where(torch.isnan(self.mean_reward), reward, moved))

    def training_flops_per_token(self) -> int:
        """The value head runs in training only."""
        return 0 if self.value is None else 2 * sum(p.numel() for p in self.value.parameters() if p.dim() == 2)


def _value_head(shape: RouterShape, hidden: int) -> nn.Sequential:
    """An MLP from a token's state to its expected reward over the running mean; it starts at 0."""
    head = nn.Sequential(
        nn.Linear(shape.d_model, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    )
    for name, parameter in head.named_parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 and len(parameter) > 1 else 0.0
        seeding.init_normal(parameter, std, shape.seed, f"layers.{shape.layer}.router.value.{name}")
    return head
