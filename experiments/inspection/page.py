"""What was seen inside a run, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rlroute.experiments.inspection import figures, text
from rlroute.experiments.inspection.drops import Drops
from rlroute.experiments.inspection.inspection import Inspection
from rlroute.experiments.report.html import render_page
from rlroute.experiments.terminal import Grid
from rlroute.foreign import printable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Section = tuple[str, str, Sequence[str], Sequence[Grid]]
"""Title, legend, ids of figures, tables."""


def render(found: Inspection, command: str) -> str:
    """Return the page of an inspection.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    drawn: dict[str, Figure] = {"loads": figures.loads_figure(found.sites)}
    sections: list[Section] = [("Sites", text.LEGEND, ["loads"], [text.sites_grid(found)])]
    drawn["history"] = figures.history_figure(found.history)
    tables = [text.history_grid(found), text.recorded_grid(found)]
    said = text.HISTORY_LEGEND + (f" {text.RECORDED_LEGEND}" if found.history.recorded else "")
    said += f" {text.KEEP}" if text.few(found) else ""
    sections.append(("Since when", said, ["history"], [table for table in tables if table is not None]))
    if found.worth is not None and (table := text.worth_grid(found)) is not None:
        names = [name for name, there in (("worth", found.worth.experts), ("best", found.worth.best)) if there]
        makers = {"worth": figures.worth_figure, "best": figures.best_figure}
        drawn |= {name: makers[name](found.worth) for name in names}
        sections.append(("What experts are worth", text.WORTH_LEGEND, names, [table]))
    regret = [table] if (table := text.regret_grid(found)) is not None else []
    if isinstance(found.regret, dict):
        drawn["regret"] = figures.regret_figure(found.regret)
    said = text.REGRET_LEGEND if regret else text.without_regret(found)
    sections.append(("Regret of routes", said, ["regret"] if regret else [], regret))
    if (pairs := text.pairs_grid(found)) is not None:
        sections.append(("Chosen together", text.PAIRS_LEGEND, [], [pairs]))
    for index, site in enumerate(found.sites):
        ids = []
        if found.domains:
            drawn[f"domains{index}"] = figures.domains_figure(site, found.domains)
            ids.append(f"domains{index}")
        if site.pairs:
            drawn[f"together{index}"] = figures.together_figure(site)
            ids.append(f"together{index}")
        sections.append((f"Site {site.site}: experts", text.EXPERTS_LEGEND, ids, [text.experts_grid(found, site)]))
    return _page("What is inside?", text.headline(found), sections, drawn, [], command)


def render_drops(run: str, found: Sequence[Drops], spell: Callable[[int], str], command: str) -> str:
    """Return the page about what outputs owe to the rest of the batch.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    drawn = {
        "changes": figures.changes_figure(found),
        "positions": figures.drops_figure(found, "by_position"),
        "rows": figures.drops_figure(found, "by_row"),
    }
    by_place = [text.places_grid(found, field) for field in text.PLACES]
    sections: list[Section] = [
        ("What changes with the batch", text.DROPS_LEGEND, ["changes"], [text.drops_grid(found)]),
        ("Where in the sequence pairs are dropped", text.PLACES["by_position"], ["positions"], by_place[:1]),
        ("Where in the batch pairs are dropped", text.PLACES["by_row"], ["rows"], by_place[1:]),
    ]
    return _page(
        "What does the batch change?",
        text.drops_said(run, found),
        sections,
        drawn,
        text.examples(found, spell),
        command,
    )


def _page(
    title: str,
    headline: str,
    sections: Sequence[Section],
    drawn: dict[str, Figure],
    examples: Sequence[str],
    command: str,
) -> str:
    shown = [(name, said, ids, [_cells(table) for table in tables]) for name, said, ids, tables in sections]
    return render_page(
        "inspect.html",
        "",
        drawn,
        title=title,
        headline=printable(headline),
        sections=shown,
        examples=[printable(line) for line in examples],
        command=printable(command),
    )


def _cells(grid: Grid) -> tuple[Sequence[str], list[list[str]], list[bool]]:
    lines = [[printable(cell) for cell in line] for line in grid.lines]
    return grid.head, lines, [grid.stands_left(title) for title in grid.head]
