"""What tables know of the ladder that was climbed in their run store (:mod:`.ladder`): compute multipliers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlroute.errors import StoreError
from rlroute.experiments.comparison.multipliers import Multiplier
from rlroute.reading import read_json

FILE = "ladder.json"
"""In the run store, and in the folder of results."""


def key_of(config: Mapping[str, Any]) -> str:
    """Return what tells the routers of a configuration from others, at whatever scale."""
    return json.dumps([config["router"], config.get("others", [])], sort_keys=True)


@dataclass(frozen=True)
class Known:
    """The compute multipliers against a reference, by the keys of entries."""

    reference: str
    multipliers: Mapping[str, Multiplier]

    def of(self, config: Mapping[str, Any], reference: Mapping[str, Any]) -> Multiplier | None:
        """Return the multiplier of a configuration's routers; None where the ladder does not know it, or knows it
        against another reference.
        """
        return self.multipliers.get(key_of(config)) if key_of(reference) == self.reference else None


def read_ladder(store: Path) -> Known | None:
    """Return what the ladder of a run store says; None where there is none.

    Raises:
        StoreError: it cannot be read.
    """
    path = store / FILE
    if not path.is_file():
        return None
    value = read_json(path)
    try:
        first, *others = value["entries"]
        return Known(str(first["key"]), {str(entry["key"]): Multiplier(**entry["compute"]) for entry in others})
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is no ladder: {type(error).__name__}: {error}") from error
