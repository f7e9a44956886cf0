"""docs/inspect.svg out of experiments/results/inspection/, which ``rlroute inspect`` wrote:
``python -m tests.inspection_figure`` makes it.

Shape suffixes: E experts.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from rlroute.experiments.inspection.measures import lifts
from rlroute.experiments.inspection.text import factor_text
from rlroute.experiments.report.loads import LOAD_COLOURS, LOAD_LIMIT
from tests import ROOT
from tests.drawing import COLOURS, Panel, drawing, element, multiples

RESULTS = ROOT / "experiments" / "results" / "inspection"
FIGURE = ROOT / "docs" / "inspect.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 340, 300, 60, 490, 40, 430
SHARES = multiples(0, 1, 0.25, ".0%")


def found(name: str) -> dict[str, Any]:
    """Return what a command wrote."""
    read: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return read


def words(said: Sequence[tuple[str, str]], left: float, top: float) -> list[str]:
    """Return lines of text, each in its colour."""
    return [element("text", text, x=left, y=top + 18 * place, fill=colour) for place, (text, colour) in enumerate(said)]


def settling(history: dict[str, Any]) -> list[str]:
    """Return the panel of how routes settle: the share of the final choices, and of tokens that are not settled."""
    steps, (site,), (agreed,) = history["steps"], history["sites"].values(), history["agreed"].values()
    axes = Panel(LEFT, TOP, WIDTH, HEIGHT, (0, steps[-1]), (0, 1))
    parts = axes.frame("How routes settle", "training step", multiples(0, steps[-1], 100, ".0f"), SHARES)
    saturation = dict(zip(steps, site["saturation"], strict=True))
    parts.append(axes.line(saturation, COLOURS[0]))
    parts += [axes.point(step, value, COLOURS[0], 3) for step, value in saturation.items()]
    parts.append(axes.line(dict(zip(steps, site["unsettled"], strict=True)), COLOURS[1], stroke_dasharray="6 4"))
    for step, value in zip(history["recorded"], agreed, strict=True):
        cross = {"x": axes.across(step), "y": axes.down(value) + 5, "text_anchor": "middle", "fill": "#000"}
        parts.append(element("text", "×", **cross, font_size=15))
    said = [
        ("tokens not settled (dashed)", COLOURS[1]),
        ("saturation: final choices made already", COLOURS[0]),
        ("× of recorded choices, the final model's", "#000"),
    ]
    return parts + words(said, axes.left + 82, axes.down(0.22))


def colour_of(value: float) -> str:
    """Return the colour of the report's heatmaps for a share over what is even."""
    scale: Sequence[Any] = LOAD_COLOURS["light"]
    at = min(value, LOAD_LIMIT) / LOAD_LIMIT
    (low, one), (high, other) = next(ends for ends in pairwise(scale) if at <= ends[1][0])
    channels = [[int(each[place : place + 2], 16) for place in (1, 3, 5)] for each in (one, other)]
    share = (at - low) / (high - low)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*channels, strict=True))


def together(site: dict[str, Any]) -> list[str]:
    """Return the panel of lifts: how often two experts are chosen by the same token, over what loads alone give."""
    lifts_EE = lifts(torch.tensor(site["together_EE"])).tolist()
    experts = len(lifts_EE)
    axes = Panel(RIGHT, TOP, HEIGHT, HEIGHT, (-0.5, experts - 0.5), (experts - 0.5, -0.5))
    marks = {place: str(place) for place in range(0, experts, 3)}
    parts = axes.frame("Chosen together: lift of each two experts", "expert", marks, {})
    side = HEIGHT / experts
    for row, line in enumerate(lifts_EE):
        for column, lift in enumerate(line):
            if row != column:
                corner = {"x": round(axes.left + column * side, 1), "y": round(axes.top + row * side, 1)}
                parts.append(element("rect", **corner, width=side, height=side, fill=colour_of(lift)))
    for place, said in marks.items():
        parts.append(element("text", said, x=axes.left - 6, y=axes.down(place) + 4, text_anchor="end"))
    return parts + scale(axes.left + HEIGHT + 14, axes.top)


def scale(left: float, top: float) -> list[str]:
    """Return the scale of colours."""
    parts, bars = [], 40
    for bar in range(bars):
        value, y = LOAD_LIMIT * (1 - (bar + 0.5) / bars), round(top + bar * HEIGHT / bars, 1)
        parts.append(element("rect", x=left, y=y, width=12, height=HEIGHT / bars + 0.5, fill=colour_of(value)))
    for value in range(round(LOAD_LIMIT) + 1):
        y = round(top + (1 - value / LOAD_LIMIT) * HEIGHT + 4, 1)
        parts.append(element("text", f"{value}" if value < LOAD_LIMIT else f"≥ {value}", x=left + 18, y=y))
    return parts


def places(left: int, title: str, under: str, drops: Sequence[dict[str, Any]], field: str) -> list[str]:
    """Return a panel of the shares of pairs that are dropped, by place, for each capacity factor; all on one scale."""
    most, count = max(max(of["by_position"] + of["by_row"]) for of in drops), len(drops[0][field])
    axes = Panel(left, BELOW, WIDTH, HEIGHT - 80, (1, count), (0, most * 1.1), inset=16)
    marks = {place: str(place) for place in range(1, count + 1)}
    parts = axes.frame(title, under, marks, multiples(0, most * 1.1, 0.05, ".0%"))
    for of, colour in zip(drops, COLOURS, strict=False):
        values = dict(enumerate(of[field], 1))
        parts.append(axes.line(values, colour))
        parts += [axes.point(place, value, colour) for place, value in values.items()]
    said = [(f"capacity {factor_text(of['factor'])}", colour) for of, colour in zip(drops, COLOURS, strict=False)]
    return parts + words(said, axes.left + 20, axes.top + 24)


def figure() -> str:
    """Return the drawing."""
    inside, drops = found("inside.json"), found("drops.json")
    (site,), capped = inside["sites"], [of for of in drops["drops"] if of["factor"] is not None]
    assert inside["run"] == drops["run"]
    parts = [*settling(inside["history"]), *together(site)]
    parts += places(LEFT, "Pairs dropped by part of the sequence", "eighth of the sequence", capped, "by_position")
    parts += places(RIGHT, "Pairs dropped by place in the batch", "row of the batch", capped, "by_row")
    return drawing(parts, RIGHT + WIDTH + 40, BELOW + HEIGHT - 30)


if __name__ == "__main__":
    FIGURE.write_text(figure())
