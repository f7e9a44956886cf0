"""Batches cut ahead are the same batches; a reader that fails is one line; no thread outlives its run."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlroute.config import RunConfig
from rlroute.errors import ConfigError, DataError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.reading import read_run
from rlroute.training import loop
from rlroute.training.batches import Batch, sample_batch
from rlroute.training.prefetch import Batches
from tests.runs import interrupted
from tests.tiny import DATA, MODEL, STEPS, TRAIN


def batch_of(step: int) -> Batch:
    values_BS = np.full((1, 2), step)
    return Batch(values_BS, values_BS + 1, np.array([step]), None)


def taken(batches: Batches, steps: range, until: int = 100) -> list[int]:
    return [int(batches.take(step, until).tokens_BS[0, 0]) for step in steps]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_each_step_gets_its_batch_whatever_is_cut_ahead(ahead: int) -> None:
    batches = Batches(batch_of, ahead)
    assert taken(batches, range(5, 12)) == list(range(5, 12))
    assert taken(batches, range(2, 4)) == [2, 3], "another step than the next one"
    batches.close()
    assert taken(batches, range(7, 9)) == [7, 8], "it begins again"
    batches.close()


def test_no_batch_is_cut_beyond_the_last_or_too_far_ahead() -> None:
    cut: list[int] = []

    def noted(step: int) -> Batch:
        cut.append(step)
        return batch_of(step)

    batches = Batches(noted, 3)
    taken(batches, range(6), until=6)
    batches.close()
    assert cut == list(range(6))
    begun = Batches(noted, 2)
    begun.take(0, 100)
    assert [step for step, _ in begun._begun] == [1, 2]
    begun.close()


def test_they_are_cut_on_one_other_thread() -> None:
    seen: set[int] = set()

    def noted(step: int) -> Batch:
        seen.add(threading.get_ident())
        return batch_of(step)

    batches = Batches(noted, 2)
    taken(batches, range(9))
    batches.close()
    assert len(seen) == 1 and threading.get_ident() not in seen


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error"), "the batch of step 3 cannot be read: Input/output error"),
        (DataError("shard 'x' is damaged"), "shard 'x' is damaged"),
    ],
)
def test_a_failing_reader_s_error_reaches_the_loop_in_one_line(error: Exception, message: str, tmp_path: Path) -> None:
    def failing(step: int) -> Batch:
        if step == 3:
            raise error
        return batch_of(step)

    batches = Batches(failing, 2)
    assert taken(batches, range(3)) == [0, 1, 2]
    with pytest.raises(DataError) as caught:
        batches.take(3, 100)
    assert str(caught.value) == message
    batches.close()


def test_a_run_with_batches_cut_ahead_is_the_same_run(tmp_path: Path) -> None:
    runs = []
    for ahead in (0, 2):
        config = build_entry("switch", DATA, MODEL, replace(TRAIN, prefetch=ahead))
        loop.train(config, 0, tmp_path)
        runs.append(read_run(tmp_path / config.run_id(0)))
    plain, ahead_of = runs
    assert plain.id != ahead_of.id and plain.summary["batches"] == ahead_of.summary["batches"]
    assert [row["loss"] for row in plain.evals] == [row["loss"] for row in ahead_of.evals]
    assert len(plain.evals) == STEPS // TRAIN.eval_every


def test_a_run_whose_reader_fails_or_that_is_stopped_leaves_no_thread_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_entry("switch", DATA, MODEL, replace(TRAIN, prefetch=2))
    sample = sample_batch

    def failing(corpus: Any, *, step: int, **keys: Any) -> Batch:
        if step == 6:
            raise OSError(5, "Input/output error")
        return sample(corpus, step=step, **keys)

    monkeypatch.setattr(loop, "sample_batch", failing)
    with pytest.raises(DataError, match="the batch of step 6 cannot be read: Input/output error"):
        loop.train(config, 0, tmp_path)
    monkeypatch.undo()

    interrupted(config, tmp_path, 9)
    resumed = loop.train(config, 0, tmp_path)
    whole = loop.train(replace(config, train=TRAIN), 0, tmp_path)
    assert resumed["batches"] == whole["batches"]
    assert resumed["final"] is not None and whole["final"] is not None
    assert resumed["final"]["loss"] == whole["final"]["loss"]


def test_illegal_values_are_refused_by_name() -> None:
    for value in (-1, 1025):
        with pytest.raises(ConfigError, match=rf"train\.prefetch = {value}: legal are numbers from 0 to 1024"):
            RunConfig(train=replace(TRAIN, prefetch=value))
