"""Sigmoid top-k whose loads are balanced by a bias that only the selection sees, without an auxiliary loss.

Loss-free balancing, Wang et al. 2024 (arXiv 2408.15664); DeepSeek-V3 (arXiv 2412.19437).

The paper's step goes by the sign of the error in load. It also tries one by its size: here relative to the mean load,
so that the rate does not hang on the size of a batch. torchtitan subtracts the step's mean, so that biases do not drift
together.

For k = 1 the gate is the score itself: normalised over one expert it would be a constant.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import normalize_rows
from rlroute.limits import NonNegative, Positive, Share
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class BiasBalancedRouter(Router):
    """Selection by s + b; after each step b moves by the update rate towards less loaded experts."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the bias-balanced router."""

        update_rate: NonNegative = 0.001
        """How far a bias moves per step (the papers' u or gamma)."""
        rule: Literal["sign", "magnitude", "centred"] = "sign"
        """What the rate multiplies: the sign of the mean load less the expert's; that difference over the mean load; or
        the sign less its mean over experts.
        """
        until: Share = 1.0
        """The share of the budget after which biases stay; DeepSeek-V3 ends at 14.3 of 14.8 trillion tokens, 0.966."""
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
        if progress < self.config.until:
            self.bias_E += self.config.update_rate * self._error(sums["demand_E"].to(self.bias_E.dtype))

    def _error(self, demand_E: Tensor) -> Tensor:
        """Return how far each expert's load is below the mean, as the rule sees it; shape (E,)."""
        below_E = demand_E.mean() - demand_E
        if self.config.rule == "magnitude":
            return below_E / demand_E.mean().clamp(min=torch.finfo(demand_E.dtype).tiny)
        sign_E = torch.sign(below_E)
        return sign_E - sign_E.mean() if self.config.rule == "centred" else sign_E
