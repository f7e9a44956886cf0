"""The slow loop over experts that every other engine is tested against; any dtype, any device, plain autograd.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows (2F where gated), E experts, R routed pairs, N
pairs of one expert.
"""

import torch
from torch import Tensor

from rlroute.decision import RoutingDecision
from rlroute.kernels.activations import activate
from rlroute.kernels.form import Form


def reference_expert_mlp(
    x_TD: Tensor, decision: RoutingDecision, in_EHD: Tensor, out_EDF: Tensor, activation: str, form: Form
) -> Tensor:
    """Return out_TD as :func:`rlroute.kernels.expert_mlp` defines it."""
    out_TD = torch.zeros_like(x_TD)
    for expert, (in_HD, out_DF) in enumerate(zip(in_EHD.unbind(0), out_EDF.unbind(0), strict=True)):
        pairs_N = torch.nonzero(decision.kept_R & (decision.expert_ids_R == expert)).squeeze(1)
        tokens_N, gates_N1 = decision.token_ids_R[pairs_N], decision.gates_R[pairs_N, None]
        x_ND = x_TD[tokens_N]
        hidden_NH = ((gates_N1 * x_ND).to(x_ND.dtype) if form.gate_at_input else x_ND) @ in_HD.t()
        if form.in_bias_EH is not None:
            hidden_NH = hidden_NH + form.in_bias_EH[expert]
        act_NF = activate(hidden_NH, activation)
        if (factors_NF := form.factors(pairs_N, act_NF.shape[1], act_NF.dtype)) is not None:
            act_NF = act_NF * factors_NF
        y_ND = act_NF @ out_DF.t()
        if form.out_bias_ED is not None:
            y_ND = y_ND + form.out_bias_ED[expert]
        out_TD = out_TD.index_add(0, tokens_N, y_ND if form.gate_at_input else gates_N1 * y_ND)
    return out_TD
