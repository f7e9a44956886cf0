"""The dashboard and the report in a real browser: nothing is asked of anybody else, no error is logged, and what a
reader chooses works, is in the address, and comes back from it.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from rlroute.experiments.comparison.ladder import reduce
from rlroute.experiments.comparison.ladder_file import FILE, key_of
from rlroute.experiments.dashboard.app import make_app
from rlroute.experiments.dashboard.published import read_results
from rlroute.experiments.dashboard.server import make_server, protect
from rlroute.experiments.report.page import write_report
from rlroute.experiments.report.views import PAGES, RUN_PAGE
from tests.boards import lay
from tests.conftest import HANG, until
from tests.test_dashboard import MEASURED
from tests.test_ladder import rungs
from tests.test_table import EXPERTS, changed, make_run, make_runs, with_regret

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver, playwright, is not installed")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path"),
]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
MANY = ("switch", "dense", *(f"router_{i}" for i in range(9)))
WAIT = HANG * 1000.0
DRAWN = ".js-plotly-plot .scatterlayer .trace"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        found = driver.chromium.launch(executable_path=CHROMIUM, args=flags, timeout=WAIT)
        yield found
        found.close()


class Visit:
    """A page, and whatever it asked for or complained of that it should not."""

    def __init__(self, browser: Any, base: str, **look: Any) -> None:
        self.base, self.wrong = base, list[str]()
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **look)
        self.page.set_default_timeout(WAIT)
        self.page.on("request", self._asked)
        self.page.on("console", self._logged)
        self.page.on("pageerror", self._failed)
        self.page.on("dialog", self._alerted)

    def _logged(self, said: Any) -> None:
        if said.type == "error":
            self.wrong.append(said.text)

    def _failed(self, error: Any) -> None:
        self.wrong.append(str(error))

    def _alerted(self, dialog: Any) -> None:
        self.wrong.append("an alert")
        dialog.dismiss()

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.wrong.append(request.url)

    def go(self, query: str = "", sign: str = DRAWN) -> Any:
        self.page.goto("about:blank")  # a page at the same address with other choices is a page of its own
        self.page.goto(self.base + query)
        self.page.wait_for_selector(sign)
        return self.page


@contextlib.contextmanager
def visiting(browser: Any, base: str, **look: Any) -> Iterator[Visit]:
    visit = Visit(browser, base, **look)
    yield visit
    visit.page.close()
    assert visit.wrong == []


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("browser") / "runs"
    for run in made():
        lay(store, run)
    keys = [key_of(run.config["config"]) for run in made()[:18:2]]
    found = reduce(rungs(1.0, *(0.55 + place / 10 for place in range(8))), keys, [], "climbed so")
    (store / FILE).write_text(json.dumps(found.to_dict()))
    return store


def made() -> list[Any]:
    """Return runs of twelve entries, of which one has a hostile field that its label tells it apart by."""
    runs = [with_regret(run, MEASURED) if run.config["router"] != "dense" else run for run in make_runs(MANY, seeds=2)]
    runs += [make_run("switch", seed, {"note": HOSTILE}) for seed in range(2)]
    return [changed(run, "config.command", HOSTILE) for run in runs]


@pytest.fixture(scope="module")
def base(store: Path) -> Iterator[str]:
    app = make_app(store, read_results(None))
    protect(app, None)
    server = make_server(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def met(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression holds: the page's policy forbids what Playwright's own wait does."""
    until(lambda: page.evaluate(expression))


def column(page: Any, view: str, place: int) -> list[str]:
    """Return the texts of a table's column."""
    cells = page.locator(f"#view-{view} tbody tr > :nth-child({place})")
    return [text.strip() for text in cells.all_inner_texts()]


def in_address(page: Any, part: str) -> None:
    until(lambda: part in page.evaluate("location.href"))


# The dashboard


def test_every_page_of_the_dashboard_is_drawn(browser: Any, base: str) -> None:
    with visiting(browser, base) as visit:
        for page in ("", "table", "verdicts", "experts", "signals"):
            visit.go(f"?page={page}", ".js-plotly-plot .xtitle")
            assert visit.page.locator("text=cannot be drawn").count() == 0
        run = make_run("switch").id
        visit.go("?page=runs", "#view-runs tbody tr").click(f"text={run}")
        visit.page.wait_for_selector("#view-config pre")
        assert f"run={run}" in visit.page.url
        assert "c0ffee" in visit.page.inner_text("#view-facts")  # the commit to repeat it at


