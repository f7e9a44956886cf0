"""What is wrong with a record: which run, file and field, what it says, and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rlroute.foreign import clipped
from rlroute.values import differing


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        run: the run's id.
        file: the file of its record, or what else holds the field.
        field: the field's path, as ``summary.json`` and ``final/loss``.
        recorded: what it says.
        found: what comes out.
        why: more about it.
    """

    run: str
    file: str
    field: str
    recorded: Any
    found: Any
    why: str = ""

    def __str__(self) -> str:
        recorded, found = (clipped(repr(value)) for value in (self.recorded, self.found))
        said = f"{self.run}: {self.file}: {self.field} is {recorded}, want {found}"
        return said + (f" ({self.why})" if self.why else "")


class Ledger:
    """Collects what is wrong with one run."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.findings: list[Finding] = []

    def add(self, file: str, field: str, recorded: Any, found: Any, why: str = "") -> None:
        """Note a finding."""
        self.findings.append(Finding(self.run, file, field, recorded, found, why))

    def same(self, file: str, field: str, recorded: Any, found: Any, why: str = "") -> None:
        """Hold a value against the one that comes out; of nested ones, name the first leaf that differs."""
        if recorded != found:
            path, one, other = next(differing(recorded, found), ("", recorded, found))
            self.add(file, f"{field}/{path}" if path else field, one, other, why)

    def near(self, file: str, field: str, recorded: float | None, found: float | None, tolerance: float) -> None:
        """Hold a number against the one that comes out, up to rounding."""
        known = isinstance(recorded, int | float) and isinstance(found, int | float)
        if recorded != found and not (known and math.isclose(recorded, found, rel_tol=0, abs_tol=tolerance)):  # type: ignore[arg-type]
            self.add(file, field, recorded, found)
