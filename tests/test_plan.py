"""Plans: parameters and FLOPs are those that a run records, memory is near what it keeps, speed is what was assumed."""

from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlroute.config import ModelConfig
from rlroute.errors import ConfigError
from rlroute.experiments.bench.plan import DAY, HOUR, MACHINES, SHARES, make_plan, to_page
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.recipes.sizes import PRESETS
from rlroute.training import loop
from rlroute.training.data import load_corpus
from rlroute.training.memory import expected_memory
from rlroute.training.prepare import build_model
from rlroute.training.step import Device, forward, make_context
from tests import ROOT
from tests.commands import TINY, refused, rlroute
from tests.kept import keeping
from tests.tiny import DATA, MODEL, TRAIN, make_batch

CORPUS = load_corpus(DATA.spec)
WIDE = ModelConfig(num_layers=3, d_model=64, num_heads=4, num_experts=8, k=2, d_expert=64)


@pytest.mark.parametrize("entry", ["switch", "reinforce"])
def test_parameters_and_flops_are_those_that_the_run_records(entry: str, tmp_path: Path) -> None:
    config = build_entry(entry, DATA, MODEL, TRAIN)
    plan = make_plan(config, CORPUS, "cpu")
    found = loop.train(config, 0, tmp_path)["model"]
    greedy = plan.costs.per_token(plan.pairs_L)
    assert {name: found[name] for name in greedy} == greedy  # type: ignore[literal-required]
    assert found["total_parameters"] == plan.costs.total_parameters
    assert found["training_flops"] == plan.flops
    assert plan.tokens == plan.steps * TRAIN.batch_size * DATA.seq_len


