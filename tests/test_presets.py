"""Published models as presets: their figures, their tiny forms, their list, and how commands take them."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlroute.errors import ConfigError
from rlroute.experiments.launch.spec import read_spec
from rlroute.experiments.recipes.catalogue import CATALOGUE
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.recipes.sizes import PRESETS, find_preset
from rlroute.experiments.report.preset_page import agrees, count, presets_page
from rlroute.reading import read_runs
from rlroute.training import loop
from tests import ROOT
from tests.commands import ran, refused, rlroute

CORPUS = "synth:documents=64,length=64"
STEPS = 20
FEW = (
    *("--data.spec", CORPUS, "--data.seq-len", "16", "--data.eval-tokens", "128"),
    *("--train.batch-size", "2", "--train.warmup-steps", "2", "--train.steps", "2"),
)


@pytest.mark.parametrize("name", CATALOGUE)
def test_figures_are_those_that_the_authors_print(name: str) -> None:
    published = CATALOGUE[name]
    counted = count(published)
    assert agrees(counted.total + published.beside, published.total, published.rounded_to)
    assert agrees(counted.active, published.active)


@pytest.mark.parametrize(
    ("here", "printed", "same"),
    [(46.9, "46.7", True), (47.2, "46.7", False), (3.4, "3.3", True), (3.5, "3.3", False), (4.0, "3", True)],
)
def test_a_figure_agrees_to_a_hundredth_or_a_unit_of_its_last_digit(here: float, printed: str, same: bool) -> None:
    assert agrees(here, printed) is same


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_tiny_form_trains_and_its_router_is_the_published_one(name: str, tmp_path: Path) -> None:
    preset, published = PRESETS[f"{name}-tiny"], CATALOGUE[name]
    data = replace(preset.data, spec=CORPUS, seq_len=16, eval_tokens=128)
    train = replace(preset.train, steps=STEPS, batch_size=2, warmup_steps=2, eval_every=STEPS, checkpoint_every=STEPS)
    config = build_entry(preset.entry, data, preset.model, train)
    summary = loop.train(config, 0, tmp_path)
    assert summary["status"] == "finished" and summary["steps"] == STEPS
    whole = build_entry(published.entry, PRESETS[name].data, PRESETS[name].model, PRESETS[name].train)
    assert whole.router == config.router and whole.others == config.others
    here, there = config.model, whole.model
    assert (here.k, here.num_experts) == (min(there.k, 4), min(there.num_experts, 16))
    ours = (
        "activation",
        "num_shared_experts",
        "shared_gate",
        "attention_gate",
        "moe_every",
        "gate_at",
        "expert_bias",
        "capacity_factor",
    )
    assert all(getattr(here, name) == getattr(there, name) for name in ours)
    kinds = [set(model.mixers.split(",")) for model in (here, there)]
    assert kinds[0] == kinds[1] and bool(here.kv_rank) == bool(there.kv_rank)


def test_the_page_is_the_list() -> None:
    assert (ROOT / "docs" / "presets.md").read_text() == presets_page() + "\n"


def test_commands_take_the_router_of_a_preset_where_none_is_named(tmp_path: Path) -> None:
    said = ("--preset", "gpt-oss-tiny", *FEW, "--store", tmp_path / "runs")
    ran("train", *said)
    ran("train", "hash", *said)
    records = read_runs(tmp_path / "runs")
    assert sorted(record.config["router"] for record in records) == ["hash", "topk"]
    chosen = next(record.config["config"] for record in records if record.config["router"] == "topk")
    assert chosen["router"]["linear_bias"] and chosen["model"]["d_model"] == 64 and chosen["model"]["k"] == 4
    assert chosen["train"]["steps"] == 2 and chosen["data"]["seq_len"] == 16


def test_a_published_size_says_what_memory_it_needs_before_any_work(tmp_path: Path) -> None:
    told = refused(rlroute("train", "--preset", "deepseek-v3", "--train.device", "cpu", "--store", tmp_path))
    assert "GiB of memory" in told and not list(tmp_path.iterdir())


def test_a_sweep_takes_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text('preset = "olmoe-tiny"\n[base]\nmodel.d_expert = 8\n[grid]\ntrain.lr = [1e-3, 2e-3]\n')
    jobs = read_spec(path).jobs("")
    wanted = find_preset("olmoe-tiny")
    assert [job.config.train.lr for job in jobs] == [1e-3, 2e-3]
    assert {job.config.model for job in jobs} == {replace(wanted.model, d_expert=8)}
    assert {job.config.router for job in jobs} == {build_entry(wanted.entry, *_parts(wanted)).router}
    path.write_text("preset = 3\n")
    with pytest.raises(ConfigError, match="preset = 3: want a text"):
        read_spec(path)
    path.write_text('preset = "olmo-tiny"\n')
    with pytest.raises(ConfigError, match=r"preset 'olmo-tiny' \(did you mean 'olmoe-tiny'\?\)"):
        read_spec(path)


def _parts(preset):
    return preset.data, preset.model, preset.train
