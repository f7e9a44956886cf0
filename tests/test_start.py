"""Runs that start from another run's weights: what is taken, what is refused, and that it belongs to what a run is."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlroute.config import ModelConfig, RunConfig, StartConfig
from rlroute.errors import CheckpointError, ConfigError, RlrouteError
from rlroute.experiments.checkpoints.trained import open_run
from rlroute.experiments.launch.origin import find_start
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.verify.store import verify
from rlroute.reading import read_runs
from rlroute.records import RunFolder, write_compact
from rlroute.registry import run_config
from rlroute.training.checkpoint import load_checkpoint, load_weights, read_whole
from rlroute.training.data import load_corpus
from rlroute.training.loop import train
from rlroute.training.manifest import own_checkpoints
from rlroute.training.optimizer import Optimizer
from rlroute.training.prepare import build_model
from rlroute.training.start import check_start, placed, start_of, take_start
from tests.commands import TINY, ran, refused, rlroute, start, table
from tests.conftest import HANG
from tests.runs import assert_same_bits, figures, interrupted
from tests.tiny import DATA, MODEL, TRAIN

CORPUS = load_corpus(DATA.spec)
SHA = "0" * 64


def run_of(entry: str, model: ModelConfig = MODEL, **parts: Any) -> RunConfig:
    return replace(build_entry(entry, DATA, model, TRAIN), **parts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a mixture and a dense model, seed 0; nobody may change it."""
    store = tmp_path_factory.mktemp("store")
    for entry in ("switch", "dense"):
        train(run_of(entry), 0, store, keep="all" if entry == "switch" else "weights")
    return store


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def source_in(store: Path, entry: str = "switch") -> Path:
    return store / run_of(entry).run_id(0)


def started(store: Path, entry: str = "switch", seed: int = 1, **choices: Any) -> Any:
    """Return a model as a run that starts from the store's mixture begins with it."""
    config = run_of(entry, start=start_of(source_in(store), **choices))
    model = build_model(config, CORPUS, seed)
    take_start(model, config, CORPUS, seed, store)
    return model


# --- what is taken


def test_every_weight_of_the_same_model_is_the_sources(trained: Path) -> None:
    mine, theirs = started(trained).state_dict(), build_model(run_of("switch"), CORPUS, 7)
    load_weights(source_in(trained), theirs, source_in(trained).name)
    assert mine.keys() == theirs.state_dict().keys()
    assert all(torch.equal(mine[name], value) for name, value in theirs.state_dict().items())


def test_a_run_is_opened_at_its_initial_weights_and_at_its_last(store: Path) -> None:
    config = run_of("switch", start=start_of(source_in(store)))
    train(config, 1, store)
    run = open_run(RunFolder(store, config, 1).read(), store)
    first, last = run.initial().state_dict(), run.model.state_dict()
    assert all(torch.equal(first[name], value) for name, value in started(store).state_dict().items())
    shutil.rmtree(source_in(store))
    assert any(not torch.equal(first[name], last[name]) for name in last)
    assert all(torch.equal(last[name], value) for name, value in run.at(12).state_dict().items())
    with pytest.raises(ConfigError, match="no such run in"):
        run.initial()


def test_an_earlier_checkpoint_is_taken_where_it_was_kept(trained: Path) -> None:
    assert list(own_checkpoints(source_in(trained))) == [4, 8, 12]
    one, last = (started(trained, step=step).state_dict() for step in (4, None))
    source = source_in(trained)
    early, moments = read_whole(source / "checkpoint-00000004", start_of(source, 4))
    assert moments == {}
    assert all(torch.equal(one[name], value) for name, value in early.items())
    assert any(not torch.equal(one[name], last[name]) for name in one)


@pytest.mark.parametrize(("entry", "choice"), [("switch", "fresh"), ("noisy_topk", "kept"), ("hash", "kept")])
def test_what_the_source_has_not_is_initialised_from_its_key(trained: Path, entry: str, choice: str) -> None:
    """The rest is the source's, whatever the router."""
    mine, source = started(trained, entry, router=choice).state_dict(), started(trained).state_dict()
    keyed = build_model(run_of(entry), CORPUS, 1).state_dict()
    for name, value in mine.items():
        taken = name in source and (choice == "kept" or ".router." not in name)
        assert torch.equal(value, (source if taken else keyed)[name]), name
    config = run_of(entry, start=start_of(source_in(trained), router=choice))
    anew = check_start(config, CORPUS, trained)
    assert anew == [n for n in mine if ".router." in n and (choice == "fresh" or n not in source)]


