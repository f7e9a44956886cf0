"""docs/upcycling.svg, and the table beside it, out of experiments/results/upcycling/:
``python -m tests.upcycling_figure`` writes the one and prints the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlroute.experiments.comparison.entries import Entry, make_entries
from rlroute.experiments.comparison.table import paired
from rlroute.experiments.statistics import Interval, t_interval
from rlroute.experiments.text import of_interval
from rlroute.reading import read_runs
from tests import ROOT
from tests.drawing import COLOURS, Panel, drawing, element, multiples

RESULTS = ROOT / "experiments" / "results" / "upcycling"
FIGURE = ROOT / "docs" / "upcycling.svg"
WIDTH, HEIGHT, LEFT, TOP = 340, 220, 60, 40
OF = {"from scratch": COLOURS[0], "upcycled": COLOURS[1], "difference": "#000"}
"""The colours of lines."""
Line = dict[int, Interval]
"""Means with their intervals, by steps."""


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


def reach(interval: Interval) -> float:
    """Return half of an interval's length."""
    assert interval.half_width is not None
    return interval.half_width


def panel(left: int, title: str, shown: dict[str, Line]) -> list[str]:
    """Return the elements of one panel: lines over steps on a logarithmic axis, with their intervals."""
    ends = [i.mean + sign * reach(i) for line in shown.values() for i in line.values() for sign in (-1, 1)]
    ends += [0.0] if "difference" in shown else []
    room = 0.05 * (max(ends) - min(ends))
    low, high, steps = min(ends) - room, max(ends) + room, sorted(set().union(*shown.values()))
    axes = Panel(left, TOP, WIDTH, HEIGHT, (steps[0], steps[-1]), (low, high), logarithmic=True, inset=20)
    marks = {step: str(step) for step in steps}
    parts = axes.frame(title, "training steps of the mixture", marks, multiples(low, high, 0.1, ".1f"))
    for index, (name, line) in enumerate(shown.items()):
        colour = OF[name]
        parts.append(axes.line({step: interval.mean for step, interval in line.items()}, colour))
        for step, interval in line.items():
            across, (top, bottom) = axes.across(step), (axes.down(interval.mean + s * reach(interval)) for s in (1, -1))
            parts.append(element("line", x1=across, x2=across, y1=top, y2=bottom, stroke=colour))
            parts.append(axes.point(step, interval.mean, colour))
        place = {"x": left + WIDTH - 10, "y": TOP + 20 + 18 * index, "text_anchor": "end"}
        parts += [element("text", name, **place, fill=colour)] if len(shown) > 1 else []
    return parts


def figure(found: Sequence[Budget]) -> str:
    """Return the drawing."""
    made = lines(found)
    losses = {name: made[name] for name in ("from scratch", "upcycled")}
    right = 2 * LEFT + WIDTH + 20
    parts = panel(LEFT, "validation bits per byte", losses)
    parts += panel(right, "upcycled minus from scratch", {"difference": made["difference"]})
    return drawing(parts, right + WIDTH + 20, TOP + HEIGHT + 50)


if __name__ == "__main__":
    FIGURE.write_text(figure(budgets()))
    print(table(budgets()))