SHEETS = ("progress", "results", "verdicts", "rungs", "said", "claims", "runs", "facts", "evals")
LISTINGS = ("config",)
CUT = """[...document.querySelectorAll("main *, header *, .pickers *")].filter((part) => {
  const {left, right, width} = part.getBoundingClientRect();
  if (!width || (left >= -1 && right <= innerWidth + 1)) return false;
  for (let at = part; at; at = at.parentElement) if (getComputedStyle(at).overflowX !== "visible") return false;
  return true;
}).map((part) => part.outerHTML.slice(0, 200))"""
"""What is beyond the window, and in nothing that can be scrolled."""
CLIPPED = """[...document.querySelectorAll(".js-plotly-plot")].flatMap((plot) => {
  const box = plot.querySelector(".main-svg").getBoundingClientRect();
  return [...plot.querySelectorAll(".xtitle, .ytitle, .xtick text, .ytick text, .annotation-text")].filter((text) => {
    const {left, right, width} = text.getBoundingClientRect();
    return width && (left < box.left - 2 || right > box.right + 2);
  }).map((text) => text.textContent);
})"""
"""Texts of figures that are cut off at a figure's left or right."""


@pytest.mark.slow
@pytest.mark.parametrize("width", [800, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", [*PAGES, "run"])
def test_every_page_is_whole(browser: Any, base: str, page: str, scheme: str, width: int) -> None:
    views = RUN_PAGE if page == "run" else PAGES[page][1]
    with visiting(browser, base, color_scheme=scheme) as visit:
        visit.page.set_viewport_size({"width": width, "height": 900})
        seen = visit.go(f"?page={page}&run={make_run('router_1').id}", f"#view-{views[-1]}")
        for view in views:
            content = {**dict.fromkeys(SHEETS, "tbody tr td"), **dict.fromkeys(LISTINGS, "pre")}
            seen.wait_for_selector(f"#view-{view} {content.get(view, '.js-plotly-plot .ytitle')}")
        assert seen.locator("#first, .absent, :text('cannot be drawn')").count() == 0
        until(lambda: seen.evaluate(CLIPPED) == [])
        assert seen.evaluate(CUT) == [] and seen.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_the_first_html_shows_the_store_without_scripts(browser: Any, base: str) -> None:
    with visiting(browser, base, java_script_enabled=False) as visit:
        page = visit.go("", "#first tbody tr")
        assert f"switch (note={HOSTILE})" in page.inner_text("#first") and "24 runs" in page.inner_text("nav")
        page.click("nav a >> text=Runs")
        page.wait_for_selector(f"#first tbody tr >> text={make_run('router_1').id}")


@pytest.mark.slow
def test_hostile_names_are_text(browser: Any, base: str) -> None:
    with visiting(browser, base) as visit:
        page = visit.go("?entries=all")
        assert f"switch (note={HOSTILE})" in column(page, "progress", 1)
        assert page.locator("main img[src=x], svg img, main script").count() == 0
        page = visit.go("?page=run&run=" + quote(made()[-1].id))
        assert HOSTILE in page.inner_text("#view-facts")
        for hostile in ("page", "run", "entries", "sort", "filter", "lot"):
            visit.go(f"?page=runs&{hostile}={quote(HOSTILE)}", "#react-entry-point main section")


@pytest.mark.slow
def test_tables_are_sorted_and_filtered_by_the_address(browser: Any, base: str) -> None:
    with visiting(browser, base) as visit:
        page = visit.go("?page=table", "#view-results tbody tr")
        page.click("#view-results thead >> text=validation bits/byte")
        page.wait_for_selector("#view-results th[aria-sort=ascending]")
        in_address(page, "sort=validation")
        ascending = [float(text.split()[0]) for text in column(page, "results", 4)]
        page.click("#view-results thead >> text=validation bits/byte")
        in_address(page, "sort=-validation")
        page.wait_for_selector("#view-results th[aria-sort=descending]")
        assert [float(text.split()[0]) for text in column(page, "results", 4)] == sorted(ascending)[::-1]
        page.fill("#filter", "router_7")
        in_address(page, "filter=router_7")
        met(page, "document.querySelectorAll('#view-results tbody tr').length === 1")
        again = visit.go(page.url.removeprefix(base), "#view-results tbody tr")
        assert column(again, "results", 1) == ["router_7"] and again.input_value("#filter") == "router_7"


@pytest.mark.slow
def test_entries_are_chosen_by_links(browser: Any, base: str) -> None:
    with visiting(browser, base) as visit:
        page = visit.go()
        assert page.locator(".entries .entry").count() == len(MANY) + 1
        assert page.locator(".entries .entry.on").count() == 8
        page.click(".entries .entry.off >> nth=0")
        met(page, "document.querySelectorAll('.entries .entry.on').length === 9")
        names = "new Set(document.querySelector('.js-plotly-plot').data.map(t => t.name)).size === 9"
        met(page, f"document.querySelector('.js-plotly-plot').data && {names}")
        again = visit.go(page.url.removeprefix(base))
        assert again.locator(".entries .entry.on").count() == 9
        again.click("text=training seconds")
        again.wait_for_selector(".js-plotly-plot .xtitle >> text=training seconds")


@pytest.mark.slow
def test_a_layer_is_picked(browser: Any, base: str) -> None:
    heat = ".js-plotly-plot .heatmaplayer image"
    with visiting(browser, base) as visit:
        page = visit.go("?page=experts", heat)
        shares = "JSON.stringify(document.querySelector('.js-plotly-plot').data[0].z)"
        first = page.evaluate(shares)
        assert len(json.loads(first)) == EXPERTS
        page.click(".layers .entry.off")
        in_address(page, "site=1")
        met(page, f"{shares} !== {json.dumps(first)}")


@pytest.mark.slow
def test_what_is_appended_is_shown_without_a_click(browser: Any, base: str, store: Path) -> None:
    run = make_run("late")  # an entry none of whose runs has ended
    folder = lay(store, run, steps=100)
    with visiting(browser, base) as visit:
        page = visit.go("?entries=all&kinds=train")
        shown = "document.querySelector('#view-curves .js-plotly-plot').data.some(t => t.x && t.x.at(-1) === {})"
        met(page, shown.format(100 * 2048))
        page.evaluate("document.querySelector('main').dataset.same = 'page'")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(run.train[10])[:40])
        page.wait_for_timeout(1500)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(run.train[10])[40:] + "\n")
        met(page, shown.format(110 * 2048))
        assert page.evaluate("document.querySelector('main').dataset.same") == "page"
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_readers_scheme_is_followed(browser: Any, base: str, scheme: str) -> None:
    other = {"light": "dark", "dark": "light"}[scheme]
    ink = "getComputedStyle(document.querySelector('.js-plotly-plot .xtitle')).fill"
    with visiting(browser, base, color_scheme=scheme) as visit:
        page = visit.go()
        text = page.evaluate("getComputedStyle(document.body.querySelector('h2')).color")
        met(page, f"{ink} === {json.dumps(text)}")
        page.emulate_media(color_scheme=other)
        met(page, f"{ink} !== {json.dumps(text)}")


