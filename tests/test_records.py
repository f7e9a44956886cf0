"""What has become of a run is asked in one place, and no record holds what strict JSON does not."""

import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlroute import lock, records
from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import HeldError, StoreError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.records import ENDED, STOPPED, RunFolder, mark, state, write_compact, write_json
from tests.test_table import changed, make_run

CONFIG = build_entry("hash", DataConfig(), ModelConfig(), TrainConfig())
MADE: Any = {"core": "0", "routers": {}, "reads": {}, "data": {}, "tokenizer": None}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, CONFIG, 0)


def begin(folder):
    folder.create()
    folder.describe(CONFIG, 0, "cpu", None, {"workers": 1, "expert_parallel": 1}, MADE)


def test_a_run_goes_through_its_states(folder):
    assert state(folder.path) == "empty"
    folder.create()
    assert state(folder.path) == "empty"
    with folder.lock():
        assert state(folder.path) == "running"
        begin(folder)
        assert state(folder.path) == "running"
    assert state(folder.path) == "interrupted"
    assert not folder.ended
    folder.set_aside("out of luck")
    assert state(folder.path) == "set aside"
    folder.set_aside(None)
    mark(folder.path / STOPPED)
    assert state(folder.path) == "stopped early"
    for status in ("finished", "diverged"):
        folder.finish({"status": status})
        assert state(folder.path) == status
        assert state(folder.path) in ENDED and folder.ended


def test_asking_for_the_state_does_not_keep_anyone_from_the_run(folder):
    folder.create()
    assert state(folder.path) == "empty"
    with folder.lock(patience=0.0):
        assert state(folder.path) == "running"
        with pytest.raises(StoreError, match="trained by process"), folder.lock(patience=0.0):
            pass


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"status": "unheard of"}', '{"status": []}'])
def test_a_summary_that_cannot_be_read_is_damaged_and_the_run_is_not_trained_again(text, folder):
    begin(folder)
    (folder.path / "summary.json").write_text(text)
    assert state(folder.path) == "damaged"
    assert folder.ended


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_its_field(bad, folder, tmp_path):
    begin(folder)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(StoreError, match=rf"summary.json: final/max_vio_L/1 = {bad}: want a finite number, or null"):
        folder.finish({"final": {"max_vio_L": [0.5, bad]}})
    with pytest.raises(StoreError, match=rf"metrics.jsonl: loss = {bad}"):
        folder.append("metrics", {"step": 1, "loss": bad})
    with pytest.raises(StoreError, match=rf"x.json: rows/0/low = {bad}"):
        write_json(tmp_path / "x.json", {"rows": [{"low": bad}]})
    with pytest.raises(StoreError, match=rf"x.jsonl: summary/final/loss = {bad}"):
        write_compact([changed(make_run("hash"), "summary.final.loss", bad)], tmp_path / "x.jsonl")
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before
    assert not list(tmp_path.glob("x.*"))


def test_what_is_written_is_what_was_written_before(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": "é"}}
    write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_text() == json.dumps(value, indent=1) + "\n"


def test_a_lock_says_who_holds_the_run_and_follows_no_link(folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    folder.create()
    with pytest.raises(HeldError, match=rf"{folder.id} is being trained by process {os.getpid()} \(waited 0 s\)"):  # noqa: SIM117
        with folder.lock(), folder.lock(patience=0.0):
            pass
    assert (folder.path / ".lock").read_text() == ""  # of a run that nobody trains
    (folder.path / ".lock").unlink()
    (folder.path / ".lock").symlink_to(precious)
    for use in (folder.create, folder.lock().__enter__):
        with pytest.raises(StoreError, match="symbolic link"):
            use()
    assert precious.read_text() == "kept"


def test_a_mark_follows_no_link_and_keeps_what_is_there(folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    folder.create()
    mark(folder.path / STOPPED)
    mark(folder.path / STOPPED)
    mark(precious)
    (folder.path / STOPPED).unlink()
    (folder.path / STOPPED).symlink_to(precious)
    for place in (folder.path / STOPPED, tmp_path / "nowhere" / STOPPED):
        with pytest.raises(StoreError, match=f"cannot write {place}"):
            mark(place)
    assert precious.read_text() == "kept"


def test_an_error_of_what_is_done_under_the_lock_is_not_one_of_the_store(folder):
    with pytest.raises(FileNotFoundError, match="of_the_router"), folder.lock():
        Path("of_the_router").read_text()


@pytest.fixture
def clock(monkeypatch):
    """Let a second pass with every look at a run, and something happen at some of them."""
    clock = SimpleNamespace(now=0.0, events={})

    def sleep(seconds):
        clock.now += 1.0
        clock.events.get(clock.now, lambda: None)()

    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


def test_waiting_names_the_process_that_trains_and_ends_with_it_however_long_it_takes(folder, clock):
    begin(folder)
    said = []
    with contextlib.ExitStack() as held:
        held.enter_context(folder.lock())
        clock.events = {float(now): lambda: folder.append("metrics", {"step": 1}) for now in range(5, 1000, 5)}
        clock.events[1000.0] = held.close
        folder.wait(said.append, patience=8.0)
    assert said == [f"run {folder.id} is being trained by process {os.getpid()}: waiting for it"]
    folder.wait(said.append, patience=0.0)
    assert len(said) == 1  # nobody holds it: nothing to say


def test_a_run_that_stands_still_is_spoken_of_once_in_each_patience(folder, clock):
    begin(folder)
    said = []
    with contextlib.ExitStack() as held:
        held.enter_context(folder.lock())
        clock.events[200.0] = held.close
        folder.wait(said.append, patience=90.0)
    still = f"run {folder.id}: process {os.getpid()} has written nothing for 1.5 minutes; waiting all the same"
    assert len(said) == 3 and all(line.startswith(still) for line in said[1:])


def test_what_has_ended_is_not_set_aside_in_whichever_order(folder, monkeypatch):
    begin(folder)
    folder.set_aside("of an earlier try")
    folder.finish({"status": "finished"})
    assert not (folder.path / "failed.json").exists()
    folder.set_aside("of a late one")
    assert not (folder.path / "failed.json").exists()
    (folder.path / "summary.json").unlink()
    write = records.write_json
    monkeypatch.setattr(records, "write_json", lambda path, value: (write(path, value), finish_then(path)))

    def finish_then(path):
        if path.name == "failed.json":  # another process ends the run at this very moment
            write(folder.path / "summary.json", {"status": "finished"})

    folder.set_aside("at the same moment")
    assert not (folder.path / "failed.json").exists()
