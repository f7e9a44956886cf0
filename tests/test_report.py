"""The report is one file that asks nobody for anything, says what the table says, and survives hostile names."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlroute.errors import ComparisonError, StoreError
from rlroute.experiments.comparison.entries import make_entries
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import columns
from rlroute.experiments.report.figures import balance_figure, curves_figure, loads_figure, make_styles
from rlroute.experiments.report.page import conclude, write_report
from rlroute.experiments.statistics import t_interval
from tests.test_table import EFFECT, EXPERTS, LAYERS, changed, diverged, make_run, make_runs, sited

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"


class Page(HTMLParser):
    """Collects what a browser would load, and the text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        (self.scripts if self.tags and self.tags[-1][0] == "script" else self.texts).append(data)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(make_runs(), path, reference=None)
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left
    return path.read_text()


def own_scripts(page: Page) -> str:
    """Return all scripts but Plotly's own bundle, which names many addresses that only maps would ask."""
    bundles = [script for script in page.scripts if "plotly.js v" in script[:200]]
    assert len(bundles) == 1
    return "".join(script for script in page.scripts if script not in bundles)


def test_nothing_is_fetched(text: str) -> None:
    page = Page(text)
    assert not [
        attrs for _, attrs in page.tags for name in attrs if name in ("src", "href", "srcset", "action", "poster")
    ]
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "form")]
    outside = own_scripts(page) + "".join(page.texts) + json.dumps(page.tags)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", outside)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; script-src 'unsafe-inline';")
    assert '"showSendToCloud": true' not in text and text.count('"showSendToCloud": false') == 3


def test_page_says_what_the_table_says(text: str) -> None:
    said = " ".join("".join(Page(text).texts).replace("\xa0", " ").split())
    table = build_table(make_runs())
    for row in table.rows:
        for cell in columns(table).values():
            assert cell(row) in said
    for title, note in table.notes:
        assert not note or (title in said and note in said)


