"""The page about a comparison: all views of it in one file.

Like the table it is a pure function of run records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlroute.experiments.comparison.ladder_file import Ladder
from rlroute.experiments.comparison.table import Table, TableRow
from rlroute.experiments.comparison.text import BALANCE, REGRET, legend
from rlroute.experiments.report.board import Board, Seen
from rlroute.experiments.report.choice import ALL, AXES, KINDS, Choice
from rlroute.experiments.report.html import render_page
from rlroute.experiments.report.sheet import Sheet
from rlroute.experiments.report.signals import MEASURES
from rlroute.experiments.report.views import RUN_PAGE, VIEWS, Listing, with_loads
from rlroute.experiments.text import listed, of_interval, short
from rlroute.experiments.verdicts import MARGIN
from rlroute.records import write_atomically
from rlroute.schema import RunRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ORDER = (
    "results",
    "forest",
    "curves",
    "verdicts",
    "balance",
    "loads",
    "health",
    "regret",
    "losses",
    "multipliers",
    "rungs",
    "said",
    "gradients",
    "claims",
    "progress",
    "runs",
)
"""The views of the page, from top to bottom; under the runs those of each run, which are drawn when it is opened."""
EVERYTHING = Choice(entries=ALL, entry=ALL, axis=ALL)
"""What is in the file; the page's script shows the first of it."""
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


@dataclass(frozen=True)
class Section:
    """A view on the page: the ids of its figures with their widths, or its table, or its text, or a line why there is
    none of these.
    """

    name: str
    title: str
    caption: str
    pickers: tuple[str, ...]
    figures: tuple[tuple[str, int], ...] = ()
    sheet: Sheet | None = None
    text: str = ""
    line: str = ""


def write_report(
    records: Sequence[RunRecord],
    path: Path,
    *,
    reference: str | None = None,
    left_out: Sequence[str] = (),
    margin: float = MARGIN,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    ladder: Ladder | None = None,
    unended: Sequence[Seen] = (),
) -> None:
    """Write the page about ``records`` to ``path``, atomically.

    Args:
        records: finished and diverged runs.
        path: the HTML file.
        reference: label of the entry that differences are taken to, as in
            :func:`~rlroute.experiments.comparison.table.build_table`.
        left_out: what other runs there are, and why they are not here.
        margin: the difference below which entries are equivalent.
        results: what other commands published, by name.
        ladder: the one of the run store.
        unended: its runs that have not ended; those that may be compared with the others are shown, and those that were
            not begun.

    Raises:
        ComparisonError: the runs are not comparable, or there is no such reference.
        MissingDependencyError: Plotly is not installed.
        StoreError: the file cannot be written.
    """
    ended = tuple(map(Seen.of, records))
    kinds = {run.kind for run in ended}
    board = Board(
        runs=(*ended, *(run for run in unended if run.config and run.kind in kinds)),
        others=tuple(run for run in unended if not run.config),
        reference=reference,
        left_out=tuple(left_out),
        margin=margin,
        results=results or {},
        compared=records,
        ladder=ladder,
    )
    write_atomically(path, render(board))


def render(board: Board) -> str:
    """Return the page.

    Raises:
        ComparisonError: the runs are not comparable, or there is no such reference.
        MissingDependencyError: Plotly is not installed.
    """
    table = board.build()
    figures: dict[str, Figure] = {}
    sections = [_section(name, board, figures) for name in ORDER]
    runs = [
        (run.id, [_section(name, board, figures, Choice(run=run.id), f"-{place}") for name in RUN_PAGE])
        for place, run in enumerate([*(run for group in board.groups for run in group.runs), *board.others])
    ]
    drawn_loads = with_loads(board)
    return render_page(
        "comparison.html",
        "comparison.js",
        figures,
        conclusion=list(conclude(table)),
        sections=sections,
        glyphs={group.hash: board.styles[group.label].glyph for group in board.groups},
        secondary=SECONDARY,
        legend=f"{legend(table)} {BALANCE_LEGEND}",
        reference=next((row.config_hash for row in table.rows if row.label == table.reference), ""),
        entries=[
            {"label": group.label, "hash": group.hash, "first": str(group.label in board.first).lower()}
            for group in board.groups
        ],
        first=len(board.first),
        axes=AXES,
        kinds=KINDS,
        loads=[{"label": group.label, "hash": group.hash} for group in drawn_loads],
        sites=list(drawn_loads[0].sites) if drawn_loads else [],
        notes=[(title, text) for title, text in table.notes if text],
        runs=runs,
    )


def _section(
    name: str, board: Board, figures: dict[str, Figure], choice: Choice = EVERYTHING, mark: str = ""
) -> Section:
    """Draw a view; put its figures to the others, under its name with a mark."""
    view = VIEWS[name]
    drawn: dict[str, Figure | Sheet | Listing | str] = {name + mark: view.draw(board, choice)}
    if "measure" in view.pickers and not isinstance(drawn[name + mark], str):
        drawn = {f"{name}-{measure}": view.draw(board, choice.but(measure=measure)) for measure in MEASURES}
    ids: list[tuple[str, int]] = []
    said: dict[str, Any] = {}
    for place, what in drawn.items():
        if isinstance(what, str):
            said["line"] = what
        elif isinstance(what, Listing):
            said["text"] = what.text
        elif isinstance(what, Sheet):
            said["sheet"] = what
        else:
            figures[place] = what
            ids.append((place, (what.layout.meta or {}).get("width", 0)))
    return Section(name, view.title, view.said(board), view.pickers, tuple(ids), **said)


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
