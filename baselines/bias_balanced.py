"""Sigmoid top-k whose loads are balanced by a bias that only the selection sees, without an auxiliary loss.

Loss-free balancing, Wang et al. 2024 (arXiv 2408.15664); DeepSeek-V3 (arXiv 2412.19437).

The paper's step goes by the sign of the error in load. It also tries one by its size: here relative to the mean load,
so that the rate does not hang on the size of a batch. torchtitan subtracts the step's mean, so that biases do not drift
together.

SMEBU (Arcee Trinity Large, 2026, arXiv 2602.17004) clamps that size softly: with v the error over the mean load, a step
is the rate times tanh(kappa v) less its mean over experts, and what is added to the bias is a moving average of steps.
Trinity's values, which we have at second hand: `rule=smebu,update_rate=0.0005`, kappa 2 and momentum 0.5.

For k = 1 the gate is the score itself: normalised over one expert it would be a constant.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import normalize_rows
from rlroute.limits import BelowOne, NonNegative, Positive, Share
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class BiasBalancedRouter(Router):
    """Selection by s + b; after each step b moves by the update rate towards less loaded experts."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the bias-balanced router."""

        update_rate: NonNegative = 0.001
        """How far a bias moves per step (the papers' u or gamma)."""
        rule: Literal["sign", "magnitude", "centred", "smebu"] = "sign"
        """What the rate multiplies: the sign of the mean load less the expert's; that difference over the mean load;
        the sign less its mean over experts; or SMEBU's step.
        """
        kappa: Positive = 2.0
        """How steep the tanh of SMEBU is: beyond an error of 1 / kappa of the mean load, steps hardly grow."""
        momentum: BelowOne = 0.5
        """Decay per step of SMEBU's moving average of steps."""
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
    step_E: Tensor | None

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.register_buffer("bias_E", torch.zeros(shape.num_experts))
        self.register_buffer("step_E", torch.zeros(shape.num_experts) if config.rule == "smebu" else None)

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
            step_E = self.config.update_rate * self._error(sums["demand_E"].to(self.bias_E.dtype))
            if self.step_E is not None:
                step_E = self.step_E.lerp_(step_E, 1 - self.config.momentum)
            self.bias_E += step_E

    def _error(self, demand_E: Tensor) -> Tensor:
        """Return how far each expert's load is below the mean, as the rule sees it; shape (E,)."""
        rule, below_E = self.config.rule, demand_E.mean() - demand_E
        if rule in ("magnitude", "smebu"):
            below_E = below_E / demand_E.mean().clamp(min=torch.finfo(demand_E.dtype).tiny)
        if rule == "magnitude":
            return below_E
        seen_E = torch.tanh(self.config.kappa * below_E) if rule == "smebu" else torch.sign(below_E)
        return seen_E if rule == "sign" else seen_E - seen_E.mean()
