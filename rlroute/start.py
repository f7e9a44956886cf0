"""Initial weights from another run: part of what a run is.

What they do to a model is :mod:`rlroute.training.start`'s.
"""

import re
from dataclasses import dataclass
from typing import Literal

from rlroute.errors import ConfigError
from rlroute.limits import Whole, check_fields

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
    """Of its weights (:attr:`rlroute.training.manifest.Manifest.weights_sha256`)."""
    router: Literal["kept", "fresh"] = "kept"
    """kept: what it holds of the routers is taken where the model has a place for it; fresh: they start anew."""

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

    def __str__(self) -> str:
        return f"{self.run} at step {self.step}"
