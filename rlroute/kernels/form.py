"""What an expert does besides its projections and its activation.

Shape suffixes: D model width, F expert width, H hidden rows of an expert, E experts, R routed pairs, N some of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute import seeding


@dataclass(frozen=True, eq=False)
class Form:
    """What an expert does besides its projections and its activation.

    Attributes:
        in_bias_EH, out_bias_ED: added behind the projections, where they are there.
        gate_at_input: whether the gate weighs the expert's input (Llama 4) and not its output.
        dropout: the share of an expert's activations that is dropped; the others are scaled, so that each stays what it
            was in the mean.
        keys_R: int64, for each pair of the decision the key that its dropped activations are drawn from; None where
            nothing is dropped.
    """

    in_bias_EH: Tensor | None = None
    out_bias_ED: Tensor | None = None
    gate_at_input: bool = False
    dropout: float = 0.0
    keys_R: Tensor | None = None

    @property
    def biases(self) -> dict[str, Tensor]:
        """The biases that are there, by name."""
        found = {"in_bias_EH": self.in_bias_EH, "out_bias_ED": self.out_bias_ED}
        return {name: bias for name, bias in found.items() if bias is not None}

    @property
    def plain(self) -> bool:
        """Whether there is nothing besides."""
        return not self.biases and not self.gate_at_input and self.keys_R is None

    @property
    def scale(self) -> float:
        """By how much an activation grows that is not dropped."""
        return 1 / (1 - self.dropout)

    def kept(self, pairs_N: Tensor, width: int) -> Tensor | None:
        """Say of some pairs' activations, of shape (N, F), which are not dropped; None where all are kept."""
        if self.keys_R is None:
            return None
        return seeding.uniform(self.keys_R[pairs_N], (width,)) >= self.dropout

    def factors(self, pairs_N: Tensor, width: int, dtype: torch.dtype) -> Tensor | None:
        """Return what these activations are multiplied by, of shape (N, F); None for 1."""
        kept_NF = self.kept(pairs_N, width)
        return None if kept_NF is None else kept_NF.to(dtype) * self.scale

    def outer(self, gates_R: Tensor) -> Tensor:
        """Return what weighs the experts' outputs: the gates, or 1 where these weigh the inputs."""
        return torch.ones_like(gates_R) if self.gate_at_input else gates_R


PLAIN = Form()
"""No biases, the gate weighs the output, nothing is dropped."""
