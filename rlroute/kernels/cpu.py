"""The CPU engine: pairs sorted by expert, then gather, both projections, activation and combine for a few hundred rows
at a time.

What makes it fast is that a chunk's intermediates never leave the cache: a pass over all R pairs at a time, as
grouped-GEMM implementations make it, reads and writes the (R, F) arrays from memory some ten times. A chunk holds as
many small experts as fit, so that only the products are called once per expert. Weights are indexed inside the autograd
function only, where ``w[e]`` is a view; outside, each such index would cost a full-size zero gradient in backward.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows of an expert (2F where it is gated), E experts, R
routed pairs, N pairs that run (sorted by expert), C rows of one chunk.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rlroute.decision import RoutingDecision
from rlroute.errors import DecisionError
from rlroute.kernels.activations import activate

CHUNK_ROWS = 1024
PIECE_ELEMENTS = 2**18
"""Pre-activations of one product: what stays in a core's cache. Bits depend on how an expert is cut, not on
``CHUNK_ROWS``.
"""


class Piece(NamedTuple):
    """Consecutive sorted pairs of one expert that are multiplied together."""

    expert: int
    size: int
    first: bool
    """Whether they are the expert's first: its weight gradient starts here."""


def sorted_expert_mlp(
    x_TD: Tensor, decision: RoutingDecision, in_EHD: Tensor, out_EDF: Tensor, activation: str
) -> Tensor:
    """Return out_TD as :func:`rlroute.kernels.expert_mlp` defines it, bit-equal from run to run at a fixed number of
    threads.
    """
    # Dropped pairs become unused ones (the value E), which sort behind all experts and are cut off below.
    experts_R = torch.where(decision.kept_R, decision.expert_ids_R, decision.num_experts)
    if len(experts_R) and not 0 <= int(experts_R.min()) <= int(experts_R.max()) <= decision.num_experts:
        ids = (int(experts_R.min()), int(experts_R.max()))
        raise DecisionError(
            f"expert ids span {ids}: legal are 0 to {decision.num_experts - 1}, and {decision.num_experts} for unused"
        )
    counts = torch.bincount(experts_R, minlength=decision.num_experts + 1)[:-1].tolist()
    runs_N = torch.nonzero(experts_R < decision.num_experts).squeeze(
        1
    )  # unused slots, of which there may be many, are not sorted
    pairs_N = runs_N[torch.argsort(experts_R[runs_N], stable=True)]  # stable: sums in a fixed order have fixed bits
    leaves = (x_TD, in_EHD, out_EDF, decision.gates_R)
    save = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    arguments = (*leaves, decision.token_ids_R, pairs_N, counts, activation, save)
    out_TD: Tensor = _SortedExperts.apply(*arguments)  # type: ignore[no-untyped-call]
    return out_TD


