"""The report is one file that asks nobody for anything, says what the table says, and survives hostile names."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlroute.errors import ComparisonError, StoreError
from rlroute.experiments.comparison.entries import make_entries
from rlroute.experiments.comparison.ladder import reduce
from rlroute.experiments.comparison.ladder_file import FILE, key_of
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import columns
from rlroute.experiments.report.board import FIRST, Board, Group, Seen, make_styles
from rlroute.experiments.report.choice import AXES
from rlroute.experiments.report.curves import curves_figure
from rlroute.experiments.report.differences import forest_figure
from rlroute.experiments.report.loads import loads_figure
from rlroute.experiments.report.page import EVERYTHING, conclude, write_report
from rlroute.experiments.report.sheets import repeat
from rlroute.experiments.report.style import COLOURS, GREY, style_of
from rlroute.experiments.report.tradeoff import tradeoff_figure
from rlroute.experiments.report.views import VIEWS
from rlroute.experiments.statistics import differences, t_interval
from rlroute.reading import read_runs
from rlroute.schema import RunRecord
from tests.boards import lay
from tests.commands import refused, rlroute
from tests.test_ladder import rungs
from tests.test_table import EFFECT, EXPERTS, LAYERS, changed, diverged, make_run, make_runs, sited

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"
MANY = ("switch", "dense", *(f"router_{i}" for i in range(12)))


def make_groups(runs: list[RunRecord]) -> list[Group]:
    """Return the entries of runs as figures take them, in the order of their labels."""
    return sorted(Board(runs=tuple(map(Seen.of, runs)), compared=runs).groups, key=lambda group: group.label)


class Page(HTMLParser):
    """Collects what a browser would load, and the text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.data = ""
        self.into = self.texts  # where text goes that comes next
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.into = []

    def handle_endtag(self, tag) -> None:
        if tag == "script" and ("type", "application/json") in self.tags[-1][1].items():
            self.data = "".join(self.into)
        elif tag == "script":
            self.scripts.append("".join(self.into))
        self.into = self.texts

    def handle_data(self, data: str) -> None:
        self.into.append(data)

    @property
    def figures(self) -> dict[str, Any]:
        """What the page's figures are drawn from."""
        return dict(json.loads(self.data))


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
    outside = own_scripts(page) + "".join(page.texts) + page.data + json.dumps(page.tags)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", outside)
    assert "showSendToCloud: false" in own_scripts(page)


def test_policy_lets_the_pages_two_scripts_run_and_no_other(text: str) -> None:
    page = Page(text)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(maxsplit=1) for rule in (policy or "").split(";"))
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert rules["default-src"] == "'none'" and len(page.scripts) == 2
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in hashes]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


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
    assert "<" not in page.data and len(page.scripts) == 2
    drawn = json.dumps([[figure["data"], figure["layout"].get("annotations")] for figure in page.figures.values()])
    assert "<img" not in drawn and "&lt;img" in drawn  # Plotly reads markup in its texts


def test_conclusion_names_who_is_worse_and_who_is_not() -> None:
    first, *others = conclude(build_table(make_runs()))
    said = dict(sentence.split(": ", 1) for sentence in others)
    assert first.startswith("bias_balanced has the lowest mean")
    assert said["Better than switch, paired by seed"] == "none."
    assert all(name in said["Worse than switch"] for name in ("hash", "unbalanced", "dense"))
    assert said["Unresolved"] == "bias_balanced." and said["Equivalent to switch within 0.02 bits per byte"] == "none."
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


def curve(figure: Any, name: str) -> Any:
    return next(trace for trace in figure.data if trace.name == name and trace.customdata is not None)


