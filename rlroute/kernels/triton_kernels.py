"""The Triton kernels: five bodies, no atomics, every output element written by one program in a fixed order.

All sums are kept in float32 (float64 has no tensor cores and no place here). ``UPCAST`` converts operands to float32 before a product:
Triton's interpreter multiplies the bit patterns of bfloat16. Offsets of rows and experts are 64-bit: R * 2F passes 2^31 in practice.

Letters: rows are pairs sorted by expert (see ``plan.py``); M rows of a tile, N output columns, K the summed dimension.
"""

import triton
import triton.language as tl


@triton.jit
def _product(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _tile(tile_experts, tile_rows, starts, tokens, GATHER: tl.constexpr, BM: tl.constexpr):
    """Return the tile's expert (-1: nothing to do), its rows, which of them exist, and where their inputs lie."""
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile)
    rows = tl.load(tile_rows + tile) + tl.arange(0, BM)
    exists = rows < tl.load(starts + tl.maximum(expert, 0) + 1)
    sources = rows
    if GATHER:
        sources = tl.load(tokens + rows, mask=exists, other=0)
    return expert, rows, exists, sources


@triton.jit
def rows_times_weights(
    inputs, weights, outputs, tokens, starts, tile_experts, tile_rows,
    N: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """outputs[row] = inputs[row or its token] @ W_expert, W stored (N, K), or (K, N) if TRANSPOSED."""
    expert, rows, exists, sources = _tile(tile_experts, tile_rows, starts, tokens, GATHER, BM)
    if expert >= 0:
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = columns < N
        base = weights + expert.to(tl.int64) * N * K
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            ks = start + tl.arange(0, BK)
            a = tl.load(
                inputs + sources[:, None] * K + ks[None, :], mask=exists[:, None] & (ks < K)[None, :], other=0.0
            )
            where = ks[:, None] * N + columns[None, :] if TRANSPOSED else columns[None, :] * K + ks[:, None]
            w = tl.load(base + where, mask=(ks < K)[:, None] & inside[None, :], other=0.0)
            acc = _product(a, w, acc, UPCAST)
        out = acc.to(outputs.dtype.element_ty)
        tl.store(outputs + rows[:, None] * N + columns[None, :], out, mask=exists[:, None] & inside[None, :])


@triton.jit
def swiglu_up(
    inputs, weights, gates, hidden, activated, tokens, pairs, starts, tile_experts, tile_rows,
    F: tl.constexpr, K: tl.constexpr, SAVE_HIDDEN: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """activated[row] = gate * silu(W_gate x) * (W_up x), x the row's token; hidden[row] = both products where backward needs them."""
    expert, rows, exists, sources = _tile(tile_experts, tile_rows, starts, tokens, True, BM)
    if expert >= 0:
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = columns < F
        base = weights + expert.to(tl.int64) * 2 * F * K + columns[None, :] * K
        gate_acc = tl.zeros((BM, BN), tl.float32)
        up_acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            ks = start + tl.arange(0, BK)
            x = tl.load(
                inputs + sources[:, None] * K + ks[None, :], mask=exists[:, None] & (ks < K)[None, :], other=0.0
            )
            valid = (ks < K)[:, None] & inside[None, :]
            gate_acc = _product(x, tl.load(base + ks[:, None], mask=valid, other=0.0), gate_acc, UPCAST)
            up_acc = _product(x, tl.load(base + F * K + ks[:, None], mask=valid, other=0.0), up_acc, UPCAST)
        there = exists[:, None] & inside[None, :]
        if SAVE_HIDDEN:
            dtype = hidden.dtype.element_ty
            at = hidden + rows[:, None] * 2 * F + columns[None, :]
            tl.store(at, gate_acc.to(dtype), mask=there)
            tl.store(at + F, up_acc.to(dtype), mask=there)
        gate = tl.load(gates + tl.load(pairs + rows, mask=exists, other=0), mask=exists, other=0.0).to(tl.float32)
        act = gate_acc * tl.sigmoid(gate_acc) * up_acc * gate[:, None]
        tl.store(activated + rows[:, None] * F + columns[None, :], act.to(activated.dtype.element_ty), mask=there)


@triton.jit
def swiglu_down_backward(
    doutputs, weights, gates, hidden, dhidden, activated, dgate_parts, tokens, pairs, starts, tile_experts, tile_rows, num_rows,
    F: tl.constexpr, K: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """da = W_down^T dout of the row's token; then the gradient of hidden, the gated activation again (dW_down needs it), and the
    columns' part of the gate's gradient, <da, activation>: one row of parts per column block, summed afterwards in a fixed order."""
    expert, rows, exists, sources = _tile(tile_experts, tile_rows, starts, tokens, True, BM)
    if expert >= 0:
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = columns < F
        base = weights + expert.to(tl.int64) * F * K
        dact = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            ks = start + tl.arange(0, BK)
            d = tl.load(
                doutputs + sources[:, None] * K + ks[None, :], mask=exists[:, None] & (ks < K)[None, :], other=0.0
            )
            w = tl.load(base + ks[:, None] * F + columns[None, :], mask=(ks < K)[:, None] & inside[None, :], other=0.0)
            dact = _product(d, w, dact, UPCAST)
        there = exists[:, None] & inside[None, :]
        at = rows[:, None] * 2 * F + columns[None, :]
        g = tl.load(hidden + at, mask=there, other=0.0).to(tl.float32)
        u = tl.load(hidden + at + F, mask=there, other=0.0).to(tl.float32)
        gate = tl.load(gates + tl.load(pairs + rows, mask=exists, other=0), mask=exists, other=0.0).to(tl.float32)[
            :, None
        ]
        s = tl.sigmoid(g)
        silu = g * s
        tl.store(dgate_parts + tl.program_id(1).to(tl.int64) * num_rows + rows, tl.sum(dact * silu * u, 1), mask=exists)
        dtype = dhidden.dtype.element_ty
        tl.store(dhidden + at, (dact * gate * u * s * (1 + g * (1 - s))).to(dtype), mask=there)
        tl.store(dhidden + at + F, (dact * gate * silu).to(dtype), mask=there)
        act = (gate * silu * u).to(activated.dtype.element_ty)
        tl.store(activated + rows[:, None] * F + columns[None, :], act, mask=there)


@triton.jit
def rows_times_rows(
    left, right, outputs, tokens, starts,
    M: tl.constexpr, N: tl.constexpr, GATHER_LEFT: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """outputs[expert] = left^T right over the expert's rows, one side gathered by token; zeros for an expert without rows."""
    expert = tl.program_id(0)
    ms = tl.program_id(1) * BM + tl.arange(0, BM)
    ns = tl.program_id(2) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    end = tl.load(starts + expert + 1)
    for start in range(tl.load(starts + expert), end, BK):
        rows = start + tl.arange(0, BK)
        exists = rows < end
        gathered = tl.load(tokens + rows, mask=exists, other=0)
        left_rows = gathered if GATHER_LEFT else rows
        right_rows = rows if GATHER_LEFT else gathered
        a = tl.load(left + left_rows[None, :] * M + ms[:, None], mask=exists[None, :] & (ms < M)[:, None], other=0.0)
        b = tl.load(right + right_rows[:, None] * N + ns[None, :], mask=exists[:, None] & (ns < N)[None, :], other=0.0)
        acc = _product(a, b, acc, UPCAST)
    at = outputs + expert.to(tl.int64) * M * N + ms[:, None] * N + ns[None, :]
    tl.store(at, acc.to(outputs.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


@triton.jit
def sum_rows_of_tokens(rows_by_token, first, inputs, outputs, D: tl.constexpr, BD: tl.constexpr):
    """outputs[token] = sum of its pairs' rows, in the order of its pairs; zeros for a token without pairs that run."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), tl.float32)
    for index in range(tl.load(first + token), tl.load(first + token + 1)):
        row = tl.load(rows_by_token + index)
        acc += tl.load(inputs + row * D + columns, mask=(columns < D) & (row >= 0), other=0.0).to(tl.float32)
    out = acc.to(outputs.dtype.element_ty)
    tl.store(outputs + token.to(tl.int64) * D + columns, out, mask=columns < D)