def chunks(counts: list[int], hidden: int) -> Iterator[tuple[slice, list[Piece]]]:
    """Cut the sorted pairs into chunks of at most ``CHUNK_ROWS`` rows; yield each one's rows and pieces.

    An expert is cut at multiples of the same number from its own first row, whatever its neighbours: its sums do not
    depend on them.

    Args:
        counts: rows of each expert.
        hidden: H; the wider, the fewer rows in a piece.
    """
    most = min(CHUNK_ROWS, max(CHUNK_ROWS // 2, PIECE_ELEMENTS // hidden))
    start, size, pieces = 0, 0, list[Piece]()
    for expert, count in enumerate(counts):
        for offset in range(0, count, most):
            piece = Piece(expert, min(most, count - offset), offset == 0)
            if size + piece.size > CHUNK_ROWS:
                yield slice(start, start + size), pieces
                start, size, pieces = start + size, 0, []
            pieces.append(piece)
            size += piece.size
    if pieces:
        yield slice(start, start + size), pieces


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        in_EHD: Tensor,
        out_EDF: Tensor,
        gates_R: Tensor,
        token_ids_R: Tensor,
        pairs_N: Tensor,
        counts: list[int],
        activation: str,
        save: bool,
    ) -> Tensor:
        tokens_N, gates_N1 = token_ids_R[pairs_N], gates_R[pairs_N, None]
        in_DH, out_FD = in_EHD.transpose(1, 2).unbind(0), out_EDF.transpose(1, 2).unbind(0)
        # Buffers are made once and written with ``out=``: fresh memory for every chunk would not be in the cache. For
        # backward the pre-activations of all rows are kept; the activation is computed again from them.
        rows_most = min(CHUNK_ROWS, len(tokens_N))
        buffer_CD = x_TD.new_empty(rows_most, x_TD.shape[1])
        hidden_NH = x_TD.new_empty(len(tokens_N) if save else rows_most, in_EHD.shape[1])
        out_TD = torch.zeros_like(x_TD)
        for rows, pieces in chunks(counts, in_EHD.shape[1]):
            tokens_C, sizes = tokens_N[rows], [piece.size for piece in pieces]
            size = len(tokens_C)
            x_CD, hidden_CH = buffer_CD[:size], hidden_NH[rows] if save else hidden_NH[:size]
            torch.index_select(x_TD, 0, tokens_C, out=x_CD)
            for piece, x, hidden in zip(pieces, torch.split(x_CD, sizes), torch.split(hidden_CH, sizes), strict=True):
                torch.mm(x, in_DH[piece.expert], out=hidden)
            act_CF = activate(hidden_CH, activation)
            act_CF *= gates_N1[
                rows
            ]  # here already, the projection being linear: its outputs are then only to be added up
            y_CD = x_CD  # its values are no longer needed
            for piece, act, y in zip(pieces, torch.split(act_CF, sizes), torch.split(y_CD, sizes), strict=True):
                torch.mm(act, out_FD[piece.expert], out=y)
            out_TD.index_add_(0, tokens_C, y_CD)
        if save:
            ctx.save_for_backward(x_TD, hidden_NH, in_EHD, out_EDF, gates_N1, tokens_N, pairs_N)
        ctx.counts, ctx.num_pairs, ctx.activation = counts, len(gates_R), activation
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, hidden_NH, in_EHD, out_EDF, gates_N1, tokens_N, pairs_N = ctx.saved_tensors
        in_HD, out_DF = in_EHD.unbind(0), out_EDF.unbind(0)
        moves_x, learns = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        din_EHD, dw_out_EDF = torch.empty_like(in_EHD), torch.empty_like(out_EDF)
        din_HD, dw_out_DF = din_EHD.unbind(0), dw_out_EDF.unbind(0)
        for expert, count in enumerate(ctx.counts):
            if count == 0:  # no product below writes its gradient
                din_HD[expert].zero_()
                dw_out_DF[expert].zero_()
        dx_TD = torch.zeros_like(dout_TD)
        dgates_N = gates_N1.new_empty(len(tokens_N))
        rows_most = min(CHUNK_ROWS, len(tokens_N))
        x_buffer_CD, dout_buffer_CD = x_TD.new_empty(2, rows_most, x_TD.shape[1]).unbind(0)
        dhidden_buffer_CH = hidden_NH.new_empty(rows_most, hidden_NH.shape[1])
        dact_buffer_CF = hidden_NH.new_empty(rows_most, out_EDF.shape[2])
        for rows, pieces in chunks(ctx.counts, in_EHD.shape[1]):
            tokens_C, hidden_CH, sizes = tokens_N[rows], hidden_NH[rows], [piece.size for piece in pieces]
            size = len(tokens_C)
            x_CD, dout_CD, dact_CF, dhidden_CH = (
                buffer[:size] for buffer in (x_buffer_CD, dout_buffer_CD, dact_buffer_CF, dhidden_buffer_CH)
            )
            torch.index_select(x_TD, 0, tokens_C, out=x_CD)
            torch.index_select(dout_TD, 0, tokens_C, out=dout_CD)
            dout_of, x_of, dhidden_of = (
                torch.split(dout_CD, sizes),
                torch.split(x_CD, sizes),
                torch.split(dhidden_CH, sizes),
            )
            for piece, dout, dact in zip(pieces, dout_of, torch.split(dact_CF, sizes), strict=True):
                torch.mm(dout, out_DF[piece.expert], out=dact)
            act_CF, dgates_N[rows] = _activate_backward(dact_CF, hidden_CH, gates_N1[rows], ctx.activation, dhidden_CH)
            products = zip(pieces, dhidden_of, x_of, dout_of, torch.split(act_CF, sizes), strict=True)
            for (expert, _, first), dhidden, x, dout, act in products:
                if learns:
                    beta = 0 if first else 1  # with beta 0 the uninitialised target is never read
                    torch.addmm(din_HD[expert], dhidden.t(), x, beta=beta, out=din_HD[expert])
                    torch.addmm(dw_out_DF[expert], dout.t(), act, beta=beta, out=dw_out_DF[expert])
                if moves_x:
                    torch.mm(dhidden, in_HD[expert], out=x)  # dx in its place: x is no longer needed
            if moves_x:
                dx_TD.index_add_(0, tokens_C, x_CD)
        dgates_R = None
        if ctx.needs_input_grad[3]:
            dgates_R = dgates_N.new_zeros(ctx.num_pairs)
            dgates_R[pairs_N] = dgates_N
        return dx_TD, din_EHD, dw_out_EDF, dgates_R, None, None, None, None, None  # what nobody asked for is not read


def _activate_backward(
    dact_CF: Tensor, hidden_CH: Tensor, gates_C1: Tensor, activation: str, dhidden_CH: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn the gradient of the ungated output's activation, overwritten, into that of the pre-activations,
    ``dhidden_CH``.

    Returns:
        The gated activation, which the gradient of the down projection needs, and the gates' gradient, shape (C,).
    """
    if activation == "swiglu":
        gate_CF, up_CF = hidden_CH.chunk(2, dim=1)
        silu_CF = functional.silu(gate_CF)
        act_CF = silu_CF * up_CF
    else:
        act_CF = activate(hidden_CH, activation)
    dgates_C = torch.linalg.vecdot(dact_CF, act_CF)
    act_CF *= gates_C1
    dact_CF *= gates_C1
    if activation == "swiglu":
        dgate_CF, dup_CF = dhidden_CH.chunk(2, dim=1)
        torch.mul(dact_CF, silu_CF, out=dup_CF)
        dact_CF *= up_CF
        torch.ops.aten.silu_backward.grad_input(dact_CF, gate_CF, grad_input=dgate_CF)
    elif activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(dact_CF, hidden_CH, grad_input=dhidden_CH)
    else:
        torch.mul(dact_CF, hidden_CH > 0, out=dhidden_CH)
    return act_CF, dgates_C
