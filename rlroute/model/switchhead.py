"""Attention whose heads choose among experts for what they read and what they write: SwitchHead.

Shape suffixes: B sequences (routing samples included), S sequence length, T = B * S tokens, D model width, N heads, H
head width, E experts, O and I outputs and inputs of a projection, R routed pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rlroute import seeding
from rlroute.config import ModelConfig
from rlroute.decision import RoutingDecision
from rlroute.kernels import combine, gather_linear, linear_combine, make_plan
from rlroute.model import wishes
from rlroute.model.attention import Rotary, RoutedAttention, attend, by_head
from rlroute.model.linear import KeyedLinear
from rlroute.model.moe import add_beside_pairs, compute_dtype
from rlroute.routing import Router, Site


class HeadProjection(nn.Module):
    """A routed site: one linear projection of a head, the sum over a token's experts of gate * W_expert x."""

    def __init__(self, config: ModelConfig, router: Router, d_in: int, d_out: int, std: float, backend: str) -> None:
        super().__init__()
        self.config, self.router, self.backend = config, router, backend
        shape = router.shape
        self.weights_EOI = nn.Parameter(torch.empty(shape.num_experts, d_out, d_in))
        for expert in range(shape.num_experts):
            seeding.init_normal(self.weights_EOI[expert], std, shape.seed, f"layers.{shape.site}.experts", expert)

    @property
    def pair_weights(self) -> list[nn.Parameter]:
        """The weights of all experts."""
        return [self.weights_EOI]

    @property
    def pair_parameters(self) -> int:
        """The weights that a pair runs."""
        return self.weights_EOI[0].numel()

    def pair_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a pair."""
        return 2 * self.pair_parameters

    def forward(self, x_TI: Tensor, decision: RoutingDecision, x_TD: Tensor) -> tuple[Tensor, RoutingDecision]:
        """Return the projection of each row, shape (T, O), and the decision with what the router wishes for.

        Args:
            x_TI: what is projected.
            decision: about these rows.
            x_TD: what it was decided from.
        """
        out_TO, decision = self._pairs(x_TI, decision)
        return add_beside_pairs(out_TO, decision, x_TD), decision

    def _pairs(self, x_TI: Tensor, decision: RoutingDecision) -> tuple[Tensor, RoutingDecision]:
        """Return the gated sums of the pairs, and the decision with their outputs where the router wishes for them."""
        plan, weights_EOI, backend = make_plan(decision), self.weights_EOI.to(x_TI.dtype), self.backend
        if "outputs" in self.router.wishes:
            run = wishes.alone(decision, x_TI.dtype)  # its rows are in the same order
            outputs_RO = linear_combine(x_TI[plan.tokens_R], make_plan(run), weights_EOI, run.gates_R, backend)
            return wishes.combine(outputs_RO, decision)
        if weights_EOI.shape[1] < weights_EOI.shape[2]:  # a row for each pair is held on the narrow side
            return combine(gather_linear(x_TI, plan, weights_EOI, backend), plan, decision.gates_R, backend), decision
        return linear_combine(x_TI[plan.tokens_R], plan, weights_EOI, decision.gates_R, backend), decision


class SwitchHead(RoutedAttention):
    """SwitchHead (Csordas et al. 2023, arXiv 2312.07987), with rotary positions.

    Queries and keys are plain. Each head has experts of its value projection, and of its output projection, and a
    router for each: both read what attention is given, at the position that is attended to and at the one that attends.
    The paper's rule is ``topk:score=sigmoid,normalize=false``; any other may decide.
    """

    def __init__(
        self, config: ModelConfig, seq_len: int, layer: int, seed: int, routers: Sequence[Router], backend: str
    ) -> None:
        super().__init__()
        self.config = config
        width, inner = config.d_model, config.attention_width
        head, std_out = inner // config.num_heads, (2 * config.num_layers * inner) ** -0.5
        self.qk = KeyedLinear(width, 2 * inner, width**-0.5, seed, f"layers.{layer}.attention.qk")
        self.rotary = Rotary(head, seq_len, config.rope_base)
        value, output = routers[: config.num_heads], routers[config.num_heads :]
        self.value = nn.ModuleList(
            HeadProjection(config, router, width, head, width**-0.5, backend) for router in value
        )
        self.output = nn.ModuleList(HeadProjection(config, router, head, width, std_out, backend) for router in output)

    @property
    def sites(self) -> Sequence[HeadProjection]:
        """Each head's projection of values, then each one's of outputs."""
        return [site for site in (*self.value, *self.output) if isinstance(site, HeadProjection)]

    def mixing_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a row's scores and values, of (S + 1) / 2 keys on average."""
        return 2 * (seq_len + 1) * self.config.attention_width

    def run(
        self, x_BSD: Tensor, made: Mapping[Site, RoutingDecision], mask_BSS: Tensor | None = None
    ) -> tuple[Tensor, dict[Site, RoutingDecision]]:
        """Return the attention output of decisions, shape (B, S, D), and these with what their routers wish for."""
        (batch, length, _), heads, made = x_BSD.shape, self.config.num_heads, dict(made)
        x_TD = x_BSD.flatten(0, 1).to(compute_dtype(x_BSD))
        v_NTH = _project(self.sites[:heads], [x_TD] * heads, made, x_TD)
        q_BNSH, k_BNSH = self.rotary(by_head(self.qk(x_BSD), 2 * heads)).chunk(2, dim=1)
        y_BNSH = attend(q_BNSH, k_BNSH, v_NTH.view(heads, batch, length, -1).transpose(0, 1), mask_BSS)
        y_NTH = y_BNSH.to(x_TD.dtype).transpose(0, 1).flatten(1, 2)
        out_TD = _project(self.sites[heads:], y_NTH, made, x_TD).sum(0)
        return out_TD.view_as(x_BSD), made


def _project(
    sites: Sequence[HeadProjection], rows_NTI: Iterable[Tensor], made: dict[Site, RoutingDecision], x_TD: Tensor
) -> Tensor:
    """Return what each head's projection makes of its rows, shape (N, T, O); put into ``made`` what was run."""
    out_NTO = []
    with torch.autocast(x_TD.device.type, enabled=False):
        for site, x_TI in zip(sites, rows_NTI, strict=True):
            key = site.router.shape.site
            out_TO, made[key] = site(x_TI, made[key], x_TD)
            out_NTO.append(out_TO)
    return torch.stack(out_NTO)
