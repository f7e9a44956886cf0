"""What records say of the regret of routes (:mod:`rlroute.training.regret`): pure functions of runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rlroute.config import DENSE
from rlroute.experiments.comparison.entries import Entry
from rlroute.schema import Regret, RunRecord


def regret_of(run: RunRecord) -> Regret | str | None:
    """Return a run's regret, or why it has none; None in records that do not say."""
    measured = run.summary.get("measured")
    return None if measured is None else measured.get("regret")


def regrets(runs: Iterable[RunRecord]) -> list[Regret]:
    """Return the regrets of the runs that have one."""
    return [found for run in runs if isinstance(found := regret_of(run), dict)]


def bits_of_regret(runs: Iterable[RunRecord]) -> list[float]:
    """Return the regrets of the runs that have one, in bits per byte: at as many bytes a token as all validation tokens
    have.
    """
    found = []
    for run in runs:
        final, regret = run.summary["final"], regret_of(run)
        if final is not None and isinstance(regret, dict):
            bits = final["bits_per_byte"] / final["loss"] if final["loss"] else 1 / math.log(2)
            found.append(regret["nats"] * bits)
    return found


def note(entries: Sequence[Entry]) -> str:
    """Say how regret was measured, for whom it is at least what was found, and who has none."""
    found = [regret for entry in entries for regret in regrets(entry.runs)]
    if not found:
        return ""
    tokens, layer = found[0]["tokens"], found[0]["layer"]
    said = [
        f"of {tokens} validation tokens in layer {layer}, against the best of all sets of as many experts, with the "
        "gates that the router gives them"
    ]
    for entry in entries:
        exact = min((regret["exact"] for regret in regrets(entry.runs)), default=1.0)
        if exact < 1:
            said.append(f"{entry.label} at least, the best found by exchanges for {1 - exact:.0%} of tokens")
        why = sorted({reason for run in entry.runs if isinstance(reason := regret_of(run), str)})
        if why and entry.router != DENSE:
            said.append(f"{entry.label} none: {', '.join(why)}")
    return "; ".join(said)
