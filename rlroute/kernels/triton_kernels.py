"""The Triton kernels: five bodies, no atomics, every output element written by one program in a fixed order.

All sums are kept in float32 (float64 has no tensor cores and no place here). ``UPCAST`` converts operands to float32
before a product: Triton's interpreter multiplies the bit patterns of bfloat16. Offsets of rows and experts are 64-bit:
R * 2F passes 2^31 in practice.

Weights come through the tensor memory accelerator (``TMA``: ``weights`` is a descriptor of all experts' rows stacked),
or by pointers where a row's bytes are no multiple of 16 or the chip has none. Rows of tokens are gathered by pointer:
Hopper's accelerator cannot.

Letters: rows are pairs sorted by expert (see ``plan.py``); M rows of a tile, N output columns, K the summed dimension.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)
"""Tiles that walk through the columns together, so that what they read is still in the L2 cache when it is read
again.
"""


@triton.jit
def _product(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _place(N: tl.constexpr, BN: tl.constexpr):
    """Return this program's tile and column block."""
    blocks: tl.constexpr = (N + BN - 1) // BN
    program = tl.program_id(0)
    first = program // (GROUP * blocks) * GROUP
    height = tl.minimum(tl.num_programs(0) // blocks - first, GROUP)
    inside = program % (GROUP * blocks)
    return first + inside % height, inside // height


@triton.jit
def _tile(tile, tile_experts, tile_rows, starts, tokens, GATHER: tl.constexpr, BM: tl.constexpr):
    """Return the tile's expert (-1: nothing to do), its rows, which of them exist, and where their inputs lie."""
    expert = tl.load(tile_experts + tile)
    rows = tl.load(tile_rows + tile) + tl.arange(0, BM)
    exists = rows < tl.load(starts + tl.maximum(expert, 0) + 1)
    sources = rows
    if GATHER:
        sources = tl.load(tokens + rows, mask=exists, other=0)
    return expert, rows, exists, sources


@triton.jit
def _weights(
    weights, expert, column, k,
    STORED: tl.constexpr, OFFSET: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the (BK, BN) block of an expert's weights at (k, column).

    An expert is stored as STORED rows: (N, K), of which ours begin at row OFFSET, or (K, N) if TRANSPOSED. By
    descriptor, columns past N may hold the next expert's (they are never stored), and K is a multiple of BK where it
    runs down the rows.
    """
    if TMA:
        first = expert.to(tl.int32) * STORED + OFFSET
        block = weights.load([first + k, column]) if TRANSPOSED else weights.load([first + column, k]).T
    else:
        ks, columns = k + tl.arange(0, BK), column + tl.arange(0, BN)
        base = weights + (expert.to(tl.int64) * STORED + OFFSET) * (N if TRANSPOSED else K)
        where = ks[:, None] * N + columns[None, :] if TRANSPOSED else columns[None, :] * K + ks[:, None]
        block = tl.load(base + where, mask=(ks < K)[:, None] & (columns < N)[None, :], other=0.0)
    return block


@triton.jit
def _inputs(inputs, sources, exists, k, K: tl.constexpr, BK: tl.constexpr):
    """Return the (BM, BK) block of the tile's input rows at k."""
    ks = k + tl.arange(0, BK)
    return tl.load(inputs + sources[:, None] * K + ks[None, :], mask=exists[:, None] & (ks < K)[None, :], other=0.0)


@triton.jit
def _gates(gates, pairs, rows, exists):
    """Return the gates of the tile's rows as a column, in float32."""
    gate = tl.load(gates + tl.load(pairs + rows, mask=exists, other=0), mask=exists, other=0.0)
    return gate.to(tl.float32)[:, None]


@triton.jit
def _activate(hidden, ACTIVATION: tl.constexpr):
    """Return the activation of ``hidden`` (for swiglu, the factor of its gate half) and its derivative."""
    if ACTIVATION == "relu":
        value, slope = tl.maximum(hidden, 0.0), tl.where(hidden > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(hidden * 0.7071067811865476))
        value, slope = hidden * below, below + hidden * tl.exp(-0.5 * hidden * hidden) * 0.3989422804014327
    else:
        s = tl.sigmoid(hidden)
        value, slope = hidden * s, s * (1 + hidden * (1 - s))
    return value, slope


@triton.jit
def rows_times_weights(
    inputs, weights, outputs, tokens, starts, tile_experts, tile_rows,
    N: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """outputs[row] = inputs[row or its token] @ W_expert, W stored (N, K), or (K, N) if TRANSPOSED."""
    tile, block = _place(N, BN)
    expert, rows, exists, sources = _tile(tile, tile_experts, tile_rows, starts, tokens, GATHER, BM)
    if expert >= 0:
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            w = _weights(weights, expert, block * BN, k, K if TRANSPOSED else N, 0, N, K, TRANSPOSED, TMA, BN, BK)
            acc = _product(_inputs(inputs, sources, exists, k, K, BK), w, acc, UPCAST)
        columns = block * BN + tl.arange(0, BN)
        there = exists[:, None] & (columns < N)[None, :]
        tl.store(outputs + rows[:, None] * N + columns[None, :], acc.to(outputs.dtype.element_ty), mask=there)


@triton.jit
def expert_up(
    inputs, weights, gates, hidden, activated, tokens, pairs, starts, tile_experts, tile_rows,
    F: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, SAVE_HIDDEN: tl.constexpr, TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """activated[row] = gate * activation(W x), x the row's token; hidden[row] = W x where backward needs it.

    For swiglu W holds F gate rows above F up rows, and the activation is silu(W_gate x) * (W_up x).
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    H: tl.constexpr = 2 * F if GATED else F
    tile, block = _place(F, BN)
    expert, rows, exists, sources = _tile(tile, tile_experts, tile_rows, starts, tokens, True, BM)
    if expert >= 0:
        acc = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            x = _inputs(inputs, sources, exists, k, K, BK)
            acc = _product(x, _weights(weights, expert, block * BN, k, H, 0, F, K, False, TMA, BN, BK), acc, UPCAST)
            if GATED:
                up = _product(x, _weights(weights, expert, block * BN, k, H, F, F, K, False, TMA, BN, BK), up, UPCAST)
        columns = block * BN + tl.arange(0, BN)
        there = exists[:, None] & (columns < F)[None, :]
        if SAVE_HIDDEN:
            at = hidden + rows[:, None] * H + columns[None, :]
            tl.store(at, acc.to(hidden.dtype.element_ty), mask=there)
            if GATED:
                tl.store(at + F, up.to(hidden.dtype.element_ty), mask=there)
        act, _ = _activate(acc, ACTIVATION)
        if GATED:
            act = act * up
        act = (act * _gates(gates, pairs, rows, exists)).to(activated.dtype.element_ty)
        tl.store(activated + rows[:, None] * F + columns[None, :], act, mask=there)


@triton.jit
def _down_backward_columns(
    dact, columns, rows, exists, gate, hidden, dhidden, activated, F: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Store the gradients and the activation of some columns of a tile; return their part of the gate's gradient."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    there = exists[:, None] & (columns < F)[None, :]
    at = rows[:, None] * (2 * F if GATED else F) + columns[None, :]
    dtype = dhidden.dtype.element_ty
    value, slope = _activate(tl.load(hidden + at, mask=there, other=0.0).to(tl.float32), ACTIVATION)
    dgated = dact * gate
    if GATED:
        up = tl.load(hidden + at + F, mask=there, other=0.0).to(tl.float32)
        tl.store(dhidden + at + F, (dgated * value).to(dtype), mask=there)
        slope, value = slope * up, value * up
    tl.store(dhidden + at, (dgated * slope).to(dtype), mask=there)
    act = (gate * value).to(activated.dtype.element_ty)
    tl.store(activated + rows[:, None] * F + columns[None, :], act, mask=there)
    return tl.sum(dact * value, 1)


@triton.jit
def _halves(block, BM: tl.constexpr, BN: tl.constexpr):
    """Return the left and the right half of a (BM, BN) block."""
    return tl.split(block.reshape(BM, 2, BN // 2).permute(0, 2, 1))


@triton.jit
def expert_down_backward(
    doutputs, weights, gates, hidden, dhidden, activated, dgate_parts, tokens, pairs, starts, tile_experts, tile_rows,
    num_rows,
    F: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """da = W_down^T dout of the row's token; then the gradient of hidden, the gated activation again (dW_down needs
    it), and the columns' part of the gate's gradient, <da, activation>: one row of parts per column block, summed
    afterwards in a fixed order.

    The epilogue takes a quarter of the columns at a time: on all of them at once it would not fit into the registers.
    """
    tile, block = _place(F, BN)
    expert, rows, exists, sources = _tile(tile, tile_experts, tile_rows, starts, tokens, True, BM)
    if expert >= 0:
        dact = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            w = _weights(weights, expert, block * BN, k, K, 0, F, K, True, TMA, BN, BK)
            dact = _product(_inputs(doutputs, sources, exists, k, K, BK), w, dact, UPCAST)
        gate = _gates(gates, pairs, rows, exists)
        columns = block * BN + tl.arange(0, BN // 4)
        left, right = _halves(dact, BM, BN)
        one, two = _halves(left, BM, BN // 2)
        three, four = _halves(right, BM, BN // 2)
        part = _down_backward_columns(one, columns, rows, exists, gate, hidden, dhidden, activated, F, ACTIVATION)
        columns += BN // 4
        part += _down_backward_columns(two, columns, rows, exists, gate, hidden, dhidden, activated, F, ACTIVATION)
        columns += BN // 4
        part += _down_backward_columns(three, columns, rows, exists, gate, hidden, dhidden, activated, F, ACTIVATION)
        columns += BN // 4
        part += _down_backward_columns(four, columns, rows, exists, gate, hidden, dhidden, activated, F, ACTIVATION)
        tl.store(dgate_parts + block.to(tl.int64) * num_rows + rows, part, mask=exists)


@triton.jit
def rows_times_rows(
    left, right, outputs, tokens, starts, order,
    M: tl.constexpr, N: tl.constexpr, GATHER_LEFT: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """outputs[expert] = left^T right over the expert's rows, one side gathered by token; zeros for an expert without
    rows.

    ``order`` lists the experts, the fullest first: the longest sums start first, so that no late one keeps the others
    waiting.
    """
    columns: tl.constexpr = (N + BN - 1) // BN
    blocks: tl.constexpr = (M + BM - 1) // BM * columns
    expert = tl.load(order + tl.program_id(0) // blocks)
    block = tl.program_id(0) % blocks
    ms = block // columns * BM + tl.arange(0, BM)
    ns = block % columns * BN + tl.arange(0, BN)
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
