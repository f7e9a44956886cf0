"""Gated delta nets, and Kimi Delta Attention, which decays each channel of a state by itself.

Shape suffixes: those of :mod:`rlroute.model.scan`, and D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute.config import ModelConfig
from rlroute.model.attention import Mixer, by_head
from rlroute.model.linear import KeyedLinear
from rlroute.model.scan import Decay, ShortConvolution, everything, scan, scan_flops


class GatedDelta(Mixer):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), as Qwen3-Next has it.

    Queries, keys and values pass a short convolution; queries and keys have length 1; the output is normed by head and
    weighed by a gate. Each head of keys serves as many heads of values.
    """

    def __init__(self, config: ModelConfig, seq_len: int, layer: int, seed: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.key, self.value = config.state_shape
        width, keys, values = config.d_model, self.key_heads * self.key, self.heads * self.value
        self.name, self.seed = f"layers.{layer}.mixer", seed
        self.qkv = self.keyed("qkv", width, 2 * keys + values)
        self.convolution = ShortConvolution(2 * keys + values, seed, f"{self.name}.convolution")
        self.beta = self.keyed("beta", width, self.heads)
        self.gate = self.keyed("gate", width, values)
        self.norm = nn.RMSNorm(self.value)
        self.out = self.keyed("out", values, width, (2 * config.num_layers * values) ** -0.5)
        self.add_decay(width)

    def keyed(self, name: str, d_in: int, d_out: int, std: float | None = None) -> KeyedLinear:
        """Return a linear map of this mixer; its weights start at 1 over the root of its inputs."""
        return KeyedLinear(d_in, d_out, std or d_in**-0.5, self.seed, f"{self.name}.{name}")

    def add_decay(self, width: int) -> None:
        """Make what the decay is computed with."""
        self.step = self.keyed("step", width, self.heads)
        self.decay = Decay(self.heads, 1, self.seed, f"{self.name}.decay")

    def steps(self, x_BSD: Tensor) -> Tensor:
        """Return what the decay's steps are made of, one number a head, or one a channel."""
        step_BSI: Tensor = self.step(x_BSD)
        return step_BSI

    def weigh(self, gate_BSI: Tensor) -> Tensor:
        """Return the weights of the outputs."""
        return functional.silu(gate_BSI)

    def mixing_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a row in the scan."""
        return scan_flops(seq_len, self.heads, self.key, self.value, delta=True)

    def forward(self, x_BSD: Tensor, mask_BSS: Tensor | None = None) -> Tensor:
        """Return what is added to the residual stream, shape (B, S, D); see :class:`.attention.Mixer`."""
        mask_BSS = everything(x_BSD) if mask_BSS is None else mask_BSS
        keys = self.key_heads * self.key
        mixed_BSI = self.convolution(self.qkv(x_BSD), mask_BSS)
        beta_BSN, step_BSI, gate_BSI = self.beta(x_BSD), self.steps(x_BSD), self.gate(x_BSD)
        with torch.autocast(x_BSD.device.type, enabled=False):
            q_BSI, k_BSI, v_BSI = torch.split(mixed_BSI, [keys, keys, self.heads * self.value], -1)
            q_BNSK, k_BNSK = self._unit(q_BSI) * self.key**-0.5, self._unit(k_BSI)
            beta_BNS = beta_BSN.to(mixed_BSI.dtype).sigmoid().transpose(1, 2)
            _, log_decay_BNSG = self.decay(step_BSI)
            y_BNSV = scan(q_BNSK, k_BNSK, by_head(v_BSI, self.heads), log_decay_BNSG, beta_BNS, mask_BSS)
            y_BSI = self.norm(y_BNSV).transpose(1, 2).flatten(2) * self.weigh(gate_BSI.to(mixed_BSI.dtype))
        y_BSD: Tensor = self.out(y_BSI)
        return y_BSD

    def _unit(self, x_BSI: Tensor) -> Tensor:
        """Return queries or keys of length 1, shape (B, N, S, K)."""
        x_BNSK = by_head(x_BSI, self.key_heads)
        x_BNSK = x_BNSK * (x_BNSK.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        return x_BNSK.repeat_interleave(self.heads // self.key_heads, 1)


class KimiDelta(GatedDelta):
    """Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): a decay for each channel of keys, through as many channels
    as a key has, and gates by a sigmoid.

    Kimi Linear makes these gates through a narrow projection too; here, as in Kimi K3, it is a full one.
    """

    def add_decay(self, width: int) -> None:
        """Make what the decay is computed with."""
        self.step_down = self.keyed("step_down", width, self.key)
        self.step_up = self.keyed("step_up", self.key, self.heads * self.key)
        self.decay = Decay(self.heads, self.key, self.seed, f"{self.name}.decay")

    def steps(self, x_BSD: Tensor) -> Tensor:
        """Return what the decay's steps are made of, one number a channel of keys."""
        step_BSI: Tensor = self.step_up(self.step_down(x_BSD))
        return step_BSI

    def weigh(self, gate_BSI: Tensor) -> Tensor:
        """Return the weights of the outputs."""
        return gate_BSI.sigmoid()
