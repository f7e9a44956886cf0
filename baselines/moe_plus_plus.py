"""Softmax top-k whose logits add a linear map of those at the site before: MoE++ and its gating residuals.

MoE++, Jin et al. 2024 (arXiv 2410.07348): z_l = W_l x + G_l z_(l-1), differentiable, so that a token remembers the way
that it came. Its zero, copy and constant experts are the model's: `--model.zero-experts 1 --model.copy-experts 1
--model.constant-experts 2`. Its balance loss weighs free experts by tau, so that they are chosen more or less often.

z_(l-1) are the logits of the last site before that has as many experts and whose router publishes logits, whichever it
is; where there is none the term is 0, as in the first layer. The paper's capacities, larger for free experts by
1 / tau, are not here: free experts of ours have none. Its public code sets the gate of a zero expert to 0 before it
divides by their sum; here a zero expert keeps its share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.balance import load_balance
from rlroute.config import RouterConfig
from rlroute.gates import softmax_meaning, softmax_top_k
from rlroute.limits import NonNegative, Share
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Term


class MoEPlusPlusRouter(Router):
    """Top-k by probability, with a residual from the site before."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of MoE++'s router."""

        mixed_balance_weight: NonNegative = 0.01
        """Weight of the f.P loss in which free experts count tau (the paper's beta)."""
        tau: Share = 0.75
        """What a free expert counts in that loss: the less, the more pairs go to free experts; a real one counts 1."""
        normalize: bool = True
        """Renormalise the gates over the chosen where k > 1."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights, and of what is added of the site before."""

    learns_from = frozenset({"gate"})
    gate_meaning = softmax_meaning(normalize=True, k=2)
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.gate_meaning = softmax_meaning(config.normalize, shape.k)
        self.batch_dependent |= config.mixed_balance_weight > 0
        self.scores = ResidualScores(shape, config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k most probable experts."""
        before_TE = context.latest(lambda decision: decision.logits_TE, self.shape.num_experts)
        logits_TE = self.scores(x_TD, before_TE)
        return softmax_top_k(logits_TE, self.shape.k, context, normalize=self.config.normalize)

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the balance loss E sum_i eta_i f_i P_i, with eta 1 for a real expert and tau for a free one."""
        assert decision.probs_TE is not None
        eta_E = torch.ones_like(decision.probs_TE[0])
        eta_E[self.shape.num_real_experts :].fill_(self.config.tau)
        value = load_balance(decision.probs_TE, decision, feedback.context, eta_E)
        return {"mixed_balance": Term(feedback.share * value, self.config.mixed_balance_weight)}


class ResidualScores(LinearScores):
    """Logits of an input, plus a linear map of those before; the first site of a model has no such map."""

    def __init__(self, shape: RouterShape, std: float) -> None:
        super().__init__(shape, "scores", std)
        experts = shape.num_experts
        self.residual = LinearScores(shape, "residual", std, features=experts) if shape.site_index else None

    def forward(self, x_TD: Tensor, before_TE: Tensor | None = None) -> Tensor:
        """Return logits of shape (T, E)."""
        logits_TE = super().forward(x_TD)
        return logits_TE if self.residual is None or before_TE is None else logits_TE + self.residual(before_TE)
