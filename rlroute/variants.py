"""Which blocks of a model have experts, and variants of the layer that runs them: options of the model, never of a
router. Each default is the plain layer.
"""

from dataclasses import dataclass
from typing import Literal

from rlroute.errors import ConfigError
from rlroute.limits import BelowOne, Count, Layers, Size, Whole


@dataclass(frozen=True, kw_only=True)
class LayerVariants:
    """The part of a model's configuration that says so."""

    num_layers: Layers = 1
    num_dense_layers: Whole = 0
    """The first n layers keep a dense MLP of the same active width."""
    moe_every: Count = 1
    """After those, every m-th block has experts, the others a dense MLP (2: GShard, Switch, Llama 4)."""
    d_dense: Size | None = None
    """Hidden width of the dense MLPs in a model with experts; none: what a token runs in a layer of experts."""
    shared_gate: Literal["none", "sigmoid"] = "none"
    """sigmoid: a learned sigmoid(w x) weighs what the shared experts give (Qwen1.5-MoE)."""
    d_latent: Size | None = None
    """Width in which routed experts read and write, between two projections that all of them share (LatentMoE); none:
    the model's.
    """
    expert_bias: bool = False
    """Routed experts have biases of both projections (GPT-OSS); shared ones and dense layers have none."""
    gate_at: Literal["output", "input"] = "output"
    """What a pair's gate weighs: its expert's output, or its input (Llama 4)."""
    expert_dropout: BelowOne = 0.0
    """In training this share of the activations inside routed experts is 0 (Switch, arXiv 2101.03961, table 4)."""
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    """float32: at least. bfloat16: the routers' matrix products and scores, the known-bad control (Switch, table 2)."""
    round_to: Whole = 0
    """In training each expert's pairs of a routing sample are rounded to a multiple of this, the size of a kernel's
    tiles, by dropping those of the smallest gates (token rounding, SonicMoE, arXiv 2512.14080); 0: they are not.
    """
    rounding: Literal["down", "nearest"] = "down"
    """down: no tile is part-filled. nearest: the last one stays where it is at least half full; no pair is added."""

    @property
    def moe_layers(self) -> range:
        """The blocks that have experts."""
        return range(self.num_dense_layers + self.moe_every - 1, self.num_layers, self.moe_every)

    def check_variants(self, num_shared_experts: int) -> None:
        """Refuse variants that cannot be together, by name.

        Raises:
            ConfigError: some cannot.
        """
        if self.num_dense_layers > self.num_layers:
            raise ConfigError(f"model.num_dense_layers = {self.num_dense_layers}: legal are 0 to {self.num_layers}")
        routed = self.num_layers - self.num_dense_layers
        if self.moe_every > max(routed, 1):
            raise ConfigError(
                f"model.moe_every = {self.moe_every}: legal are 1 to {max(routed, 1)}, "
                "the layers after model.num_dense_layers"
            )
        if self.d_dense is not None and len(self.moe_layers) == self.num_layers:
            raise ConfigError(f"model.d_dense = {self.d_dense}: no layer is dense, legal is none")
        if self.rounding != "down" and not self.round_to:
            raise ConfigError(f"model.rounding = {self.rounding!r} with model.round_to = 0: legal is 'down'")
        if self.shared_gate != "none" and not num_shared_experts:
            raise ConfigError(
                f"model.shared_gate = {self.shared_gate!r} with model.num_shared_experts = 0: legal is 'none'"
            )

    def check_router_dtype(self, dtype: str) -> None:
        """Refuse routers in bfloat16 in a model of float64.

        Raises:
            ConfigError: they are.
        """
        if dtype == "float64" and self.router_dtype != "float32":
            raise ConfigError(
                f"model.router_dtype = {self.router_dtype!r} with train.dtype 'float64': legal is 'float32'"
            )