def test_curves_are_means_with_t_bands() -> None:
    runs = make_runs(("switch", "dense"))
    groups = make_groups(runs)
    figure = curves_figure(groups, make_styles(groups))
    drawn = curve(figure, "switch")
    band = next(trace for trace in figure.data if trace.name == "switch" and trace.fill == "toself")
    last = [run.evals[-1] for run in runs if run.config["router"] == "switch"]
    interval = t_interval([row["bits_per_byte"] for row in last])
    assert (drawn.x[-1], drawn.y[-1]) == (last[0]["tokens"], pytest.approx(interval.mean, abs=1e-5))
    ends = sorted(y for x, y in zip(band.x, band.y, strict=True) if x == last[0]["tokens"])
    assert ends == pytest.approx([interval.low, interval.high], abs=1e-5)
    single = make_groups(make_runs(("switch",), seeds=1))
    assert not [trace for trace in curves_figure(single, make_styles(single)).data if trace.fill == "toself"]


def test_training_losses_are_drawn_in_the_unit_of_the_evaluations() -> None:
    rows: Any = [
        {"kind": "train", "step": s, "tokens": s * 2048, "seconds": s / 10, "loss": 5 / s} for s in (10, 20, 30)
    ]
    runs = [replace(run, train=list(rows)) for run in make_runs(("switch",))]
    runs[1].train.pop()  # a step that not all seeds have is not drawn
    groups = make_groups(runs)
    (drawn,) = (t for t in curves_figure(groups, make_styles(groups)).data if t.meta["kind"] == "train")
    bits = [run.evals[-1]["bits_per_byte"] / run.evals[-1]["loss"] for run in runs]
    assert list(drawn.x) == [10 * 2048, 20 * 2048]
    assert drawn.y == pytest.approx([5 / s * sum(bits) / len(bits) for s in (10, 20)], abs=1e-5)


def test_curves_can_be_read_against_flops_and_time() -> None:
    runs = make_runs(("switch", "dense"))
    groups = make_groups(runs)
    drawn = curve(curves_figure(groups, make_styles(groups)), "switch")
    switch = [run for run in runs if run.config["router"] == "switch"]
    model, last = switch[0].summary["model"], [run.evals[-1] for run in switch]
    per_token = model["flops_per_token"] + model["training_only_flops_per_token"]
    assert set(drawn.meta["x"]) == set(AXES) and list(drawn.x) == drawn.meta["x"]["tokens"]
    assert drawn.meta["x"]["flops"][-1] == pytest.approx(3 * last[0]["tokens"] * per_token, rel=1e-5)
    seconds = sum(row["seconds"] for row in last) / len(last)
    assert drawn.meta["x"]["seconds"][-1] == pytest.approx(seconds, rel=1e-5)


def test_forest_shows_the_paired_differences_of_the_table() -> None:
    runs = make_runs()
    entries, table = {e.label: e for e in make_entries(runs)}, build_table(runs)
    figure = forest_figure(table, entries, make_styles(list(entries.values())))
    assert figure is not None
    means = {t.y[0]: t for t in figure.data if t.error_x.array is not None}
    assert list(means) == [row.label for row in table.rows if row.label != table.reference]
    for row in table.rows:
        if row.difference is not None:
            drawn, seeds = means[row.label], [t for t in figure.data if t.y[0] == row.label and len(t.x) > 1]
            assert (drawn.x[0], drawn.error_x.array[0]) == (row.difference.mean, row.difference.half_width)
            mine = entries[row.label].bits_by_seed
            assert list(seeds[0].x) == differences(mine, entries[table.reference].bits_by_seed)
            assert drawn.marker.symbol.endswith("-open") == (row.p_holm is None or row.p_holm >= 0.05)
    alone = make_runs(("switch",))
    assert forest_figure(build_table(alone), {e.label: e for e in make_entries(alone)}, {}) is None


def test_every_entry_has_one_colour_in_all_figures() -> None:
    runs = make_runs()
    entries, table = make_entries(runs), build_table(runs)
    styles = make_styles(entries)
    assert len({style.colour for style in styles.values()}) == len(EFFECT)
    curves = {t.name: t.line.color for t in curves_figure(make_groups(runs), styles).data if t.customdata is not None}
    points = tradeoff_figure(table, {e.label: e for e in entries}, styles)
    assert {t.name: t.marker.color for t in points.data if t.name} == curves


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


