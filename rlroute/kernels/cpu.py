"""The CPU engine: pairs sorted by expert, then gather, both projections, activation and combine for a few hundred rows
at a time.

What makes it fast is that a chunk's intermediates never leave the cache: a pass over all R pairs at a time, as
grouped-GEMM implementations make it, reads and writes the (R, F) arrays from memory some ten times. A chunk holds as
many small experts as fit, so that only the products are called once per expert. Both directions are below autograd
(``operator.py``), where ``w[e]`` is a view; above, each such index would cost a full-size zero gradient in backward.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows of an expert (2F where it is gated), E experts, R
routed pairs, N pairs that run (sorted by expert), C rows of one chunk.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rlroute.decision import RoutingDecision
from rlroute.errors import DecisionError
from rlroute.kernels.activations import CLAMP, activate, curve, curve_backward, split
from rlroute.kernels.form import Form

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


def sort_pairs(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Return the pairs that run, sorted by expert and filled up to the most that may, and the first place of each
    expert and, last, the number that run, shape (E + 1,).

    Raises:
        DecisionError: an expert id is out of range, or more pairs run than the decision says.
    """
    # Dropped pairs become unused ones (the value E), which sort behind all experts and are cut off below.
    experts_R = torch.where(decision.kept_R, decision.expert_ids_R, decision.num_experts)
    least, most = torch.stack(experts_R.aminmax()).tolist() if len(experts_R) else (0, 0)
    if not 0 <= least <= most <= decision.num_experts:
        raise DecisionError(
            f"expert ids span {(least, most)}: legal are 0 to {decision.num_experts - 1}, "
            f"and {decision.num_experts} for unused"
        )
    counts_E = torch.bincount(experts_R, minlength=decision.num_experts + 1)[:-1]
    # Unused slots, of which there may be many, are not sorted.
    runs_N = torch.nonzero(experts_R < decision.num_experts).squeeze(1)
    if len(runs_N) > decision.most_pairs:
        raise DecisionError(f"{len(runs_N)} pairs run: legal are 0 to {decision.most_pairs}, the decision's max_pairs")
    order_N = torch.argsort(experts_R[runs_N], stable=True)  # stable: sums in a fixed order have fixed bits
    pairs_R = runs_N.new_zeros(decision.most_pairs)
    torch.index_select(runs_N, 0, order_N, out=pairs_R[: len(runs_N)])
    return pairs_R, functional.pad(counts_E.cumsum(0), (1, 0))


def _counts(starts_E: Tensor) -> tuple[list[int], int]:
    """Return how many pairs each expert has, and all have."""
    starts = starts_E.tolist()
    return [end - start for start, end in pairwise(starts)], starts[-1]


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


def forward(
    x_TD: Tensor, decision: RoutingDecision, in_EHD: Tensor, out_EDF: Tensor, activation: str, form: Form, save: bool
) -> tuple[Tensor, ...]:
    """Run the pairs of a decision, with the same bits from run to run at a fixed number of threads.

    Returns:
        out_TD, as :func:`rlroute.kernels.expert_mlp` defines it, and what :func:`backward` wants: the pre-activations
        (no rows unless ``save``), the pairs that run, their tokens, where each expert's begin, and nothing, twice.
    """
    pairs_R, starts_E = sort_pairs(decision)
    counts, size = _counts(starts_E)
    tokens_R, pairs_N = decision.token_ids_R[pairs_R], pairs_R[:size]
    tokens_N, gates_N1 = tokens_R[:size], decision.gates_R[pairs_N, None]
    outer_N1 = form.outer(gates_N1)
    in_DH, out_FD = in_EHD.transpose(1, 2).unbind(0), out_EDF.transpose(1, 2).unbind(0)
    # Buffers are made once and written with ``out=``: fresh memory for every chunk would not be in the cache. For
    # backward the pre-activations of all rows are kept; the activation is computed again from them.
    rows_most = min(CHUNK_ROWS, size)
    buffer_CD = x_TD.new_empty(rows_most, x_TD.shape[1])
    hidden_RH = x_TD.new_empty(len(pairs_R) if save else rows_most, in_EHD.shape[1])
    out_TD = torch.zeros_like(x_TD)
    for rows, pieces in chunks(counts, in_EHD.shape[1]):
        tokens_C, sizes = tokens_N[rows], [piece.size for piece in pieces]
        size = len(tokens_C)
        x_CD, hidden_CH = buffer_CD[:size], hidden_RH[rows] if save else hidden_RH[:size]
        torch.index_select(x_TD, 0, tokens_C, out=x_CD)
        if form.gate_at_input:
            x_CD *= gates_N1[rows]
        for piece, x, hidden in zip(pieces, torch.split(x_CD, sizes), torch.split(hidden_CH, sizes), strict=True):
            torch.mm(x, in_DH[piece.expert], out=hidden)
            if form.in_bias_EH is not None:
                hidden += form.in_bias_EH[piece.expert]
        act_CF = activate(hidden_CH, activation)
        if (factors_CF := form.factors(pairs_N[rows], act_CF.shape[1], act_CF.dtype)) is not None:
            act_CF *= factors_CF
        if not form.gate_at_input:
            # Here already, the projection being linear: its outputs are then only to be added up.
            act_CF *= gates_N1[rows]
        y_CD = x_CD  # its values are no longer needed
        of_pieces = (torch.split(tensor, sizes) for tensor in (act_CF, y_CD, outer_N1[rows]))
        for piece, act, y, outer in zip(pieces, *of_pieces, strict=True):
            torch.mm(act, out_FD[piece.expert], out=y)
            if form.out_bias_ED is not None:
                y += outer * form.out_bias_ED[piece.expert]
        out_TD.index_add_(0, tokens_C, y_CD)
    none = (pairs_R.new_zeros(0), pairs_R.new_zeros(0))  # rows by token: it adds up where it is
    return out_TD, hidden_RH if save else x_TD.new_empty(0, in_EHD.shape[1]), pairs_R, tokens_R, starts_E, *none


