"""Dense models that become mixtures: what the experts are, that the function is kept, and training that goes on.

Shape suffixes: E experts, H hidden rows, D model width, W width of an expert.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlroute.config import ModelConfig, RunConfig, StartConfig
from rlroute.errors import ConfigError
from rlroute.experiments.checkpoints.upcycled import at_start
from rlroute.experiments.comparison.entries import check_comparable
from rlroute.experiments.recipes.entries import build_entry, parse_entry
from rlroute.model import Transformer
from rlroute.model.moe import Placement
from rlroute.model.upcycling import group_scores, upcycled
from rlroute.training.checkpoint import read_whole
from rlroute.training.data import load_corpus
from rlroute.training.group import Group
from rlroute.training.loop import train
from rlroute.training.optimizer import Optimizer
from rlroute.training.prepare import build_model
from rlroute.training.start import start_of, take_start
from tests import ROOT, upcycling_figure
from tests.commands import TINY, ran, refused, rlroute
from tests.runs import assert_same_bits, interrupted
from tests.tiny import DATA, MODEL, TRAIN, make_batch, make_model, run_batch, shake, small_config

CORPUS = load_corpus(DATA.spec)
START = StartConfig(run="dense", step=1, sha256="0" * 64, upcycle=True)
WIDTH = 12


def dense_model(**fields: Any) -> Transformer:
    """Return a dense model of two layers whose MLPs are of WIDTH, at weights that no seed gives."""
    return shake(make_model(None, small_config(k=1, d_expert=WIDTH, **fields)))


def mixture_of(dense: Transformer, entry: str, start: StartConfig = START, **fields: Any) -> Transformer:
    """Return a mixture whose experts are a dense model's MLPs, or pieces of them."""
    router, values = parse_entry(entry)
    mixture = make_model(router, small_config(**fields), **values)
    source = dense.state_dict()
    made = upcycled(source, mixture.state_dict(), start, seed=0)
    keyed = mixture.load_state_dict(made, strict=False).missing_keys
    assert all(".router." in name or "_bias_" in name for name in keyed)
    group_scores(mixture, source)
    return mixture


@torch.no_grad()
def apart(one: Transformer, other: Transformer) -> float:
    """Return the largest difference of two models' logits."""
    batch = make_batch(sequences=4)
    return float((run_batch(one, batch)[0] - run_batch(other, batch)[0]).abs().max())


