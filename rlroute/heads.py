"""The heads of a model's attention: part of its configuration."""

from dataclasses import dataclass
from typing import Annotated, Literal

from rlroute.errors import ConfigError
from rlroute.limits import Between, Size, Whole


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How many there are, of which width, and which are experts."""

    d_model: Size = 64
    num_heads: Size = 4
    num_kv_heads: Whole = 0
    """Heads of keys and values, each shared by as many query heads (arXiv 2305.13245); 0: as many as those."""
    head_width: Whole = 0
    """Channels of a head; 0: d_model / num_heads."""
    attention_experts: Annotated[int, Between(0, 2**14)] = 0
    """Experts of each attention, routed like the others, k a token (JetMoE, arXiv 2404.07413); 0: none."""
    attention_form: Literal["moa", "switchhead"] = "moa"
    """What these are of. moa: of query and output projections, each a group of heads. switchhead: of each head's value
    projection and of its output projection, between which it chooses for itself, k a token (arXiv 2312.07987).
    """

    @property
    def attention_width(self) -> int:
        """Channels of all query heads together."""
        return self.num_heads * self.head_width or self.d_model

    def check_heads(self, k: int) -> None:
        """Refuse illegal values by name.

        Args:
            k: experts per token.

        Raises:
            ConfigError: a value is illegal.
        """
        heads = f"num_heads = {self.num_heads}"
        if not self.head_width and self.d_model % (2 * self.num_heads):
            raise ConfigError(
                f"model.d_model = {self.d_model}: "
                f"must be a multiple of 2 * num_heads = {2 * self.num_heads} (rotary positions)"
            )
        if self.head_width % 2:
            raise ConfigError(f"model.head_width = {self.head_width}: must be even (rotary positions)")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ConfigError(f"model.num_kv_heads = {self.num_kv_heads}: must divide model.{heads}")
        if self.num_kv_heads and self.attention_experts:
            raise ConfigError(
                f"model.num_kv_heads = {self.num_kv_heads} with model.attention_experts: legal is 0, "
                "an expert has as many heads as keys and values"
            )
        experts = f"model.attention_experts = {self.attention_experts} with k = {k}"
        if self.attention_form == "switchhead":
            if k > self.attention_experts:
                raise ConfigError(f"{experts} and model.attention_form 'switchhead': legal are {k} experts and more")
        elif self.attention_experts and (k > self.attention_experts or self.num_heads % k):
            raise ConfigError(f"{experts} and {heads}: k must divide the heads, and is at most the experts")
