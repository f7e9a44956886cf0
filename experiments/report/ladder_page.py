"""The page about a ladder: losses against compute with the laws through them, multipliers with their intervals."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from rlroute.config import DENSE
from rlroute.experiments.comparison.ladder_file import Ladder
from rlroute.experiments.comparison.ladder_text import notes, table
from rlroute.experiments.report.board import FIRST
from rlroute.experiments.report.html import render_page
from rlroute.experiments.report.style import GREY, Style, in_title, new_figure, styles_of
from rlroute.experiments.text import of_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def render(ladder: Ladder) -> str:
    """Return the page.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    columns, rows = table(ladder)
    return render_page(
        "ladder.html",
        "",
        {"losses": losses_figure(ladder), "multipliers": multipliers_figure(ladder)},
        reference=ladder.rungs.labels[0],
        columns=columns,
        rows=rows,
        notes=list(notes(ladder)),
    )


def _styles(ladder: Ladder) -> dict[str, Style]:
    labels = ladder.rungs.labels
    return styles_of([name for name in labels if name != DENSE], [name for name in labels if name == DENSE])


def shown_first(ladder: Ladder) -> list[str]:
    """Return the labels of those that are drawn at first, the others by a click on their names: the reference, the
    yardstick, the best others at the largest budget.
    """
    labels = ladder.rungs.labels
    ranked = sorted(ladder.entries, key=lambda entry: (entry.label not in (labels[0], DENSE), entry.bits[-1].mean))
    return [entry.label for entry in ranked][:FIRST]


def losses_figure(ladder: Ladder) -> Figure:
    """Draw the best mean loss at each budget, with t intervals, and each entry's law between the first and the last."""
    figure, styles = (
        new_figure("training compute (FLOPs)", "validation loss (bits per byte)", height=460),
        _styles(ladder),
    )
    compute_J = ladder.rungs.compute_J
    between = np.geomspace(compute_J.min(), compute_J.max(), 60)
    first = shown_first(ladder)
    for entry in ladder.entries:
        style, name = styles[entry.label], escape(entry.label)
        visible = True if entry.label in first else "legendonly"
        if entry.law is not None:
            law = entry.law
            loss = law["floor"] + law["scale"] * (between / law["unit"]) ** -law["exponent"]
            line = {"color": style.colour, "dash": style.dash, "width": 2}
            figure.add_scatter(
                x=between.tolist(), y=loss.tolist(), mode="lines", line=line, legendgroup=name, showlegend=False,
                name=name, visible=visible, hoverinfo="skip",
            )  # fmt: skip
        half = [bits.half_width or 0.0 for bits in entry.bits]
        figure.add_scatter(
            x=compute_J.tolist(),
            y=[bits.mean for bits in entry.bits],
            error_y={"array": half, "thickness": 1, "width": 3},
            mode="markers",
            marker={"symbol": style.symbol, "size": 9, "color": style.colour},
            name=name,
            visible=visible,
            legendgroup=name,
            customdata=[f"{of_interval(b)} (width {w})" for b, w in zip(entry.bits, entry.widths, strict=True)],
            hovertemplate="%{customdata}",
        )
    figure.update_xaxes(type="log", tickvals=compute_J.tolist(), tickformat=".3s")
    figure.update_layout(legend={"orientation": "h", "y": -0.2})
    return figure


def multipliers_figure(ladder: Ladder) -> Figure:
    """Draw the compute and time multipliers of all entries but the reference, with their intervals."""
    styles, first = _styles(ladder), shown_first(ladder)
    title = f"multiplier (compute or time of {in_title(ladder.rungs.labels[0])})"
    figure = new_figure(title, "entry, and of what", height=180 + 50 * len(first))
    for entry in ladder.entries:
        style, name = styles[entry.label], escape(entry.label)
        both = [(kind, found) for kind, found in (("compute", entry.compute), ("time", entry.time)) if found]
        known = [(kind, m, m.value) for kind, m in both if m.value is not None]
        if not known:
            continue
        figure.add_scatter(
            x=[value for _, _, value in known],
            y=[f"{name}, {kind}" for kind, _, _ in known],
            error_x={
                "array": [(m.high or value) - value for _, m, value in known],
                "arrayminus": [value - (m.low or value) for _, m, value in known],
                "thickness": 1,
            },
            mode="markers",
            marker={"symbol": style.symbol, "size": 10, "color": style.colour},
            name=name,
            visible=True if entry.label in first else "legendonly",
            customdata=[str(m) for _, m, _ in known],
            hovertemplate="%{customdata}",
        )
    figure.add_vline(x=1, line={"dash": "dot", "width": 1, "color": GREY})
    figure.update_xaxes(type="log")
    figure.update_yaxes(automargin=True, autorange="reversed", title={"standoff": 10})
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.3})
    return figure
