"""Compiled dense parts: the same model to rounding, one compilation for all layers, refused where nothing compiles."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.model import compiling
from rlroute.model.compiling import check_compiler, set_compiled
from rlroute.reading import read_run
from rlroute.training import loop
from rlroute.training.evaluate import evaluate
from rlroute.training.prepare import check
from rlroute.training.step import Device, backward_batch
from tests.tiny import V, make_batch, make_model, shake, small_config

pytestmark = pytest.mark.processes  # the compiler tries in one what the processor can do
CPU, BF16 = Device("cpu", torch.float32), Device("cpu", torch.bfloat16)
MODELS = {
    "dense": (None, {}),
    "routed": ("switch", {}),
    "shared experts": ("switch", {"num_shared_experts": 1}),
    "attention experts": ("switch", {"attention_experts": 4}),
    "mixers": (None, {"mixers": "gated_delta"}),
    "latent attention": ("switch", {"kv_rank": 4, "q_rank": 6, "head_width": 4, "value_width": 5}),
    "tied embeddings": (None, {"tie_embeddings": True}),
    "variants": ("switch", {"num_shared_experts": 1, "shared_gate": "sigmoid", "d_latent": 4, "expert_bias": True}),
}


def counters():
    """What was compiled; the compiler is loaded where it is needed, not by whoever collects tests."""
    from torch._dynamo.utils import counters

    return counters


@pytest.fixture(autouse=True)
def fresh():
    """Forget what was compiled and counted."""
    torch.compiler.reset()
    counters().clear()
    check_compiler.cache_clear()
    yield
    torch.compiler.reset()
    check_compiler.cache_clear()


def trained(model, device, batch, compiled):
    set_compiled(model, compiled)
    model.zero_grad(set_to_none=True)
    result = backward_batch(model, batch, device, seed=0, step=0, micro_batches=2)
    return result.loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_compiled_and_eager_agree(case):
    """Loss, evaluation and every gradient to 1e-5, and bfloat16 to its own rounding, for several layers at once."""
    router, fields = MODELS[case]
    model = shake(make_model(router, small_config(num_layers=3, **fields), dtype=torch.float32), 0.1)
    batch = make_batch(4)
    loss, wanted = trained(model, CPU, batch, False)
    compiled_loss, found = trained(model, CPU, batch, True)
    graphs = counters()["stats"]["unique_graphs"]
    assert math.isclose(loss, compiled_loss, rel_tol=1e-5) and wanted.keys() == found.keys()
    for name in wanted:
        assert (wanted[name] - found[name]).norm() <= 1e-5 * wanted[name].norm(), name
    one_for_all_layers = {
        "dense": 2,
        "routed": 2,
        "shared experts": 3,
        "attention experts": 1,
        "mixers": 2,
        "latent attention": 2,
        "tied embeddings": 2,
        "variants": 3,
    }
    assert graphs == one_for_all_layers[case]
    assert not counters()["graph_break"]
    texts = [evaluate(model, [batch], torch.ones(V).numpy(), CPU, seed=0, step=0, final=False) for _ in range(2)]
    set_compiled(model, False)
    eager = evaluate(model, [batch], torch.ones(V).numpy(), CPU, seed=0, step=0, final=False)
    assert texts[0] == texts[1] and math.isclose(texts[0]["loss"], eager["loss"], rel_tol=1e-5)


@pytest.mark.slow
def test_compiled_bfloat16_is_as_near_as_its_rounding():
    model = shake(make_model(None, small_config(), dtype=torch.float32), 0.1)
    exact, _ = trained(model, CPU, make_batch(4), False)
    rounded, _ = trained(model, BF16, make_batch(4), False)
    compiled, gradients = trained(model, BF16, make_batch(4), True)
    assert abs(compiled - exact) <= max(2 * abs(rounded - exact), 2e-3)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


@pytest.mark.slow
def test_a_run_is_compiled_as_it_says_and_audited_as_it_is(tmp_path: Path):
    data = DataConfig(spec="stdlib", seq_len=16, eval_tokens=80)  # the last batch is shorter
    model = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=4, d_expert=8)
    train = TrainConfig(steps=4, batch_size=2, eval_every=2, warmup_steps=1, compile=True)
    runs = []
    for compile in (True, False):
        config = build_entry("switch", data, model, replace(train, compile=compile))
        loop.train(config, 0, tmp_path)
        runs.append(read_run(tmp_path / config.run_id(0)))
        assert bool(counters()["stats"]["unique_graphs"]) == compile
        counters().clear()
    compiled, eager = runs
    assert compiled.config["config"]["train"]["compile"] and compiled.id != eager.id
    assert math.isclose(compiled.evals[-1]["loss"], eager.evals[-1]["loss"], rel_tol=1e-4)
    audits = [run.summary["measured"] for run in runs]
    assert audits[0] and audits[1] and audits[0]["evaluation"]["later"] == audits[1]["evaluation"]["later"]


def test_without_a_compiler_a_run_is_refused_before_any_work(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    config = RunConfig(data=DataConfig(spec="stdlib", eval_tokens=2048), train=TrainConfig(compile=True))
    with pytest.raises(
        ConfigError, match=r"train\.compile = True: torch.compile does not work here on cpu, .*CxxCompiler"
    ):
        check({config: [0]})
    with pytest.raises(ConfigError, match=r"train\.compile"):
        loop.train(config, 0, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    check({replace(config, train=TrainConfig()): [0]})


def test_only_what_is_marked_is_compiled():
    model = make_model("switch", small_config())
    set_compiled(model, True)
    chosen = {type(m).__name__ for m in model.modules() if getattr(m, "compiled", False)}
    assert chosen == {"Transformer", "Block", "MoELayer"} and not compiling.DenseParts.compiled
