"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads are made of one narrow latent, and so may queries be. Positions turn channels of their own:
of queries by head, of keys the same for all heads.

Shape suffixes: B sequences, S sequence length, D model width, N heads, H head width (of queries and keys: that of the
channels which turn and of those which do not).
"""

import torch
from torch import Tensor, nn

from rlroute.config import ModelConfig
from rlroute.model.attention import Mixer, Rotary, attend, by_head, gated, output_gate
from rlroute.model.linear import KeyedLinear


class LatentAttention(Mixer):
    """Causal attention with keys and values from a latent; both latents are normed."""

    def __init__(self, config: ModelConfig, seq_len: int, layer: int, seed: int) -> None:
        super().__init__()
        self.num_heads, width = config.num_heads, config.d_model
        self.plain, self.turning, self.value = config.latent_widths

        def keyed(name: str, d_in: int, d_out: int, std: float) -> KeyedLinear:
            return KeyedLinear(d_in, d_out, std, seed, f"layers.{layer}.attention.{name}")

        self.q_down = keyed("q_down", width, config.q_rank, width**-0.5) if config.q_rank else None
        self.q_norm = nn.RMSNorm(config.q_rank) if config.q_rank else None
        rank = config.q_rank or width
        self.q_up = keyed("q_up", rank, self.num_heads * (self.plain + self.turning), rank**-0.5)
        self.kv_down = keyed("kv_down", width, config.kv_rank + self.turning, width**-0.5)
        self.kv_norm = nn.RMSNorm(config.kv_rank)
        made = self.num_heads * (self.plain + self.value)
        self.kv_up = keyed("kv_up", config.kv_rank, made, config.kv_rank**-0.5)
        inner = self.num_heads * self.value
        self.out = keyed("out", inner, width, (2 * config.num_layers * inner) ** -0.5)
        self.gate = output_gate(config, layer, seed, inner)
        self.rotary = Rotary(self.turning, seq_len, config.rope_base)

    def mixing_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a row's scores and values, of (S + 1) / 2 keys on average."""
        return (seq_len + 1) * self.num_heads * (self.plain + self.turning + self.value)

    def forward(self, x_BSD: Tensor, mask_BSS: Tensor | None = None) -> Tensor:
        """Return the attention output, shape (B, S, D); ``mask_BSS`` says whom each position attends to."""
        q_BNSH, (k_BNSH, v_BNSH) = self._queries(x_BSD), self._keys_and_values(x_BSD)
        y_BNSH = attend(q_BNSH, k_BNSH, v_BNSH, mask_BSS)
        y_BSD: Tensor = self.out(gated(y_BNSH.transpose(1, 2).flatten(2), self.gate, x_BSD))
        return y_BSD

    def _queries(self, x_BSD: Tensor) -> Tensor:
        if self.q_down is not None and self.q_norm is not None:
            x_BSD = _wide_norm(self.q_norm, self.q_down(x_BSD))
        plain_BNSH, turning_BNSH = torch.split(
            by_head(self.q_up(x_BSD), self.num_heads), [self.plain, self.turning], -1
        )
        return torch.cat((plain_BNSH, self.rotary(turning_BNSH)), -1)

    def _keys_and_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        latent_BSR, turning_BSH = torch.split(self.kv_down(x_BSD), [self.kv_up.in_features, self.turning], -1)
        made_BNSH = by_head(self.kv_up(_wide_norm(self.kv_norm, latent_BSR)), self.num_heads)
        plain_BNSH, v_BNSH = torch.split(made_BNSH, [self.plain, self.value], -1)
        shared_BNSH = self.rotary(turning_BSH[:, None]).expand(-1, self.num_heads, -1, -1)
        return torch.cat((plain_BNSH, shared_BNSH), -1), v_BNSH


def _wide_norm(norm: nn.RMSNorm, x_BSR: Tensor) -> Tensor:
    """Return a norm of what is in the precision of products, in that of the norm."""
    normed_BSR: Tensor = norm(x_BSR.to(norm.weight.dtype))
    return normed_BSR
