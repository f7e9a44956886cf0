"""Views as Dash shows them: tables and pickers of links, so that all that is chosen is in the page's address."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dash import dcc, html

from rlroute.experiments.report.board import Board, Group, Lot
from rlroute.experiments.report.choice import ALL, AXES, KINDS, Choice
from rlroute.experiments.report.sheet import Cell, Sheet
from rlroute.experiments.report.signals import MEASURES
from rlroute.experiments.report.style import Style
from rlroute.experiments.report.views import PAGES, RUN_PAGE, VIEWS, Listing, chosen_group, chosen_site, routed

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Component = Any
GRAPH = {
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}
BLANK = {
    "data": [],
    "layout": {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    | {axis: {"visible": False} for axis in ("xaxis", "yaxis")},
}
"""What is seen for a moment, until the page's script has given a figure the colours of the reader's scheme."""


def navigation(choice: Choice, lots: Sequence[Lot], total: int) -> list[Component]:
    """Return the links to the pages, how many runs there are, and links to other lots of them where there are any."""
    plain = choice.but(run="", sort="", filter="")
    links = [
        dcc.Link(title, plain.but(page=page).link, className="tab on" if page == choice.page else "tab")
        for page, (title, _) in PAGES.items()
    ]
    links.append(html.Span("1 run" if total == 1 else f"{total:,} runs", className="small total"))
    if len(lots) < 2:
        return links
    chosen = next((lot.key for lot in lots if lot.key == choice.lot), lots[0].key)
    others = [_chip(lot.title, Choice(page=choice.page, lot=lot.key), lot.key == chosen) for lot in lots]
    return [*links, html.Div([html.Span("Not all may be compared: "), *others], className="pickers")]


def views_of(choice: Choice) -> tuple[str, ...]:
    """Return the names of the views of a page; an unknown page is the first."""
    return RUN_PAGE if choice.page == "run" else PAGES.get(choice.page, PAGES[""])[1]


def pickers(board: Board, choice: Choice) -> list[Component]:
    """Return what a reader can choose of a page: links to the same page, otherwise chosen."""
    wanted = {name for view in views_of(choice) for name in VIEWS[view].pickers}
    rows = []
    if "entries" in wanted and board.groups:
        rows.append(_entries(board, choice))
    if "axis" in wanted:
        rows.append(_options("Against", AXES, choice.axis, lambda value: choice.but(axis=value)))
    if "kinds" in wanted:
        rows.append(_options("Show", KINDS, choice.kinds, lambda value: choice.but(kinds=value)))
    if "entry" in wanted and (group := chosen_group(board, choice)):
        rows.append(_loads(board, choice, group))
    if "measure" in wanted and "gradients" in board.results:
        measure = choice.measure if choice.measure in MEASURES else next(iter(MEASURES))
        rows.append(_options("Measure", MEASURES, measure, lambda value: choice.but(measure=value)))
    return rows


def _entries(board: Board, choice: Choice) -> Component:
    shown = {group.label for group in choice.drawn(board)}
    chips = [
        _chip(group.label, choice.toggled(group, board), group.label in shown, board.styles) for group in board.groups
    ]
    if len(board.groups) > len(board.first):
        other = choice.but(entries="" if choice.entries == ALL else ALL)
        chips.append(
            dcc.Link(f"all {len(board.groups)}, or the first {len(board.first)}", other.link, className="plain")
        )
    return html.Div(chips, className="pickers entries")


def _loads(board: Board, choice: Choice, group: Group) -> Component:
    routers = [
        _chip(one.label, choice.but(entry=one.hash, site=""), one is group, board.styles) for one in routed(board)
    ]
    site = chosen_site(group, choice)
    layers = [_chip(key, choice.but(entry=group.hash, site=key), key == site) for key in group.sites]
    return html.Div(
        [
            html.Div([html.Span("Router"), *routers], className="pickers"),
            html.Div([html.Span("Layer"), *layers], className="pickers layers"),
        ]
    )


def _options(title: str, values: Mapping[str, str], now: str, then: Any) -> Component:
    chips = [_chip(said, then(value), value == now) for value, said in values.items()]
    return html.Div([html.Span(title), *chips], className="pickers")


def _chip(text: str, choice: Choice, on: bool, styles: Mapping[str, Style] | None = None) -> Component:
    glyph = [_glyph(styles[text])] if styles else []
    return dcc.Link([*glyph, text], choice.link, className="entry on" if on else "entry off")


def _glyph(style: Style) -> Component:
    svg = style.glyph.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    return html.Img(src=source, className="glyph", alt="", width=24, height=12)


# Views


def shown(name: str, drawn: Figure | Sheet | Listing | str | Exception, board: Board, choice: Choice) -> Component:
    """Return a view with its title; of one that failed, with what went wrong."""
    view = VIEWS[name]
    caption = [html.P(said, className="small")] if (said := view.said(board)) else []
    return html.Section([html.H2(view.title), *caption, _content(name, drawn, board, choice)], id=f"view-{name}")


def _content(name: str, drawn: Figure | Sheet | Listing | str | Exception, board: Board, choice: Choice) -> Component:
    if isinstance(drawn, Exception):
        return html.P(f"This view cannot be drawn: {type(drawn).__name__}: {drawn}", className="alarm")
    if isinstance(drawn, str):
        return html.P(drawn, className="absent")
    if isinstance(drawn, Listing):
        return html.Pre(drawn.text)
    if isinstance(drawn, Sheet):
        return _table(drawn.arranged(choice.sort, choice.filter), len(drawn.rows), board, choice)
    return html.Div(
        [
            dcc.Store(id={"view": name, "part": "raw"}, data=drawn.to_plotly_json()),
            html.Div(
                dcc.Graph(id={"view": name, "part": "graph"}, figure=BLANK, config=GRAPH, responsive=True),
                style={"height": drawn.layout.height, "minWidth": (drawn.layout.meta or {}).get("width")},
            ),
        ],
        className="wide",
    )


def _table(sheet: Sheet, total: int, board: Board, choice: Choice) -> Component:
    hashes = {group.hash: board.styles[group.label] for group in board.groups}
    heads = [
        html.Th(
            _head(title, choice), scope="col", className="left" if title in sheet.left else "", **_sorted(title, choice)
        )
        for title in sheet.head
    ]
    rows = [
        html.Tr([_cell(cell, place, choice, hashes, sheet) for place, cell in enumerate(row)], key=row[0].text)
        for row in sheet.rows
    ]
    left = f"{len(rows)} of {total} rows" if len(rows) < total else ""
    table = html.Table([html.Thead(html.Tr(heads)), html.Tbody(rows)], className=sheet.kind)
    return html.Div([html.Div(table, className="scroll"), html.P(left, className="small")])


def _head(title: str, choice: Choice) -> Component:
    return dcc.Link(title, choice.but(sort=f"-{title}" if choice.sort == title else title).link)


def _sorted(title: str, choice: Choice) -> dict[str, str]:
    way = {title: "ascending", f"-{title}": "descending"}.get(choice.sort)
    return {"aria-sort": way} if way else {}


def _cell(cell: Cell, place: int, choice: Choice, styles: Mapping[str, Style], sheet: Sheet) -> Component:
    text: Any = cell.text
    if cell.run:
        text = dcc.Link(text, Choice(page="run", run=cell.run, lot=choice.lot).link)
    glyph = [_glyph(styles[cell.entry])] if place == 0 and cell.entry in styles else []
    names = [cell.tone, "left" if sheet.head[place] in sheet.left else "", "said" if "\n" in cell.text else ""]
    kind = html.Td if place else html.Th
    return kind([*glyph, text], className=" ".join(filter(None, names)), **({} if place else {"scope": "row"}))
