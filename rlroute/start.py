"""Initial weights from another run: part of what a run is.

What they do to a model is :mod:`rlroute.training.start`'s.
"""

import re
from dataclasses import dataclass
from typing import Literal

from rlroute.errors import ConfigError
from rlroute.limits import NonNegative, Share, Whole, check_fields, refuse_idle

_SHA256 = re.compile("[0-9a-f]{64}")
_RUN = re.compile(r"\w[\w.+@:,=~-]*")


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The checkpoint whose weights a run starts from, in place of those that its seed gives.

    What that checkpoint has nothing for is initialised from its key, as in a run that starts from no other.
    """

    run: str
    """Id of the run that wrote it; its folder lies in the same store."""
    step: Whole
    """Steps after which it was written."""
    sha256: str
    """Of its weights, and of the optimizer's state where that is carried
    (:meth:`rlroute.training.manifest.Manifest.sha256`).
    """
    router: Literal["kept", "fresh"] = "kept"
    """kept: what it holds of the routers is taken where the model has a place for it; fresh: they start anew."""
    optimizer: Literal["fresh", "carried"] = "fresh"
    """carried: the moments of what is taken, and their count of updates, go on from that checkpoint."""
    upcycle: bool = False
    """Where the model has experts and the checkpoint is a dense model's, they are its MLPs (sparse upcycling, arXiv
    2212.05055), or pieces of these (granular, arXiv 2410.07524): :mod:`rlroute.model.upcycling`.
    """
    upcycle_noise: NonNegative = 0.0
    """Noise added to each such expert's weights, over their spread."""
    upcycle_drop: Share = 0.0
    """Share of each such expert's hidden units that is drawn anew (Drop-Upcycling, arXiv 2502.19261)."""

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal.
        """
        check_fields(self, "start")
        if len(self.run) > 250 or not _RUN.fullmatch(self.run):
            raise ConfigError(f"start.run = {self.run!r:.100}: want a run's id")
        if not _SHA256.fullmatch(self.sha256):
            raise ConfigError(f"start.sha256 = {self.sha256!r:.100}: want 64 hex digits")
        refuse_idle(self, StartConfig, "start", {"upcycle_noise": "upcycle", "upcycle_drop": "upcycle"})

    def __str__(self) -> str:
        return f"{self.run} at step {self.step}"
