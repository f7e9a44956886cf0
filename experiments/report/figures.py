"""The figures of a page about a comparison, in one style.

A trace says in ``meta`` which entry it is of, and what the page's script needs to show or hide it and to change its
axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rlroute.config import DENSE
from rlroute.experiments.comparison.entries import Entry
from rlroute.experiments.comparison.table import Table, paired
from rlroute.experiments.report.style import Style, faint, new_figure, styles_of
from rlroute.experiments.statistics import Interval, t_interval
from rlroute.experiments.text import NOTHING, of_interval
from rlroute.reading import worst_vio
from rlroute.schema import EvalRow, RunRecord, TrainRow

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

AXES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training seconds"}
"""What a curve can be drawn against: FLOPs by the pairs that ran, and seconds, are means over seeds."""
LOAD_COLOURS = {
    "light": [[0, "#2b4c8c"], [0.125, "#93b5dc"], [0.25, "#f7f7f7"], [0.5, "#f2a57c"], [1, "#8c1c13"]],
    "dark": [[0, "#5b8def"], [0.125, "#34507f"], [0.25, "#232a35"], [0.5, "#b3552d"], [1, "#ffb38a"]],
}
"""Cold below the fair share, warm above it, and the fair share as pale as the page."""
LOAD_LIMIT = 4.0
"""The colour scale of expert loads ends at this multiple of the fair share, in all heatmaps."""
LOAD_COLUMNS = 100
"""Points in time that a heatmap shows at most."""
SEED_COLUMNS = 4
"""Heatmaps side by side."""

Axis = Callable[[RunRecord, "EvalRow | TrainRow"], float]


def make_styles(entries: Sequence[Entry]) -> dict[str, Style]:
    """Give each entry its style, the same in all figures."""
    routed = sorted(entry.label for entry in entries if entry.router != DENSE)
    return styles_of(routed, [entry.label for entry in entries if entry.router == DENSE])


# Curves


def curves_figure(entries: Sequence[Entry], styles: Mapping[str, Style]) -> Figure:
    """Draw the loss against tokens, FLOPs or time: evaluations as means over seeds with t intervals as bands, and the
    mean training loss as a thin line.
    """
    figure = new_figure(AXES["tokens"], "loss (bits per byte)", height=460)
    seen: list[float] = []
    for index, entry in enumerate(entries):
        style, name = styles[entry.label], escape(entry.label)
        line = {"color": style.colour, "dash": style.dash}
        trained, evaluated = _training(entry), _evaluations(entry)
        figure.add_scatter(
            **_against(entry, index, "train", [(rows, sum(values) / len(values)) for rows, values in trained]),
            name=name,
            mode="lines",
            line={"color": faint(style.colour, 0.45), "width": 1},
            hoverinfo="skip",
            showlegend=False,
        )
        intervals = [(rows, t_interval(values)) for rows, values in evaluated]
        seen += [interval.mean for _, interval in intervals]
        band = [(rows, i.low, i.high) for rows, i in intervals if i.low is not None and i.high is not None]
        if band:
            outline = [(r, low) for r, low, _ in band] + [(r, high) for r, _, high in band][::-1]
            fill = {"fill": "toself", "fillcolor": faint(style.colour, 0.13), "line": {"width": 0}, "mode": "lines"}
            figure.add_scatter(
                **_against(entry, index, "eval", outline), **fill, name=name, hoverinfo="skip", showlegend=False
            )
        figure.add_scatter(
            **_against(entry, index, "eval", [(rows, interval.mean) for rows, interval in intervals]),
            name=name,
            mode="lines+markers",
            line=line | {"width": 2},
            marker={"symbol": style.symbol, "size": 8, "color": style.colour},
            hovertemplate="%{y:.4f} ± %{customdata}",
            customdata=[NOTHING if i.half_width is None else f"{i.half_width:.4f}" for _, i in intervals],
            showlegend=False,
        )
    figure.update_layout(hovermode="x unified")
    figure.update_xaxes(tickformat="~s")
    if seen:  # the first training steps lie far above all that is to be compared
        room = 0.06 * (max(seen) - min(seen)) or 0.1
        figure.update_yaxes(range=[min(seen) - room, max(seen) + room])
    return figure


Points = list[tuple[list[tuple[RunRecord, Any]], list[float]]]
"""At each step that all seeds have: their runs with their rows, and their losses."""


def _at_common_steps(entry: Entry, rows_of: Callable[[RunRecord], Iterable[tuple[Any, float]]]) -> Points:
    found: dict[int, list[tuple[RunRecord, Any, float]]] = {}
    for run in entry.finished:
        for row, loss in rows_of(run):
            found.setdefault(row["step"], []).append((run, row, loss))
    common = [points for _, points in sorted(found.items()) if len(points) == len(entry.finished)]
    return [([(run, row) for run, row, _ in points], [loss for *_, loss in points]) for points in common]


def _evaluations(entry: Entry) -> Points:
    return _at_common_steps(entry, lambda run: ((row, row["bits_per_byte"]) for row in run.evals))


def _training(entry: Entry) -> Points:
    """Return training losses in bits per byte, at as many bytes a token as the validation tokens have."""

    def rows(run: RunRecord) -> Iterable[tuple[TrainRow, float]]:
        final = run.summary["final"]
        bits = final["bits_per_byte"] / final["loss"] if final and final["loss"] else 1 / math.log(2)
        return ((row, row["loss"] * bits) for row in run.train)

    return _at_common_steps(entry, rows)


def _flops(run: RunRecord, row: EvalRow | TrainRow) -> float:
    model, share = run.summary["model"], row["tokens"] / max(1, run.summary["tokens"])
    if "training_flops" in model:
        return share * model["training_flops"]
    return 3.0 * row["tokens"] * (model["flops_per_token"] + model["training_only_flops_per_token"])


_MEASURES: dict[str, Axis] = {
    "tokens": lambda run, row: float(row["tokens"]),
    "flops": _flops,
    "seconds": lambda run, row: row["seconds"],
}


def _against(
    entry: Entry, index: int, kind: str, points: Sequence[tuple[Sequence[Any], float | None]]
) -> dict[str, Any]:
    """Return a trace's coordinates, those on the other axes in its ``meta``."""
    along = {
        axis: [float(f"{sum(of(run, row) for run, row in rows) / len(rows):.6g}") for rows, _ in points]
        for axis, of in _MEASURES.items()
    }
    y = [None if value is None else round(value, 5) for _, value in points]
    return {"x": along["tokens"], "y": y, "meta": {"entry": index, "kind": kind, "x": along}}