def test_same_records_give_the_same_bytes(text: str, tmp_path: Path) -> None:
    write_report(make_runs()[::-1], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    runs = [changed(make_run(router, s), "config.command", HOSTILE) for router in (HOSTILE, "switch") for s in range(2)]
    write_report(runs, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert not [tag for tag, _ in page.tags if tag == "img"] and not [a for _, a in page.tags if "onerror" in a]
    assert HOSTILE in "".join(page.texts)  # seen as it is, not as markup
    assert "<img" not in own_scripts(page)
    entries = make_entries(runs)
    for trace in curves_figure(entries, make_styles(entries)).data:
        assert "<" not in (trace.name or "") + (trace.legendgroup or "")


def test_conclusion_names_who_is_separated_and_who_is_not() -> None:
    first, *others = conclude(build_table(make_runs()))
    said = dict(sentence.split(": ", 1) for sentence in others)
    assert first.startswith("bias_balanced has the lowest mean")
    assert said["Better than switch, paired by seed"] == "none."
    assert all(name in said["Worse than switch"] for name in ("hash", "unbalanced", "dense"))
    assert said["Not separated from switch"] == "bias_balanced."
    assert said["Dead experts"].startswith("unbalanced (") and "all others" in said["Dead experts"]


def test_conclusion_is_modest_about_one_seed_divergence_and_views_of_the_future() -> None:
    assert any("One seed has no interval" in sentence for sentence in conclude(build_table(make_runs(seeds=1))))
    runs = [*make_runs(), *(make_run("expert_choice", seed) for seed in range(3))]
    runs = [diverged(run) if run.config["router"] == "hash" else run for run in runs]
    said = " ".join(conclude(build_table(runs)))
    assert "Not causal: expert_choice." in said and "Diverged: 3 runs" in said
    assert list(conclude(build_table([diverged(make_run("hash"))]))) == [
        "Every run diverged: there is nothing to compare."
    ]


def test_curves_are_means_with_t_bands() -> None:
    runs = make_runs(("switch", "dense"))
    entries = make_entries(runs)
    figure = curves_figure(entries, make_styles(entries))
    curve = next(trace for trace in figure.data if trace.name == "switch")
    band = next(trace for trace in figure.data if trace.legendgroup == "switch" and trace.fill == "toself")
    last = [run.evals[-1] for run in runs if run.config["router"] == "switch"]
    interval = t_interval([row["bits_per_byte"] for row in last])
    assert (curve.x[-1], curve.y[-1]) == (last[0]["tokens"], interval.mean)
    assert {interval.low, interval.high} == {y for x, y in zip(band.x, band.y, strict=True) if x == last[0]["tokens"]}
    single = make_entries(make_runs(("switch",), seeds=1))
    assert [trace.fill for trace in curves_figure(single, make_styles(single)).data] == [None]


def test_every_entry_has_one_colour_in_all_figures() -> None:
    runs = make_runs()
    entries, table = make_entries(runs), build_table(runs)
    styles = make_styles(entries)
    assert len({style["colour"] for style in styles.values()}) == len(EFFECT)
    curves = {t.name: t.line.color for t in curves_figure(entries, styles).data if t.name}
    points = balance_figure(table, {e.label: e for e in entries}, styles)
    assert {t.name: t.marker.color for t in points.data if t.name} == {n: c for n, c in curves.items() if n != "dense"}


def test_heatmaps_show_each_layer_of_each_entry_on_one_scale() -> None:
    entries = make_entries(make_runs(("switch", "unbalanced"), seeds=2))
    figure, drawn = loads_figure(entries)
    assert drawn == [(0, 0), (0, 1), (1, 0), (1, 1)] and LAYERS == 2
    assert [bool(trace.visible) for trace in figure.data] == [True, False, False, False]
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    run = entries[1].runs[0]
    assert run.config["seed"] == 0
    last = [row[-1] for row in figure.data[3].z]
    assert last == pytest.approx([f * EXPERTS for f in run.loads[-1]["load_LE"][1]], abs=1e-4)


@pytest.mark.parametrize("routers", [("dense",), ("switch",)])
def test_one_entry_alone_has_a_page(routers: tuple[str, ...], tmp_path: Path) -> None:
    write_report(make_runs(routers, seeds=1), tmp_path / "report.html")
    assert "<table" in (tmp_path / "report.html").read_text()


def test_what_cannot_be_compared_or_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="'nonesuch'"):
        write_report(make_runs(), tmp_path / "report.html", reference="nonesuch")
    with pytest.raises(StoreError, match="nowhere"):
        write_report(make_runs(), tmp_path / "nowhere" / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_sites_are_named_by_their_keys_and_may_have_other_numbers_of_experts(tmp_path: Path) -> None:
    runs = [sited(make_run("switch", seed)) for seed in range(2)]
    write_report(runs, tmp_path / "report.html")
    options = re.findall(r'<option value="(\d)">([^<]*)</option>', (tmp_path / "report.html").read_text())
    assert options == [("0", "switch"), ("0", "0.attention"), ("1", "0"), ("2", "1.attention"), ("3", "1")]
    figure, drawn = loads_figure(make_entries(runs))
    assert drawn == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [len(trace.z) for trace in figure.data] == [4, EXPERTS, 4, EXPERTS]


def test_a_run_that_chose_nothing_has_a_page(tmp_path: Path) -> None:
    runs = [changed(make_run("hash", seed), "summary.final.max_vio_L", [None, None]) for seed in range(2)]
    write_report([*runs, *make_runs(("switch",), seeds=2)], tmp_path / "report.html")
    table = build_table(runs)
    assert (
        len(balance_figure(table, {e.label: e for e in make_entries(runs)}, make_styles(make_entries(runs))).data) == 0
    )


def test_conclusion_names_who_is_untuned() -> None:
    assert "Untuned: bandit." in list(conclude(build_table(make_runs(("bandit",), seeds=2))))
