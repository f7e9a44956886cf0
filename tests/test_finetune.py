"""``rlroute finetune``: a run trained on in modes that one table tells apart, from weights that are the source's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlroute.config import Parts, RunConfig
from rlroute.experiments.recipes.finetuning import SLOWER, defaults, variants
from rlroute.experiments.verify.store import verify
from rlroute.reading import read_described, read_runs
from rlroute.registry import run_config
from rlroute.training.loop import train
from rlroute.training.manifest import own_checkpoints
from rlroute.training.start import start_of
from tests import ROOT
from tests.commands import TINY, ran, refused, rlroute
from tests.finetuning_figure import FIGURE, figure, table
from tests.runs import assert_same_bits, interrupted, weights_of
from tests.test_parts import PARTS

SHORT = ("--launcher", "local", "--train.steps", 4, "--train.eval-every", 2, "--train.lr", 0.01)
OTHER = ("--data.spec", "synth:documents=64,length=64,seed=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of all modes, fine-tuned from a run of the same store; nobody may change it."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran("train", "switch:z_weight=0.01", *TINY, "--seed", 7)
        ran("finetune", "switch", "--train", *PARTS, "--seeds", 1, "--tokens", 600, *OTHER, *SHORT)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be changed, in which commands run."""
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def source_in(folder: Path) -> Path:
    (source,) = (folder / "runs").glob("switch-*-s7")
    return source


def trains(name: str, parts: Parts) -> bool:
    """Whether a parameter of the tiny model trains, whose attention has no experts."""
    wanted = {"all": "", "moe": ".moe.", "attention": ".attention.", "router": ".router."}
    return ".moe." not in name if parts == "non-moe" else wanted[parts] in name


def test_what_a_mode_freezes_has_the_sources_bits_and_all_else_has_moved(folder: Path) -> None:
    before, seen = weights_of(source_in(folder)), set()
    for run in read_runs(folder / "runs"):
        if run.config["seed"] < 7:
            parts = run.config["config"]["train"]["parts"]
            after = weights_of(folder / "runs" / run.id)
            moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
            assert moved == {name for name in before if trains(name, parts)}, parts
            seen.add(parts)
    assert seen == set(PARTS)


def test_one_table_tells_the_modes_apart_and_what_they_reach_on_training_tokens(folder: Path) -> None:
    table = (folder / "results" / "table.md").read_text()
    for parts in PARTS:
        assert f"| switch (train.parts={parts}) |" in table
        assert 'train.parts: "all" (switch (train.parts=all)), "attention"' in table
    assert "difference to switch (train.parts=all) |" in table
    assert f"**Starts from**: {source_in(folder).name} at step 12" in table
    assert "**Training tokens**: switch (train.parts=all) " in table and "600 training and" in table


def test_a_run_is_the_sources_in_all_that_is_not_said(folder: Path) -> None:
    source = run_config(read_described(source_in(folder))["config"])
    tuned = next(run for run in read_runs(folder / "runs") if run.config["seed"] == 0)
    mine = run_config(tuned.config["config"])
    assert mine.router == source.router and mine.model == source.model
    assert mine.data == replace(source.data, spec=OTHER[1], train_tokens=600)
    assert (mine.train.steps, mine.train.lr, mine.train.eval_train) == (4, 0.01, True)
    assert mine.train.batch_size == source.train.batch_size
    assert mine.start == start_of(source_in(folder))
    assert all("training" in row for row in tuned.evals) and [row["step"] for row in tuned.evals] == [2, 4]
    assert defaults(source).train.lr == SLOWER * source.train.lr


def test_its_records_hold_against_the_source(folder: Path) -> None:
    assert verify(folder / "runs") == []


def configs(folder: Path, *entries: str, **varied: Any) -> list[RunConfig]:
    source = run_config(read_described(source_in(folder))["config"])
    size = defaults(source)
    short = replace(size, train=replace(size.train, steps=6, checkpoint_every=2, eval_every=2, lr=0.01))
    choices: dict[str, Any] = {"parts": ["all"], "expert_dropout": [], "tokens": []} | varied
    named = variants(entries, source, short, start_of(source_in(folder)), **choices)
    assert len({name for name, _ in named}) == len(named)
    return [config for _, config in named]


def test_every_combination_is_a_run_of_its_own(folder: Path) -> None:
    every = configs(folder, parts=["all", "moe"], expert_dropout=[0.0, 0.4], tokens=[100, 200])
    assert len({config.run_id(0) for config in every}) == 8
    seen = {(c.train.parts, c.model.expert_dropout, c.data.train_tokens) for c in every}
    assert seen == {(p, d, t) for p in ("all", "moe") for d in (0.0, 0.4) for t in (100, 200)}


