"""What saves memory and time in training and changes no law of it: options of a run. Each default is off."""

from dataclasses import dataclass
from typing import Annotated, Literal

from rlroute.errors import ConfigError
from rlroute.limits import Between, Count


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The part of a training configuration that says so."""

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrices outside routers; bfloat16 has masters in float32, and needs dtype bfloat16."""
    loss_chunk: Count | None = None
    """Tokens whose logits are there at a time, made again in backward; none: those of a micro-batch."""
    recompute: bool = False
    """Keep each block's inputs alone for backward, and compute the rest again there; routes are drawn once."""
    prefetch: Annotated[int, Between(0, 1024)] = 0
    """Batches that another thread cuts ahead; they are the same."""

    def check_saving(self, dtype: str) -> None:
        """Refuse what cannot be together, by name.

        Args:
            dtype: the compute precision.

        Raises:
            ConfigError: some cannot.
        """
        if self.param_dtype == "bfloat16" != dtype:
            raise ConfigError(f"train.param_dtype = 'bfloat16' with train.dtype = {dtype!r}: legal is 'bfloat16'")