# Differences


def forest_figure(table: Table, entries: Mapping[str, Entry], styles: Mapping[str, Style]) -> Figure | None:
    """Draw each entry's paired difference to the reference, with its interval and the differences of single seeds;
    None where there is none.

    Filled: found also when corrected for the number of comparisons (Holm). Shaded: within the margin.
    """
    rows = [(row, difference) for row in table.rows if (difference := row.difference)]
    if not rows:
        return None
    figure = new_figure(
        f"difference to {escape(table.reference)} (bits per byte; left is better)", "", 110 + 34 * len(rows)
    )
    base = entries[table.reference]
    for row, difference in rows:
        style, name = styles[row.label], escape(row.label)
        seeds = paired(entries[row.label], base)
        figure.add_scatter(
            x=seeds,
            y=[name] * len(seeds),
            mode="markers",
            marker={"color": faint(style.colour, 0.5), "size": 5},
            hovertemplate="%{x:+.4f}<extra>one seed</extra>",
        )
        figure.add_scatter(
            x=[difference.mean],
            y=[name],
            error_x={"array": [difference.half_width or 0.0], "thickness": 2, "width": 6, "color": style.colour},
            mode="markers",
            marker={"color": style.colour, "symbol": style.shape + ("" if row.found else "-open"), "size": 12},
            hovertemplate=f"<b>{name}</b><br>{of_interval(difference, '+')}<extra></extra>",
        )
        figure.add_annotation(
            x=1, xref="paper", xanchor="left", y=name, text=_said(difference, row.p_holm), showarrow=False
        )
    figure.add_vrect(-table.margin, table.margin, fillcolor="#7a8494", opacity=0.15, line_width=0)
    figure.add_vline(0, line={"width": 1.5, "color": "#7a8494"})
    figure.update_yaxes(autorange="reversed", showline=False, showgrid=False, automargin=True, ticks="")
    figure.update_xaxes(tickformat="+.2f")
    figure.update_layout(showlegend=False, margin={"r": 200, "l": 24, "t": 30})
    return figure


def _said(difference: Interval, p_holm: float | None) -> str:
    return f" {of_interval(difference, '+')}" + ("" if p_holm is None else f", <i>p</i> {p_holm:.2g}")


# Balance


