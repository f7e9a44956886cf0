"""How a model's blocks mix the tokens of a sequence: part of its configuration."""

from dataclasses import dataclass, fields
from typing import Literal

from rlroute.errors import ConfigError
from rlroute.heads import Heads
from rlroute.limits import Whole, refuse_idle

STATEFUL = ("gated_delta", "kimi_delta", "mamba2")
"""Mixers with a state of fixed size, in place of keys and values of all positions."""


@dataclass(frozen=True, kw_only=True)
class Mixing(Heads):
    """Which mixers the blocks have; attention through latents (DeepSeek-V2, arXiv 2405.04434), in place of plain heads;
    mixers with a state of fixed size.
    """

    mixers: str = "attention"
    """What each block has, in turn: a comma parts blocks, and after the last of them it is the first's turn again. Of
    attention, gated_delta (arXiv 2412.06464), kimi_delta (arXiv 2510.26692) and mamba2 (arXiv 2405.21060); two in one
    block are named as in mamba2+attention.
    """
    attention_gate: Literal["none", "sigmoid"] = "none"
    """sigmoid: a learned sigmoid(W x) weighs each channel of what heads give (arXiv 2505.06708; Qwen3-Next)."""
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
    state_heads: Whole = 0
    """Heads of a mixer with a state; 0: num_heads."""
    state_key_heads: Whole = 0
    """Heads of its keys and queries, each shared by as many of its heads (Mamba-2's groups); 0: as many as heads."""
    state_key_width: Whole = 0
    """Channels of its keys (Mamba-2's state size); 0: those of a head of attention."""
    state_value_width: Whole = 0
    """Channels of its values; 0: as many as of keys."""

    def mixers_at(self, layer: int) -> tuple[str, ...]:
        """Return the mixers of a block, in their order."""
        turns = self.mixers.split(",")
        return tuple(turns[layer % len(turns)].split("+"))

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Of a mixer with a state: its heads, those of keys, and channels of a head's keys and values."""
        heads = self.state_heads or self.num_heads
        key = self.state_key_width or self.attention_width // self.num_heads
        return heads, self.state_key_heads or heads, key, self.state_value_width or key

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
        of_state = ("state_heads", "state_key_heads", "state_key_width", "state_value_width")
        refuse_idle(self, Mixing, "model", dict.fromkeys(of_state, "mixers"))
        self._check_mixers()
        heads, keys, _, _ = self.state_shape
        if heads % keys:
            raise ConfigError(f"model.state_key_heads = {keys}: must divide model.state_heads = {heads}")
        if self.kv_rank and self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads = {self.num_kv_heads} with model.kv_rank = {self.kv_rank}: legal is 0, "
                "latent attention has as many heads of keys and values as of queries"
            )
        for name in ("kv_rank", "attention_gate", "mixers"):
            if self.attention_experts and (value := getattr(self, name)) != getattr(Mixing, name):
                raise ConfigError(
                    f"model.{name} = {value!r} with model.attention_experts = {self.attention_experts}: "
                    f"legal is {getattr(Mixing, name)!r}, these are experts of plain attention"
                )
        if self.kv_rank and (turning := self.latent_widths[1]) % 2:
            raise ConfigError(f"model.rope_width = {turning}: must be even (rotary positions)")

    def _check_mixers(self) -> None:
        one = ("attention", *STATEFUL)
        legal = {*one, *(f"{mixer}+attention" for mixer in STATEFUL)}
        for turn in self.mixers.split(","):
            if turn not in legal:
                raise ConfigError(
                    f"model.mixers = {self.mixers!r}: {turn!r} is none, legal are {', '.join(one)}, and those with a "
                    "state before attention, as in mamba2+attention"
                )
        for name in ("kv_rank", "attention_gate", "num_kv_heads"):
            if "attention" not in self.mixers and getattr(self, name) != getattr(Mixing, name):
                raise ConfigError(
                    f"model.{name} = {getattr(self, name)!r} does nothing with model.mixers = {self.mixers!r}: "
                    f"legal is {getattr(Mixing, name)!r}"
                )


MIXING = frozenset(field.name for field in fields(Mixing)) - {field.name for field in fields(Heads)}
"""The fields of :class:`Mixing` itself."""
