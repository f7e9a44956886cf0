"""The activations between an expert's two projections, in plain PyTorch; the Triton kernels have them in their
epilogues.

One is a curve of the hidden rows, or where it is gated a curve of their first half times their second half.

Shape suffixes: N rows, F expert width, H hidden rows of an expert.
"""

import torch
from torch import Tensor
from torch.nn import functional

from rlroute.errors import ConfigError

GATED = ("swiglu", "swiglu_clamped", "geglu")
"""Those of which a gate multiplies the other half."""
ACTIVATIONS = ("swiglu", "gelu", "relu", "swiglu_clamped", "geglu", "relu_squared")
CLAMP, SLOPE = 7.0, 1.702
"""Of ``swiglu_clamped``: where its inputs end, and how steep its sigmoid is."""


def hidden_rows(activation: str, width: int) -> int:
    """Return H: the rows of W_in for experts of width F; twice as many where a gate multiplies.

    Raises:
        ConfigError: there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r}: legal are {', '.join(map(repr, ACTIVATIONS))}")
    return 2 * width if activation in GATED else width


def activate(hidden_NH: Tensor, activation: str) -> Tensor:
    """Return the activation of each row, shape (N, F).

    ``swiglu`` is silu(gate) * up (Shazeer 2020, arXiv 2002.05202), the gate in the first half; ``gelu`` the exact one,
    by the error function (Hendrycks and Gimpel 2016, arXiv 1606.08415), and ``geglu`` has it in the place of silu.
    ``relu_squared`` is Primer's (So et al. 2021, arXiv 2109.08668). ``swiglu_clamped`` is GPT-OSS's (arXiv 2508.10925):
    the gate at most 7, up within 7 of 0; gate * sigmoid(1.702 gate) * (up + 1).
    """
    inner_NF, factor_NF = split(hidden_NH, activation)
    curve_NF = curve(inner_NF, activation)
    return curve_NF if factor_NF is None else curve_NF * factor_NF


def split(hidden_NH: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """Return what the curve is of, and what multiplies it: None for 1."""
    if activation not in GATED:
        return hidden_NH, None
    gate_NF, up_NF = hidden_NH.chunk(2, dim=1)
    if activation == "swiglu_clamped":
        return gate_NF.clamp(max=CLAMP), up_NF.clamp(-CLAMP, CLAMP) + 1
    return gate_NF, up_NF


def curve(inner_NF: Tensor, activation: str) -> Tensor:
    """Return the curve's values."""
    if activation == "swiglu":
        return functional.silu(inner_NF)
    if activation == "swiglu_clamped":
        return inner_NF * (SLOPE * inner_NF).sigmoid()
    if activation == "relu":
        return functional.relu(inner_NF)
    if activation == "relu_squared":
        return functional.relu(inner_NF).square()
    return functional.gelu(inner_NF)


def curve_backward(dcurve_NF: Tensor, inner_NF: Tensor, activation: str, out_NF: Tensor) -> None:
    """Write the gradient of what the curve is of into ``out_NF``."""
    if activation == "swiglu":
        torch.ops.aten.silu_backward.grad_input(dcurve_NF, inner_NF, grad_input=out_NF)
    elif activation == "swiglu_clamped":  # a silu of another width
        torch.ops.aten.silu_backward.grad_input(dcurve_NF, SLOPE * inner_NF, grad_input=out_NF)
    elif activation == "relu":
        torch.mul(dcurve_NF, inner_NF > 0, out=out_NF)
    elif activation == "relu_squared":
        torch.mul(dcurve_NF, 2 * functional.relu(inner_NF), out=out_NF)
    else:
        torch.ops.aten.gelu_backward.grad_input(dcurve_NF, inner_NF, grad_input=out_NF)