@pytest.mark.parametrize(
    ("entry", "model", "train"),
    [
        ("dense", {}, {}),
        ("dense", {"activation": "gelu"}, {"dtype": "bfloat16"}),
        ("dense", {"activation": "relu"}, {"dtype": "float64"}),
        ("switch", {}, {}),
        ("switch", {"num_shared_experts": 2}, {}),
        ("switch", {"num_dense_layers": 1, "activation": "gelu"}, {}),
        ("switch", {"attention_experts": 4}, {}),
        ("switch", {"attention_experts": 4, "attention_form": "switchhead"}, {}),
        ("switch", {"moe_every": 3, "d_dense": 96, "num_kv_heads": 2}, {}),
        ("topk", {"d_latent": 32, "expert_bias": True}, {}),
        ("topk", {"d_latent": 32}, {}),
        ("switch", {"activation": "geglu"}, {}),
        ("switch", {"gate_at": "input"}, {}),
        ("switch", {"tie_embeddings": True}, {"dtype": "bfloat16"}),
        ("dense", {"kv_rank": 16}, {}),
        ("dense", {"mixers": "kimi_delta,mamba2+attention", "attention_gate": "sigmoid"}, {}),
        ("switch", {"mixers": "gated_delta", "state_heads": 8, "state_key_heads": 2}, {"dtype": "bfloat16"}),
        ("switch", {"kv_rank": 32, "q_rank": 48, "value_width": 24}, {"dtype": "bfloat16"}),
        ("dense", {"activation": "geglu", "head_width": 24}, {}),
        ("dense", {"activation": "swiglu_clamped"}, {}),
        ("dense", {"activation": "relu_squared"}, {}),
        ("switch", {}, {"dtype": "bfloat16"}),
        ("switch", {}, {"recompute": True}),
        ("dense", {}, {"recompute": True, "dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_memory_is_within_a_tenth_of_what_a_forward_keeps(entry: str, model: Any, train: Any) -> None:
    """Weights, their copies, activations and logits; without the gradient of these, and of what is computed again."""
    data = replace(DATA, seq_len=32)
    config = build_entry(entry, data, replace(WIDE, **model), replace(TRAIN, batch_size=8, **train))
    net = build_model(config, CORPUS, 0)
    device = Device("cpu", loop.DTYPES[config.train.dtype])
    batch = make_batch(8, 32, vocab_size=CORPUS.vocab_size)
    context = make_context(batch, device, seed=0, step=0, explore=True)
    with keeping(net) as kept:
        forward(net, batch, context, device)
    parameters = sum(p.numel() for p in net.parameters())
    expected = expected_memory(config, parameters, CORPUS.vocab_size)
    again = 0
    if config.train.recompute:  # one block's, by the difference to a model of one more
        more = replace(config, model=replace(config.model, num_layers=4), train=replace(config.train, recompute=False))
        less = replace(more, model=replace(more.model, num_layers=3))
        sizes = [expected_memory(each, 0, CORPUS.vocab_size).activations for each in (more, less)]
        again = sizes[0] - sizes[1] + expected.copies
    size = 8 if device.dtype == torch.float64 else 4
    logits = len(context.token_ids_T) * CORPUS.vocab_size * size
    assert kept.bytes == pytest.approx(expected.copies + expected.activations + logits - again, rel=0.1)
    assert expected.weights == parameters * size and expected.moments == 2 * expected.gradients


def test_each_option_that_saves_memory_saves_it_and_is_charged() -> None:
    def plan_of(**fields: Any) -> Any:
        return make_plan(build_entry("switch", DATA, MODEL, replace(TRAIN, **fields)), CORPUS, "cpu")

    plain, chunked, again, both = (
        plan_of(),
        plan_of(loss_chunk=4),
        plan_of(recompute=True),
        plan_of(recompute=True, loss_chunk=4),
    )
    assert plain.again == 0 and both.again == chunked.again + again.again
    assert chunked.memory.logits == plain.memory.logits // 16
    assert both.tokens_per_second < min(chunked.tokens_per_second, again.tokens_per_second) < plain.tokens_per_second
    assert plan_of(micro_batches=2).memory.activations == plain.memory.activations // 2
    many = make_plan(build_entry("switch", DATA, replace(MODEL, num_layers=8), TRAIN), CORPUS, "cpu")
    kept = build_entry("switch", DATA, replace(MODEL, num_layers=8), replace(TRAIN, recompute=True))
    assert make_plan(kept, CORPUS, "cpu").memory.activations < many.memory.activations / 2


@pytest.mark.parametrize(("entry", "compiled", "measured"), [("switch", False, 257_907), ("dense", True, 501_186)])
def test_the_assumed_speed_is_the_one_that_was_measured(entry: str, compiled: bool, measured: int) -> None:
    """The table of docs/gpu.md has both tokens per second and MFU: one follows from the other by the FLOPs planned."""
    preset = PRESETS["gpu-124m"]
    config = build_entry(entry, preset.data, preset.model, replace(preset.train, compile=compiled))
    plan = make_plan(config, replace(CORPUS, vocab_size=2048), "h200")
    assert plan.tokens_per_second == pytest.approx(measured, rel=0.01)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"{share:.1%}" in page for shares in SHARES.values() for share in shares) and f"{measured:,}" in page
    beside_weights = plan.memory.total - plan.memory.weights - plan.memory.moments
    if not compiled:
        assert beside_weights == pytest.approx(21.4e9, rel=0.1), "the peak of a step, on the card"
    text = to_page(plan, "x")
    speed = plan.tokens_per_second
    assert speed is not None and f"{plan.tokens / speed / HOUR:,.2f}" in text and DAY == 24 * HOUR
    assert sum(astuple(plan.memory)) == plan.memory.total


def test_what_was_not_measured_has_no_hours() -> None:
    config = build_entry("switch", DATA, MODEL, replace(TRAIN, device="cuda"))
    unmeasured: list[dict[str, Any]] = [{}, {"dtype": "bfloat16", "compile": True, "deterministic": True}]
    for fields in unmeasured:
        plan = make_plan(replace(config, train=replace(config.train, **fields)), CORPUS, "a100")
        assert plan.tokens_per_second is None and "nothing measured" in to_page(plan, "x")


def test_another_kind_of_device_is_refused() -> None:
    config = build_entry("switch", DATA, MODEL, TRAIN)
    with pytest.raises(ConfigError, match=r"--device h100 with train\.device = 'cpu': legal are cpu"):
        make_plan(config, CORPUS, "h100")
    cuda = replace(config, train=replace(TRAIN, device="cuda"))
    with pytest.raises(
        ConfigError, match=rf"--device cpu with train\.device = 'cuda': legal are {', '.join(MACHINES)}"
    ):
        make_plan(cuda, CORPUS, "cpu")
    timed = replace(config, train=replace(TRAIN, budget="time", budget_amount=60.0))
    with pytest.raises(ConfigError, match=r"train\.budget = 'time'"):
        make_plan(timed, CORPUS, "cpu")


def test_the_command_prints_a_plan_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = rlroute("plan", "switch", *TINY, "--train.device", "cuda", "--train.dtype", "bfloat16", "--device", "b200")
    assert done.code == 0 and "NVIDIA B200" in done.out and "| parameters |" in done.out and "hours" in done.out
    assert "legal are" in refused(rlroute("plan", "switch", *TINY, "--device", "h100"))
    assert not list(tmp_path.iterdir())


def test_a_preset_brings_its_own_entry_to_a_plan_and_without_either_it_is_refused() -> None:
    alone, named = rlroute("plan", "--preset", "mixtral-tiny"), rlroute("plan", "topk", "--preset", "mixtral-tiny")
    assert (alone.code, named.code) == (0, 0) and "mixtral-tiny on " in alone.out
    assert "wants an ENTRY" in refused(rlroute("plan"))
