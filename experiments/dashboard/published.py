"""What other commands published, as views read it: the user's own, else rlroute's records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlroute.experiments import RESULTS
from rlroute.reading import read_json


def _claims(path: Path | None) -> Mapping[str, Any]:
    """Return the claims board, as the page of claims shows it; of no claim that was run, if there is no file."""
    from rlroute.experiments.claims.outcomes import read_outcomes
    from rlroute.experiments.claims.page import summary

    found = read_outcomes(path) if path else {}
    head, lines = summary(found)
    first = {name: outcome["parts"][0] for name, outcome in found.items() if outcome["parts"]}
    numbers = [{"#": int(line[0]), **first.get(line[0], {})} for line in lines]
    keys = [[of.get(title) if title in ("#", "effect", "n") else None for title in head] for of in numbers]
    commits = sorted({outcome["commit"] for outcome in found.values()})
    return {"head": head, "lines": lines, "keys": keys, "commits": commits}


def _gradients(path: Path | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    record = read_json(path)
    environment = record.get("environment")
    return {**record, "commits": [environment.get("commit")] if isinstance(environment, dict) else []}


PUBLISHED: dict[str, tuple[str, Callable[[Path | None], Mapping[str, Any] | None]]] = {
    "gradients": ("gradients/gradients.json", _gradients),
    "claims": ("claims.jsonl", _claims),
}
"""Where each lies in a folder of results, and what is made of it, be it there or not."""


def read_results(folder: Path | None) -> dict[str, Mapping[str, Any]]:
    """Return what is there, by name; of each, ``origin`` says in a line whose it is, of which file and commit.

    Args:
        folder: of results; None for rlroute's own alone.

    Raises:
        StoreError: a file cannot be read.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name, (path, read) in PUBLISHED.items():
        places = [place for place in (folder, RESULTS) if place is not None and (place / path).exists()]
        if (what := read(places[0] / path if places else None)) is not None:
            found[name] = {**what, "origin": _origin(places[0], path, folder, what["commits"]) if places else ""}
    return found


def _origin(place: Path, path: str, folder: Path | None, commits: Sequence[object]) -> str:
    made = f", made at commit {', '.join(str(commit)[:12] for commit in commits)}" if any(commits) else ""
    if place != RESULTS:
        return f"From {place / path}{made}."
    lacking = f": there is no {folder / path}" if folder else ""
    return f"Not yours{lacking}. Published with rlroute: experiments/results/{path}{made}."