def test_nothing_of_the_source_is_lost_or_of_another_shape() -> None:
    start = StartConfig(run="one", step=1, sha256=SHA)
    source = {"embed.weight": torch.ones(3, 2), "layers.0.moe.router.scores.weight": torch.ones(4, 2)}
    assert placed(source, source | {"new": torch.ones(1)}, start) == source
    assert placed(source, {"embed.weight": torch.ones(3, 2)}, start).keys() == {"embed.weight"}
    with pytest.raises(ConfigError, match=r"'one': its embed.weight has no place in this model$"):
        placed(source, {}, start)
    with pytest.raises(ConfigError, match=r"its embed.weight is of shape \(3, 2\), here \(2, 3\)$"):
        placed(source, source | {"embed.weight": torch.ones(2, 3)}, start)
    other = source | {"layers.0.moe.router.scores.weight": torch.ones(5, 2)}
    with pytest.raises(ConfigError, match=r"scores.weight is of shape \(4, 2\), here \(5, 2\); start.router = 'fresh'"):
        placed(source, other, start)
    assert placed(source, other, replace(start, router="fresh")).keys() == {"embed.weight"}


# --- what a run is


def test_the_start_is_part_of_the_id_and_of_nothing_else() -> None:
    start = StartConfig(run="switch-0123456789ab-s0", step=12, sha256=SHA)
    plain, mine = run_of("switch"), run_of("switch", start=start)
    assert "start" not in plain.to_dict()
    changed: list[dict[str, Any]] = [
        {"run": "switch-0123456789ab-s1"},
        {"step": 8},
        {"sha256": "1" * 64},
        {"router": "fresh"},
    ]
    configs = [plain, mine, *(replace(mine, start=replace(start, **change)) for change in changed)]
    assert len({config.run_id(0) for config in configs}) == len(configs)
    assert run_config(json.loads(json.dumps(mine.to_dict()))) == mine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": ""}, "start.run = '': want a run's id"),
        ({"run": "../other"}, "start.run = '../other': want a run's id"),
        ({"run": "a" * 251}, "start.run = 'aaa.*: want a run's id"),
        ({"step": -1}, "start.step = -1: legal are numbers from 0"),
        ({"sha256": "12"}, "start.sha256 = '12': want 64 hex digits"),
        ({"router": "half"}, "start.router = 'half': legal are 'kept', 'fresh'"),
    ],
)
def test_illegal_starts_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"run": "one", "step": 1, "sha256": SHA} | change
    with pytest.raises(ConfigError, match=message):
        run_of("switch", start=StartConfig(**values))
    with pytest.raises(ConfigError, match=message):
        run_config({"start": values})


def test_a_killed_run_goes_on_from_its_own_checkpoint_to_the_same_bits(store: Path, tmp_path: Path) -> None:
    config, whole = run_of("switch", start=start_of(source_in(store))), tmp_path / "whole"
    train(config, 0, whole, sources=store)
    folder = interrupted(config, store, 6)
    train(config, 0, store)
    assert_same_bits(folder, whole / folder.name)


@pytest.mark.parametrize("keep", ["weights", "state", "all"])
def test_what_is_kept_changes_no_figure_and_can_be_read(keep: Any, trained: Path, tmp_path: Path) -> None:
    """With the optimizer's state a checkpoint is what a resume needs."""
    config = run_of("switch")
    train(config, 0, tmp_path, keep=keep)
    folder = tmp_path / config.run_id(0)
    assert figures(folder) == figures(source_in(trained))
    assert list(own_checkpoints(folder)) == ([4, 8, 12] if keep == "all" else [12])
    model = build_model(config, CORPUS, 0)
    if keep != "state":
        with pytest.raises(CheckpointError, match=r"trainer\.pt"):
            load_checkpoint(folder, model, Optimizer(model, config.train), folder.name)
    else:
        found, damaged = load_checkpoint(folder, model, Optimizer(model, config.train), folder.name)
        assert found is not None and found.step == 12 and not damaged


# --- what is refused


def change_weights(folder: Path) -> None:
    (path,) = folder.glob("checkpoint-*12/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def remove_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint-00000012")


