"""Who is better: paired differences to the reference as a figure, and the verdict of every pair as a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from rlroute.experiments.comparison.entries import Entry
from rlroute.experiments.comparison.pairs import pair
from rlroute.experiments.comparison.table import Table, paired
from rlroute.experiments.report.sheet import Cell, Sheet
from rlroute.experiments.report.style import Style, faint, in_title, new_figure
from rlroute.experiments.statistics import Interval
from rlroute.experiments.text import NOTHING, of_interval
from rlroute.experiments.verdicts import Verdict

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def forest_figure(
    table: Table, entries: Mapping[str, Entry], styles: Mapping[str, Style], drawn: Collection[str] | None = None
) -> Figure | None:
    """Draw each entry's paired difference to the reference, with its interval and the differences of single seeds;
    None where there is none.

    Filled: found also when corrected for the number of comparisons (Holm). Shaded: within the margin.

    Args:
        table: the comparison.
        entries, styles: by label.
        drawn: the labels of those that are drawn; all if None.
    """
    rows = [(r, difference) for r in table.rows if (difference := r.difference) and (drawn is None or r.label in drawn)]
    if not rows:
        return None
    figure = new_figure(
        f"difference to {in_title(table.reference)} (bits per byte; left is better)", "entry", 110 + 34 * len(rows)
    )
    base = entries[table.reference]
    for row, difference in rows:
        style, name = styles[row.label], escape(row.label)
        seeds = paired(entries[row.label], base)
        figure.add_scatter(
            x=seeds,
            y=[name] * len(seeds),
            mode="markers",
            marker={"color": faint(style.colour, 0.75), "symbol": style.shape, "size": 6},
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
    figure.update_yaxes(title={"standoff": 10})  # which makes room for it beside names of any length
    figure.update_xaxes(tickformat="+.2f")
    figure.update_layout(showlegend=False, margin={"r": 200, "l": 24, "t": 30})
    return figure


def _said(difference: Interval, p_holm: float | None) -> str:
    return f" {of_interval(difference, '+')}" + ("" if p_holm is None else f", <i>p</i> {p_holm:.2g}")


def verdict_sheet(entries: Sequence[Entry], margin: float) -> Sheet:
    """Return the verdict of each entry (rows) against each other one (columns), with the paired difference."""
    head = (f"row against column, margin {margin:g}", *(entry.label for entry in entries))
    rows = tuple(
        (Cell(entry.label, entry=_hash(entry)), *(_verdict_cell(entry, other, margin) for other in entries))
        for entry in entries
    )
    return Sheet(head, rows, head_entries=("", *map(_hash, entries)))


def _verdict_cell(entry: Entry, other: Entry, margin: float) -> Cell:
    if entry is other:
        return Cell(NOTHING, entry=_hash(other))
    found = pair(entry, other, margin)
    interval, said = found.difference, found.verdict
    if interval is None:
        return Cell("no common seed", entry=_hash(other))
    words = "equivalent" if said.equivalent and not said.direction else str(said)
    return Cell(f"{words}\n{of_interval(interval, '+')}", interval.mean, entry=_hash(other), tone=_tone(said))


def _hash(entry: Entry) -> str:
    return entry.runs[0].config["config_hash"]


def _tone(said: Verdict) -> str:
    return said.direction or ("equivalent" if said.equivalent else "")
