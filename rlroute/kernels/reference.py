"""The slow loop over experts that every other engine is tested against; any dtype, any device, plain autograd.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows (2F where gated), E experts, R routed pairs, N
pairs of one expert.
"""

import torch
from torch import Tensor

from rlroute.decision import RoutingDecision
from rlroute.kernels.activations import activate


def reference_expert_mlp(
    x_TD: Tensor, decision: RoutingDecision, in_EHD: Tensor, out_EDF: Tensor, activation: str
) -> Tensor:
    """Return out_TD as :func:`rlroute.kernels.expert_mlp` defines it."""
    out_TD = torch.zeros_like(x_TD)
    for expert, (in_HD, out_DF) in enumerate(zip(in_EHD.unbind(0), out_EDF.unbind(0), strict=True)):
        pairs_N = torch.nonzero(decision.kept_R & (decision.expert_ids_R == expert)).squeeze(1)
        tokens_N = decision.token_ids_R[pairs_N]
        y_ND = activate(x_TD[tokens_N] @ in_HD.t(), activation) @ out_DF.t()
        out_TD = out_TD.index_add(0, tokens_N, decision.gates_R[pairs_N, None] * y_ND)
    return out_TD
