"""The figures of a page about a comparison, in one style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from rlroute.config import DENSE
from rlroute.errors import MissingDependencyError
from rlroute.experiments.comparison.entries import Entry
from rlroute.experiments.comparison.table import Table
from rlroute.experiments.statistics import Interval, t_interval
from rlroute.experiments.text import NOTHING, of_interval
from rlroute.schema import EvalRow

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = ("#332288", "#cc6677", "#117733", "#ddaa33", "#44aa99", "#882255", "#66a9d9", "#999933", "#aa4499")
"""Told apart with any colour vision (after Paul Tol's muted scheme); markers differ too."""
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "cross",
    "x",
    "triangle-down",
    "star",
    "hexagon",
    "pentagon",
    "bowtie",
)
DENSE_COLOUR = "#555555"
LOAD_COLOURS = [[0, "#2b4c8c"], [0.125, "#93b5dc"], [0.25, "#f7f7f7"], [0.5, "#f2a57c"], [1, "#8c1c13"]]
LOAD_LIMIT = 4.0
"""The colour scale of expert loads ends at this multiple of the fair share, in all heatmaps."""
LOAD_COLUMNS = 150
"""Points in time that a heatmap shows at most."""


# Figures


def make_styles(entries: Sequence[Entry]) -> dict[str, dict[str, str]]:
    """Give each entry its colour and marker, the same in all figures."""
    routed = sorted(entry.label for entry in entries if entry.router != DENSE)
    styles = {
        label: {"colour": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[i % len(SYMBOLS)]}
        for i, label in enumerate(routed)
    }
    return styles | {e.label: {"colour": DENSE_COLOUR, "symbol": "line-ew"} for e in entries if e.router == DENSE}


def curves_figure(entries: Sequence[Entry], styles: Mapping[str, Mapping[str, str]]) -> Figure:
    """Draw validation bits per byte against training tokens: means over seeds, with t intervals as bands."""
    figure = new_figure("training tokens", "validation loss (bits per byte)", height=460)
    for entry in entries:
        points = _curve(entry)
        colour, name = styles[entry.label]["colour"], escape(entry.label)
        tokens = list(points)
        band = [(t, i.low, i.high) for t, i in points.items() if i.low is not None and i.high is not None]
        if band:
            x, low, high = (list(part) for part in zip(*band, strict=True))
            outline = {"x": x + x[::-1], "y": low + high[::-1]}
            fill = {"fill": "toself", "fillcolor": _faint(colour), "line": {"width": 0}, "mode": "lines"}
            figure.add_scatter(**outline, **fill, legendgroup=name, showlegend=False, hoverinfo="skip")
        figure.add_scatter(
            x=tokens,
            y=[interval.mean for interval in points.values()],
            name=name,
            legendgroup=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": "dash" if entry.router == DENSE else "solid"},
            marker={"symbol": styles[entry.label]["symbol"], "size": 7, "line": {"color": colour, "width": 1}},
            hovertemplate="%{y:.4f} ± %{customdata}",
            customdata=[NOTHING if i.half_width is None else f"{i.half_width:.4f}" for i in points.values()],
        )
    figure.update_layout(hovermode="x unified", legend={"x": 1.01, "y": 1})
    figure.update_xaxes(tickformat="~s")
    return figure


def balance_figure(table: Table, entries: Mapping[str, Entry], styles: Mapping[str, Mapping[str, str]]) -> Figure:
    """Draw quality against balance: the mean with its interval over all seeds' own points; the dense model is a
    line.
    """
    figure = new_figure("MaxVio (worst layer, validation set)", "validation loss (bits per byte)", height=470)
    vios = []
    for row in table.rows:
        if row.bits_per_byte is None:
            continue
        colour, name = styles[row.label]["colour"], escape(row.label)
        if row.max_vio is None:
            label = {"text": name, "font": {"color": colour}, "bgcolor": "rgba(255,255,255,0.8)"}
            figure.add_hline(
                row.bits_per_byte.mean,
                line={"color": colour, "dash": "dash"},
                annotation=label,
                annotation_position="bottom right",
            )
            continue
        points = [(worst(final), final["bits_per_byte"]) for final in entries[row.label].finals]
        seen = [(vio, bits) for vio, bits in points if vio is not None]
        dots = {"x": [vio for vio, _ in seen], "y": [bits for _, bits in seen]}
        vios += [*dots["x"], row.max_vio]
        faint = {"color": _faint(colour, 0.45), "size": 5}
        figure.add_scatter(**dots, mode="markers", marker=faint, legendgroup=name, showlegend=False, hoverinfo="skip")
        figure.add_scatter(
            x=[row.max_vio],
            y=[row.bits_per_byte.mean],
            error_y={"array": [row.bits_per_byte.half_width or 0.0], "thickness": 1.5, "width": 5},
            name=name,
            legendgroup=name,
            mode="markers",
            marker={"color": colour, "symbol": styles[row.label]["symbol"], "size": 11},
            hovertemplate=f"<b>{name}</b><br>MaxVio %{{x:.3f}}<br>{of_interval(row.bits_per_byte)} bits/byte"
            "<extra></extra>",
        )
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "x": 0})
    if vios and min(vios) > 0:
        figure.update_xaxes(type="log", tickvals=[d * 10.0**p for p in range(-4, 4) for d in (1, 2, 5)])
    return figure