COPIES: dict[str, Any] = {"d_expert": WIDTH}
PIECES: dict[str, Any] = {"d_expert": WIDTH // 2, "num_experts": 8}


@pytest.mark.parametrize(
    ("entry", "fields"),
    [
        *((entry, COPIES) for entry in ("switch", "hash", "noisy_topk", "bias_balanced", "reinforce", "gshard")),
        *(
            (entry, COPIES | {"gate_form": "unit"})
            for entry in ("unbalanced", "sampled_topk", "switch:normalize=false")
        ),
        *((entry, PIECES) for entry in ("switch", "bias_balanced", "reinforce", "hash:table=multi", "moe_plus_plus")),
        ("switch", PIECES | {"k": 4}),
        ("switch", {"d_expert": WIDTH // 4, "num_experts": 8, "k": 4}),
        ("switch", PIECES | {"activation": "gelu"}),
        ("switch", PIECES | {"expert_bias": True}),
        ("switch", PIECES | {"num_dense_layers": 1, "d_dense": WIDTH}),
    ],
)
def test_the_function_is_the_dense_models_where_gates_sum_to_one(entry: str, fields: dict[str, Any]) -> None:
    """Copied or cut, to rounding in float64, whatever the router."""
    dense = dense_model(activation=fields.get("activation", "swiglu"))
    mixture = mixture_of(dense, entry, **fields)
    assert apart(dense, mixture) < 1e-10
    assert apart(dense, shake(mixture, 0.01)) > 1e-3


@pytest.mark.parametrize(
    ("entry", "fields"),
    [
        ("switch:normalize=false", COPIES),
        ("hash", PIECES),
        ("switch", PIECES | {"k": 3}),
        ("switch", COPIES | {"k": 1}),
    ],
)
def test_the_function_changes_where_gates_or_pieces_do_not_make_a_whole(entry: str, fields: dict[str, Any]) -> None:
    dense = dense_model()
    assert apart(dense, mixture_of(dense, entry, **fields)) > 1e-3


@pytest.mark.parametrize(("activation", "projections"), [("swiglu", 2), ("gelu", 1)])
def test_experts_are_the_pieces_one_after_the_other(activation: Any, projections: int) -> None:
    """Against a cut by hand, row by row: of six experts of a third of the width, the first two are the first third."""
    dense = dense_model(activation=activation)
    mixture = mixture_of(dense, "hash", d_expert=4, num_experts=6, activation=activation)
    for block, other in zip(dense.blocks, mixture.blocks, strict=True):
        assert block.mlp is not None and other.moe is not None
        in_HD, out_DF = block.mlp.experts.in_EHD[0], block.mlp.experts.out_EDF[0]
        for expert in range(6):
            units = [expert // 2 * 4 + unit for unit in range(4)]
            rows = [projection * WIDTH + unit for projection in range(projections) for unit in units]
            assert torch.equal(other.moe.experts.in_EHD[expert], in_HD[rows])
            assert torch.equal(other.moe.experts.out_EDF[expert], 3 * out_DF[:, units])


# --- what is changed on purpose


def units_changed(dense: Transformer, mixture: Transformer) -> list[list[set[int]]]:
    """Return the units of each copied expert that are not the dense model's, by each of gate, up and down."""
    found = []
    for block, other in zip(dense.blocks, mixture.blocks, strict=True):
        assert block.mlp is not None and other.moe is not None
        theirs = [*block.mlp.experts.in_EHD[0].chunk(2), block.mlp.experts.out_EDF[0].t()]
        for in_HD, out_DW in zip(other.moe.experts.in_EHD, other.moe.experts.out_EDF, strict=True):
            mine = [*in_HD.chunk(2), out_DW.t()]
            found.append([set((a != b).any(1).nonzero().flatten().tolist()) for a, b in zip(mine, theirs, strict=True)])
    return found


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, WIDTH)])
def test_drop_draws_a_share_of_each_experts_units_anew(share: float, count: int) -> None:
    """The same units of all three matrices, others in each expert and layer, of the spread of what they replace."""
    dense = dense_model()
    mixture = mixture_of(dense, "switch", replace(START, upcycle_drop=share), **COPIES)
    changed = units_changed(dense, mixture)
    assert all(
        len(units) == count and units == same for gate, up, down in changed for units, same in ((gate, up), (up, down))
    )
    assert len({frozenset(gate) for gate, _, _ in changed}) > 1 or count in (0, WIDTH)
    assert count or apart(dense, mixture) < 1e-10


def test_drawn_units_have_the_mean_and_spread_of_what_they_replace() -> None:
    source = {
        "layers.0.mlp.experts.in_EHD": 5 + 2 * torch.randn(1, 2 * 256, 64),
        "layers.0.mlp.experts.out_EDF": 0.1 * torch.randn(1, 64, 256) - 3,
    }
    whole = {
        "layers.0.moe.experts.in_EHD": torch.empty(2, 2 * 256, 64),
        "layers.0.moe.experts.out_EDF": torch.empty(2, 64, 256),
    }
    made = upcycled(source, whole, replace(START, upcycle_drop=1.0), 0)
    in_EHD, out_EDW = made["layers.0.moe.experts.in_EHD"], made["layers.0.moe.experts.out_EDF"]
    assert abs(in_EHD.mean() - 5) < 0.05 and abs(in_EHD.std() - 2) < 0.05
    assert abs(out_EDW.mean() + 3) < 0.01 and abs(out_EDW.std() - 0.1) < 0.01
    assert not torch.equal(in_EHD[0], in_EHD[1])
    again, other = (upcycled(source, whole, replace(START, upcycle_drop=1.0), seed) for seed in (0, 1))
    assert all(torch.equal(made[name], again[name]) and not torch.equal(made[name], other[name]) for name in made)


def test_noise_is_a_share_of_the_weights_spread_and_each_experts_own() -> None:
    dense = dense_model()
    plain, noisy = (mixture_of(dense, "switch", replace(START, upcycle_noise=n), **PIECES) for n in (0.0, 0.1))
    for name, value in plain.state_dict().items():
        change = noisy.state_dict()[name] - value
        if ".moe.experts." not in name:
            assert not change.any()
            continue
        assert 0.08 < float(change.std() / value.std()) < 0.12
        assert not torch.equal(change[0], change[1])


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_expert": 5}, "model.d_expert = 5: must divide the dense model's width 12"),
        ({"d_expert": 4, "num_experts": 4}, "model.num_experts = 4: must be a multiple of the 3 pieces of the MLP"),
        (
            COPIES | {"num_shared_experts": 1},
            "in a model with layers.0.moe.shared.experts.* legal are routed experts alone",
        ),
        (COPIES | {"d_latent": 4}, "in a model with layers.0.moe.down.weight: legal are routed experts alone"),
        (COPIES | {"constant_experts": 1}, "in a model with layers.0.moe.free.* legal are routed experts alone"),
    ],
)
def test_experts_that_cannot_be_made_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycled(dense_model().state_dict(), make_model("switch", small_config(**fields)).state_dict(), START, 0)


