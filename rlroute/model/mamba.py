"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), as Nemotron-H has it.

Shape suffixes: those of :mod:`rlroute.model.scan`, and D model width, H groups of channels that are normed together.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute.config import ModelConfig
from rlroute.model.attention import Mixer, by_head
from rlroute.model.linear import KeyedLinear
from rlroute.model.scan import Decay, ShortConvolution, everything, scan, scan_flops


class Mamba2(Mixer):
    """A state-space mixer: values are taken in by the size of a step, and passed on beside the state too.

    Keys and queries are the paper's B and C, their heads its groups, a key's width its state size. Outputs are weighed
    by a gate, and then normed in as many groups.
    """

    def __init__(self, config: ModelConfig, seq_len: int, layer: int, seed: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.key, self.value = config.state_shape
        width, keys, values = config.d_model, self.key_heads * self.key, self.heads * self.value
        name = f"layers.{layer}.mixer"

        def keyed(part: str, d_out: int) -> KeyedLinear:
            return KeyedLinear(width, d_out, width**-0.5, seed, f"{name}.{part}")

        self.vkq = keyed("vkq", values + 2 * keys)
        self.convolution = ShortConvolution(values + 2 * keys, seed, f"{name}.convolution", bias=True)
        self.gate, self.step = keyed("gate", values), keyed("step", self.heads)
        self.decay = Decay(self.heads, 1, seed, f"{name}.decay")
        self.past_N = nn.Parameter(torch.ones(self.heads))
        self.gain_I = nn.Parameter(torch.ones(values))
        self.norm = nn.RMSNorm(values // self.key_heads, elementwise_affine=False)
        self.out = KeyedLinear(values, width, (2 * config.num_layers * values) ** -0.5, seed, f"{name}.out")

    def mixing_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a row in the scan."""
        return scan_flops(seq_len, self.heads, self.key, self.value, delta=False)

    def forward(self, x_BSD: Tensor, mask_BSS: Tensor | None = None) -> Tensor:
        """Return what is added to the residual stream, shape (B, S, D); see :class:`.attention.Mixer`."""
        mask_BSS = everything(x_BSD) if mask_BSS is None else mask_BSS
        keys = self.key_heads * self.key
        mixed_BSI = self.convolution(self.vkq(x_BSD), mask_BSS)
        step_BSI, gate_BSI = self.step(x_BSD), self.gate(x_BSD).to(mixed_BSI.dtype)
        with torch.autocast(x_BSD.device.type, enabled=False):
            v_BSI, k_BSI, q_BSI = torch.split(mixed_BSI, [self.heads * self.value, keys, keys], -1)
            v_BNSV = by_head(v_BSI, self.heads)
            step_BNS1, log_decay_BNS1 = self.decay(step_BSI)
            read_BNSV = scan(
                self._of_heads(q_BSI), self._of_heads(k_BSI), step_BNS1 * v_BNSV, log_decay_BNS1, None, mask_BSS
            )
            y_BSI = (read_BNSV + self.past_N[:, None, None] * v_BNSV).transpose(1, 2).flatten(2)
            weighed_BSI = y_BSI * functional.silu(gate_BSI)
            y_BSI = self.gain_I * self.norm(weighed_BSI.view(*y_BSI.shape[:2], self.key_heads, -1)).flatten(2)
        y_BSD: Tensor = self.out(y_BSI)
        return y_BSD

    def _of_heads(self, x_BSI: Tensor) -> Tensor:
        """Return keys or queries of every head, shape (B, N, S, K)."""
        return by_head(x_BSI, self.key_heads).repeat_interleave(self.heads // self.key_heads, 1)
