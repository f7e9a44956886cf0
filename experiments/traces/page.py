"""Traces as one self-contained HTML page: heatmaps of the loads, balance by layer, flips.

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from rlroute.experiments.report.html import cells, render_page
from rlroute.experiments.report.loads import over_fair, share_figure
from rlroute.experiments.report.style import drawn, faint, new_figure, style_of
from rlroute.experiments.traces import text
from rlroute.experiments.traces.flips import Flips
from rlroute.experiments.traces.measure import PERCENTS, LayerLoads, Loads
from rlroute.foreign import printable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def render(measured: Sequence[Loads], flips: Flips | None, command: str) -> str:
    """Return the page.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    figures = {f"loads{index}": loads_figure(loads) for index, loads in enumerate(measured)}
    figures["balance"] = balance_figure(measured)
    if flips:
        figures["flips"] = flips_figure(flips)
    return render_page(
        "trace.html",
        "",
        figures,
        legend=text.LEGEND,
        traces=[(text.headline(of), *map(cells, (text.spread_grid(of), text.layers_grid(of)))) for of in measured],
        flips=None if flips is None else (text.flips_text(flips), cells(text.flips_grid(flips))),
        flips_legend=text.FLIPS_LEGEND,
        command=printable(command),
    )


def loads_figure(loads: Loads) -> Figure:
    """Draw the load of each layer's experts over the fair share; layers of fewer experts end earlier."""
    names = _names(loads.shown)
    rows, height = over_fair([of.load_E for of in loads.shown]), min(max(110 + 24 * len(names), 260), 1400)
    return share_figure(rows, names, height, "layer %{y}, expert %{x}<br>%{z:.2f} × the fair share", "layer")


def balance_figure(measured: Sequence[Loads]) -> Figure:
    """Draw MaxVio of each layer: of all steps together, and from the median to the 95th percentile of single steps."""
    figure = new_figure("layer", "MaxVio", height=420)
    for index, loads in enumerate(measured):
        style, names = style_of(index), _names(loads.shown)
        low, high = (drawn([of.step_max_vio[at] for of in loads.shown]) for at in (0, PERCENTS.index(95)))
        spans = [None if a is None or b is None else b - a for a, b in zip(low, high, strict=True)]
        figure.add_bar(
            x=names,
            y=spans,
            base=low,
            name=f"{escape(printable(loads.name))}, p50 to p95 of steps",
            marker={"color": faint(style.colour, 0.3)},
            offsetgroup=str(index),
            hovertemplate="from %{base:.3f} to %{y:.3f}",
        )
        figure.add_scatter(
            x=names,
            y=drawn([of.max_vio for of in loads.shown]),
            name=f"{escape(printable(loads.name))}, all steps",
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 9},
            hovertemplate="%{y:.3f}",
        )
    figure.update_layout(hovermode="x unified", barmode="group", legend={"orientation": "h", "y": 1.12})
    figure.update_xaxes(type="category")
    return figure


def flips_figure(flips: Flips) -> Figure:
    """Draw the share of tokens that flip, and of choices that are lost, in each layer."""
    figure = new_figure("layer", "share", height=380)
    found = {"tokens that flip": (flips.changed, flips.compared), "lost choices": (flips.lost, flips.chosen)}
    for index, (name, (part_L, whole_L)) in enumerate(found.items()):
        shares = [part / whole if whole else None for part, whole in zip(part_L, whole_L, strict=True)]
        figure.add_bar(
            x=[escape(printable(layer)) for layer in flips.layers],
            y=shares,
            name=name,
            marker={"color": style_of(index).colour},
            hovertemplate="%{y:.2%}",
        )
    figure.update_layout(hovermode="x unified", barmode="group", legend={"orientation": "h", "y": 1.12})
    figure.update_xaxes(type="category")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def _names(layers: Sequence[LayerLoads]) -> list[str]:
    return [escape(printable(of.layer)) for of in layers]
