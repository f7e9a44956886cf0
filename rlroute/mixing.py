"""How a model's blocks mix the tokens of a sequence: part of its configuration."""

from dataclasses import dataclass

from rlroute.errors import ConfigError
from rlroute.heads import Heads
from rlroute.limits import Whole, refuse_idle


@dataclass(frozen=True, kw_only=True)
class Mixing(Heads):
    """Attention through latents (DeepSeek-V2, arXiv 2405.04434), in place of plain heads."""

    kv_rank: Whole = 0
    """Width of the latent that all heads' keys and values are made of; 0: none, plain attention."""
    q_rank: Whole = 0
    """Width of the latent that queries are made of; 0: none, they are made of the hidden state."""
    rope_width: Whole = 0
    """Channels of a head that turn with the position, whose keys all heads share, beside the head's others; 0: half as
    many as those.
    """
    value_width: Whole = 0
    """Channels of a head's values; 0: as many as of its keys that do not turn."""

    @property
    def latent_widths(self) -> tuple[int, int, int]:
        """Channels of a head of latent attention: of keys that do not turn, of keys that do, of values."""
        plain = self.attention_width // self.num_heads
        return plain, self.rope_width or plain // 2, self.value_width or plain

    def check_mixing(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal.
        """
        refuse_idle(self, Mixing, "model", dict.fromkeys(("q_rank", "rope_width", "value_width"), "kv_rank"))
        for name in ("attention_experts", "num_kv_heads"):
            if self.kv_rank and getattr(self, name):
                raise ConfigError(
                    f"model.{name} = {getattr(self, name)} with model.kv_rank = {self.kv_rank}: legal is 0, "
                    "latent attention has the same heads for queries, keys and values, and no experts"
                )
        if self.kv_rank and (turning := self.latent_widths[1]) % 2:
            raise ConfigError(f"model.rope_width = {turning}: must be even (rotary positions)")
