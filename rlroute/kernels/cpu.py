"""The CPU engine: pairs sorted by expert, then gather, both projections, activation and combine for a few hundred rows at a time.

What makes it fast is that a chunk's intermediates never leave the cache: a pass over all R pairs at a time, as grouped-GEMM
implementations make it, reads and writes the (R, F) arrays from memory some ten times. Weights are indexed inside the autograd
function only, where ``w[e]`` is a view; outside, each such index would cost a full-size zero gradient in backward.

Shape suffixes: T tokens, D model width, F expert width, H = 2F, E experts, R routed pairs, N pairs that run (sorted by expert),
C rows of one chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rlroute.errors import DecisionError
from rlroute.routing import RoutingDecision

CHUNK_ROWS = 512


def sorted_expert_mlp(x_TD: Tensor, decision: RoutingDecision, in_EHD: Tensor, out_EDF: Tensor) -> Tensor:
    """Return out_TD as :func:`rlroute.kernels.expert_mlp` defines it, bit-equal from run to run at a fixed number of threads."""
    experts_R = torch.where(decision.kept_R, decision.expert_ids_R, decision.num_experts)
    if len(experts_R) and not 0 <= int(experts_R.min()) <= int(experts_R.max()) <= decision.num_experts:
        ids = (int(experts_R.min()), int(experts_R.max()))
        raise DecisionError(
            f"expert ids span {ids}: legal are 0 to {decision.num_experts - 1}, and {decision.num_experts} for unused"
        )
    counts = torch.bincount(experts_R, minlength=decision.num_experts + 1)[:-1].tolist()
    pairs_N = torch.argsort(experts_R, stable=True)[: sum(counts)]
    tokens_N = decision.token_ids_R[pairs_N]
    out_TD: Tensor = _SortedExperts.apply(x_TD, in_EHD, out_EDF, decision.gates_R, tokens_N, pairs_N, counts)  # type: ignore[no-untyped-call]
    return out_TD


def _chunks(counts: list[int]) -> Iterator[tuple[int, slice, bool]]:
    """Yield (expert, rows, whether they are the expert's first) over the sorted pairs."""
    start = 0
    for expert, count in enumerate(counts):
        for offset in range(start, start + count, CHUNK_ROWS):
            yield expert, slice(offset, min(offset + CHUNK_ROWS, start + count)), offset == start
        start += count


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        in_EHD: Tensor,
        out_EDF: Tensor,
        gates_R: Tensor,
        tokens_N: Tensor,
        pairs_N: Tensor,
        counts: list[int],
    ) -> Tensor:
        width = out_EDF.shape[2]
        x_ND = x_TD.new_empty(len(tokens_N), x_TD.shape[1])
        hidden_NH = x_TD.new_empty(len(tokens_N), 2 * width)
        gates_N1 = gates_R[pairs_N, None]
        out_TD = torch.zeros_like(x_TD)
        for expert, rows, _ in _chunks(counts):
            torch.index_select(x_TD, 0, tokens_N[rows], out=x_ND[rows])
            torch.mm(x_ND[rows], in_EHD[expert].t(), out=hidden_NH[rows])
            act_CF = functional.silu(hidden_NH[rows, :width])
            act_CF *= hidden_NH[rows, width:]
            act_CF *= gates_N1[rows]
            out_TD.index_add_(0, tokens_N[rows], torch.mm(act_CF, out_EDF[expert].t()))
        ctx.save_for_backward(x_ND, hidden_NH, in_EHD, out_EDF, gates_N1, tokens_N, pairs_N)
        ctx.counts, ctx.num_pairs = counts, len(gates_R)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, hidden_NH, in_EHD, out_EDF, gates_N1, tokens_N, pairs_N = ctx.saved_tensors
        width = out_EDF.shape[2]
        din_EHD, dw_out_EDF = torch.empty_like(in_EHD), torch.empty_like(out_EDF)
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                din_EHD[expert].zero_()
                dw_out_EDF[expert].zero_()
        dx_TD = torch.zeros_like(dout_TD)
        dgates_N = gates_N1.new_empty(len(tokens_N))
        for expert, rows, first in _chunks(ctx.counts):
            gate_CF, up_CF = hidden_NH[rows, :width], hidden_NH[rows, width:]
            dout_CD = dout_TD.index_select(0, tokens_N[rows])
            dact_CF = torch.mm(dout_CD, out_EDF[expert])
            silu_CF = functional.silu(gate_CF)
            act_CF = silu_CF * up_CF
            dgates_N[rows] = torch.linalg.vecdot(dact_CF, act_CF)
            act_CF *= gates_N1[rows]
            dact_CF *= gates_N1[rows]
            dhidden_CH = torch.empty_like(hidden_NH[rows])
            torch.mul(dact_CF, silu_CF, out=dhidden_CH[:, width:])
            dact_CF *= up_CF
            torch.ops.aten.silu_backward.grad_input(dact_CF, gate_CF, grad_input=dhidden_CH[:, :width])
            beta = 0 if first else 1  # with beta 0 the uninitialised target is never read
            torch.addmm(din_EHD[expert], dhidden_CH.t(), x_ND[rows], beta=beta, out=din_EHD[expert])
            torch.addmm(dw_out_EDF[expert], dout_CD.t(), act_CF, beta=beta, out=dw_out_EDF[expert])
            dx_TD.index_add_(0, tokens_N[rows], torch.mm(dhidden_CH, in_EHD[expert]))
        dgates_R = None
        if ctx.needs_input_grad[3]:
            dgates_R = dgates_N.new_zeros(ctx.num_pairs)
            dgates_R[pairs_N] = dgates_N
        return dx_TD, din_EHD, dw_out_EDF, dgates_R, None, None, None
