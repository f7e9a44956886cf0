"""Replay: a run's choices, recorded and taken again, give its losses bit for bit: every kind of choice, in one process
and in two.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlroute.baselines.replay import ReplayRouter
from rlroute.choices import ChoiceLog
from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError, DecisionError, StoreError
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.presets import build_comparison
from rlroute.experiments.traces.reading import open_trace
from rlroute.experiments.traces.write import write
from rlroute.parallel.local import run_ranks
from rlroute.parallel.mesh import Mesh
from rlroute.registry import router_class, run_config
from rlroute.training.loop import train
from rlroute.training.prepare import check
from tests.runs import interrupted
from tests.toys import installed

DATA = DataConfig(spec="synth:vocab=32,documents=40", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=4, k=2, d_expert=8)
TRAIN = TrainConfig(
    steps=4,
    batch_size=4,
    micro_batches=2,
    warmup_steps=1,
    eval_every=2,
    log_every=1,
    checkpoint_every=2,
    record_choices=True,
)


KINDS: dict[str, dict[str, Any]] = {
    "switch": {},
    "reinforce": {},
    "hash": {},
    "noisy_topk": {},
    "variable k": {"rule": "threshold"},
    "a bound": {"rule": "threshold", "share": 0.5},
    "expert choice": {"rule": "experts"},
}


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with installed():
        yield


def run_of(kind: str, **model: Any) -> RunConfig:
    fields = KINDS[kind]
    router = router_class("toys" if fields else kind).Config(**fields)
    return RunConfig(data=DATA, model=replace(MODEL, **model), router=router, train=TRAIN)


def replay_of(source: RunConfig, folder: Path, seed: int = 0) -> RunConfig:
    return replace(source, router=ReplayRouter.Config(run=str(folder / source.run_id(seed))))


def losses(folder: Path, config: RunConfig) -> list[tuple[str, int, float]]:
    rows = (folder / config.run_id(0) / "metrics.jsonl").read_text().splitlines()
    return [(row["kind"], row["step"], row["loss"]) for row in map(json.loads, rows)]


def train_as_rank(values: dict[str, Any], folder: str) -> None:
    with installed():
        train(run_config(values), 0, Path(folder), group=Mesh(2))


@pytest.mark.parametrize("name", KINDS)
def test_replay_gives_the_losses_of_a_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = run_of(name)
    train(source, 0, tmp_path)
    replay = replay_of(source, tmp_path)
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay) == losses(tmp_path, source)
    assert ChoiceLog(tmp_path / replay.run_id(0)).sha256() == ChoiceLog(tmp_path / source.run_id(0)).sha256()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    "name", ["switch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("variable k", "expert choice"))]
)
def test_replay_in_two_processes_is_the_run_in_two_processes(name: str, tmp_path: Path) -> None:
    source = run_of(name)
    run_ranks(train_as_rank, 2, source.to_dict(), str(tmp_path))
    replay = replay_of(source, tmp_path)
    run_ranks(train_as_rank, 2, replay.to_dict(), str(tmp_path))
    assert losses(tmp_path, replay) == losses(tmp_path, source)


def test_a_replay_has_the_learning_rates_of_its_run(tmp_path: Path) -> None:
    rates: dict[str, Any] = {"lr": 0.005, "router_lr_scale": 3.0}
    source = replace(run_of("hash"), train=replace(TRAIN, **rates))
    train(source, 0, tmp_path)
    entry = f"replay:run={tmp_path / source.run_id(0)}"
    (replay,) = build_comparison([entry], DATA, MODEL, TRAIN, tuned=True)
    assert replay.train == source.train
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay) == losses(tmp_path, source)
    (plain,) = build_comparison([entry], DATA, MODEL, TRAIN, tuned=False)
    assert plain.train == TRAIN
    with pytest.raises(ConfigError, match=r"train\.lr = 0\.1: the tuned recipe sets it for replay"):
        build_comparison([entry], DATA, MODEL, replace(TRAIN, lr=0.1), tuned=True)


@pytest.mark.parametrize("form", ["moa", "switchhead"])
def test_all_sites_of_a_block_are_replayed_and_so_is_a_capacity(form: str, tmp_path: Path) -> None:
    source = run_of("switch", attention_experts=4, attention_form=form, capacity_factor=1.0)
    train(source, 0, tmp_path)
    replay = replay_of(source, tmp_path)
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay) == losses(tmp_path, source)


@pytest.mark.parametrize("form", ["moa", "switchhead"])
def test_a_run_is_replayed_from_the_trace_that_it_wrote(form: str, tmp_path: Path) -> None:
    """Bit for bit; and with other choices in the file it is another run."""
    source = run_of("switch", attention_experts=4, attention_form=form)
    train(source, 0, tmp_path)
    run, path = tmp_path / source.run_id(0), tmp_path / "trace.npz"
    write(open_trace(str(run), tmp_path), path)
    replay = replace(source, router=ReplayRouter.Config(run=str(run), trace=str(path)))
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay) == losses(tmp_path, source)
    with np.load(path) as file:
        steps = [(file[name] + 1) % 4 for name in file.files]
    np.savez(path, *steps)
    with pytest.raises(ConfigError, match="has choices of SHA-256"):
        check({replay: [0]})
    other = replace(source, router=ReplayRouter.Config(run=str(run), trace=str(path)))
    train(other, 0, tmp_path)
    assert losses(tmp_path, other)[0] != losses(tmp_path, source)[0]


def test_a_trace_that_is_not_of_the_runs_shapes_is_refused(tmp_path: Path) -> None:
    source = run_of("hash")
    train(source, 0, tmp_path)
    run = str(tmp_path / source.run_id(0))

    def replay(*steps: np.ndarray) -> RunConfig:
        np.savez(tmp_path / "other.npz", *steps)
        return replace(source, router=ReplayRouter.Config(run=run, trace=str(tmp_path / "other.npz")))

    with pytest.raises(ConfigError, match="has 3 layers: legal are the model's 2 sites"):
        check({replay(np.zeros((64, 3, 2), np.int16)): [0]})
    with pytest.raises(StoreError, match="holds 60 tokens for step 0: want 64"):
        train(replay(np.zeros((60, 2, 2), np.int16)), 0, tmp_path)
    with pytest.raises(DecisionError, match=r"have shape \(32, 3\): want \(32, 2\)"):
        train(replay(np.zeros((64, 2, 3), np.int16)), 0, tmp_path)
    with pytest.raises(StoreError, match="holds no step 1: it has 1"):
        train(replay(np.tile(np.array([0, 1]), (64, 2, 1))), 0, tmp_path)


def test_choices_are_taken_rather_than_made_again(tmp_path: Path) -> None:
    """With the recorded choices altered, the losses are others: what is replayed is the record, not the router."""
    source = run_of("switch")
    train(source, 0, tmp_path)
    log = ChoiceLog(tmp_path / source.run_id(0))
    log.write(0, 0, {0: (log.read(0, 0, 0) + 1) % 4})
    replay = replay_of(source, tmp_path)
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay)[0] != losses(tmp_path, source)[0]


def test_a_run_of_any_seed_is_replayed_by_the_commands_way(tmp_path: Path) -> None:
    """What checks a run before any work knows its seed."""
    source = run_of("switch")
    train(source, 5, tmp_path)
    replay = replay_of(source, tmp_path, 5)
    (record,) = run_all([Job(replay, 5, "")], Launch(store=tmp_path, launcher="local"))
    assert record.summary["status"] == "finished"


def test_an_interrupted_replay_goes_on(tmp_path: Path) -> None:
    source = run_of("switch")
    interrupted(source, tmp_path, 3)
    train(source, 0, tmp_path)
    replay = replay_of(source, tmp_path)
    interrupted(replay, tmp_path, 3)
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay) == losses(tmp_path, source)


def test_what_cannot_be_replayed_is_refused_by_name(tmp_path: Path) -> None:
    source = run_of("hash")
    train(replace(source, train=replace(TRAIN, record_choices=False)), 0, tmp_path)
    silent = replace(source, train=replace(TRAIN, record_choices=False)).run_id(0)
    config = ReplayRouter.Config
    with pytest.raises(StoreError, match=r"was not trained with --train\.record-choices"):
        config(run=str(tmp_path / silent))
    train(source, 0, tmp_path)
    replay = replay_of(source, tmp_path)
    with pytest.raises(ConfigError, match="has seed 0: legal is that, not 1"):
        check({replay: [0, 1]})
    with pytest.raises(ConfigError, match="weights of terms are those of the recorded run"):
        config(run=str(tmp_path / source.run_id(0)), balance_weight=0.1)
    with pytest.raises(StoreError, match="holds no step 4"):
        train(replace(replay, train=replace(TRAIN, steps=5)), 0, tmp_path)
    with pytest.raises(DecisionError, match="choices forced at site 0 have shape"):
        train(replace(replay, train=replace(TRAIN, batch_size=8)), 0, tmp_path)
    assert isinstance(replay.router, config)
    with pytest.raises(ConfigError, match="has choices of SHA-256"):
        train(replace(replay, router=replace(replay.router, sha256="0" * 64)), 0, tmp_path)
