"""The page about a comparison.

Like the table it is a pure function of run records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlroute.config import DENSE
from rlroute.experiments.comparison.entries import Entry, make_entries
from rlroute.experiments.comparison.table import Table, TableRow, build_table
from rlroute.experiments.comparison.text import BALANCE, REGRET, columns, legend
from rlroute.experiments.report.figures import (
    AXES,
    balance_figure,
    curves_figure,
    forest_figure,
    loads_figure,
    make_styles,
)
from rlroute.experiments.report.html import render_page
from rlroute.experiments.report.style import Style
from rlroute.experiments.text import listed, of_interval, short
from rlroute.experiments.verdicts import MARGIN
from rlroute.records import write_atomically
from rlroute.schema import RunRecord

FIRST = 8
"""How many entries the curves show before the reader asks for more."""
SECONDARY = (
    "settings",
    "gate",
    *BALANCE,
    *REGRET,
    "parameters active / total",
    "FLOPs/token",
    "training-only FLOPs/token",
    "n",
    "resolvable",
)
"""The columns that narrow pages hide until the reader asks for them."""

BALANCE_LEGEND = (
    "Gini, min/max load and without expert: mean difference of two experts' loads over twice their mean, lowest over "
    "highest load, and the share of tokens for which no expert ran; mean over seeds, then the worst layer."
)


def write_report(
    records: Sequence[RunRecord],
    path: Path,
    *,
    reference: str | None = None,
    left_out: Sequence[str] = (),
    margin: float = MARGIN,
) -> None:
    """Write the page about ``records`` to ``path``, atomically.

    Args:
        records: finished and diverged runs.
        path: the HTML file.
        reference: label of the entry that differences are taken to, as in
            :func:`~rlroute.experiments.comparison.table.build_table`.
        left_out: what other runs there are, and why they are not here.
        margin: the difference below which entries are equivalent.

    Raises:
        ComparisonError: the runs are not comparable, or there is no such reference.
        MissingDependencyError: Plotly is not installed.
        StoreError: the file cannot be written.
    """
    table = build_table(records, reference, left_out, margin)
    write_atomically(path, render(table, make_entries(records)))


def render(table: Table, entries: Sequence[Entry]) -> str:
    """Return the page.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    styles = make_styles(entries)
    by_label = {entry.label: entry for entry in entries}
    ordered = [by_label[row.label] for row in table.rows]
    routed = [entry for entry in ordered if entry.router != DENSE and entry.runs[0].loads]
    figures = {
        "forest": forest_figure(table, by_label, styles),
        "curves": curves_figure(ordered, styles),
        "balance": balance_figure(table, by_label, styles),
        "loads": loads_figure(routed) if routed else None,
    }
    shown, first = columns(table, balance=True), _first(table)
    return render_page(
        "comparison.html",
        "comparison.js",
        {name: figure for name, figure in figures.items() if figure is not None},
        conclusion=list(conclude(table)),
        columns=list(shown),
        secondary=SECONDARY,
        rows=[_row(row, table, [cell(row) for cell in shown.values()], styles) for row in table.rows],
        legend=f"{legend(table)} {BALANCE_LEGEND}",
        reference=table.reference,
        forest=figures["forest"] is not None,
        entries=[
            {"label": e.label, "glyph": styles[e.label].glyph, "first": str(e.label in first).lower()} for e in ordered
        ],
        first=len(first),
        axes=AXES,
        routed=[entry.label for entry in routed],
        sites=[str(site) for site in routed[0].sites] if routed else [],
        notes=[(title, text) for title, text in table.notes if text],
        configs=[_config(entry) for entry in ordered],
    )


def _first(table: Table) -> set[str]:
    """Return who is shown at first: the reference and the yardsticks, and the best of the others."""
    always = [row.label for row in table.rows if row.router == DENSE or row.label == table.reference]
    others = [row.label for row in table.rows if row.label not in always]
    return {*always, *others[: max(FIRST - len(always), 0)]}


def _row(row: TableRow, table: Table, cells: Sequence[str], styles: Mapping[str, Style]) -> dict[str, Any]:
    return {"cells": cells, "glyph": styles[row.label].glyph, "reference": row.label == table.reference}


def _config(entry: Entry) -> dict[str, str]:
    text = json.dumps(entry.runs[0].config["config"], indent=1, sort_keys=True)
    return {"label": entry.label, "runs": ", ".join(run.id for run in entry.runs), "text": text}


# What the table says, in words


def conclude(table: Table) -> Iterable[str]:
    """Say in words what the table shows and what it does not: who is better or worse than the reference, who is
    equivalent, who is unbalanced.
    """
    ranked = [row for row in table.rows if row.bits_per_byte]
    if not ranked:
        yield "Every run diverged: there is nothing to compare."
        return
    best = next((row for row in ranked if row.causal), ranked[0])
    seeds = "1 seed" if best.n == 1 else f"{best.n} seeds"
    among = "" if all(row.causal for row in ranked) else " of all that are causal"
    bits = of_interval(best.bits_per_byte)
    yield f"{best.label} has the lowest mean validation loss{among}: {bits} bits per byte over {seeds}."
    yield from _verdicts(table)
    yield from _balance(ranked)
    future = [row.label for row in ranked if not row.causal]
    if future:
        reason = "Such routing sees later tokens, so its loss cannot be held against the others'."
        yield f"Not causal: {listed(future)}. {reason}"
    untuned = [row.label for row in ranked if not row.tuned]
    if untuned:
        yield f"Untuned: {listed(untuned)}."
    lost = sum(row.diverged for row in table.rows)
    if lost:
        yield f"Diverged: {lost} {'run' if lost == 1 else 'runs'}, named below and left out of all figures."


def _verdicts(table: Table) -> Iterable[str]:
    pairs = [(row, row.difference) for row in table.rows if row.difference]
    if all(difference.half_width is None for _, difference in pairs):
        yield "One seed has no interval, so every verdict is unresolved."
        return
    said = [(row, row.verdict) for row, _ in pairs if row.verdict is not None]
    better = [_change(row) for row, verdict in said if verdict.direction == "better"]
    worse = [_change(row) for row, verdict in said if verdict.direction == "worse"]
    yield f"Better than {table.reference}, paired by seed: {listed(better)}."
    yield f"Worse than {table.reference}: {listed(worse)}."
    alike = [row.label for row, verdict in said if verdict.equivalent]
    yield f"Equivalent to {table.reference} within {table.margin:g} bits per byte: {listed(alike)}."
    yield f"Unresolved: {listed([row.label for row, verdict in said if not verdict.resolved])}."
    if better or worse:
        holds = [row.label for row, _ in pairs if row.found]
        yield f"Better or worse also when corrected for {len(pairs)} comparisons (Holm, 5%): {listed(holds)}."


def _balance(ranked: Sequence[TableRow]) -> Iterable[str]:
    routed = [row for row in ranked if row.max_vio is not None]
    dead = [
        f"{row.label} ({short(row.dead_experts)} of {row.experts}, MaxVio {row.max_vio:.2f})"
        for row in routed
        if row.dead_experts
    ]
    alive = [row.max_vio for row in routed if not row.dead_experts and row.max_vio is not None]
    if routed:
        spread = f"; all others keep every expert alive, MaxVio {min(alive):.2f} to {max(alive):.2f}" if alive else ""
        yield f"Dead experts: {listed(dead)}{spread}."


def _change(row: TableRow) -> str:
    return row.label if row.difference is None else f"{row.label} ({row.difference.mean:+.4f})"
