"""The dashboard follows a store that grows, shows what is there and says what is not, keeps all that is chosen in its
address, and answers only who may ask.

Longer than most: every view, page and state is tried on the same few stores.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from dash import dcc, html
from hypothesis import given
from hypothesis import strategies as st

from rlroute.alarms import Alarm, alarms
from rlroute.errors import ConfigError
from rlroute.experiments import RESULTS
from rlroute.experiments.comparison.ladder import reduce
from rlroute.experiments.comparison.ladder_file import FILE, key_of
from rlroute.experiments.comparison.table import build_table, paired
from rlroute.experiments.dashboard import app as app_module
from rlroute.experiments.dashboard import first, follow, published, server
from rlroute.experiments.dashboard.app import Boards, make_app
from rlroute.experiments.dashboard.follow import Followed, FollowedRun, Thinned
from rlroute.experiments.launch.tail import Tail
from rlroute.experiments.report import views
from rlroute.experiments.report.board import FIRST, Board, Seen, make_lots
from rlroute.experiments.report.choice import ALL, Choice
from rlroute.experiments.report.page import EVERYTHING
from rlroute.experiments.report.runs import list_runs, to_grid
from rlroute.experiments.report.sheet import Cell, Sheet
from rlroute.experiments.report.tradeoff import pareto
from rlroute.experiments.report.views import PAGES, RUN_PAGE, VIEWS
from rlroute.experiments.verdicts import verdict
from rlroute.foreign import Unfit
from rlroute.reading import read_run
from tests.boards import board_of, lay
from tests.commands import refused, rlroute
from tests.test_ladder import rungs
from tests.test_table import LAYERS, REGRET, changed, diverged, make_run, make_runs, with_regret

MEASURED = REGRET | {"confidence_C": [i / 10 for i in range(10)], "nats_C": [0.1] * 10, "better_C": [None, *[0.5] * 9]}
HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs"


# Following


@given(st.integers(0, 200), st.integers(1, 9))
def test_rows_are_thinned_alike_however_many_there_are(count: int, most: int) -> None:
    thinned, lines = Thinned[int](most), range(count)
    for place in lines:
        thinned.add(place)
    stride = max(1, thinned.stride)
    wanted = [place for place in range(len(lines)) if place % stride == 0 or place == len(lines) - 1]
    assert thinned.rows == wanted and len(wanted) <= most + 1
    assert stride == 1 or len(lines) > most * stride // 2  # no coarser than it must be


def test_a_tail_leaves_what_has_no_end_and_sees_a_file_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    tail = Tail(path)
    assert list(tail.lines()) == [] and tail.turns == 0
    path.write_bytes(b"one\ntw")
    assert list(tail.lines()) == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\n\nthree\nfo")
    assert list(tail.lines()) == [b"two", b"", b"three"]
    assert list(tail.lines()) == [] and tail.turns == 1
    with path.open("ab") as file:
        file.write(b"\0\0\0\n")  # a shared folder may show the length of what is not there yet
    assert list(tail.lines()) == []
    (tmp_path / "new").write_bytes(b"one\n")
    (tmp_path / "new").replace(path)
    assert list(tail.lines()) == [b"one"] and tail.turns == 2


def test_a_tail_refuses_a_line_without_end(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"x" * 20)
    with mock.patch("rlroute.experiments.launch.tail.LINE", 10), pytest.raises(Unfit, match="more than 10 bytes"):
        list(Tail(path).lines())


def test_ended_runs_are_those_of_the_store(store: Path) -> None:
    runs = make_runs(("switch", "dense"), seeds=2)
    for run in runs:
        lay(store, run)
    seen = Followed(store).look()
    assert [run.id for run in seen] == sorted(run.id for run in runs)
    for one in seen:
        record = read_run(store / one.id)
        assert one.state == "finished" and one.record is not None and one.share == 1.0
        assert (one.summary, one.evals, one.loads) == (record.summary, record.evals, record.loads)
        assert build_table([one.record]) == build_table([record])


def test_what_is_appended_is_seen_and_only_what_changed_is_read(store: Path) -> None:
    run = make_run("switch")
    lay(store, make_run("hash"))
    folder, followed = lay(store, run, steps=200), Followed(store)
    before = {run.id: run for run in followed.look()}
    version = followed.version
    with mock.patch.object(follow, "read_part", side_effect=AssertionError("read again")):
        assert dict(before) == {run.id: run for run in followed.look()} and followed.version == version
    line = json.dumps(run.train[20] | {"step": 210})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line[:30])
    assert [one.last["step"] for one in followed.look() if one.id == run.id and one.last] == [200]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line[30:] + "\n")
    (now,) = (one for one in followed.look() if one.id == run.id)
    assert now.last is not None and now.last["step"] == 210 and followed.version > version
    assert now.state == "running"  # its rows grow, whoever holds its lock
    lay(store, run, steps=100)  # taken up again from an earlier checkpoint
    (now,) = (one for one in followed.look() if one.id == run.id)
    assert now.last is not None and now.last["step"] == 100 and len(now.train) == 10 and len(now.evals) == 1


def test_alarms_stand_while_rows_raise_them(store: Path) -> None:
    run = make_run("unbalanced")
    assert [alarm.kind for alarm in Seen.of(run).alarms if alarm.kind == "dead experts"]
    folder, followed = lay(store, run, steps=200), Followed(store)
    assert followed.look()[0].alarms == ()  # two evaluations are not three in a row
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(run.evals[2]) + "\n")
    assert {alarm.kind for alarm in followed.look()[0].alarms} == {alarm.kind for alarm in Seen.of(run).alarms}
    sheet = VIEWS["progress"].draw(Board(runs=followed.look()), Choice())
    assert isinstance(sheet, Sheet) and "dead experts" in sheet.rows[0][-1].text


def test_alarms_are_those_of_all_rows_however_many_are_drawn_and_however_they_come(store: Path) -> None:
    run = make_run("switch")
    folder = lay(store, run, steps=0)
    live = FollowedRun(folder, lambda: 0.0)
    live.look()
    rows: list[Any] = [
        {**run.train[0], "step": step, "seconds": 5.0 * step, "logits_L": [50.0 if step > 3191 else 1.0] * LAYERS}
        for step in range(1, 3200)
    ]
    for start, stop in pairwise((0, 3000, 3193, 3199)):
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[start:stop])
        os.utime(folder / "metrics.jsonl", (time.time() - 400,) * 2)  # a stall at one row in 5 s, none at one in 80 s
        live.look()  # what has come
        live.look()  # and for how long nothing has
        fresh = FollowedRun(folder)
        fresh.look()
        assert (live.seen.state, fresh.seen.state) == ("running", "interrupted")
        assert max(len(live.seen.train), len(fresh.seen.train)) < stop / 10
        for seen, idle in ((live.seen, 400.0), (fresh.seen, None)):
            wanted = alarms(run.id, run.config["config"]["model"], rows[:stop], idle)
            assert list(map(_raised, seen.alarms)) == list(map(_raised, wanted))
        assert {alarm.kind for alarm in live.seen.alarms} == {"stalled"} | (
            {"router logits"} if stop == 3199 else set()
        )


def _raised(alarm: Alarm) -> tuple[Any, ...]:
    return alarm.kind, alarm.site, alarm.step, alarm.threshold


def test_runs_that_wait_for_their_turn_are_counted(store: Path) -> None:
    lay(store, make_run("switch"))
    waiting = store / make_run("switch", 1).id
    waiting.mkdir()
    (waiting / ".lock").touch()
    (store / "a folder").mkdir()
    first, second = Followed(store).look()
    sheet = VIEWS["progress"].draw(Board(runs=(first,), others=(second,)), Choice())
    assert isinstance(sheet, Sheet) and sheet.rows[0][1].text == "1 of 2"


def test_a_run_that_stands_still_is_interrupted(store: Path) -> None:
    now = 0.0
    folder, followed = lay(store, make_run("switch"), steps=100), Followed(store, lambda: now)
    assert [run.state for run in followed.look()] == ["interrupted"]
    os.utime(folder / "metrics.jsonl", ns=(1, 1))
    assert [run.state for run in followed.look()] == ["running"]
    now = follow.LIVELY + 1
    assert [run.state for run in followed.look()] == ["interrupted"]


def test_damage_is_named_and_the_others_are_shown(store: Path, tmp_path: Path) -> None:
    lay(store, make_run("switch"))
    torn, other, odd = (lay(store, make_run(name)) for name in ("hash", "unbalanced", "bandit"))
    (torn / "summary.json").write_text('{"status": "finished"')
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": "many"}\n')
    (odd / "config.json").write_text((torn / "config.json").read_text())
    (store / "link").symlink_to(tmp_path)
    seen = {run.id: run for run in Followed(store).look()}
    assert seen[make_run("switch").id].state == "finished"
    damaged = {run.id: run.reason for run in seen.values() if run.state == "damaged"}
    assert set(damaged) == {torn.name, other.name, odd.name, "link"}
    assert "step" in damaged[other.name] and "another run" in damaged[odd.name]
    board = Board(runs=make_lots(seen.values())[0].runs, others=tuple(r for r in seen.values() if not r.config))
    sheet = VIEWS["runs"].draw(board, Choice())
    assert isinstance(sheet, Sheet) and {row[0].text for row in sheet.rows} == set(seen)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("router"),
        lambda config: config["router"].pop("name"),
        lambda config: config.update(train="quickly"),
        lambda config: config.update(model=[]),
        lambda config: config["train"].update(steps="many"),
    ],
)
def test_an_unfinished_run_whose_configuration_is_damaged_is_named(store: Path, change: Callable[[Any], Any]) -> None:
    folder = lay(store, make_run("switch"), steps=100)
    described = json.loads((folder / "config.json").read_text())
    change(described["config"])
    (folder / "config.json").write_text(json.dumps(described))
    (seen,) = Followed(store).look()
    (listed,) = list_runs(store)
    assert (
        (seen.state, listed.state) == ("damaged", "damaged") and "config" in seen.reason and "config" in listed.reason
    )
    assert "damaged" in str(to_grid([listed]).lines)


def test_runs_that_are_gone_are_forgotten_and_a_store_may_come_later(store: Path) -> None:
    followed = Followed(store)
    assert followed.look() == ()
    folder = lay(store, make_run("switch"))
    assert len(followed.look()) == 1
    folder.rename(folder.with_name(".gone"))
    assert followed.look() == ()


def test_a_ladder_is_shown_as_soon_as_it_is_there_and_a_broken_one_is_said(store: Path) -> None:
    runs = make_runs(("switch", "hash"), seeds=2)
    for run in runs:
        lay(store, run)
    boards = Boards(Followed(store), {}, None, 0.02)
    version = boards.look()
    page = Choice(page="ladder")
    assert views.NO_LADDER in json.dumps(boards.body(page), default=_plain)
    found = reduce(rungs(1.0, 1.3), [key_of(run.config["config"]) for run in runs[::2]], ["a"], "climbed so")
    (store / FILE).write_text(json.dumps(found.to_dict()))
    assert boards.look() != version
    said = json.dumps(boards.body(page), default=_plain)
    assert views.NO_LADDER not in said and str(found.entries[1].compute) in said and "climbed so" in said
    table = boards.of(page).build()
    assert {row.router: row.compute_multiplier for row in table.rows}["hash"] == found.entries[1].compute
    version = boards.look()
    (store / FILE).write_text(json.dumps(found.to_dict() | {"compute": "much"}))
    assert boards.look() != version
    line = VIEWS["multipliers"].draw(boards.of(page), page)
    assert isinstance(line, str) and f"{FILE}: compute" in line and "\n" not in line
    assert boards.of(page).build().rows[0].bits_per_byte  # the table is there
    (store / FILE).unlink()
    boards.look()
    assert VIEWS["losses"].draw(boards.of(page), page) == views.NO_LADDER


def test_a_compact_file_is_followed_too(tmp_path: Path) -> None:
    from rlroute.records import write_compact

    runs = make_runs(("switch", "hash"), seeds=1)
    write_compact(runs, tmp_path / "some.jsonl")
    assert [run.id for run in Followed(tmp_path / "some.jsonl").look()] == sorted(run.id for run in runs)


# Lots


def test_runs_that_may_not_be_compared_are_apart_and_what_runs_is_with_its_kin() -> None:
    ended = [Seen.of(run) for run in make_runs(("switch", "hash"), seeds=2)]
    others = [Seen.of(make_run("switch", train__batch_size=8))]
    going = replace(Seen.of(make_run("hash", 2)), state="running", summary=None, record=None)
    first, second = make_lots([*others, *ended, going])
    assert {run.id for run in first.runs} == {run.id for run in [*ended, going]}
    assert [run.id for run in second.runs] == [others[0].id] and first.key != second.key
    board = Board(runs=first.runs)
    assert not isinstance(board.table, str) and [row.n for row in board.table.rows] == [2, 2]
    (hash_group,) = (group for group in board.groups if group.router == "hash")
    assert [run.id for run in hash_group.going] == [going.id] and len(hash_group.settled) == 2


# Links


TEXTS = ("page", "lot", "entries", "run", "sort", "filter")
CHOICES = st.builds(Choice, **{name: st.text(max_size=8) for name in TEXTS})


@given(CHOICES, st.sampled_from(["tokens", "flops", "seconds"]), st.sampled_from(["both", "eval", "train"]))
def test_a_link_says_all_that_is_chosen(choice: Choice, axis: str, kinds: str) -> None:
    choice = choice.but(axis=axis, kinds=kinds)
    assert Choice.of(choice.link) == choice


@given(st.text(max_size=60))
def test_a_link_that_says_something_else_still_shows_a_page(text: str) -> None:
    choice = Choice.of("?axis=&kinds=none&page=%zz&" + text)
    assert choice.axis in ("tokens", "flops", "seconds") and choice.kinds in ("both", "eval", "train")


def test_eight_entries_are_drawn_at_first_and_the_others_by_a_click() -> None:
    board = board_of(make_runs(("switch", "dense", *(f"router_{i}" for i in range(12))), seeds=2))
    first = Choice().drawn(board)
    assert len(first) == FIRST and {"switch", "dense"} < {group.label for group in first}
    assert Choice(entries=ALL).drawn(board) == board.groups
    other = next(group for group in board.groups if group not in first)
    more = Choice().toggled(other, board)
    assert set(map(id, more.drawn(board))) == set(map(id, [*first, other]))
    assert more.toggled(other, board).drawn(board) == first
    last = board.groups[-1].runs[-1]
    going = replace(last, state="running", summary=None, record=None)
    live = Board(runs=(*(run for run in board.runs if run is not last), going))
    assert len(live.first) == FIRST and board.groups[-1].label in live.first  # what is being trained is seen


def test_of_a_long_ladder_as_many_are_drawn_at_first_and_the_others_by_a_click() -> None:
    found = reduce(rungs(1.0, *(0.55 + place / 10 for place in range(10))), list("abcdefghijk"), [], None)
    board = Board(runs=(), ladder=found)
    best = sorted(found.entries[1:], key=lambda entry: entry.bits[-1].mean)[: FIRST - 1]
    for name in ("losses", "multipliers"):
        figure: Any = VIEWS[name].draw(board, Choice())
        names = {shown: {t.name for t in figure.data if t.visible == shown} for shown in (True, "legendonly")}
        reference = {"entry 1"} if name == "losses" else set()  # which has no multiplier
        assert names[True] == reference | {entry.label for entry in best}
        assert names["legendonly"] == {entry.label for entry in found.entries[1:]} - names[True]
        assert figure.layout.showlegend is not False


# Views


def test_every_view_says_in_a_line_what_is_not_there() -> None:
    for name, view in VIEWS.items():
        line = view.draw(Board(runs=()), Choice())
        assert isinstance(line, str) and line and "\n" not in line, name


@pytest.fixture(scope="module")
def whole() -> Board:
    runs = [run if run.config["router"] == "dense" else with_regret(run, MEASURED) for run in make_runs()]
    ladder = reduce(
        rungs(1.0, 1.3), [key_of(run.config["config"]) for run in make_runs(("switch", "hash"), 1)], [], None
    )
    return replace(board_of(runs), results=published.read_results(None), ladder=ladder)


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_draws_what_is_there_and_every_axis_has_its_unit(name: str, whole: Board) -> None:
    drawn = VIEWS[name].draw(whole, Choice(run=whole.runs[0].id))
    assert not isinstance(drawn, str), drawn
    if isinstance(drawn, Sheet):
        assert drawn.rows and {len(row) for row in drawn.rows} == {len(drawn.head)}
    elif not isinstance(drawn, views.Listing):
        assert untitled(drawn) == []


@pytest.mark.parametrize("name", VIEWS)
def test_every_axis_has_its_unit_however_many_panels_there_are(name: str) -> None:
    runs = make_runs(("switch", "hash", "dense"), seeds=6)  # more than stand side by side
    runs = [run if run.config["router"] == "dense" else with_regret(run, MEASURED) for run in runs]
    for run in runs:
        for row in run.evals:
            row.pop("without_L", None)  # as old ones: an odd number of panels
    figure = VIEWS[name].draw(board_of(runs), EVERYTHING.but(run=runs[0].id))
    assert not hasattr(figure, "layout") or untitled(figure) == []


def untitled(figure: Any) -> list[str]:
    """Return the axes of a figure whose marks say numbers or names, but which have no title; those without marks share
    an axis that has both.
    """
    axes = {key: axis for key, axis in figure.to_plotly_json()["layout"].items() if re.match("[xy]axis", key)}
    said = {key for key, axis in axes.items() if axis.get("title", {}).get("text")}
    marked = {key for key, axis in axes.items() if axis.get("showticklabels", True)}
    shared = [{key, axis.get("matches", key[0]).replace(key[0], f"{key[0]}axis")} for key, axis in axes.items()]
    while any(joined := [(one, two) for one, two in combinations(shared, 2) if one & two and one != two]):
        one, two = joined[0]
        shared = [part for part in shared if part not in (one, two)] + [one | two]
    return sorted(marked - said) + [str(part) for part in shared if not part & said & marked]


def test_every_view_is_on_a_page() -> None:
    assert {view for _, shown in PAGES.values() for view in shown} | set(RUN_PAGE) == set(VIEWS)


def test_a_run_that_goes_on_is_drawn_with_those_that_ended() -> None:
    runs = [Seen.of(run) for run in make_runs(("switch", "hash"), seeds=2)]
    part = make_run("switch", 2)
    going = replace(
        Seen.of(part), state="running", summary=None, record=None, train=part.train[:15], evals=part.evals[:1]
    )
    board = Board(runs=(*runs, going))
    figure = VIEWS["curves"].draw(board, Choice(kinds="train"))
    ends = [trace.x[-1] for trace in figure.data if trace.name == "switch"]  # type: ignore[union-attr]
    assert ends == [part.train[-1]["tokens"], part.train[14]["tokens"]]
    sheet = VIEWS["progress"].draw(board, Choice())
    assert isinstance(sheet, Sheet)
    row = next(row for row in sheet.rows if row[0].text == "switch")
    assert [cell.text for cell in row[1:5]] == ["2 of 3", "1", "", "79%"]


def test_progress_counts_what_was_asked_for_and_is_not_there_yet() -> None:
    run = changed(make_run("switch"), "config.asked", {"entries": ["switch"], "seeds": [0, 1, 2, 3]})
    sheet = VIEWS["progress"].draw(Board(runs=(Seen.of(run),)), Choice())
    assert isinstance(sheet, Sheet) and sheet.rows[0][1].text == "1 of 4" and sheet.rows[0][4].text == "25%"


def test_verdicts_are_of_every_pair_and_say_the_opposite_across(whole: Board) -> None:
    sheet = VIEWS["verdicts"].draw(whole, Choice())
    assert isinstance(sheet, Sheet)
    opposite = {"better": "worse", "worse": "better"}
    for place, row in enumerate(sheet.rows):
        for other, cell in enumerate(row[1:]):
            if place != other:
                one, two = (whole.entries[sheet.head[1 + i]] for i in (place, other))
                said = verdict(paired(one, two), whole.margin)
                assert cell.text.startswith(said.direction or ("equivalent" if said.equivalent else "unresolved"))
                mirrored = sheet.rows[other][1 + place].tone
                assert mirrored == opposite.get(cell.tone, cell.tone)
    assert "margin 0.02" in sheet.head[0]


POINTS = st.dictionaries(st.sampled_from("abcdef"), st.tuples(*[st.integers(0, 3)] * 3), max_size=6)


@given(POINTS)
def test_the_front_is_whom_nobody_beats(points: dict[str, tuple[int, ...]]) -> None:
    beaten = set()
    for name, mine in points.items():
        for other in points.values():
            if max(o - m for o, m in zip(other, mine, strict=True)) <= 0 and sum(other) < sum(mine):
                beaten.add(name)
    assert pareto(points) == points.keys() - beaten


def test_tables_are_sorted_by_numbers_and_narrowed_by_words() -> None:
    numbers = [3.0, None, -1.0, 20.0]
    rows = tuple((Cell(f"Row {i}"), Cell("none" if n is None else f"{n:g} k", n)) for i, n in enumerate(numbers))
    sheet = Sheet(("name", "size"), rows)
    assert [row[1].key for row in sheet.arranged("size").rows] == [-1.0, 3.0, 20.0, None]
    assert [row[1].key for row in sheet.arranged("-size").rows] == [20.0, 3.0, -1.0, None]
    assert [row[0].text for row in sheet.arranged("-name").rows] == ["Row 3", "Row 2", "Row 1", "Row 0"]
    assert sheet.arranged("nonesuch").rows == sheet.arranged("").rows == rows
    assert [row[0].text for row in sheet.arranged(words=" row  20").rows] == ["Row 3"]
    assert sheet.arranged(words="3 nothing").rows == ()


UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "%": 0.01}
NUMBER = re.compile(r"(?:≥ |≤ )?([+-]?\d[\d,]*\.?\d*)(?!\d*[-:]) ?([kMG%](?!\w))?")


@pytest.mark.parametrize("name", VIEWS)
def test_every_column_of_numbers_is_sorted_by_number(name: str, whole: Board) -> None:
    sheet = VIEWS[name].draw(whole, Choice(run=whole.runs[0].id))
    if not isinstance(sheet, Sheet) or sheet.kind == "facts":  # whose rows are not of a kind
        return
    for place, title in enumerate(sheet.head):
        if title == "figures there":  # the source's own words, some of which begin with a number
            continue
        rows = sheet.arranged(title).rows
        cells = [row[place] for row in rows]
        found = [match for cell in cells if (match := NUMBER.match(cell.text))]
        assert len(found) <= sum(cell.key is not None for cell in cells), (title, cells)
        said = [float(match[1].replace(",", "")) * UNITS[match[2] or ""] for match in found]
        if title != "runs ended":  # a share, as a text "2 of 3"
            assert said == sorted(said), title


@pytest.mark.parametrize(("name", "view"), [("claims", "claims"), ("gradients", "gradients")])
def test_published_results_say_whose_they_are(name: str, view: str, tmp_path: Path) -> None:
    path = published.PUBLISHED[name][0]
    mine = tmp_path / "mine" / path
    mine.parent.mkdir(parents=True)
    shutil.copy(RESULTS / path, mine)
    for folder, wanted in ((tmp_path, f"Not yours: there is no {tmp_path / path}."), (tmp_path / "mine", "From ")):
        board = Board(runs=(), results=published.read_results(folder))
        (commit,) = board.results[name]["commits"]
        said = json.dumps(app_module.draw(view, board, Choice()), default=_plain)
        assert wanted in said and path in said and commit[:12] in said
        assert ("Published with rlroute: experiments/results/" in said) == wanted.startswith("Not yours")


def test_claims_are_in_the_order_of_their_numbers(whole: Board) -> None:
    sheet = VIEWS["claims"].draw(whole, Choice())
    assert isinstance(sheet, Sheet)
    numbers = [int(row[0].text) for row in sheet.arranged("-#").rows]
    assert numbers == sorted(numbers)[::-1] and len(numbers) > 10


def test_a_diverged_run_and_a_table_that_cannot_be_are_said() -> None:
    runs = [Seen.of(diverged(make_run("hash"))), Seen.of(make_run("switch"))]
    board = Board(runs=tuple(runs), reference="nonesuch")
    assert "nonesuch" in str(VIEWS["results"].draw(board, Choice()))
    sheet = VIEWS["runs"].draw(board, Choice())
    assert isinstance(sheet, Sheet) and "diverged" in [row[2].text for row in sheet.rows]
    for run in runs:
        curve: Any = VIEWS["one"].draw(board, Choice(run=run.id))
        assert len(curve.data) == 2 and all(len(trace.x) for trace in curve.data)


# The app


def test_the_page_follows_the_store_and_is_drawn_once(store: Path) -> None:
    for run in make_runs(("switch", "hash"), seeds=1):
        lay(store, run)
    boards = Boards(Followed(store), {}, None, 0.02)
    version = boards.look()
    body = boards.body(Choice())
    with mock.patch.object(app_module, "draw", side_effect=AssertionError("drawn again")):
        assert boards.look() == version and boards.body(Choice()) is body
    lay(store, make_run("dense"))
    assert boards.look() != version and "dense" in json.dumps(boards.body(Choice()), default=_plain)


def _plain(part: Any) -> Any:
    return part.to_plotly_json()


def test_a_view_that_fails_says_so_in_its_place(whole: Board, capsys: pytest.CaptureFixture[str]) -> None:
    broken = replace(VIEWS["curves"], draw=mock.Mock(side_effect=KeyError("what")))
    with mock.patch.dict(VIEWS, curves=broken):
        said = json.dumps(app_module.draw("curves", whole, Choice()), default=_plain)
    assert "cannot be drawn" in said and "KeyError" in capsys.readouterr().err


def make_client(store: Path, token: str | None = None, base: str = "http://127.0.0.1:8050") -> Any:
    app = make_app(store)
    server.protect(app, token)
    client = app.server.test_client()
    client.environ_base["HTTP_HOST"] = base.removeprefix("http://")
    return client


def test_without_a_token_only_loopback_names_are_answered(store: Path) -> None:
    client = make_client(store)
    for name in ("127.0.0.1:8050", "localhost:8050", "[::1]:8050", "localhost"):
        assert client.get("/", headers={"Host": name}).status_code == 200
    for name in ("evil.example", "evil.example:8050", "127.0.0.1.evil.example", "10.0.0.1:8050"):
        assert client.get("/", headers={"Host": name}).status_code == 403
        assert client.get("/_dash-layout", headers={"Host": name}).status_code == 403


def test_with_a_token_whoever_has_it_is_answered(store: Path) -> None:
    token = "a-token-of-some-length"
    client = make_client(store, token)
    for path in ("/", "/_dash-layout", "/assets/base.css", "/?token=wrong", "/?token="):
        assert client.get(path).status_code == 401
    assert client.get("/_dash-layout", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    answer = client.get(f"/?token={token}&page=table")
    assert answer.status_code == 302 and answer.headers["Location"].endswith("/?page=table")
    assert "HttpOnly" in answer.headers["Set-Cookie"] and "SameSite=Strict" in answer.headers["Set-Cookie"]
    assert client.get("/_dash-layout").status_code == 200  # with the cookie
    assert make_client(store, token).get("/_dash-layout").status_code == 401


def test_a_page_may_ask_nobody_but_its_own_server(store: Path) -> None:
    answer = make_client(store).get("/")
    rules = _rules(answer)
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert "unsafe" not in rules["script-src"] and all("http" not in rule for rule in rules.values())
    asked = re.findall(r"""(?:src|href)=["']([^"']*)""", answer.get_data(as_text=True))
    assert len(asked) > 5
    assert all(re.match(r"/(?!/)|\?|data:image/svg\+xml;base64,", address) for address in asked)


class Parsed(HTMLParser):
    """Collects the elements and the texts of a page, which are all closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.around: list[str] = []
        self.feed(text)
        self.close()
        assert not self.around

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        self.around += [] if tag in first.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.around.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_first_html_has_what_the_page_shows_escaped(store: Path) -> None:
    runs = [make_run("switch", seed, {"note": note}) for seed in range(2) for note in (HOSTILE, '"{%scripts%}')]
    for run in [changed(run, "config.command", HOSTILE) for run in runs]:
        lay(store, run)
    client = make_client(store)
    plain = len(re.findall("<script", make_client(store / "nothing").get("/").get_data(as_text=True)))
    for page in (*PAGES, f"run&run={runs[0].id}", HOSTILE, "runs&sort=seed"):
        answer = client.get(f"/?page={page}")
        text = answer.get_data(as_text=True)
        inside = text.partition(first.ENTRY)[0].split('<div id="first">')[1]
        assert len(re.findall("<script", text)) == plain and "unsafe-inline" not in _rules(answer)["script-src"]
        parsed = Parsed('<div id="first">' + inside)
        assert not {"script", "iframe"} & {tag for tag, _ in parsed.elements} and "id" not in parsed.elements[1][1]
        assert not [name for _, attrs in parsed.elements for name in attrs if name.startswith("on") or name == "id"][1:]
        images = [attrs["src"] for tag, attrs in parsed.elements if tag == "img"]
        assert all(str(source).startswith("data:image/svg+xml;base64,") for source in images)
        assert {str(store), "4 runs"} <= set(parsed.texts)
        wanted = {"": f"switch (note={HOSTILE})", "runs": runs[0].id, f"run&run={runs[0].id}": HOSTILE}
        assert page not in wanted or wanted[page] in parsed.texts
    lay(store, make_run("hash"))
    assert "5 runs" in client.get("/").get_data(as_text=True)  # as the store is now


@given(st.text(), st.text())
def test_a_part_of_a_page_is_the_same_as_html(text: str, name: str) -> None:
    text, name = text.replace("\r", ""), name.replace("\r", "")
    part = html.Td([text, dcc.Link("on", href=name), dcc.Store(id="x", data={"not": "there"})], className=name)
    parsed = Parsed(first.to_html(part))
    assert parsed.elements == [("td", {"class": name}), ("a", {"href": name})]
    assert "".join(parsed.texts) == text + "on"


def _rules(answer: Any) -> dict[str, str]:
    return dict(rule.strip().split(maxsplit=1) for rule in answer.headers["Content-Security-Policy"].split(";"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "no such host"])
def test_nobody_is_served_beyond_loopback_without_a_token(host: str, tmp_path: Path) -> None:
    said = refused(rlroute("dashboard", tmp_path, "--host", host))
    assert repr(host) in said and "token" in said


def test_bad_options_are_named_before_any_work(tmp_path: Path) -> None:
    assert "16" in refused(rlroute("dashboard", tmp_path, "--token", "short"))
    assert "70000" in refused(rlroute("dashboard", tmp_path, "--port", "70000"))
    assert "nowhere" in refused(rlroute("dashboard", tmp_path / "nowhere" / "runs"))
    server.check_address("127.0.0.1", None)
    server.check_address("0.0.0.0", "a-token-of-some-length")


def test_a_port_that_is_taken_is_named(store: Path) -> None:
    app = make_app(store)
    one = server.make_server(app, "127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match=str(one.port)):
            server.make_server(app, "127.0.0.1", one.port)
    finally:
        one.server_close()
