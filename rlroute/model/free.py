"""Experts that cost nothing: zero, copy and constant ones (MoE++, Jin et al. 2024, arXiv 2410.07348), behind the real
ones in this order.

A router chooses among all of them alike. The kernels see the pairs of real experts alone; what those of the others add
is a weight of the token's own input and of learned vectors, found for all tokens at once: no row is gathered for it,
and nothing waits for the device.

Shape suffixes: T tokens, D model width, E real experts, J constant experts.
"""

import torch
from torch import Tensor, nn

from rlroute import seeding
from rlroute.config import ModelConfig
from rlroute.decision import RoutingDecision


class FreeExperts(nn.Module):
    """The free experts of one layer: all that they hold is what the constant ones learned.

    A constant expert gives a x + b v: v is its vector, and (a, b) the softmax of a linear map of x. As in the authors'
    public code the vectors start as N(0, 1); the map is initialised like an expert's input weights.
    """

    def __init__(self, config: ModelConfig, layer: int, seed: int) -> None:
        super().__init__()
        self.first_copy = config.num_experts + config.zero_experts
        self.first_constant = self.first_copy + config.copy_experts
        self.constants = config.constant_experts
        if self.constants:
            self.vector_JD = nn.Parameter(torch.empty(self.constants, config.d_model))
            self.mix_J2D = nn.Parameter(torch.empty(self.constants, 2, config.d_model))
            key = f"layers.{layer}.free"
            for row in range(self.constants):
                seeding.init_normal(self.vector_JD[row], 1.0, seed, f"{key}.vector", row)
                seeding.init_normal(self.mix_J2D[row], config.d_model**-0.5, seed, f"{key}.mix", row)

    def forward(self, x_TD: Tensor, decision: RoutingDecision) -> Tensor:
        """Return what the pairs of free experts add, shape (T, D), in the precision of ``x_TD``.

        Args:
            x_TD: the layer's input.
            decision: over all experts, as it is run.
        """
        own_T = _weight_T(decision, self.first_copy, self.first_constant)
        if not self.constants:
            return own_T[:, None].to(x_TD.dtype) * x_TD
        first = self.first_constant
        gates_TJ = torch.stack([_weight_T(decision, first + j, first + j + 1) for j in range(self.constants)], dim=1)
        logits_TX = nn.functional.linear(x_TD, self.mix_J2D.flatten(0, 1).to(x_TD.dtype))
        shares_TJ2 = logits_TX.to(gates_TJ.dtype).view(-1, self.constants, 2).softmax(2)
        own_T = own_T + (gates_TJ * shares_TJ2[..., 0]).sum(1)
        vectors_TD = (gates_TJ * shares_TJ2[..., 1]).to(x_TD.dtype) @ self.vector_JD.to(x_TD.dtype)
        return own_T[:, None].to(x_TD.dtype) * x_TD + vectors_TD


def _weight_T(decision: RoutingDecision, first: int, end: int) -> Tensor:
    """Return the sum of each token's kept gates of experts ``first`` to ``end - 1``."""
    ids_R, gates_R = decision.expert_ids_R, decision.gates_R
    theirs_R = decision.kept_R & (ids_R >= first) & (ids_R < end)
    return decision.token_sum(torch.where(theirs_R, gates_R, torch.zeros_like(gates_R)))
