"""k distinct experts at random for each token: the control that knows nothing.

Random routing as a control: THOR, Zuo et al. 2021 (arXiv 2110.04260).
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import constant_gates
from rlroute.routing import Router, RoutingContext, RoutingDecision


class UniformRouter(Router):
    """Uniform draws without replacement. The draws are keyed, so evaluation is as deterministic as everyone else's."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The uniform router has no fields."""

    gate_meaning = "1/k"
    publishes = frozenset()

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Draw k experts; greedy evaluation draws too, as there is no best expert."""
        ids_TK = context.choose(context.noise("uniform", (self.shape.num_experts,)), self.shape.k)
        return RoutingDecision.token_choice(ids_TK, constant_gates(ids_TK, x_TD), self.shape.num_experts)
