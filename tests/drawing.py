"""Drawings of the documentation: SVG as text, and panels with axes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlroute.experiments.statistics import Interval

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8c510a", "#7f3c8d", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
GREY, PALE = "#888", "#ddd"
Marks = Mapping[int, str] | Mapping[float, str]
"""What stands at an axis, by values."""
Values = Mapping[int, float] | Mapping[float, float]
"""Values by where they stand across."""
Line = dict[int, Interval]
"""Means with their intervals, by training steps."""
WIDTH, HEIGHT, LEFT, TOP = 340, 220, 60, 40
"""Of panels side by side: their size, what is left free of each for marks, and above them."""
BOTTOM = TOP + HEIGHT + 50


def element(name: str, inside: str = "", /, **attributes: object) -> str:
    """Return an SVG element; the underscores of attributes are its hyphens."""
    said = " ".join(f'{key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f"<{name} {said}>{inside}</{name}>"


def drawing(parts: Sequence[str], width: float, height: float) -> str:
    """Return a drawing on white."""
    inside = "\n".join([element("rect", width="100%", height="100%", fill="#fff"), *parts])
    size = {"width": round(width), "height": round(height)}
    font = {"font_family": "sans-serif", "font_size": 13}
    return element("svg", inside, xmlns="http://www.w3.org/2000/svg", **size, **font) + "\n"


@dataclass(frozen=True)
class Panel:
    """A place in a drawing, with axes.

    Attributes:
        left, top, width, height: in pixels.
        xs, ys: the first and the last value of each axis.
        logarithmic: whether the one across is.
        inset: so many pixels are left free at both ends of the one across.
    """

    left: float
    top: float
    width: float
    height: float
    xs: tuple[float, float]
    ys: tuple[float, float]
    logarithmic: bool = False
    inset: float = 0

    def across(self, value: float) -> float:
        """Return how far right a value stands."""
        low, high, here = (math.log(at) if self.logarithmic else at for at in (*self.xs, value))
        return round(self.left + self.inset + (here - low) / (high - low) * (self.width - 2 * self.inset), 1)

    def down(self, value: float) -> float:
        """Return how far down a value stands."""
        low, high = self.ys
        return round(self.top + (high - value) / (high - low) * self.height, 1)

    def frame(self, title: str, under: str, ticks: Marks, grid: Marks) -> list[str]:
        """Return the frame: the title, what is said under it, the marks of both axes, and lines at those upwards."""
        right, below = self.left + self.width, self.top + self.height
        parts = [element("text", title, x=self.left, y=self.top - 12, font_weight="bold")]
        for value, said in grid.items():
            y, colour = self.down(value), PALE if value else GREY
            parts.append(element("line", x1=self.left, x2=right, y1=y, y2=y, stroke=colour))
            parts.append(element("text", said, x=self.left - 6, y=y + 4, text_anchor="end"))
        box = {"x": self.left, "y": self.top, "width": self.width, "height": self.height}
        parts.append(element("rect", **box, fill="none", stroke=GREY))
        for value, said in ticks.items():
            parts.append(element("text", said, x=self.across(value), y=below + 18, text_anchor="middle"))
        parts.append(element("text", under, x=self.left + self.width / 2, y=below + 36, text_anchor="middle"))
        return parts

    def line(self, values: Values, colour: str, **more: object) -> str:
        """Return a line through values."""
        points = " ".join(f"{self.across(at)},{self.down(value)}" for at, value in values.items())
        return element("polyline", points=points, fill="none", stroke=colour, stroke_width=2, **more)

    def point(self, at: float, value: float, colour: str, radius: float = 4) -> str:
        """Return a dot."""
        return element("circle", cx=self.across(at), cy=self.down(value), r=radius, fill=colour)


def multiples(low: float, high: float, by: float, said: str) -> dict[float, str]:
    """Return the multiples of a step within bounds, each as a format says it."""
    places = range(math.ceil(low / by), math.floor(high / by) + 1)
    return {place * by: format(place * by, said) for place in places}


def panel_left(index: int) -> int:
    """Return where the panel of an index begins, of some side by side."""
    return LEFT + index * (WIDTH + LEFT + 20)


def reach(interval: Interval) -> float:
    """Return half of an interval's length."""
    assert interval.half_width is not None
    return interval.half_width


def by_steps(
    left: int,
    title: str,
    under: str,
    shown: Mapping[str, Line],
    colours: Mapping[str, str],
    grid: float,
    *,
    zero: bool = False,
) -> list[str]:
    """Return the elements of one panel: lines over steps on a logarithmic axis, with their intervals.

    Args:
        left: where it begins.
        title, under: what is said above and below.
        shown: the lines.
        colours: of the lines.
        grid: lines across stand at its multiples.
        zero: whether 0 is shown however far the values are.
    """
    ends = [i.mean + sign * reach(i) for line in shown.values() for i in line.values() for sign in (-1, 1)]
    ends += [0.0] if zero else []
    room = 0.05 * (max(ends) - min(ends))
    low, high, steps = min(ends) - room, max(ends) + room, sorted(set().union(*shown.values()))
    axes = Panel(left, TOP, WIDTH, HEIGHT, (steps[0], steps[-1]), (low, high), logarithmic=True, inset=20)
    marks = {step: f"{step:,}" for step in steps}
    digits = max(0, -math.floor(math.log10(grid)))
    parts = axes.frame(title, under, marks, multiples(low, high, grid, f".{digits}f"))
    for index, (name, line) in enumerate(shown.items()):
        colour = colours[name]
        parts.append(axes.line({step: interval.mean for step, interval in line.items()}, colour))
        for step, interval in line.items():
            across, (top, bottom) = axes.across(step), (axes.down(interval.mean + s * reach(interval)) for s in (1, -1))
            parts.append(element("line", x1=across, x2=across, y1=top, y2=bottom, stroke=colour))
            parts.append(axes.point(step, interval.mean, colour))
        place = {"x": left + WIDTH - 10, "y": TOP + 20 + 18 * index, "text_anchor": "end"}
        parts += [element("text", name, **place, fill=colour)] if len(shown) > 1 else []
    return parts
