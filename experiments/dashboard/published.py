"""What other commands published, as views read it: the user's own, else rlroute's records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlroute.experiments import RESULTS
from rlroute.reading import read_json

PUBLISHED = {"gradients": "gradients/gradients.json"}
"""Where each lies in a folder of results."""


def read_results(folder: Path | None) -> dict[str, Mapping[str, Any]]:
    """Return what is there, by name.

    Args:
        folder: of results; None for rlroute's own alone.

    Raises:
        StoreError: a file cannot be read.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name, path in PUBLISHED.items():
        places = [place / path for place in (folder, RESULTS) if place is not None and (place / path).exists()]
        if places:
            found[name] = read_json(places[0])
    return found