def test_an_entry_of_the_same_router_keeps_what_it_does_not_say(folder: Path) -> None:
    off, other = configs(folder, "switch:balance_weight=0", "noisy_topk")
    source = run_config(read_described(source_in(folder))["config"])
    assert source.router is not None and off.router is not None and other.router is not None
    assert off.router == replace(source.router, balance_weight=0.0) and source.router.balance_weight > 0
    assert off.router.z_weight == 0.01 and other.router.z_weight == 0


@pytest.mark.parametrize("entry", ["reinforce:baseline=batch", "bandit"])
def test_an_agent_learns_to_route_a_frozen_model(entry: str, copy: Path) -> None:
    """It starts from the source's scores where it has a place for them."""
    before = weights_of(source_in(copy))
    (config,) = configs(copy, entry, parts=["router"])
    train(config, 0, copy / "runs")
    after = weights_of(copy / "runs" / config.run_id(0))
    frozen = {name for name in before if ".router." not in name}
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    moved = [n for n in after if ".router." in n and not (n in before and torch.equal(after[n], before[n]))]
    assert moved, "the policy has learnt"
    scores = "layers.0.moe.router.scores.weight"
    if entry != "bandit":
        still = replace(config, train=replace(config.train, lr=1e-9))
        train(still, 0, copy / "runs")
        torch.testing.assert_close(
            weights_of(copy / "runs" / still.run_id(0))[scores], before[scores], rtol=0, atol=1e-6
        )


def test_a_killed_run_gives_the_same_bits(copy: Path, tmp_path: Path) -> None:
    (config,) = configs(copy, parts=["non-moe"], expert_dropout=[0.4], tokens=[300])
    store = tmp_path / "cut"
    shutil.copytree(source_in(copy), store / source_in(copy).name)
    train(config, 0, copy / "runs")
    stopped = interrupted(config, store, 3)
    train(config, 0, store)
    assert_same_bits(stopped, copy / "runs" / stopped.name)


def test_a_changed_source_is_refused_by_name(copy: Path) -> None:
    source = source_in(copy)
    path = own_checkpoints(source)[12] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    line = refused(rlroute("finetune", source.name, "--tokens", 600, *OTHER, *SHORT, "--seeds", 2))
    assert source.name in line and "model.safetensors is not what was written" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nope",), "run 'nope': not a run of runs; legal are a run's folder"),
        (("switch", "--from-step", 5), "no checkpoint of step 5"),
        (("switch", "--train", "experts"), "experts"),
        (("switch", "--expert-dropout", 1), "--expert-dropout = 1.0: legal are numbers from 0"),
        (("switch", "--tokens", 0), "--tokens = 0: legal are"),
        (("switch", "--tokens", 100_000), "data.train_tokens = 100000: corpus"),
        (("switch", "--train.parts", "moe"), "--train.parts: finetune takes --train"),
        (("switch", "--data.train-tokens", 9), "--data.train-tokens: finetune takes --tokens"),
        (("switch", "hash", "--train", "router"), "train.parts = 'router': nothing of the model trains"),
        (("switch", "--reference", "hash"), "--reference 'hash': legal are switch"),
        (("switch", "--model.d-model", 32), "embed.weight is of shape"),
        (("switch", "--data.spec", "package:nope"), "no distribution 'nope' is installed"),
        (("switch", "--train", "all", "all"), "is asked for twice"),
    ],
    ids=str,
)
def test_bad_words_are_refused_in_one_line_before_any_work(words: tuple[Any, ...], message: str, copy: Path) -> None:
    before = sorted(path.name for path in (copy / "runs").iterdir())
    shutil.move(source_in(copy), copy / "source")
    for path in (copy / "runs").iterdir():
        shutil.rmtree(path)
    shutil.move(copy / "source", copy / "runs" / next(name for name in before if name.endswith("-s7")))
    assert message in refused(rlroute("finetune", *words, "--launcher", "local", "--seeds", 1, "--out", copy / "none"))
    assert len(list((copy / "runs").iterdir())) == 1 and not (copy / "none").exists()


def test_the_record_says_what_was_trained(folder: Path) -> None:
    for run in read_runs(folder / "runs"):
        config = json.loads((folder / "runs" / run.id / "config.json").read_text())["config"]
        assert config["train"]["parts"] in PARTS and ("start" in config) == (run.config["seed"] < 7)


def test_the_page_shows_what_the_records_say() -> None:
    assert f"\n{table()}\n" in (ROOT / "docs" / "finetuning.md").read_text()
    assert figure() == FIGURE.read_text(), "python -m tests.finetuning_figure"