def backward(
    dout_TD: Tensor,
    x_TD: Tensor,
    in_EHD: Tensor,
    out_EDF: Tensor,
    gates_R: Tensor,
    activation: str,
    form: Form,
    kept: tuple[Tensor, ...],
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of x, of both projections, of the gates and of both biases; those that are not wanted are
    not to be read.

    Args:
        dout_TD: the gradient of what :func:`forward` returned.
        x_TD, in_EHD, out_EDF, gates_R, activation, form: what it was given.
        kept: what else it returned.
        wanted: of which of the six a gradient is asked for.
    """
    hidden_RH, pairs_R, tokens_R, starts_E, *_ = kept
    counts, size = _counts(starts_E)
    tokens_N, pairs_N = tokens_R[:size], pairs_R[:size]
    gates_N1 = gates_R[pairs_N, None]
    in_HD, out_DF = in_EHD.unbind(0), out_EDF.unbind(0)
    moves_x, learns = wanted[0] or form.gate_at_input, wanted[1] or wanted[2]
    din_EHD, dw_out_EDF = torch.empty_like(in_EHD), torch.empty_like(out_EDF)
    din_HD, dw_out_DF = din_EHD.unbind(0), dw_out_EDF.unbind(0)
    for expert, count in enumerate(counts):
        if count == 0:  # no product below writes its gradient
            din_HD[expert].zero_()
            dw_out_DF[expert].zero_()
    din_bias_EH, dout_bias_ED = in_EHD.new_zeros(in_EHD.shape[:2]), out_EDF.new_zeros(out_EDF.shape[:2])
    dx_TD = x_TD.new_zeros(x_TD.shape)
    dgates_N = gates_N1.new_empty(size)
    rows_most = min(CHUNK_ROWS, size)
    x_buffer_CD, dout_buffer_CD, source_buffer_CD = x_TD.new_empty(3, rows_most, x_TD.shape[1]).unbind(0)
    dhidden_buffer_CH = hidden_RH.new_empty(rows_most, hidden_RH.shape[1])
    dact_buffer_CF = hidden_RH.new_empty(rows_most, out_EDF.shape[2])
    for rows, pieces in chunks(counts, in_EHD.shape[1]):
        tokens_C, hidden_CH, sizes = tokens_N[rows], hidden_RH[rows], [piece.size for piece in pieces]
        size = len(tokens_C)
        x_CD, dout_CD, source_CD, dact_CF, dhidden_CH = (
            buffer[:size]
            for buffer in (x_buffer_CD, dout_buffer_CD, source_buffer_CD, dact_buffer_CF, dhidden_buffer_CH)
        )
        torch.index_select(x_TD, 0, tokens_C, out=x_CD)
        torch.index_select(dout_TD, 0, tokens_C, out=dout_CD)
        if form.gate_at_input:
            torch.mul(x_CD, gates_N1[rows], out=source_CD)
        else:
            source_CD = x_CD
        dout_of, x_of, dhidden_of = (torch.split(rows_CI, sizes) for rows_CI in (dout_CD, source_CD, dhidden_CH))
        for piece, dout, dact in zip(pieces, dout_of, torch.split(dact_CF, sizes), strict=True):
            torch.mm(dout, out_DF[piece.expert], out=dact)
        act_CF, dgates_N[rows] = _activate_backward(
            dact_CF, hidden_CH, gates_N1[rows], pairs_N[rows], activation, form, dhidden_CH
        )
        if form.biases:
            gates_of, dgates_of = torch.split(gates_N1[rows], sizes), torch.split(dgates_N[rows], sizes)
            parts = zip(pieces, dhidden_of, dout_of, gates_of, dgates_of, strict=True)
            for piece, dhidden, dout, gates, dgates in parts:
                _biases_backward(piece.expert, dhidden, dout, gates, dgates, form, din_bias_EH, dout_bias_ED)
        products = zip(pieces, dhidden_of, x_of, dout_of, torch.split(act_CF, sizes), strict=True)
        for (expert, _, first), dhidden, x, dout, act in products:
            if learns:
                beta = 0 if first else 1  # with beta 0 the uninitialised target is never read
                torch.addmm(din_HD[expert], dhidden.t(), x, beta=beta, out=din_HD[expert])
                torch.addmm(dw_out_DF[expert], dout.t(), act, beta=beta, out=dw_out_DF[expert])
            if moves_x:
                torch.mm(dhidden, in_HD[expert], out=x)  # dx in its place: x is no longer needed
        if form.gate_at_input:
            dgates_N[rows] = torch.linalg.vecdot(x_CD, source_CD)
            source_CD *= gates_N1[rows]
        if moves_x:
            dx_TD.index_add_(0, tokens_C, source_CD)
    dgates_R = torch.zeros_like(gates_R)
    dgates_R[pairs_N] = dgates_N
    return dx_TD, din_EHD, dw_out_EDF, dgates_R, din_bias_EH, dout_bias_ED


def _activate_backward(
    dact_CF: Tensor,
    hidden_CH: Tensor,
    gates_C1: Tensor,
    pairs_C: Tensor,
    activation: str,
    form: Form,
    dhidden_CH: Tensor,
) -> tuple[Tensor, Tensor]:
    """Turn the gradient of the activation that the down projection reads, overwritten and before its gate, into that of
    the pre-activations, ``dhidden_CH``.

    Returns:
        What the down projection reads, which its gradient needs, and the gradient of gates behind it, shape (C,).
    """
    inner_CF, factor_CF = split(hidden_CH, activation)
    curve_CF = curve(inner_CF, activation)
    act_CF = curve_CF if factor_CF is None else curve_CF * factor_CF
    if (factors_CF := form.factors(pairs_C, act_CF.shape[1], act_CF.dtype)) is not None:
        dact_CF *= factors_CF
    dgates_C = torch.linalg.vecdot(dact_CF, act_CF)
    if factors_CF is not None:
        act_CF *= factors_CF
    if not form.gate_at_input:
        act_CF *= gates_C1
        dact_CF *= gates_C1
    if factor_CF is None:
        curve_backward(dact_CF, inner_CF, activation, dhidden_CH)
    else:
        dinner_CF, dfactor_CF = dhidden_CH.chunk(2, dim=1)
        torch.mul(dact_CF, curve_CF, out=dfactor_CF)
        dact_CF *= factor_CF
        curve_backward(dact_CF, inner_CF, activation, dinner_CF)
        if activation == "swiglu_clamped":
            gate_CF, up_CF = hidden_CH.chunk(2, dim=1)
            dinner_CF.masked_fill_(gate_CF > CLAMP, 0)
            dfactor_CF.masked_fill_(up_CF.abs() > CLAMP, 0)
    return act_CF, dgates_C


def _biases_backward(
    expert: int,
    dhidden: Tensor,
    dout: Tensor,
    gates: Tensor,
    dgates: Tensor,
    form: Form,
    din_bias_EH: Tensor,
    dout_bias_ED: Tensor,
) -> None:
    """Add a piece's part to the gradients of its expert's biases, and theirs to those of its gates."""
    din_bias_EH[expert] += dhidden.sum(0)
    if form.out_bias_ED is not None:
        dout_bias_ED[expert] += (form.outer(gates) * dout).sum(0)
        dgates += (dout @ form.out_bias_ED[expert]).to(dgates.dtype)