def train_otherwise(folder: Path) -> None:
    """Put another run's weights there, and say so in their manifest."""
    shutil.rmtree(folder)
    other = replace(run_of("switch"), train=replace(TRAIN, lr=0.1))
    train(other, 0, folder.parent)
    shutil.move(folder.parent / other.run_id(0), folder)
    for name in ("config.json", "summary.json", "checkpoint-00000012/manifest.json"):
        path = folder / name
        path.write_text(path.read_text().replace(other.run_id(0), folder.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_weights, "checkpoint .*: model.safetensors is not what was written"),
        (remove, "start.run = 'switch-.*': no such run in"),
        (remove_checkpoint, "checkpoint .*checkpoint-00000012: it has no manifest.json"),
        (train_otherwise, "checkpoint .*: it has SHA-256 [0-9a-f]{64}, want [0-9a-f]{64}"),
    ],
)
def test_a_changed_missing_or_damaged_source_is_refused_by_name(store: Path, change: Any, message: str) -> None:
    """Before anything is written, by whoever trains; an ended run that started from it stays as it is."""
    ended, config = run_of("hash", start=start_of(source_in(store))), run_of("switch", start=start_of(source_in(store)))
    summary = train(ended, 1, store)
    change(source_in(store))
    with pytest.raises(RlrouteError, match=message):
        train(config, 1, store)
    with pytest.raises(RlrouteError, match=message):
        check_start(config, CORPUS, store)
    assert not (store / config.run_id(1)).exists()
    assert train(ended, 1, store) == summary


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"activation": "geglu"}, "model.activation = 'geglu': start.run = 'switch-.*' was trained with 'swiglu'"),
        ({"rope_base": 500.0}, "model.rope_base = 500.0: start.run = .* was trained with 10000.0"),
        ({"num_heads": 1}, "model.num_heads = 1: start.run = .* was trained with 2"),
        ({"mixers": "mamba2"}, "model.mixers = 'mamba2': start.run = .* was trained with 'attention'"),
        ({"kv_rank": 8}, "model.kv_rank = 8: start.run = .* was trained with 0"),
        ({"tie_embeddings": True}, "model.tie_embeddings = True: start.run = .* was trained with False"),
        ({"d_model": 32}, "start.run = .*: its embed.weight is of shape .*, here "),
        ({"num_experts": 8}, r"its layers.0.moe.experts.in_EHD is of shape \(4, 16, 16\), here \(8, 16, 16\)"),
    ],
)
def test_a_model_that_computes_something_else_is_refused_by_name(trained: Path, model: Any, message: str) -> None:
    config = run_of("switch", replace(MODEL, **model), start=start_of(source_in(trained), router="fresh"))
    with pytest.raises(ConfigError, match=message):
        check_start(config, CORPUS, trained)


def test_another_tokenizer_is_refused_by_name(trained: Path) -> None:
    other = replace(CORPUS, provenance={**CORPUS.provenance, "tokenizer_sha256": SHA})
    with pytest.raises(
        ConfigError, match=r"data.tokenizer = 'bytes': start.run = .* was trained with another, 'bytes'"
    ):
        check_start(run_of("switch", start=start_of(source_in(trained))), other, trained)


# --- stores, tables, commands


def test_a_run_from_another_store_is_brought_along(trained: Path, tmp_path: Path) -> None:
    store = tmp_path / "mine"
    start = find_start(source_in(trained), store, 8)
    assert start == start_of(source_in(trained), 8) == find_start(source_in(store), store, 8)
    assert list(own_checkpoints(source_in(store))) == [8]
    assert [run.id for run in read_runs(store)] == [source_in(trained).name] and verify(store) == []
    with pytest.raises(ConfigError, match=r"no checkpoint of step 12 in .*, legal are 8"):
        find_start(source_in(trained), store)
    change_manifest = source_in(store) / "checkpoint-00000008" / "manifest.json"
    old = start.sha256
    change_manifest.write_text(change_manifest.read_text().replace(old, SHA))
    with pytest.raises(ConfigError, match="is the same run with other weights; use another store"):
        find_start(source_in(trained), store, 8)


def test_a_folder_that_is_not_called_as_its_run_is_refused(store: Path) -> None:
    moved = source_in(store).rename(store / "other")
    with pytest.raises(ConfigError, match=r"other: it holds run switch-.*, and a run's folder is called as the run"):
        find_start(moved, store)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store in which a comparison started from a run of it, beside the same from its seeds."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran("train", "switch", *TINY, "--seed", 9)
        ran("compare", "switch", "hash", *TINY, "--seeds", 2, "--launcher", "local", "--from", "switch")
        Path("results/table.md").rename("first.md")
        ran("compare", "switch", *TINY, "--seeds", 2, "--launcher", "local")
    return folder


