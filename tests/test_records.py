"""What has become of a run is asked in one place, and no record holds what strict JSON does not."""

import json
from typing import Any

import pytest

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import StoreError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.records import ENDED, RunFolder, state, stop_early, write_compact, write_json
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
    stop_early(folder.path)
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
        with pytest.raises(StoreError, match="trained by another process"), folder.lock(patience=0.0):
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
