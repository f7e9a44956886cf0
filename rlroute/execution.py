"""How a run is computed: device, precision, engine, and what saves memory or time. Each option of the latter is off by
default.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from rlroute.errors import ConfigError
from rlroute.limits import Between, Count

Keep = Literal["weights", "state", "all"]
"""What of a run's checkpoints stays once it has ended: the last one's weights; its optimizer's state as well; the
weights of all. It changes no figure, and is no part of what a run is.
"""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The part of a training configuration that says so."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute precision; router and residual loss stay in float32 at least."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrices outside routers; bfloat16 has masters in float32, and needs dtype bfloat16."""
    kernel: Literal["auto", "cpu", "triton", "reference"] = "auto"
    threads: Annotated[int, Between(1, 1024)] = 1
    """CPU threads of a run; bits depend on it, so it is part of the run's identity."""
    deterministic: bool = False
    """On cuda: the same run gives the same bits again, slower; on the CPU it does so anyway."""
    compile: bool = False
    """Run the dense parts through torch.compile: faster after the first steps, and rounded otherwise."""
    loss_chunk: Count | None = None
    """Tokens whose logits are there at a time, made again in backward; none: those of a micro-batch."""
    recompute: bool = False
    """Keep each block's inputs alone for backward, and compute the rest again there; routes are drawn once."""
    prefetch: Annotated[int, Between(0, 1024)] = 0
    """Batches that another thread cuts ahead; they are the same."""

    def check_execution(self) -> None:
        """Refuse what cannot be together, by name.

        Raises:
            ConfigError: some cannot.
        """
        if self.param_dtype == "bfloat16" != self.dtype:
            raise ConfigError(f"train.param_dtype = 'bfloat16' with train.dtype = {self.dtype!r}: legal is 'bfloat16'")