def test_a_comparison_starts_from_one_run_and_its_table_says_so(compared: Path) -> None:
    (source,) = (compared / "runs").glob("switch-*-s9")
    origin = f"{source.name} at step 12 (sha256 {start_of(source).sha256[:12]})"
    alone, text = (compared / "first.md").read_text(), ran("table", compared / "runs", "--no-timings")
    assert "| switch |" in alone and f"**Starts from**: {origin} (hash, switch)." in alone
    assert f"| switch from {source.name} |" in text and "| switch |" in text
    mine = f"hash from {source.name}, switch from {source.name}"
    assert f"**Starts from**: {origin} ({mine}); the weights of their seeds (switch)." in text
    assert f"equal over 2 entries with experts from {origin}: " in text
    assert f'start.router: "kept" ({mine}), null (switch)' in text and "start.sha256" not in text
    assert "tuned: switch (the best trial" in text and f"tuned for: {mine}" in text
    assert "| tuned at 500 steps of 8 |" in text and "| tuned for switch at 500 steps of 8 |" in text
    (elsewhere,) = re.findall(r"found for runs of another length: (.*?) \(the nearest", text)
    assert set(elsewhere.split(", ")) == {*mine.split(", "), "switch"}
    assert verify(compared / "runs") == []


def test_verify_holds_initial_weights_against_the_source(compared: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(compared / "runs", tmp_path / "runs"))
    (source,) = store.glob("switch-*-s9")
    started_runs = [run for run in read_runs(store) if "start" in run.config["config"]]
    compact = tmp_path / "all.jsonl"
    write_compact(started_runs, compact)
    assert [f.field for f in verify(compact)] == ["config/start"] * len(started_runs)
    assert verify(compact, sources=store) == []
    assert verify(store, reruns=1, evaluate=True) == []
    change_weights(source)
    findings = [str(finding) for finding in verify(store)]
    ours = [finding for finding in findings if "config/start" in finding]
    assert len(ours) == len(started_runs) and all(f"{source.name} at step 12" in finding for finding in ours)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("source", "other", "more"), [("switch", "hash", ()), ("dense", "dense", ("--upcycle",))])
def test_through_ray_a_comparison_from_a_run_gives_the_local_launchers_records(
    source: str, other: str, more: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    """Each store gets the source from elsewhere, and workers read it there."""
    origin = source_in(trained, source)
    command = ("compare", "switch", other, *TINY, "--seeds", 2, "--from", origin, *more)
    for launcher in (("local",), ("ray", "--concurrency", "2")):
        folder = tmp_path / launcher[0]
        folder.mkdir()
        process = start(folder, *command, "--launcher", *launcher)
        _, err = process.communicate(timeout=HANG)
        assert process.returncode == 0, err
    local, ray = tmp_path / "local", tmp_path / "ray"
    mine, theirs = ([run for run in read_runs(f / "runs") if run.id != origin.name] for f in (local, ray))
    assert len(mine) == 4 and all(run.config["config"]["start"]["run"] == origin.name for run in mine)
    for run, same in zip(mine, theirs, strict=True):
        assert run.id == same.id and run.config["made_from"] == same.config["made_from"]
        assert_same_bits(*(store / "runs" / run.id for store in (local, ray)))
    assert table(local / "runs") == table(ray / "runs")


def test_bad_words_are_refused_in_one_line(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compared)
    cases = {
        ("--from", "nope"): "run 'nope': not a run of runs; legal are a run's folder",
        ("--from", "switch"): "runs are called so in runs, the first switch-",
        ("--from-router", "fresh"): "--from-router fresh does not apply to runs that start from no other",
        ("--from-step", "4"): "--from-step 4 does not apply to runs that start from no other",
        ("--from-step", "4", "--from", next(Path("runs").glob("*-s9")).name): "no checkpoint of step 4 in",
    }
    for words, message in cases.items():
        for command in (("train", "hash"), ("judge", "hash"), ("compare", "hash")):
            assert message in refused(rlroute(*command, *TINY, *words))
    assert "--from switch does not apply to --task clusters" in refused(
        rlroute("compare", "--task", "clusters", "--from", "switch")
    )