def test_a_mixture_is_no_dense_model() -> None:
    state = make_model("switch", small_config()).state_dict()
    with pytest.raises(ConfigError, match=r"'dense' has no layers.0.mlp.experts.in_EHD: it is not dense"):
        upcycled(state, state, START, 0)


@pytest.mark.parametrize("field", ["upcycle_noise", "upcycle_drop"])
def test_what_changes_experts_needs_upcycling(field: str) -> None:
    values: dict[str, Any] = {field: 0.5}
    with pytest.raises(ConfigError, match=rf"start.{field} = 0.5 does nothing without start.upcycle: legal is 0.0"):
        RunConfig(start=replace(START, upcycle=False, **values))
    for bad in (-0.1, 1.1, "x") if field == "upcycle_drop" else (-0.1, "x"):
        with pytest.raises(ConfigError, match=rf"start.{field} = "):
            values = {field: bad}
            RunConfig(start=replace(START, **values))


# --- runs

CUT = replace(MODEL, num_experts=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a dense run and the state of its optimizer; nobody may change it."""
    store = tmp_path_factory.mktemp("store")
    train(build_entry("dense", DATA, MODEL, TRAIN), 5, store, keep="state")
    return store


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def source_in(store: Path) -> Path:
    return next(store.glob("dense-*"))


def run_of(store: Path, entry: str = "switch", model: ModelConfig = CUT, **choices: Any) -> RunConfig:
    start = start_of(source_in(store), upcycle=True, **choices)
    return replace(build_entry(entry, DATA, model, TRAIN), start=start)


@pytest.mark.parametrize(("entry", "model"), [("switch", CUT), ("hash", replace(MODEL, d_expert=16)), ("dense", CUT)])
def test_before_its_first_step_a_run_has_the_dense_models_loss(store: Path, entry: str, model: ModelConfig) -> None:
    """To 1e-5 bits, in float32; the dense entry of a comparison goes on from the same weights."""
    dense, mixture = at_start(run_of(store, entry, model), 0, store)
    assert dense == pytest.approx(mixture, abs=1e-5)
    first = train(run_of(store, entry, model), 0, store)["final"]
    assert first is not None and first["bits_per_byte"] < dense


@pytest.mark.parametrize("choices", [{}, {"optimizer": "carried", "upcycle_noise": 0.01, "upcycle_drop": 0.5}], ids=str)
def test_a_killed_run_goes_on_to_the_same_bits(store: Path, tmp_path: Path, choices: dict[str, Any]) -> None:
    config, whole = run_of(store, **choices), tmp_path / "whole"
    train(config, 0, whole, sources=store)
    folder = interrupted(config, store, 6)
    train(config, 0, store)
    assert_same_bits(folder, whole / folder.name)


def test_moments_are_carried_cut_and_copied_with_their_count(trained: Path) -> None:
    config, plain = run_of(trained, optimizer="carried"), run_of(trained)
    source = source_in(trained)
    _, moments = read_whole(source / "checkpoint-00000012", config.start or START)
    model = build_model(config, CORPUS, 1)
    optimizer = Optimizer(model, TRAIN)
    optimizer.carry(take_start(model, config, CORPUS, 1, trained))
    state = optimizer.state()
    assert config.run_id(0) != plain.run_id(0) and take_start(model, plain, CORPUS, 1, trained) == {}
    for name, kept in state.items():
        if ".router." in name:
            assert kept["step"] == 0 and not kept["exp_avg"].any()
        elif ".moe." not in name:
            assert kept["step"] == 12 and torch.equal(kept["exp_avg_sq"], moments[name]["exp_avg_sq"])
    out_DF = moments["layers.0.mlp.experts.out_EDF"]["exp_avg"][0]
    out_EDW = state["layers.0.moe.experts.out_EDF"]["exp_avg"]
    assert all(torch.equal(out_EDW[e], out_DF.chunk(2, 1)[e // 4]) for e in range(8))  # moments are not scaled
    assert state["layers.0.moe.experts.out_EDF"]["step"] == 12
    optimizer.check_state(state, 0)
    with pytest.raises(ValueError, match="has had 12 updates at step 3"):
        Optimizer(model, TRAIN).check_state(state, 3)


def test_an_optimizers_state_that_was_not_kept_is_refused_by_name(store: Path) -> None:
    (source_in(store) / "checkpoint-00000012" / "trainer.pt").unlink()
    with pytest.raises(ConfigError, match=r"no optimizer's state in .*; --keep state keeps that of the last"):
        run_of(store, optimizer="carried")


class Half(Group):
    """One of two processes, which holds the second half of the experts."""

    placement = Placement(2, 1)


def test_a_process_takes_the_experts_that_it_holds(trained: Path) -> None:
    config = run_of(trained, upcycle_noise=0.1, optimizer="carried")
    whole, half = build_model(config, CORPUS, 0), build_model(config, CORPUS, 0, Half())
    all_moments, moments = (
        take_start(whole, config, CORPUS, 0, trained),
        take_start(half, config, CORPUS, 0, trained, Half()),
    )
    mine, theirs = half.state_dict(), whole.state_dict()
    for name, value in mine.items():
        cut = ".moe.experts." in name
        assert torch.equal(value, theirs[name][4:] if cut else theirs[name]), name
        if cut:
            assert torch.equal(moments[name]["exp_avg"], all_moments[name]["exp_avg"][4:])


# --- commands and pages


def test_the_page_shows_what_is_published() -> None:
    found = upcycling_figure.budgets()
    assert len(found) > 1 and upcycling_figure.FIGURE.read_text() == upcycling_figure.figure(found)
    assert upcycling_figure.table(found) in (ROOT / "docs" / "upcycling.md").read_text()
    for budget in found:
        assert [run.config["seed"] for run in budget.scratch.runs] == [
            run.config["seed"] for run in budget.upcycled.runs
        ]
        check_comparable([budget.scratch, budget.upcycled])


def test_upcycle_is_the_comparisons_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [word for word in zip(TINY[::2], TINY[1::2], strict=True) if word[0].startswith("--train")]
    words = [part for word in settings for part in word]
    made = ran("upcycle", "dense", "--experts", 8, "--pieces", 2, *words)
    assert "before its first step" in made and made.count("bits per byte") == 2
    first, dense = (
        float(word) for word in made.split("\n")[0].replace(" bits per byte, the dense model", "").split()[-2:]
    )
    assert first == pytest.approx(dense, abs=1e-5)
    before = sorted(path.name for path in store.iterdir())
    options = ("--model.num-experts", 8, "--seeds", 1, "--launcher", "local", "--from", "dense", "--upcycle")
    ran("compare", "switch", "hash", "dense", *TINY, *options)
    after = {path.name for path in store.iterdir()}
    assert set(before) <= after and len(after) == len(before) + 2
    assert "**Starts from**: dense-" in Path("results/table.md").read_text()
    assert ran("verify", "runs") == ""


def test_bad_words_are_refused_in_one_line(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = {
        ("upcycle", "nope"): "run 'nope': not a run of runs",
        ("upcycle", "dense", "--pieces", 3): "--pieces 3: must divide the width of the MLPs of run dense-",
        (
            "upcycle",
            "dense",
            "--pieces",
            2,
            "--experts",
            3,
        ): "model.num_experts = 3: must be a multiple of the 2 pieces",
        ("upcycle", "dense", "--experts", 2, "--k", 3): "model.k = 3: legal are 1 to model.num_experts = 2",
        ("upcycle", "dense", "--drop", 2): "--drop = 2.0: legal are numbers from 0 to 1",
        ("upcycle", "dense", "--noise", -1): "--noise = -1.0: legal are numbers from 0",
        ("upcycle", "dense", "--step", 3): "no checkpoint of step 3 in",
        ("upcycle", "dense", "--router", "nope"): "unknown router 'nope'",
        ("upcycle", "dense", "--concurrency", 2): "--concurrency 2: upcycle trains one run",
        ("train", "switch", *TINY, "--upcycle"): "does not apply to runs that start from no other",
        (
            "train",
            "switch",
            *TINY,
            "--from",
            "dense",
        ): "has no place in this model; start.upcycle = True makes experts of it",
        (
            "train",
            "switch",
            *TINY,
            "--from",
            "dense",
            "--upcycle-drop",
            0.5,
        ): "start.upcycle_drop = 0.5 does nothing without start.upcycle",
    }
    before = sorted(store.rglob("*"))
    for words, message in cases.items():
        assert message in refused(rlroute(*words)), words
    assert sorted(store.rglob("*")) == before
