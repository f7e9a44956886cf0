"""Sigmoid top-k whose gates are normalised together with those of the shared experts; a bias balances the choice.

Inkling, by its public code: s = sigmoid(z) of routed and shared experts; the k largest s + b of the routed ones are
chosen, and their gates and the shared experts' are s over the sum of all of these, times `route_scale` and a learned
number, at first 1. A token can so rest on the shared experts. Without any this is `topk:score=sigmoid,bias_rate=0.001`
times that number; a gate that is alone is the score.

The bias moves as in loss-free balancing (Wang et al. 2024, arXiv 2408.15664); what Inkling's training does is not
published.

Shape suffixes: T tokens, D model width, E experts, K experts per token, S shared experts, X that run: K and S.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute.config import RouterConfig
from rlroute.gates import normalize_rows
from rlroute.limits import NonNegative, Positive, Share
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class JointGatesRouter(Router):
    """Selection by s + b; one sum divides the gates of chosen and of shared experts."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the router with joint gates."""

        route_scale: Positive = 1.0
        """Factor on all gates; Inkling, 6 experts a token and 2 shared ones: 8."""
        bias_rate: NonNegative = 0.001
        """How far the bias of the choice moves per step towards less loaded experts."""
        bias_until: Share = 1.0
        """The share of the budget after which the bias stays."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate", "load"})
    gate_meaning = "sigmoid, unbiased, normalised over the chosen and the shared, times a learned scale"
    config: Config
    bias_E: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.shared_SD = None
        if shape.num_shared_experts:
            self.shared_SD = nn.Parameter(torch.empty(shape.num_shared_experts, shape.d_model))
            shape.init(self.shared_SD, "shared", config.init_std)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("bias_E", torch.zeros(shape.num_experts))

    @classmethod
    def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
        """Refuse shared experts that the layer weighs itself."""
        if shape.weighs_shared:
            return "model.shared_gate weighs the shared experts, whose gates it makes: legal is 'none'"
        return super().refuses(config, shape)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Choose by biased scores; normalise the unbiased ones of all experts that run."""
        logits_TE, k = self.scores(x_TD), self.shape.k
        scores_TE = logits_TE.sigmoid()
        ids_TK = context.choose(scores_TE + self.bias_E, k)
        runs_TX = logits_TE.gather(1, ids_TK)
        if self.shared_SD is not None:
            runs_TX = torch.cat([runs_TX, functional.linear(x_TD, self.shared_SD)], 1)
        several = runs_TX.shape[1] > 1  # one gate over itself would be a constant 1
        gates_TX = functional.logsigmoid(runs_TX).softmax(1) if several else runs_TX.sigmoid()
        gates_TX = self.config.route_scale * self.scale * gates_TX
        return RoutingDecision.token_choice(
            ids_TK,
            gates_TX[:, :k],
            self.shape.num_experts,
            logits_TE=logits_TE,
            probs_TE=normalize_rows(scores_TE),
            shared_gates_TS=None if self.shared_SD is None else gates_TX[:, k:],
        )

    def adapt(self, sums: Sums, progress: float) -> None:
        """Raise the bias of experts that less than the mean chose, lower that of the others."""
        if progress < self.config.bias_until:
            demand_E = sums["demand_E"].to(self.bias_E.dtype)
            self.bias_E += self.config.bias_rate * torch.sign(demand_E.mean() - demand_E)
