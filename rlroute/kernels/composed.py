"""Experts that the fused engines do not take, made of the primitives that these are made of: plain autograd stands
between the two projections, and the pre-activations of all pairs are kept.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows of an expert, E experts, R routed pairs (rows, in
the plan's order).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rlroute import seeding
from rlroute.decision import RoutingDecision
from rlroute.kernels.activations import activate
from rlroute.kernels.plan import Plan, make_plan
from rlroute.kernels.primitives import combine, gather_linear, linear_combine


@dataclass(frozen=True, eq=False)
class Form:
    """What an expert does besides its projections and its activation.

    Attributes:
        in_bias_EH, out_bias_ED: added behind the projections, where they are there.
        gate_at_input: whether the gate weighs the expert's input (Llama 4) and not its output.
        dropout: the share of an expert's activations that is dropped.
        keys_R: int64, for each pair of the decision the key that its dropped activations are drawn from; None where
            nothing is dropped.
    """

    in_bias_EH: Tensor | None = None
    out_bias_ED: Tensor | None = None
    gate_at_input: bool = False
    dropout: float = 0.0
    keys_R: Tensor | None = None

    @property
    def biases(self) -> dict[str, Tensor]:
        """The biases that are there, by name."""
        found = {"in_bias_EH": self.in_bias_EH, "out_bias_ED": self.out_bias_ED}
        return {name: bias for name, bias in found.items() if bias is not None}

    @property
    def plain(self) -> bool:
        """Whether the fused engines take it."""
        return not self.biases and not self.gate_at_input and self.keys_R is None


PLAIN = Form()
"""No biases, the gate weighs the output, nothing is dropped."""


def composed_mlp(
    x_TD: Tensor,
    decision: RoutingDecision,
    in_EHD: Tensor,
    out_EDF: Tensor,
    backend: str,
    activation: str,
    form: Form,
) -> Tensor:
    """Return out_TD as :func:`rlroute.kernels.expert_mlp` defines it."""
    plan, gates_R = make_plan(decision), decision.gates_R
    experts_R = decision.expert_ids_R[plan.pairs_R].clamp(max=decision.num_experts - 1)  # of idle rows too
    hidden_RH = gather_linear(x_TD, plan, in_EHD, backend)
    if form.gate_at_input:  # a projection is linear: its rows are weighed in place of its inputs
        hidden_RH = hidden_RH * gates_R.index_select(0, plan.pairs_R)[:, None].to(hidden_RH.dtype)
        gates_R = torch.ones_like(gates_R)
    if form.in_bias_EH is not None:  # an embedding: its gradient is summed in an order that does not change
        hidden_RH = hidden_RH + functional.embedding(experts_R, form.in_bias_EH)
    act_RF = _drop(activate(hidden_RH, activation), plan, form)
    out_TD = linear_combine(act_RF, plan, out_EDF, gates_R, backend)
    if form.out_bias_ED is None:
        return out_TD
    idle_R1 = (torch.arange(len(experts_R), device=experts_R.device) >= plan.starts_E[-1])[:, None]
    bias_RD = functional.embedding(experts_R, form.out_bias_ED).masked_fill(idle_R1, 0)
    return out_TD + combine(bias_RD, plan, gates_R, backend)


def _drop(act_RF: Tensor, plan: Plan, form: Form) -> Tensor:
    """Return activations of which some are 0, the others scaled so that each stays what it was in the mean."""
    if form.keys_R is None:
        return act_RF
    kept_RF = seeding.uniform(form.keys_R[plan.pairs_R], act_RF.shape[1:]) >= form.dropout
    return act_RF * kept_RF / (1 - form.dropout)
