"""The Dash app: a page that is a function of its address and of what the store holds, and follows both."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from dash import MATCH, Dash, Input, Output, State, dcc, html, no_update

from rlroute.errors import StoreError
from rlroute.experiments.dashboard import parts
from rlroute.experiments.dashboard.first import put_first
from rlroute.experiments.dashboard.follow import Followed
from rlroute.experiments.report.board import Board, Lot, Seen, make_lots
from rlroute.experiments.report.choice import Choice
from rlroute.experiments.report.views import PAGES, VIEWS
from rlroute.experiments.verdicts import MARGIN

SECONDS = 1.0
"""The page asks this often whether anything has changed."""
TITLE = "rlroute"
KEPT = 64
"""Pages that are kept drawn while nothing changes."""
_PAINT = "(raw) => raw ? painted(raw) : window.dash_clientside.no_update"
_REPAINT = """(search, shown) => {
  if ("version" in shown) document.getElementById("first")?.remove();
  if (!window.following) {
    window.following = true;
    DARK.addEventListener("change", () => {
      for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(plot, colours(plot.layout));
    });
  }
  return window.dash_clientside.no_update;
}"""


class Boards:
    """What is shown of a store, made anew where it has changed."""

    def __init__(
        self, store: Followed, results: Mapping[str, Mapping[str, Any]], reference: str | None, margin: float
    ) -> None:
        self.store, self._plain = store, Board(runs=(), results=results, reference=reference, margin=margin)
        self._lock, self._made = threading.Lock(), dict[str, Board]()
        self._version, self._lots, self._others = -1, list[Lot](), tuple[Seen, ...]()
        self._before = dict[str, Board]()
        self._drawn = dict[str, list[Any]]()

    def look(self) -> int:
        """Read what is new in the store; return a number that is another whenever anything is."""
        with self._lock:
            runs = self.store.look()
            if self.store.version != self._version:
                self._version = self.store.version
                self._lots, self._others = make_lots(runs), tuple(run for run in runs if run.config is None)
                self._before, self._made, self._drawn = self._made, {}, {}
            return self._version

    @property
    def lots(self) -> list[Lot]:
        """The lots of runs that may be compared."""
        return self._lots

    @property
    def total(self) -> int:
        """How many runs there are."""
        return sum(len(lot.runs) for lot in self._lots) + len(self._others)

    def of(self, choice: Choice) -> Board:
        """Return what a choice is about; a run's page is about its lot."""
        with self._lock:
            lot = next((lot for lot in self._lots if lot.key == choice.lot), self._lots[0] if self._lots else None)
            for one in self._lots if choice.run else []:
                lot = one if any(run.id == choice.run for run in one.runs) else lot
            key = lot.key if lot else ""
            if key not in self._made:
                others = [f"{other.title}: not comparable with these" for other in self._lots if other is not lot]
                runs = lot.runs if lot else ()
                self._made[key] = replace(
                    self._plain, runs=runs, others=self._others, left_out=tuple(others), ladder=self.store.ladder
                )
                if key in self._before:
                    self._made[key].take_over(self._before[key])
            return self._made[key]

    def body(self, choice: Choice) -> list[Any]:
        """Return the views of a page, which are drawn once while nothing changes."""
        found = self._drawn.get(choice.link)
        if found is None:
            board = self.of(choice)
            found = [draw(name, board, choice) for name in parts.views_of(choice)]
            if len(self._drawn) < KEPT:
                self._drawn[choice.link] = found
        return found


def make_app(
    store: Path,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    reference: str | None = None,
    margin: float = MARGIN,
) -> Dash:
    """Return the app over a store, which has been read once.

    Args:
        store: a run store, which need not be there yet, or a compact file.
        results: what other commands published, by name.
        reference: the entry that differences are taken to.
        margin: the difference below which entries are equivalent.

    Raises:
        StoreError: a compact file cannot be read.
    """
    boards = Boards(Followed(store), results or {}, reference, margin)
    boards.look()
    for page in PAGES:  # what is loaded and worked out once is so before anyone waits for it
        boards.body(Choice(page=page))
    with as_file(files("rlroute.experiments.report") / "assets") as assets:
        app = Dash(
            __name__,
            assets_folder=str(assets.resolve()),
            serve_locally=True,
            suppress_callback_exceptions=True,
            title=TITLE,
            update_title="",
        )
    app.layout = _layout(store)
    plain = app.interpolate_index
    app.interpolate_index = lambda **said: put_first(plain(**said), _filled(store, boards))
    _connect(app, boards)
    return app


def _layout(store: Path, nav: Any = None, pickers: Any = None, body: Any = None) -> Any:
    return html.Div(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Interval(id="tick", interval=SECONDS * 1000),
            dcc.Store(id="shown", data={}),
            dcc.Store(id="listening"),
            html.Header([html.H1(["rlroute ", html.Span(str(store), className="small")]), html.Nav(nav, id="nav")]),
            html.Div(pickers, id="pickers"),
            dcc.Input(id="filter", placeholder="rows with these words", debounce=0.3, type="text", className="plain"),
            html.Main(body, id="body"),
        ],
        className="board",
    )


def _filled(store: Path, boards: Boards) -> Any:
    """Return the page that is asked for, as it stands; or why it cannot be read."""
    from flask import request

    try:
        boards.look()
    except StoreError as error:
        return _layout(store, body=html.P(str(error), className="alarm"))
    choice = Choice.of(request.query_string.decode(errors="replace"))
    board = boards.of(choice)
    nav = parts.navigation(choice, boards.lots, boards.total)
    return _layout(store, nav, parts.pickers(board, choice), boards.body(choice))


def _connect(app: Dash, boards: Boards) -> None:
    app.clientside_callback(_REPAINT, Output("listening", "data"), Input("url", "search"), Input("shown", "data"))
    raw, graph = ({"view": MATCH, "part": part} for part in ("raw", "graph"))
    app.clientside_callback(_PAINT, Output(graph, "figure"), Input(raw, "data"))

    def follow(search: str | None, ticks: int | None, before: dict[str, Any]) -> Any:
        version, link = boards.look(), Choice.of(search).link
        if before.get("version") == version and before.get("link") == link:
            return (no_update,) * 5
        choice, old = Choice.of(search), Choice.of(before.get("link"))
        board = boards.of(choice)
        # What is being typed is not written over, neither by an answer to itself nor by one to an earlier click.
        keep = choice.filter == old.filter or (bool(before) and old.but(filter=choice.filter) == choice)
        return (
            parts.navigation(choice, boards.lots, boards.total),
            parts.pickers(board, choice),
            boards.body(choice),
            no_update if keep else choice.filter,
            {"version": version, "link": link},
        )

    def narrow(words: str | None, search: str | None) -> Any:
        choice = Choice.of(search)
        return no_update if (words or "") == choice.filter else choice.but(filter=words or "").link

    page = [Output("nav", "children"), Output("pickers", "children"), Output("body", "children")]
    app.callback(
        *page,
        Output("filter", "value"),
        Output("shown", "data"),
        Input("url", "search"),
        Input("tick", "n_intervals"),
        State("shown", "data"),
    )(follow)
    app.callback(Output("url", "search"), Input("filter", "value"), State("url", "search"), prevent_initial_call=True)(
        narrow
    )


def draw(name: str, board: Board, choice: Choice) -> Any:
    """Return a view. A defect in one does not take the others from the reader: it stands in its place, and its
    traceback in the standard error.
    """
    try:
        return parts.shown(name, VIEWS[name].draw(board, choice), board, choice)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return parts.shown(name, error, board, choice)
