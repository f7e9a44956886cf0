"""The activations between an expert's two projections, in plain autograd; the engines have them in their epilogues.

Shape suffixes: N rows, F expert width, H hidden rows of an expert.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional

from rlroute.errors import ConfigError

Activation = Literal["swiglu", "gelu", "relu"]
ACTIVATIONS = ("swiglu", "gelu", "relu")


def hidden_rows(activation: str, width: int) -> int:
    """Return H: the rows of W_in for experts of width F; twice as many where a gate multiplies.

    Raises:
        ConfigError: there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r}: legal are {', '.join(map(repr, ACTIVATIONS))}")
    return 2 * width if activation == "swiglu" else width


def activate(hidden_NH: Tensor, activation: str) -> Tensor:
    """Return the activation of each row, shape (N, F).

    ``swiglu`` is silu(gate) * up (Shazeer 2020, arXiv 2002.05202), the gate in the first half; ``gelu`` the exact one,
    by the error function (Hendrycks and Gimpel 2016, arXiv 1606.08415).
    """
    if activation == "gelu":
        return functional.gelu(hidden_NH)
    if activation == "relu":
        return functional.relu(hidden_NH)
    gate_NF, up_NF = hidden_NH.chunk(2, dim=1)
    return functional.silu(gate_NF) * up_NF
