"""How every figure looks: colours that hold on light and on dark paper, marks told apart without colour, one layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rlroute.extras import missing

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = ("#6a46f5", "#e66f04", "#007862", "#c5305f", "#009cc9", "#8d5093", "#ad8b63", "#d1000b")
"""One palette for both papers: each colour stands out from white and from the dark page by a contrast of 3.1 or more
(WCAG 2.2 asks 3 of graphics), and any two of them, the grey included, are 15 or more apart in CIELAB for readers with
full sight, deuteranopia, protanopia and tritanopia.
"""
GREY = "#7a8494"
"""Of the dense yardstick."""
SHAPES = {
    "circle": '<circle cx="12" cy="6" r="4"/>',
    "square": '<rect x="8" y="2" width="8" height="8"/>',
    "diamond": '<path d="M12 1l5 5-5 5-5-5z"/>',
    "triangle-up": '<path d="M12 1.5l5 8.5H7z"/>',
    "triangle-down": '<path d="M12 10.5l5-8.5H7z"/>',
    "cross": '<path d="M10.5 1h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z"/>',
    "x": '<path d="M8 3.5L9.5 2l2.5 2.5L14.5 2 16 3.5 13.5 6 16 8.5 14.5 10 12 7.5 9.5 10 8 8.5 10.5 6z"/>',
    "star": '<path d="M12 .5l1.6 3.9 4.2.3-3.2 2.7 1 4.1L12 9.3l-3.6 2.2 1-4.1-3.2-2.7 4.2-.3z"/>',
}
"""Plotly's names of the marks, each with its drawing in a box of 24 by 12."""
DASHES = {"solid": "", "dash": "5 3", "dot": "1.5 2.5", "dashdot": "5 2 1.5 2"}
"""Plotly's names of the lines, each with its pattern in pixels."""


@dataclass(frozen=True)
class Style:
    """How an entry is drawn: no two of the first 32 agree in shape, filling and line, whatever their colours."""

    colour: str
    shape: str
    filled: bool
    dash: str

    @property
    def symbol(self) -> str:
        """Plotly's name of the mark."""
        return self.shape if self.filled else f"{self.shape}-open"

    @property
    def glyph(self) -> str:
        """The line with its mark, as SVG to stand before the entry's name."""
        dash = f' stroke-dasharray="{DASHES[self.dash]}"' if DASHES[self.dash] else ""
        fill = self.colour if self.filled else "none"
        return (
            '<svg class="glyph" width="24" height="12" viewBox="0 0 24 12" aria-hidden="true">'
            f'<path d="M0 6h24" stroke="{self.colour}" stroke-width="1.6"{dash}/>'
            f'<g fill="{fill}" stroke="{self.colour}" stroke-width="1.6">{SHAPES[self.shape]}</g></svg>'
        )


def style_of(index: int) -> Style:
    """Return the style of the ``index``-th entry: eight colours with shapes of their own, then the same eight hollow
    and dashed in other colours, and so on.
    """
    turn, shape = divmod(index, len(COLOURS))
    dash = list(DASHES)[turn % len(DASHES)]
    colour = COLOURS[(shape + 3 * turn) % len(COLOURS)]
    return Style(colour, list(SHAPES)[shape], turn % 2 == 0, dash)


def styles_of(labels: Sequence[str], yardsticks: Sequence[str] = ()) -> dict[str, Style]:
    """Give each label a style, in their order; yardsticks are grey."""
    styles = {label: style_of(index) for index, label in enumerate(labels)}
    return styles | {label: Style(GREY, "circle", False, "dot") for label in yardsticks}


def faint(colour: str, alpha: float) -> str:
    """Return a colour that lets ``1 - alpha`` of what lies beneath through."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def in_title(reference: str) -> str:
    """Return what the title of an axis calls the reference: its label, where there is room for it."""
    return escape(reference) if len(reference) <= 40 else "the reference"


def drawn(values: Sequence[float]) -> list[float | None]:
    """Return numbers as a figure has them: five decimals, and none where they are not defined."""
    return [round(value, 5) if math.isfinite(value) else None for value in values]


def add_panels(
    figure: Figure, titles: Sequence[str], across: int, x_title: str, **look: Any
) -> tuple[Figure, list[dict[str, int]]]:
    """Part a figure into panels that have the axis across in common: the lowest of each column has its title and the
    marks at it, the others have neither.

    Args:
        figure: an empty one.
        titles: of the panels, from left to right and from top to bottom.
        across: so many stand side by side.
        x_title: of the axis, with its unit.
        look: what else Plotly's ``make_subplots`` takes.

    Returns:
        The figure, and where each panel is in it.
    """
    from plotly.subplots import make_subplots

    down = max(-(-len(titles) // across), 1)
    cells: list[list[dict[str, Any] | None]] = [
        [{} if row * across + col < len(titles) else None for col in range(across)] for row in range(down)
    ]
    look |= {"specs": cells, "subplot_titles": titles, "shared_xaxes": "all"}
    figure = make_subplots(down, across, figure=figure, **look)
    places = [{"row": place // across + 1, "col": place % across + 1} for place in range(len(titles))]
    for place, where in enumerate(places):
        lowest = place >= len(titles) - across
        figure.update_xaxes(title={"text": x_title if lowest else ""}, showticklabels=lowest, **where)
    return figure, places


def new_figure(x_title: str, y_title: str, height: int) -> Figure:
    """Return an empty figure in the house's style; the page's script gives it the colours of the reader's scheme.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise missing("the report", "plotly") from error
    figure = graph_objects.Figure()
    font = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13}
    clear = "rgba(0,0,0,0)"
    figure.update_layout(
        template="none",
        height=height,
        font=font,
        margin={"l": 64, "r": 16, "t": 24, "b": 52},
        hoverlabel={"namelength": -1},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
    )
    figure.update_xaxes(title={"text": x_title}, zeroline=False, showline=True)
    figure.update_yaxes(title={"text": y_title}, zeroline=False, showline=True)
    return figure
