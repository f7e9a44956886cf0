"""Quality against balance and against throughput: who is not behind another in all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rlroute.config import DENSE
from rlroute.experiments.comparison.entries import Entry
from rlroute.experiments.comparison.table import Table, TableRow
from rlroute.experiments.report.style import GREY, Style, faint, new_figure
from rlroute.experiments.text import of_interval, si
from rlroute.reading import worst_vio

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def pareto(points: Mapping[str, Sequence[float]]) -> set[str]:
    """Return who is on the front: nobody else is at least as low in every number, and lower in one."""
    return {
        name
        for name, mine in points.items()
        if not any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and list(other) != list(mine)
            for other in points.values()
        )
    }


def tradeoff_figure(
    table: Table, entries: Mapping[str, Entry], styles: Mapping[str, Style], drawn: Collection[str] | None = None
) -> Figure:
    """Draw the loss against MaxVio and against tokens per second: means with their intervals over all seeds' own
    points. The dense model, which has no MaxVio, is a line there.

    A line of its own runs along the front of each two; a ring is round those on the front of all three. Only causal
    routers are on them: the others' losses cannot be held against theirs.

    Args:
        table: the comparison.
        entries, styles: by label.
        drawn: the labels of those that are drawn; all if None. The fronts are of all in any case.
    """
    from plotly.subplots import make_subplots

    titles = ("MaxVio (worst layer, validation set)", "training tokens per second")
    figure = make_subplots(1, 2, shared_yaxes=True, figure=new_figure("", "", height=440), horizontal_spacing=0.05)
    for row in table.rows:
        if row.bits_per_byte is not None and (drawn is None or row.label in drawn):
            _draw_entry(figure, row, entries[row.label], styles[row.label])
    _draw_fronts(figure, table.rows)
    for col, title in enumerate(titles, start=1):
        figure.update_xaxes(title={"text": title}, col=col)
    figure.update_yaxes(title={"text": "validation loss (bits per byte)"}, col=1)
    vios = [row.max_vio for row in table.rows if row.max_vio is not None]
    if vios and min(vios) > 0:
        figure.update_xaxes(type="log", tickvals=[d * 10.0**p for p in range(-4, 4) for d in (1, 2, 5)], col=1)
    return figure


def _draw_entry(figure: Figure, row: TableRow, entry: Entry, style: Style) -> None:
    if row.max_vio is not None:
        seen = [(worst_vio(final), final["bits_per_byte"]) for final in entry.finals]
        _draw_points(figure, row, style, 1, row.max_vio, [(vio, bits) for vio, bits in seen if vio is not None])
    elif row.router == DENSE and row.bits_per_byte is not None:
        label = {"text": escape(row.label), "font": {"color": style.colour}}
        line = {"color": style.colour, "dash": style.dash}
        figure.add_hline(
            row.bits_per_byte.mean, line=line, annotation=label, annotation_position="bottom right", row=1, col=1
        )
    if row.tokens_per_second is not None:
        speeds = [
            (run.summary["tokens_per_second"], final["bits_per_byte"])
            for run in entry.finished
            if (final := run.summary["final"])
        ]
        dots = [(speed, bits) for speed, bits in speeds if speed is not None]
        _draw_points(figure, row, style, 2, row.tokens_per_second, dots)


def _draw_points(
    figure: Figure, row: TableRow, style: Style, col: int, x: float, dots: Sequence[tuple[float, float]]
) -> None:
    assert row.bits_per_byte
    where: dict[str, Any] = {
        "showlegend": False,
        "meta": {"entry": row.config_hash, "kind": "eval"},
        "row": 1,
        "col": col,
    }
    figure.add_scatter(
        x=[x for x, _ in dots],
        y=[bits for _, bits in dots],
        mode="markers",
        marker={"color": faint(style.colour, 0.75), "symbol": style.symbol, "size": 6},
        hoverinfo="skip",
        **where,
    )
    name = escape(row.label)
    said = f"MaxVio {row.max_vio:.3f}<br>" if row.max_vio is not None else ""
    said += f"{si(row.tokens_per_second)} tokens/s<br>" if row.tokens_per_second is not None else ""
    figure.add_scatter(
        x=[x],
        y=[row.bits_per_byte.mean],
        error_y={"array": [row.bits_per_byte.half_width or 0.0], "thickness": 1.5, "width": 5},
        name=name,
        mode="markers",
        marker={"color": style.colour, "symbol": style.symbol, "size": 12},
        hovertemplate=f"<b>{name}</b><br>{said}{of_interval(row.bits_per_byte)} bits/byte<extra></extra>",
        **where,
    )


def _draw_fronts(figure: Figure, rows: Sequence[TableRow]) -> None:
    """Draw the fronts: they are of all entries, whoever is drawn."""
    routed = [row for row in rows if row.router != DENSE and row.causal and row.bits_per_byte]
    bits = {row.label: row.bits_per_byte.mean for row in routed if row.bits_per_byte}
    vios = {row.label: row.max_vio for row in routed if row.max_vio is not None}
    speeds = {row.label: row.tokens_per_second for row in routed if row.tokens_per_second is not None}
    both = vios.keys() & speeds.keys()
    ringed = pareto({name: (bits[name], vios[name], -speeds[name]) for name in sorted(both)})
    for col, (found, sign) in enumerate(((vios, 1), (speeds, -1)), start=1):
        front = sorted(pareto({name: (bits[name], sign * x) for name, x in found.items()}), key=lambda n: found[n])
        look: dict[str, Any] = {
            "hoverinfo": "skip",
            "showlegend": False,
            "row": 1,
            "col": col,
            "meta": {"kind": "front"},
        }
        if len(front) > 1:
            figure.add_scatter(
                x=[found[name] for name in front],
                y=[bits[name] for name in front],
                mode="lines",
                line={"color": GREY, "width": 1, "dash": "dot", "shape": "hv" if sign > 0 else "vh"},
                **look,
            )
        rings = sorted(ringed & found.keys())
        if rings:
            figure.add_scatter(
                x=[found[name] for name in rings],
                y=[bits[name] for name in rings],
                mode="markers",
                marker={"symbol": "circle-open", "size": 21, "color": GREY, "line": {"width": 1.5}},
                **look,
            )
