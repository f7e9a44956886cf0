"""What stands between an expert's two projections, for the epilogues of the Triton kernels: biases, gates at the input,
activations with their derivatives, dropout. What is not there is None or a constant, and costs nothing.
"""

import triton
import triton.language as tl


@triton.jit
def hidden_of(product, gate, bias, columns, mask, GATE_AT_INPUT: tl.constexpr):
    """Return some columns of what an activation reads, of their product with the ungated rows."""
    if GATE_AT_INPUT:
        product = product * gate
    if bias is not None:
        product = product + tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return product


@triton.jit
def activate(hidden, ACTIVATION: tl.constexpr):
    """Return the activation of ``hidden`` (for one with a gate, the curve of its gate half) and its derivative."""
    if ACTIVATION == "relu":
        value, slope = tl.maximum(hidden, 0.0), tl.where(hidden > 0, 1.0, 0.0)
    elif ACTIVATION == "relu_squared":
        above = tl.maximum(hidden, 0.0)
        value, slope = above * above, 2 * above
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        below = 0.5 * (1 + tl.erf(hidden * 0.7071067811865476))
        value, slope = hidden * below, below + hidden * tl.exp(-0.5 * hidden * hidden) * 0.3989422804014327
    elif ACTIVATION == "swiglu_clamped":
        least = tl.minimum(hidden, 7.0)
        s = tl.sigmoid(1.702 * least)
        value = least * s
        slope = tl.where(hidden <= 7.0, s + 1.702 * value * (1 - s), 0.0)
    else:
        s = tl.sigmoid(hidden)
        value, slope = hidden * s, s * (1 + hidden * (1 - s))
    return value, slope


@triton.jit
def factor_of(up, ACTIVATION: tl.constexpr):
    """Return what multiplies the curve of the gate half."""
    if ACTIVATION == "swiglu_clamped":
        up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1
    return up


@triton.jit
def up_backward(dfactor, up, ACTIVATION: tl.constexpr):
    """Return the gradient of ``up`` from that of its factor."""
    if ACTIVATION == "swiglu_clamped":
        dfactor = tl.where(tl.abs(up) <= 7.0, dfactor, 0.0)
    return dfactor


@triton.jit
def kept_of(kept, scale, rows, columns, mask, F: tl.constexpr):
    """Return what dropout multiplies activations by: 0, or ``scale``."""
    return tl.load(kept + rows[:, None] * F + columns[None, :], mask=mask, other=0).to(tl.float32) * scale
