"""Where a run stands."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimizer's state, all that a resume needs."""

    step: int = 0
    chain: str = ""
    """Hash chain of the batches seen, hex."""
    flops: int = 0
    """Training FLOPs spent, by the pairs that ran."""
    forward: int = 0
    """Those of them that no backward spent."""
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "eval": 0.0})

    @classmethod
    def read(cls, values: Mapping[str, Any], step: int) -> "Progress":
        """Return where a run stood at its checkpoint of a step.

        Raises:
            ValueError: no run can stand there.
        """
        if not isinstance(values, Mapping) or values.keys() != {f.name for f in fields(cls)}:
            raise ValueError("the progress has other fields than step, chain, flops, forward and seconds")
        read = cls(**values)
        legal = {
            "step": type(read.step) is int and read.step == step,
            "chain": type(read.chain) is str and _SHA256.fullmatch(read.chain) is not None,
            "flops": type(read.flops) is int and read.flops >= 0,
            "forward": type(read.forward) is int and 0 <= read.forward <= read.flops,
            "seconds": isinstance(read.seconds, dict)
            and read.seconds.keys() == cls().seconds.keys()
            and all(type(s) is float and 0 <= s < math.inf for s in read.seconds.values()),
        }
        for name, holds in legal.items():
            if not holds:
                raise ValueError(f"the progress at step {step} has {name} = {getattr(read, name)!r}")
        return read
