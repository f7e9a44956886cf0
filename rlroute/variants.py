"""Which blocks of a model have experts, and variants of the layer that runs them: options of the model, never of a
router. Each default is the plain layer.
"""

from dataclasses import dataclass
from typing import Literal

from rlroute.errors import ConfigError
from rlroute.limits import Layers, Whole


@dataclass(frozen=True, kw_only=True)
class LayerVariants:
    """The part of a model's configuration that says so."""

    num_layers: Layers = 1
    num_dense_layers: Whole = 0
    """The first n layers keep a dense MLP of the same active width."""
    shared_gate: Literal["none", "sigmoid"] = "none"
    """sigmoid: a learned sigmoid(w x) weighs what the shared experts give (Qwen1.5-MoE)."""

    def check_variants(self, num_shared_experts: int) -> None:
        """Refuse variants that cannot be together, by name.

        Raises:
            ConfigError: some cannot.
        """
        if self.num_dense_layers > self.num_layers:
            raise ConfigError(f"model.num_dense_layers = {self.num_dense_layers}: legal are 0 to {self.num_layers}")
        if self.shared_gate != "none" and not num_shared_experts:
            raise ConfigError(
                f"model.shared_gate = {self.shared_gate!r} with model.num_shared_experts = 0: legal is 'none'"
            )