def loads_figure(entries: Sequence[Entry]) -> tuple[Figure, list[tuple[int, int]]]:
    """Draw the load of every expert over time: one heatmap for each entry and routed site; the first is visible.

    Returns:
        The figure, and the (entry, routed site) indices of its heatmaps.
    """
    figure = new_figure("training step", "expert", height=470)
    drawn: list[tuple[int, int]] = []
    for index, entry in enumerate(entries):
        rows = entry.runs[0].loads
        rows = rows[:: -(-len(rows) // LOAD_COLUMNS)]
        for site, load_E in enumerate(rows[0]["load_LE"]):  # sites may have different numbers of experts
            share_ES = [[round(row["load_LE"][site][e] * len(load_E), 4) for row in rows] for e in range(len(load_E))]
            hover = "step %{x}, expert %{y}<br>%{z:.2f} × the fair share<extra></extra>"
            figure.add_heatmap(
                x=[row["step"] for row in rows],
                z=share_ES,
                coloraxis="coloraxis",
                visible=not drawn,
                hovertemplate=hover,
            )
            drawn.append((index, site))
    ticks = {
        "tickvals": [0, 1, 2, 3, 4],
        "ticktext": ["0", "1 (fair)", "2", "3", "≥ 4"],
        "thickness": 14,
        "outlinewidth": 0,
    }
    bar = ticks | {"title": {"text": "load over<br>fair share"}}
    figure.update_layout(coloraxis={"cmin": 0, "cmax": LOAD_LIMIT, "colorscale": LOAD_COLOURS, "colorbar": bar})
    figure.update_yaxes(showgrid=False)
    figure.update_xaxes(showgrid=False)
    return figure, drawn


def worst(final: EvalRow) -> float | None:
    """Return the largest MaxVio of an evaluation; None where no site chose anything."""
    return max((vio for vio in final["max_vio_L"] if vio is not None), default=None)


def _curve(entry: Entry) -> dict[int, Interval]:
    """Return the interval at each number of tokens at which all finished runs of the entry were evaluated."""
    bits: dict[int, list[float]] = {}
    for run in entry.finished:
        for row in run.evals:
            bits.setdefault(row["tokens"], []).append(row["bits_per_byte"])
    return {tokens: t_interval(values) for tokens, values in sorted(bits.items()) if len(values) == len(entry.finished)}


def new_figure(x_title: str, y_title: str, height: int) -> Figure:
    """Return an empty figure in the house's style.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise MissingDependencyError("the report needs Plotly: pip install 'rlroute[report]'") from error
    figure = graph_objects.Figure()
    font = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#1c2330"}
    margin = {"l": 64, "r": 16, "t": 36, "b": 56}
    figure.update_layout(
        template="plotly_white", height=height, font=font, margin=margin, hoverlabel={"namelength": -1}
    )
    figure.update_xaxes(title={"text": x_title}, linecolor="#9aa3b2", gridcolor="#e8ebf0", zeroline=False)
    figure.update_yaxes(title={"text": y_title}, linecolor="#9aa3b2", gridcolor="#e8ebf0", zeroline=False)
    return figure


def _faint(colour: str, alpha: float = 0.1) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def figure_html(figure: Figure, name: str, plotlyjs: bool = False) -> str:
    """Return a figure as a part of a page; one figure of a page brings Plotly's script."""
    config = {
        "displaylogo": False,
        "showSendToCloud": False,
        "responsive": True,
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
    }
    text: str = figure.to_html(config=config, include_plotlyjs=plotlyjs, full_html=False, div_id=name)
    return text
