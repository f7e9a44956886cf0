"""Sigmoid top-k whose loads are balanced by a bias that only the selection sees, without an auxiliary loss.

Loss-free balancing, Wang et al. 2024 (arXiv 2408.15664); DeepSeek-V3 (arXiv 2412.19437).

For k = 1 the gate is the score itself: normalised over one expert it would be a constant.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import normalize_rows
from rlroute.limits import NonNegative, Positive
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class BiasBalancedRouter(Router):
    """Selection by s + b; after each step b moves by the update rate towards less loaded experts."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the bias-balanced router."""

        update_rate: NonNegative = 0.001
        """How far a bias moves per step (the papers' u or gamma)."""
        route_scale: Positive = 1.0
        """Factor on all gates; DeepSeek-V3 uses 2.5."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate", "load"})
    gate_meaning = "sigmoid, unbiased, normalised over the chosen for k > 1"
    config: Config
    bias_E: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.register_buffer("bias_E", torch.zeros(shape.num_experts))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Select by biased scores, gate by unbiased ones."""
        logits_TE = self.scores(x_TD)
        scores_TE = logits_TE.sigmoid()
        ids_TK = context.choose(scores_TE + self.bias_E, self.shape.k)
        gates_TK = scores_TE.gather(1, ids_TK)
        if self.shape.k > 1:
            gates_TK = normalize_rows(gates_TK)
        probs_TE = normalize_rows(scores_TE)
        return RoutingDecision.token_choice(
            ids_TK, self.config.route_scale * gates_TK, self.shape.num_experts, logits_TE=logits_TE, probs_TE=probs_TE
        )

    def adapt(self, sums: Sums, progress: float) -> None:
        """Raise the bias of experts that less than the mean chose, lower that of the others."""
        demand_E = sums["demand_E"].to(self.bias_E.dtype)
        self.bias_E += self.config.update_rate * torch.sign(demand_E.mean() - demand_E)
