"""What a run's record held when it ended: one SHA-256 for each of its parts, in ``seal.json``.

A seal tells that a part was edited afterwards. It does not tell who is right: whoever edits a part can seal it anew.
What a record says is proven by recomputing it, which :mod:`rlroute.experiments.verify` does.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

PARTS = ("config", "environment", "evals", "train", "loads", "summary")
"""Parts of a run's record; its rows are those of the whole run."""


def of_part(value: Any) -> str:
    """Return the SHA-256 of a part's canonical JSON, which is the same however its file is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(parts: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each part."""
    return {name: of_part(parts[name]) for name in PARTS}


def broken(parts: Mapping[str, Any], sealed: Mapping[str, Any]) -> list[str]:
    """Return the parts that are not what was sealed."""
    return [name for name in PARTS if name in parts and of_part(parts[name]) != sealed[name]]