MACHADO = {
    "full sight": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""What readers see of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1."""
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])


def cielab(colour: str, sight: Any) -> Any:
    """Return L*, a* and b* of what a reader sees of a colour."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    x, y, z = (XYZ @ np.clip(np.array(sight) @ linear, 0, 1)) / XYZ.sum(1)
    x, y, z = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", MACHADO)
def test_colours_are_told_apart_by_colour_blind_readers(sight: str) -> None:
    assert len(COLOURS) == FIRST
    seen = {colour: cielab(colour, MACHADO[sight]) for colour in (*COLOURS, GREY)}
    assert min(np.linalg.norm(seen[one] - seen[two]) for one, two in combinations(seen, 2)) >= 15


def test_no_series_is_told_apart_by_colour_alone() -> None:
    runs = make_runs(MANY)
    last = runs.pop()
    going = replace(Seen.of(last), state="running", summary=None, record=None)
    board = Board(runs=(*map(Seen.of, runs), going))
    styles = {group.hash: board.styles[group.label] for group in board.groups}
    for name in ("curves", "health", "balance"):
        figure: Any = VIEWS[name].draw(board, EVERYTHING)
        series = [trace for trace in figure.data if "entry" in trace.meta and trace.fill != "toself"]
        assert len({trace.meta["entry"] for trace in series}) > FIRST
        for trace in series:
            style = styles[trace.meta["entry"]]
            assert trace.marker.symbol == style.symbol, name
            assert "lines" not in trace.mode or trace.line.dash == style.dash, name


def test_styles_are_told_apart_without_colour_and_seen_on_both_papers(text: str) -> None:
    assert len({(s.shape, s.filled, s.dash) for s in map(style_of, range(32))}) == 32
    assert len({(s.shape, s.filled) for s in map(style_of, range(16))}) == 16
    papers = [luminance(paper) for paper in re.findall(r"--page: (#\w{6})", text)]
    assert len(papers) == 2
    for colour in map(luminance, (*COLOURS, GREY)):
        for paper in papers:
            assert (max(colour, paper) + 0.05) / (min(colour, paper) + 0.05) > 3


def test_eight_entries_are_shown_at_first_with_the_reference_and_the_yardstick(tmp_path: Path) -> None:
    runs = make_runs(MANY)
    write_report(runs, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    buttons = [attrs for tag, attrs in page.tags if tag == "button" and attrs.get("class") == "entry"]
    first = [row.label for row, b in zip(build_table(runs).rows, buttons, strict=True) if b["aria-pressed"] == "true"]
    assert len(buttons) == len(MANY) and len(first) == FIRST == 8 and {"switch", "dense"} < set(first)
    curves = page.figures["curves"]["data"]
    assert {trace["meta"]["entry"] for trace in curves} == {
        run.config["config_hash"] for run in runs
    }  # the others are there to be shown


def test_heatmaps_show_every_seed_of_each_layer_of_each_entry_on_one_scale() -> None:
    entries = make_groups(make_runs(("switch", "unbalanced"), seeds=3))
    figure = loads_figure(entries)
    loads = figure.layout.meta["loads"]
    assert [[[drawn["seed"] for drawn in seeds] for seeds in sites] for sites in loads] == [[[0, 1, 2]] * LAYERS] * 2
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"} and len(figure.data) == 3
    assert [note.text for note in figure.layout.annotations] == ["seed 0", "seed 1", "seed 2"]
    for seed, run in enumerate(entries[1].runs):
        last = [row[-1] for row in loads[1][1][seed]["share"]]
        assert last == pytest.approx([f * EXPERTS for f in run.loads[-1]["load_LE"][1]], abs=5.1e-3)
    assert [list(map(list, trace.z)) for trace in figure.data] == [drawn["share"] for drawn in loads[0][0]]


def test_a_seed_without_loads_is_an_empty_heatmap() -> None:
    runs = make_runs(("switch",), seeds=2)
    runs[1].loads.clear()
    empty = loads_figure(make_groups(runs)).layout.meta["loads"][0][0][1]
    assert empty == {"seed": 1, "steps": [], "share": []}


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
    picker = re.search(r'<select id="site".*?</select>', (tmp_path / "report.html").read_text(), re.DOTALL)
    assert picker and re.findall(r">([^<]+)</option>", picker[0]) == ["0.attention", "0", "1.attention", "1"]
    (sites,) = loads_figure(make_groups(runs)).layout.meta["loads"]
    assert [len(seeds[0]["share"]) for seeds in sites] == [4, EXPERTS, 4, EXPERTS]


def test_a_run_that_chose_nothing_has_a_page(tmp_path: Path) -> None:
    runs = [changed(make_run("hash", seed), "summary.final.max_vio_L", [None, None]) for seed in range(2)]
    write_report([*runs, *make_runs(("switch",), seeds=2)], tmp_path / "report.html")
    figure = tradeoff_figure(
        build_table(runs), {e.label: e for e in make_entries(runs)}, make_styles(make_entries(runs))
    )
    assert {trace.xaxis for trace in figure.data} == {"x2"}  # against throughput alone


def test_the_ladder_of_a_store_is_on_its_page_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    store, runs = tmp_path / "runs", make_runs(("switch", "hash"), seeds=2)
    for run in runs:
        lay(store, run)
    command = ("report", store, "--results", tmp_path, "--out")
    found = reduce(rungs(1.0, 1.3), [key_of(run.config["config"]) for run in runs[::2]], ["a"], "climbed so")
    (store / FILE).write_text(json.dumps(found.to_dict()))
    assert rlroute(*command, tmp_path / "report.html").code == 0
    page = Page((tmp_path / "report.html").read_text())
    assert {"losses", "multipliers"} <= page.figures.keys()
    assert "climbed so" in page.texts and str(found.entries[1].compute) in page.texts
    assert "compute multiplier" in page.texts
    (store / FILE).write_text(json.dumps(found.to_dict() | {"entries": []}))
    assert FILE in refused(rlroute(*command, tmp_path / "another.html"))
    assert not (tmp_path / "another.html").exists()


def test_every_run_has_its_page_and_those_that_did_not_end_are_said(tmp_path: Path) -> None:
    store, runs = tmp_path / "runs", make_runs(("switch", "hash"), seeds=2)
    for run in runs:
        lay(store, run)
    cut = lay(store, make_run("switch", 2), steps=200)
    failed = lay(store, make_run("late"), steps=100)
    (failed / "failed.json").write_text(json.dumps({"id": failed.name, "reason": "it was lost"}))
    lay(store, make_run("elsewhere", train__batch_size=8), steps=100)  # which may not be compared with these
    assert rlroute("report", store, "--results", tmp_path, "--out", tmp_path / "report.html").code == 0
    page = Page((tmp_path / "report.html").read_text())
    said = " ".join("".join(page.texts).split())
    shown = [attrs["id"] for tag, attrs in page.tags if tag == "details"]
    assert sorted(map(str, shown)) == sorted(f"run-{name}" for name in [*(r.id for r in runs), cut.name, failed.name])
    assert len([name for name in page.figures if name.startswith("one-")]) == len(shown)
    for title in ("This run", "Its loss", "Its evaluations", "Its configuration"):
        assert said.count(title) == len(shown)
    assert "2 of 3" in said and "set aside: it was lost" in said and "interrupted" in said
    for run in runs:
        assert repeat(Seen.of(run)) in said and f'"lr": {run.config["config"]["train"]["lr"]}' in said
    assert build_table(runs).rows == build_table(read_runs(store)).rows  # the table is of those that ended


def test_conclusion_names_who_is_untuned() -> None:
    assert "Untuned: bandit." in list(conclude(build_table(make_runs(("bandit",), seeds=2))))
