"""Drawings of the documentation: SVG as text, and panels with axes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8c510a", "#7f3c8d", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
GREY, PALE = "#888", "#ddd"
Marks = Mapping[int, str] | Mapping[float, str]
"""What stands at an axis, by values."""
Values = Mapping[int, float] | Mapping[float, float]
"""Values by where they stand across."""


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
