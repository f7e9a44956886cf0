"""Every token runs every expert, weighted by a softmax: the control that chooses nothing.

The mixture of experts as it was before it was sparse, Jacobs et al. 1991 (doi 10.1162/neco.1991.3.1.79). It is not Soft
MoE (arXiv 2308.00951), whose experts run mixtures of tokens.

The model's k is no part of the rule: k is E, and the compute of all experts is counted and printed, E / k times that of
token choice. A capacity goes by the model's k and drops what is over it.
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import softmax_top_k
from rlroute.limits import NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision


class SoftRouter(Router):
    """All experts, the most probable first."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the soft mixture."""

        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts, which all run"
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take every expert."""
        return softmax_top_k(self.scores(x_TD), self.shape.num_experts, context, normalize=False)
