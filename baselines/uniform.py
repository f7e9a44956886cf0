"""k distinct experts at random for each token: the control that knows nothing.

Random routing as a control: THOR, Zuo et al. 2021 (arXiv 2110.04260).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.routing import Router, RoutingContext, RoutingDecision
from rlroute.sampling import top_k


class UniformRouter(Router):
    """Uniform draws without replacement. The draws are keyed, so evaluation is as deterministic as everyone else's."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The uniform router has no fields."""

    gate_meaning = "1/k"

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Draw k experts; greedy evaluation draws too, as there is no best expert."""
        ids_TK = top_k(context.noise("uniform", (self.shape.num_experts,)), self.shape.k)
        gates_TK = torch.full(ids_TK.shape, 1 / self.shape.k, dtype=x_TD.dtype, device=x_TD.device)
        return RoutingDecision.token_choice(ids_TK, gates_TK, self.shape.num_experts)
