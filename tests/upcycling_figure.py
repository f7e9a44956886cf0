"""docs/upcycling.svg, and the table beside it, out of experiments/results/upcycling/:
``python -m tests.upcycling_figure`` writes the one and prints the other.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlroute.experiments.comparison.entries import Entry, make_entries
from rlroute.experiments.comparison.table import paired
from rlroute.experiments.statistics import Interval, t_interval
from rlroute.experiments.text import of_interval
from rlroute.reading import read_runs
from tests import ROOT

RESULTS = ROOT / "experiments" / "results" / "upcycling"
FIGURE = ROOT / "docs" / "upcycling.svg"
WIDTH, HEIGHT, LEFT, TOP = 340, 220, 60, 40
COLOURS = {"from scratch": "#0072b2", "upcycled": "#d55e00", "difference": "#000000"}
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
    made: dict[str, Line] = {name: {} for name in COLOURS}
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
        cells = [of_interval(made[name][steps]) for name in COLOURS]
        rows.append(f"| {steps} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(rows)


def reach(interval: Interval) -> float:
    """Return half of an interval's length."""
    assert interval.half_width is not None
    return interval.half_width


def element(name: str, inside: str = "", **attributes: object) -> str:
    """Return an SVG element; the underscores of attributes are its hyphens."""
    said = " ".join(f'{key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f"<{name} {said}>{inside}</{name}>"


def panel(x: int, title: str, shown: dict[str, Line]) -> list[str]:
    """Return the elements of one panel: lines over steps on a logarithmic axis, with their intervals."""
    ends = [i.mean + sign * reach(i) for line in shown.values() for i in line.values() for sign in (-1, 1)]
    ends += [0.0] if "difference" in shown else []
    room = 0.05 * (max(ends) - min(ends))
    low, high, steps = min(ends) - room, max(ends) + room, sorted(set().union(*shown.values()))

    def across(step: int) -> float:
        return round(x + 20 + math.log(step / steps[0]) / math.log(steps[-1] / steps[0]) * (WIDTH - 40), 1)

    def down(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * HEIGHT, 1)

    below = TOP + HEIGHT
    parts = [element("rect", x=x, y=TOP, width=WIDTH, height=HEIGHT, fill="none", stroke="#888")]
    parts += [element("text", title, x=x, y=TOP - 12, font_weight="bold")]
    parts += [element("text", str(step), x=across(step), y=below + 18, text_anchor="middle") for step in steps]
    parts += [element("text", "training steps of the mixture", x=x + WIDTH / 2, y=below + 36, text_anchor="middle")]
    for tick in range(math.ceil(low * 10), math.floor(high * 10) + 1):
        y, colour = down(tick / 10), "#ddd" if tick else "#888"
        parts += [element("text", f"{tick / 10:.1f}", x=x - 6, y=y + 4, text_anchor="end")]
        parts += [element("line", x1=x, x2=x + WIDTH, y1=y, y2=y, stroke=colour)]
    for index, (name, line) in enumerate(shown.items()):
        colour = COLOURS[name]
        points = " ".join(f"{across(step)},{down(interval.mean)}" for step, interval in line.items())
        parts += [element("polyline", points=points, fill="none", stroke=colour, stroke_width=2)]
        for step, interval in line.items():
            top, bottom = (down(interval.mean + sign * reach(interval)) for sign in (1, -1))
            parts += [element("line", x1=across(step), x2=across(step), y1=top, y2=bottom, stroke=colour)]
            parts += [element("circle", cx=across(step), cy=down(interval.mean), r=4, fill=colour)]
        place = {"x": x + WIDTH - 10, "y": TOP + 20 + 18 * index, "text_anchor": "end"}
        parts += [element("text", name, **place, fill=colour)] if len(shown) > 1 else []
    return parts


def figure(found: Sequence[Budget]) -> str:
    """Return the drawing."""
    made = lines(found)
    losses = {name: made[name] for name in ("from scratch", "upcycled")}
    right = 2 * LEFT + WIDTH + 20
    parts = panel(LEFT, "validation bits per byte", losses)
    parts += panel(right, "upcycled minus from scratch", {"difference": made["difference"]})
    size = {"width": right + WIDTH + 20, "height": TOP + HEIGHT + 50}
    inside = "\n".join([element("rect", width="100%", height="100%", fill="#fff"), *parts])
    return (
        element("svg", inside, xmlns="http://www.w3.org/2000/svg", **size, font_family="sans-serif", font_size=13)
        + "\n"
    )


if __name__ == "__main__":
    FIGURE.write_text(figure(budgets()))
    print(table(budgets()))