def balance_figure(table: Table, entries: Mapping[str, Entry], styles: Mapping[str, Style]) -> Figure:
    """Draw quality against balance: the mean with its interval over all seeds' own points; the dense model is a
    line.
    """
    figure = new_figure("MaxVio (worst layer, validation set)", "validation loss (bits per byte)", height=440)
    vios = []
    for index, row in enumerate(table.rows):
        if row.bits_per_byte is None:
            continue
        style, name, meta = styles[row.label], escape(row.label), {"entry": index, "kind": "eval"}
        if row.max_vio is None:
            label = {"text": name, "font": {"color": style.colour}}
            line = {"color": style.colour, "dash": style.dash}
            figure.add_hline(row.bits_per_byte.mean, line=line, annotation=label, annotation_position="bottom right")
            continue
        points = [(worst_vio(final), final["bits_per_byte"]) for final in entries[row.label].finals]
        seen = [(vio, bits) for vio, bits in points if vio is not None]
        dots = {"x": [vio for vio, _ in seen], "y": [bits for _, bits in seen]}
        vios += [*dots["x"], row.max_vio]
        small = {"color": faint(style.colour, 0.5), "size": 5}
        figure.add_scatter(**dots, mode="markers", marker=small, showlegend=False, hoverinfo="skip", meta=meta)
        figure.add_scatter(
            x=[row.max_vio],
            y=[row.bits_per_byte.mean],
            error_y={"array": [row.bits_per_byte.half_width or 0.0], "thickness": 1.5, "width": 5},
            name=name,
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 12},
            hovertemplate=f"<b>{name}</b><br>MaxVio %{{x:.3f}}<br>{of_interval(row.bits_per_byte)} bits/byte"
            "<extra></extra>",
            showlegend=False,
            meta=meta,
        )
    if vios and min(vios) > 0:
        figure.update_xaxes(type="log", tickvals=[d * 10.0**p for p in range(-4, 4) for d in (1, 2, 5)])
    return figure


# Loads


def loads_figure(entries: Sequence[Entry]) -> Figure:
    """Draw the load of every expert over time: one heatmap for each seed, all of one entry and routed site at a time.

    The figure shows the first; ``layout.meta["loads"][entry][site]`` holds, for each seed, what the script puts there:
    its number, the steps, and each expert's load over the fair share.
    """
    from plotly.subplots import make_subplots

    loads = [[_loads(entry, site) for site in range(len(entry.sites))] for entry in entries]
    most = max(len(seeds) for sites in loads for seeds in sites)
    across = min(most, SEED_COLUMNS)
    down = -(-most // across)
    plain = new_figure("training step", "expert", height=110 + 230 * down)
    titles = [f"seed {drawn['seed']}" for drawn in loads[0][0]]
    spacing = {"horizontal_spacing": 0.02, "vertical_spacing": 0.2 / down}
    figure = make_subplots(down, across, shared_yaxes=True, subplot_titles=titles, figure=plain, **spacing)
    for place, drawn in enumerate(loads[0][0]):
        figure.add_heatmap(
            x=drawn["steps"],
            z=drawn["share"],
            name=f"seed {drawn['seed']}",
            coloraxis="coloraxis",
            hovertemplate="step %{x}, expert %{y}<br>%{z:.2f} × the fair share",
            row=place // across + 1,
            col=place % across + 1,
        )
    bar = {"tickvals": [0, 1, 2, 3, 4], "ticktext": ["0", "1 (fair)", "2", "3", "≥ 4"], "thickness": 14}
    bar |= {"outlinewidth": 0, "title": {"text": "load over<br>fair share"}}
    figure.update_layout(
        coloraxis={"cmin": 0, "cmax": LOAD_LIMIT, "colorscale": LOAD_COLOURS["light"], "colorbar": bar},
        meta={"loads": loads, "scales": LOAD_COLOURS},
    )
    figure.update_xaxes(showgrid=False, zeroline=False, title={"text": ""})
    figure.update_xaxes(title={"text": "training step"}, row=down)
    figure.update_yaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(title={"text": "expert"}, col=1)
    return figure


def _loads(entry: Entry, site: int) -> list[dict[str, Any]]:
    """Return what each seed's experts got at a site, over the fair share; sites may have different numbers of
    experts.
    """
    found = []
    for run in entry.runs:
        rows = run.loads[:: -(-len(run.loads) // LOAD_COLUMNS) or 1]
        load_SE = [row["load_LE"][site] for row in rows]
        share_ES = [[round(load * len(load_SE[0]), 2) for load in load_S] for load_S in zip(*load_SE, strict=True)]
        found.append({"seed": run.config["seed"], "steps": [row["step"] for row in rows], "share": share_ES})
    return found
