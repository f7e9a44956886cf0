"""The activations between an expert's two projections, in plain autograd; the engines have three of them in their
epilogues.

Shape suffixes: N rows, F expert width, H hidden rows of an expert.
"""

from torch import Tensor
from torch.nn import functional

from rlroute.errors import ConfigError

ACTIVATIONS = ("swiglu", "gelu", "relu")
"""Those of the fused engines."""
COMPOSED = ("swiglu_clamped", "geglu", "relu_squared")
"""Those that stand between the primitives only."""
GATED = ("swiglu", "swiglu_clamped", "geglu")
"""Those of which a gate multiplies the other half."""
CLAMP, SLOPE = 7.0, 1.702
"""Of ``swiglu_clamped``: where its inputs end, and how steep its sigmoid is."""


def hidden_rows(activation: str, width: int) -> int:
    """Return H: the rows of W_in for experts of width F; twice as many where a gate multiplies.

    Raises:
        ConfigError: there is no such activation.
    """
    if activation not in ACTIVATIONS + COMPOSED:
        raise ConfigError(f"activation {activation!r}: legal are {', '.join(map(repr, ACTIVATIONS + COMPOSED))}")
    return 2 * width if activation in GATED else width


def activate(hidden_NH: Tensor, activation: str) -> Tensor:
    """Return the activation of each row, shape (N, F).

    ``swiglu`` is silu(gate) * up (Shazeer 2020, arXiv 2002.05202), the gate in the first half; ``gelu`` the exact one,
    by the error function (Hendrycks and Gimpel 2016, arXiv 1606.08415), and ``geglu`` has it in the place of silu.
    ``relu_squared`` is Primer's (So et al. 2021, arXiv 2109.08668). ``swiglu_clamped`` is GPT-OSS's (arXiv 2508.10925):
    the gate at most 7, up within 7 of 0; gate * sigmoid(1.702 gate) * (up + 1).
    """
    if activation == "gelu":
        return functional.gelu(hidden_NH)
    if activation == "relu":
        return functional.relu(hidden_NH)
    if activation == "relu_squared":
        return functional.relu(hidden_NH).square()
    gate_NF, up_NF = hidden_NH.chunk(2, dim=1)
    if activation == "geglu":
        return functional.gelu(gate_NF) * up_NF
    if activation == "swiglu_clamped":
        gate_NF, up_NF = gate_NF.clamp(max=CLAMP), up_NF.clamp(-CLAMP, CLAMP)
        return gate_NF * (SLOPE * gate_NF).sigmoid() * (up_NF + 1)
    return functional.silu(gate_NF) * up_NF
