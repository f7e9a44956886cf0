"""The Triton kernels: five bodies, no atomics, every output element written by one program in a fixed order.

All sums are kept in float32 (float64 has no tensor cores and no place here). ``UPCAST`` converts operands to float32
before a product: Triton's interpreter multiplies the bit patterns of bfloat16. Offsets of rows and experts are 64-bit:
R * 2F passes 2^31 in practice.

Where the chip has a tensor memory accelerator, and a row's bytes are a multiple of 16, blocks come and go through it:
weights (``TMA``: ``weights`` is a descriptor of every expert's matrices) and rows in the order of experts (``SORTED``:
they are descriptors too; one whose rows end with the expert's is *ragged*: what lies past the end reads as zeros and is
not written). Elsewhere pointers do the same. Rows of tokens are gathered by pointer: Hopper's accelerator cannot.

What an expert has besides (biases, the gate at its input, dropout) is a constant of a kernel, or a pointer that is None
where it is not there: none of it costs anything then.

Letters: rows are pairs sorted by expert (see ``plan.py``); M rows of a tile, N output columns, K the summed dimension.
"""

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged, to_ragged_indices

from rlroute.kernels.triton_activations import activate, factor_of, hidden_of, kept_of, up_backward


@triton.jit
def _product(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _place(program, tiles, blocks):
    """Return a program's tile and column block.

    Eight tiles walk through the columns together, so that what they read is still in the L2 cache when it is read
    again.
    """
    first = program // (8 * blocks) * 8
    height = tl.minimum(tiles - first, 8)
    inside = program % (8 * blocks)
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
    PARTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the block of an expert's weights at (k, column), of shape (BK, PARTS * BN).

    An expert is stored as PARTS matrices one below the other, each (N, K), or (K, N) if TRANSPOSED; the block holds the
    columns of each part, side by side. What lies outside a matrix is zero.
    """
    if TMA:
        if TRANSPOSED:
            block = weights.load([expert.to(tl.int32) * PARTS, k, column]).reshape(BK, PARTS * BN)
        else:
            block = weights.load([expert.to(tl.int32) * PARTS, column, k]).reshape(PARTS * BN, BK).T
    else:
        ks, lanes = k + tl.arange(0, BK), tl.arange(0, PARTS * BN)
        columns = column + lanes % BN
        rows = lanes // BN * N + columns
        where = ks[:, None] * N + columns[None, :] if TRANSPOSED else rows[None, :] * K + ks[:, None]
        mask = (ks < K)[:, None] & (columns < N)[None, :]
        block = tl.load(weights + expert.to(tl.int64) * PARTS * N * K + where, mask=mask, other=0.0)
    return block


@triton.jit
def _inputs(inputs, sources, exists, k, K: tl.constexpr, BK: tl.constexpr):
    """Return the (BM, BK) block of the tile's input rows at k."""
    ks = k + tl.arange(0, BK)
    return tl.load(inputs + sources[:, None] * K + ks[None, :], mask=exists[:, None] & (ks < K)[None, :], other=0.0)


@triton.jit
def _halves(block, BM: tl.constexpr, BN: tl.constexpr):
    """Return the left and the right half of a (BM, BN) block."""
    return tl.split(block.reshape(BM, 2, BN // 2).permute(0, 2, 1))


@triton.jit
def _gates(gates, pairs, rows, exists):
    """Return the gates of the tile's rows as a column, in float32."""
    gate = tl.load(gates + tl.load(pairs + rows, mask=exists, other=0), mask=exists, other=0.0)
    return gate.to(tl.float32)[:, None]


@triton.jit
def _add_bias(acc, bias, gates, pairs, expert, rows, exists, column, N: tl.constexpr, BN: tl.constexpr):
    """Add to each row its gate times its expert's bias."""
    columns = column + tl.arange(0, BN)
    of_expert = tl.load(bias + expert * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    return acc + _gates(gates, pairs, rows, exists) * of_expert[None, :]


@triton.jit
def rows_times_weights(
    inputs, weights, outputs, bias, gates, tokens, pairs, starts, tile_experts, tile_rows, tile_count,
    N: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
    SORTED: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """outputs[row] = inputs[row or its token] @ W_expert + gate * bias, W stored (N, K), or (K, N) if TRANSPOSED.

    A program goes from one block to the next until none is left. By descriptor, the next block's loads begin while
    this one's result is stored; its rows past the expert's last are another's, and are not stored.
    """
    blocks: tl.constexpr = (N + BN - 1) // BN
    tiles = tl.load(tile_count).to(tl.int32)
    for program in tl.range(tl.program_id(0), tiles * blocks, tl.num_programs(0), flatten=SORTED):
        tile, block = _place(program, tiles, blocks)
        acc = tl.zeros((BM, BN), tl.float32)
        if SORTED:
            expert = tl.load(tile_experts + tile)
            row = tl.load(tile_rows + tile).to(tl.int32)
            size = tl.load(starts + expert + 1).to(tl.int32) - row
            for k in range(0, K, BK):
                w = _weights(weights, expert, block * BN, k, 1, N, K, TRANSPOSED, TMA, BN, BK)
                acc = _product(inputs.load([row, k]), w, acc, UPCAST)
            if bias is not None:
                lanes = tl.arange(0, BM)
                acc = _add_bias(acc, bias, gates, pairs, expert, row + lanes, lanes < size, block * BN, N, BN)
            left, right = _halves(acc, BM, BN)  # whole, it would take the room of a stage
            most, end, first = to_ragged_indices(row, size, 0)  # the library's store_ragged cannot be interpreted
            outputs.store([most, end, first, block * BN], left.to(outputs.dtype).reshape(1, 1, BM, BN // 2))
            outputs.store([most, end, first, block * BN + BN // 2], right.to(outputs.dtype).reshape(1, 1, BM, BN // 2))
        else:
            expert, rows, exists, sources = _tile(tile, tile_experts, tile_rows, starts, tokens, GATHER, BM)
            for k in range(0, K, BK):
                w = _weights(weights, expert, block * BN, k, 1, N, K, TRANSPOSED, TMA, BN, BK)
                acc = _product(_inputs(inputs, sources, exists, k, K, BK), w, acc, UPCAST)
            if bias is not None:
                acc = _add_bias(acc, bias, gates, pairs, expert, rows, exists, block * BN, N, BN)
            columns = block * BN + tl.arange(0, BN)
            there = exists[:, None] & (columns < N)[None, :]
            tl.store(outputs + rows[:, None] * N + columns[None, :], acc.to(outputs.dtype.element_ty), mask=there)


@triton.jit
def expert_up(
    inputs, weights, bias, gates, kept, scale, hidden, activated, tokens, pairs, starts, tile_experts, tile_rows,
    F: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, GATE_AT_INPUT: tl.constexpr,
    SAVE_HIDDEN: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """activated[row] = gate * activation(W x + bias), x the row's token; hidden[row] = W x where backward needs it.

    For swiglu W holds F gate rows above F up rows, and the activation is silu(W_gate x) * (W_up x). GATE_AT_INPUT: the
    gate multiplies W x, and not the activation.
    """
    blocks: tl.constexpr = (F + BN - 1) // BN
    tile, block = _place(tl.program_id(0), tl.num_programs(0) // blocks, blocks)
    expert, rows, exists, sources = _tile(tile, tile_experts, tile_rows, starts, tokens, True, BM)
    if expert >= 0:
        acc = tl.zeros((BM, PARTS * BN), tl.float32)  # gate and up in one product
        for k in range(0, K, BK):
            w = _weights(weights, expert, block * BN, k, PARTS, F, K, False, TMA, BN, BK)
            acc = _product(_inputs(inputs, sources, exists, k, K, BK), w, acc, UPCAST)
        if PARTS == 2:
            acc, up = _halves(acc, BM, 2 * BN)
        columns = block * BN + tl.arange(0, BN)
        there = exists[:, None] & (columns < F)[None, :]
        if SAVE_HIDDEN:
            at = hidden + rows[:, None] * (PARTS * F) + columns[None, :]
            tl.store(at, acc.to(hidden.dtype.element_ty), mask=there)
            if PARTS == 2:
                tl.store(at + F, up.to(hidden.dtype.element_ty), mask=there)
        gate = _gates(gates, pairs, rows, exists) if GATE_AT_INPUT else 1.0
        act, _ = activate(
            hidden_of(acc, gate, bias, expert * (PARTS * F) + columns, columns < F, GATE_AT_INPUT), ACTIVATION
        )
        if PARTS == 2:
            up = hidden_of(up, gate, bias, expert * (PARTS * F) + F + columns, columns < F, GATE_AT_INPUT)
            act = act * factor_of(up, ACTIVATION)
        if kept is not None:
            act = act * kept_of(kept, scale, rows, columns, there, F)
        if not GATE_AT_INPUT:  # read here: sooner, it would take a register along
            act = act * _gates(gates, pairs, rows, exists)
        act = act.to(activated.dtype.element_ty)
        tl.store(activated + rows[:, None] * F + columns[None, :], act, mask=there)


@triton.jit
def _down_backward_columns(
    dact, columns, expert, rows, exists, gate, operands,
    F: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, GATE_AT_INPUT: tl.constexpr,
):  # fmt: skip
    """Store the gradients and the activation of some columns of a tile; return their part of the gate's gradient."""
    bias, kept, scale, hidden, dhidden, activated = operands
    inside = columns < F
    there = exists[:, None] & inside[None, :]
    at = rows[:, None] * (PARTS * F) + columns[None, :]
    of_expert = expert * (PARTS * F) + columns
    dtype = dhidden.dtype.element_ty
    product = tl.load(hidden + at, mask=there, other=0.0).to(tl.float32)
    value, slope = activate(hidden_of(product, gate, bias, of_expert, inside, GATE_AT_INPUT), ACTIVATION)
    if kept is not None:
        dact = dact * kept_of(kept, scale, rows, columns, there, F)
    dgated = dact if GATE_AT_INPUT else dact * gate
    if PARTS == 2:
        up_product = tl.load(hidden + at + F, mask=there, other=0.0).to(tl.float32)
        up = hidden_of(up_product, gate, bias, of_expert + F, inside, GATE_AT_INPUT)
        dup = up_backward(dgated * value, up, ACTIVATION)
        tl.store(dhidden + at + F, dup.to(dtype), mask=there)
        factor = factor_of(up, ACTIVATION)
        slope, value = slope * factor, value * factor
    tl.store(dhidden + at, (dgated * slope).to(dtype), mask=there)
    act = value if GATE_AT_INPUT else gate * value
    if kept is not None:
        act = act * kept_of(kept, scale, rows, columns, there, F)
    tl.store(activated + rows[:, None] * F + columns[None, :], act.to(activated.dtype.element_ty), mask=there)
    credit = dgated * slope * product if GATE_AT_INPUT else dact * value
    if GATE_AT_INPUT and PARTS == 2:
        credit += dup * up_product
    return tl.sum(credit, 1)


@triton.jit
def expert_down_backward(
    doutputs, weights, bias, gates, kept, scale, hidden, dhidden, activated, dgate_parts, tokens, pairs, starts,
    tile_experts, tile_rows, num_rows,
    F: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, GATE_AT_INPUT: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """da = W_down^T dout of the row's token; then the gradient of what the activation reads, the gated activation again
    (dW_down needs it), and the columns' part of the gate's gradient, <da, activation> or, with gates at the input,
    <dhidden, W x>: one row of parts per column block, summed afterwards in a fixed order.

    The epilogue takes a quarter of the columns at a time: on all of them at once it would not fit into the registers.
    """
    blocks: tl.constexpr = (F + BN - 1) // BN
    tile, block = _place(tl.program_id(0), tl.num_programs(0) // blocks, blocks)
    expert, rows, exists, sources = _tile(tile, tile_experts, tile_rows, starts, tokens, True, BM)
    if expert >= 0:
        dact = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            w = _weights(weights, expert, block * BN, k, 1, F, K, True, TMA, BN, BK)
            dact = _product(_inputs(doutputs, sources, exists, k, K, BK), w, dact, UPCAST)
        gate = _gates(gates, pairs, rows, exists)
        operands = (bias, kept, scale, hidden, dhidden, activated)
        columns = block * BN + tl.arange(0, BN // 4)
        left, right = _halves(dact, BM, BN)
        one, two = _halves(left, BM, BN // 2)
        three, four = _halves(right, BM, BN // 2)
        part = _down_backward_columns(
            one, columns, expert, rows, exists, gate, operands, F, ACTIVATION, PARTS, GATE_AT_INPUT
        )
        columns += BN // 4
        part += _down_backward_columns(
            two, columns, expert, rows, exists, gate, operands, F, ACTIVATION, PARTS, GATE_AT_INPUT
        )
        columns += BN // 4
        part += _down_backward_columns(
            three, columns, expert, rows, exists, gate, operands, F, ACTIVATION, PARTS, GATE_AT_INPUT
        )
        columns += BN // 4
        part += _down_backward_columns(
            four, columns, expert, rows, exists, gate, operands, F, ACTIVATION, PARTS, GATE_AT_INPUT
        )
        tl.store(dgate_parts + block.to(tl.int64) * num_rows + rows, part, mask=exists)


@triton.jit
def _rows(values, rows, exists, columns, N: tl.constexpr):
    """Return some columns of some rows; zeros for rows that do not exist."""
    at = values + rows.to(tl.int64)[:, None] * N + columns[None, :]
    return tl.load(at, mask=exists[:, None] & (columns < N)[None, :], other=0.0)


@triton.jit
def _rows_of_expert(
    values, start, end, column, N: tl.constexpr, SORTED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Return BN columns of the BK rows from ``start``; zeros from ``end``, where the expert's rows end."""
    if SORTED:
        block = load_ragged(values, start, end - start, [0, column])
    else:
        rows = start + tl.arange(0, BK)
        block = _rows(values, rows, rows < end, column + tl.arange(0, BN), N)
    return block


@triton.jit
def rows_times_rows(
    left, right, outputs, tokens, starts, order,
    M: tl.constexpr, N: tl.constexpr, GATHER_LEFT: tl.constexpr, SORTED: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """outputs[expert] = left^T right over the expert's rows, one side gathered by token; zeros for an expert without
    rows.

    ``order`` lists the experts, the fullest first: the longest sums start first, so that no late one keeps the others
    waiting. Tokens are read one turn ahead of the rows they say where to find: no load waits for another.
    """
    blocks: tl.constexpr = (N + BN - 1) // BN
    per_expert: tl.constexpr = (M + BM - 1) // BM * blocks
    expert = tl.load(order + tl.program_id(0) // per_expert)
    block = tl.program_id(0) % per_expert
    m, n = block // blocks * BM, block % blocks * BN
    ms, ns, span = m + tl.arange(0, BM), n + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    begin, end = tl.load(starts + expert).to(tl.int32), tl.load(starts + expert + 1).to(tl.int32)
    gathered = tl.load(tokens + begin + span, mask=begin + span < end, other=0)
    for start in range(begin, end, BK):
        exists = start + span < end
        if GATHER_LEFT:
            a = _rows(left, gathered, exists, ms, M)
            b = _rows_of_expert(right, start, end, n, N, SORTED, BN, BK)
        else:
            a = _rows_of_expert(left, start, end, m, M, SORTED, BM, BK)
            b = _rows(right, gathered, exists, ns, N)
        acc = _product(a.T, b, acc, UPCAST)
        gathered = tl.load(tokens + start + BK + span, mask=start + BK + span < end, other=0)
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
