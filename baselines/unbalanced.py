"""Softmax top-k with nothing that balances: the control that must collapse.

Collapse without a balance loss: Shazeer et al. 2017 (arXiv 1701.06538, table 6), OLMoE (arXiv 2409.02060).
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import softmax_meaning, softmax_top_k
from rlroute.limits import NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision


class UnbalancedRouter(Router):
    """Top-k by probability; it learns through its gates alone."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the unbalanced control."""

        normalize: bool = True
        """Renormalise the gates over the chosen where k > 1."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = softmax_meaning(normalize=True, k=2)
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.gate_meaning = softmax_meaning(config.normalize, shape.k)
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k most probable experts."""
        return softmax_top_k(self.scores(x_TD), self.shape.k, context, normalize=self.config.normalize)
