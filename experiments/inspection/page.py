"""What was seen inside a run, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlroute.experiments.inspection import figures, text
from rlroute.experiments.inspection.drops import Drops
from rlroute.experiments.inspection.inspection import Inspection, SiteView
from rlroute.experiments.report.html import cells, render_page
from rlroute.experiments.terminal import Grid
from rlroute.foreign import printable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title, said: its title, and what its figures mean.
        figures: by the ids of their places.
        tables: below them.
    """

    title: str
    said: str
    figures: Mapping[str, Figure]
    tables: Sequence[Grid | None]


def render(found: Inspection, command: str) -> str:
    """Return the page of an inspection.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    sites = Section("Sites", text.LEGEND, {"loads": figures.loads_figure(found)}, [text.sites_grid(found)])
    sections = [sites, _history(found), *_worth(found), _regret(found)]
    if (pairs := text.pairs_grid(found)) is not None:
        sections.append(Section("Chosen together", text.PAIRS_LEGEND, {}, [pairs]))
    sections += [_sites(found, name, sites) for name, sites in found.families.items()]
    return _page("What is inside?", text.headline(found), sections, [], command)


def _history(found: Inspection) -> Section:
    said = [
        text.HISTORY_LEGEND,
        text.RECORDED_LEGEND if found.history.recorded else "",
        text.KEEP if text.few(found) else "",
    ]
    drawn = {"history": figures.history_figure(found.history)}
    tables = [text.history_grid(found), text.recorded_grid(found)]
    return Section("Since when", " ".join(filter(None, said)), drawn, tables)


def _worth(found: Inspection) -> Iterator[Section]:
    if (worth := found.worth) is None:
        return
    drawn = {"worth": figures.worth_figure(worth)} if worth.experts else {}
    if worth.best:
        drawn["best"] = figures.best_figure(worth)
    yield Section("What experts are worth", text.WORTH_LEGEND, drawn, [text.worth_grid(found)])


def _regret(found: Inspection) -> Section:
    if not isinstance(found.regret, dict):
        return Section("Regret of routes", text.without_regret(found), {}, [])
    drawn = {"regret": figures.regret_figure(found.regret)}
    return Section("Regret of routes", text.REGRET_LEGEND, drawn, [text.regret_grid(found)])


def _sites(found: Inspection, name: str, sites: Sequence[SiteView]) -> Section:
    drawn: dict[str, Figure] = {}
    for site in sites:
        place = found.sites.index(site)
        if found.domains:
            drawn[f"domains{place}"] = figures.domains_figure(site, found.domains)
        if site.pairs:
            drawn[f"together{place}"] = figures.together_figure(site)
    return Section(f"Site {name}: experts", text.EXPERTS_LEGEND, drawn, [text.experts_grid(found, sites)])


def render_drops(run: str, found: Sequence[Drops], spell: Callable[[int], str], command: str) -> str:
    """Return the page about what outputs owe to the rest of the batch.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    changes = {"changes": figures.changes_figure(found)}
    sections = [Section("What changes with the batch", text.DROPS_LEGEND, changes, [text.drops_grid(found)])]
    titles = ("Where in the sequence pairs are dropped", "Where in the batch pairs are dropped")
    for title, (field, said) in zip(titles, text.PLACES.items(), strict=True):
        drawn = {field: figures.drops_figure(found, field)}
        sections.append(Section(title, said, drawn, [text.places_grid(found, field)]))
    said = text.drops_said(run, found)
    return _page("What does the batch change?", said, sections, text.examples(found, spell), command)


def _page(title: str, headline: str, sections: Sequence[Section], examples: Sequence[str], command: str) -> str:
    return render_page(
        "inspect.html",
        "",
        {name: figure for section in sections for name, figure in section.figures.items()},
        title=title,
        headline=printable(headline),
        sections=[(of.title, of.said, list(of.figures), [cells(t) for t in of.tables if t]) for of in sections],
        examples=[printable(line) for line in examples],
        command=printable(command),
    )
