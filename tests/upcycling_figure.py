"""docs/upcycling.svg, and the table beside it, out of experiments/results/upcycling/:
``python -m tests.upcycling_figure`` writes the one and prints the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlroute.experiments.comparison.entries import Entry, make_entries
from rlroute.experiments.comparison.table import paired
from rlroute.experiments.statistics import t_interval
from rlroute.experiments.text import of_interval
from rlroute.reading import read_runs
from tests import ROOT
from tests.drawing import BOTTOM, COLOURS, LEFT, Line, by_steps, drawing, panel_left

RESULTS = ROOT / "experiments" / "results" / "upcycling"
FIGURE = ROOT / "docs" / "upcycling.svg"
OF = {"from scratch": COLOURS[0], "upcycled": COLOURS[1], "difference": "#000"}
"""The colours of lines."""
UNDER = "training steps of the mixture"


class Budget(NamedTuple):
    """The entries of one budget."""

    steps: int
    scratch: Entry
    upcycled: Entry


def budgets(folder: Path = RESULTS) -> list[Budget]:
    """Return what was compared, shortest first."""
    found = []
    for file in folder.glob("*.jsonl"):
        entries = make_entries(read_runs(file))
        upcycled, scratch = sorted(entries, key=lambda entry: "start" not in entry.runs[0].config["config"])
        found.append(Budget(scratch.runs[0].summary["steps"], scratch, upcycled))
    return sorted(found, key=lambda budget: budget.steps)


def lines(found: Sequence[Budget]) -> dict[str, Line]:
    """Return the losses of both in bits per byte, and their paired differences, by steps."""
    made: dict[str, Line] = {name: {} for name in OF}
    for budget in found:
        made["from scratch"][budget.steps] = t_interval(list(budget.scratch.bits_by_seed.values()))
        made["upcycled"][budget.steps] = t_interval(list(budget.upcycled.bits_by_seed.values()))
        made["difference"][budget.steps] = t_interval(paired(budget.upcycled, budget.scratch))
    return made


def table(found: Sequence[Budget]) -> str:
    """Return the figures as Markdown."""
    made = lines(found)
    rows = ["| steps | from scratch | upcycled | difference, paired | seeds |", "|---:|---:|---:|---:|---:|"]
    for steps, seeds in ((budget.steps, len(budget.scratch.runs)) for budget in found):
        cells = [of_interval(made[name][steps]) for name in OF]
        rows.append(f"| {steps} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(rows)


def figure(found: Sequence[Budget]) -> str:
    """Return the drawing."""
    made = lines(found)
    losses = {name: made[name] for name in ("from scratch", "upcycled")}
    parts = by_steps(panel_left(0), "validation bits per byte", UNDER, losses, OF, 0.1)
    difference = {"difference": made["difference"]}
    parts += by_steps(panel_left(1), "upcycled minus from scratch", UNDER, difference, OF, 0.1, zero=True)
    return drawing(parts, panel_left(2) - LEFT, BOTTOM)


if __name__ == "__main__":
    FIGURE.write_text(figure(budgets()))
    print(table(budgets()))