# The report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(made(), path, results=read_results(None))
    return path.as_uri()


@pytest.mark.slow
def test_the_report_asks_nobody_and_keeps_what_is_chosen_in_its_address(browser: Any, report: str) -> None:
    with visiting(browser, report) as visit:
        page = visit.go()
        assert HOSTILE in page.inner_text("main") and page.locator("main img, main script").count() == 0
        page.click("#view-results ~ .scroll >> nth=0 >> text=validation bits/byte")
        in_address(page, "sort=validation")
        page.click("button.entry[aria-pressed=false] >> nth=0")
        in_address(page, "entries=")
        page.select_option("#axis", "seconds")
        page.select_option("#site", "1")
        page.fill("#filter", "router_7")
        in_address(page, "filter=router_7")
        again = visit.go(page.url.removeprefix(report))
        assert again.locator("button.entry[aria-pressed=true]").count() == 9
        assert (again.input_value("#axis"), again.input_value("#site")) == ("seconds", "1")
        again.wait_for_selector("#curves .xtitle >> text=training seconds")
        seen = again.locator("table.sheet >> nth=0").locator("tbody tr:visible > :first-child").all_inner_texts()
        assert [text.strip() for text in seen] == ["router_7"]
        assert again.locator("th[aria-sort=ascending]").count() > 0


@pytest.mark.slow
def test_a_run_of_the_report_is_drawn_when_it_is_opened(browser: Any, report: str) -> None:
    run = made()[0].id
    with visiting(browser, report) as visit:
        page = visit.go()
        assert page.locator("details .js-plotly-plot").count() == 0
        page.click(f"#view-runs ~ .scroll [data-run='{run}']")
        page.wait_for_selector(f"details[open] {DRAWN}")
        assert page.locator("details .js-plotly-plot").count() == 1
        assert "c0ffee" in page.inner_text("details[open]") and page.locator("details[open] tbody tr").count() > 5
        visit.go(f"#run={run}", f"details[open] {DRAWN}")


@pytest.mark.slow
@pytest.mark.parametrize("width", [800, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_whole(browser: Any, report: str, scheme: str, width: int) -> None:
    with visiting(browser, report, color_scheme=scheme) as visit:
        visit.page.set_viewport_size({"width": width, "height": 900})
        page = visit.go(f"#run={made()[0].id}", f"details[open] {DRAWN}")
        for view in ("progress", "results", "verdicts", "claims", "runs"):
            assert page.locator(f"#view-{view} ~ .scroll tbody tr").count() > 0
        until(lambda: page.evaluate(CLIPPED) == [])
        assert page.evaluate(CUT) == [] and page.evaluate("document.documentElement.scrollWidth <= innerWidth")
