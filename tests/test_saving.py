"""What saves memory changes no figure: losses in chunks to rounding, recomputed blocks to the bit.

Shape suffixes: M routing samples, T tokens, V vocabulary.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlroute.config import RunConfig
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.model import Transformer
from rlroute.model.compiling import set_compiled
from rlroute.model.recompute import set_recompute
from rlroute.reading import read_run
from rlroute.routing import Router, RoutingDecision
from rlroute.training import loop
from rlroute.training.data import load_corpus
from rlroute.training.group import Group
from rlroute.training.prepare import build_model, check
from rlroute.training.step import Device, StepResult, backward_batch, forward, make_context
from tests.kept import keeping
from tests.tiny import CPU64, DATA, MODEL, TRAIN, make_batch, make_model, shake, small_config

WIDE = 53
"""A vocabulary as large as nothing else."""
CASES: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "dense": (None, {}, {}),
    "switch": ("switch", {}, {}),
    "samples": ("reinforce", {}, {}),
    "credit": ("credit", {}, {}),
    "noise": ("noisy_topk", {"num_shared_experts": 1}, {}),
    "experts choose": ("expert_choice", {}, {}),
    "variable k": ("remoe", {}, {}),
    "drops": ("switch", {"capacity_factor": 0.5}, {}),
    "attention": ("switch", {"attention_experts": 4}, {}),
    "heads": ("credit", {"attention_experts": 4, "attention_form": "switchhead", "capacity_factor": 0.5}, {}),
    "own": ("topk", {"gate_form": "unit"}, {}),
    "mixers": ("switch", {"mixers": "kimi_delta,mamba2+attention", "num_dense_layers": 1}, {}),
    "latent": ("switch", {"kv_rank": 4, "q_rank": 6, "head_width": 4}, {}),
    "tied": ("switch", {"tie_embeddings": True}, {}),
    "variants": (
        "topk",
        {"expert_dropout": 0.5, "expert_bias": True, "d_latent": 4, "num_shared_experts": 1, "shared_gate": "sigmoid"},
        {},
    ),
}


def model_of(case: str, dtype: torch.dtype = torch.float64) -> Transformer:
    router, model, fields = CASES[case]
    return shake(make_model(router, small_config(**model), dtype=dtype, **fields), 0.1)


def train(model: Transformer, device: Device = CPU64) -> tuple[StepResult, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    result = backward_batch(model, make_batch(4), device, seed=0, step=0, micro_batches=2)
    return result, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The loss in chunks


@pytest.mark.parametrize(
    ("case", "chunk"), [("dense", 16), ("switch", 1), ("switch", 5), ("samples", 7), ("samples", 1000), ("tied", 5)]
)
def test_losses_in_chunks_and_their_gradients_are_those_of_the_whole(case: str, chunk: int) -> None:
    model = model_of(case)
    whole, wanted = train(model)
    model.loss_chunk = chunk
    found, gradients = train(model)
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-12, atol=1e-12)
    assert found.terms.keys() == whole.terms.keys() and gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-12, atol=1e-12)


def test_each_token_has_its_own_loss_in_every_sample() -> None:
    model, batch = model_of("samples"), make_batch(3)
    context = make_context(batch, CPU64, samples=2, seed=0, step=0, explore=True)
    whole_MT, _ = forward(model, batch, context, CPU64)
    model.loss_chunk = 7
    loss_MT, _ = forward(model, batch, context, CPU64)
    torch.testing.assert_close(loss_MT, whole_MT, rtol=1e-12, atol=1e-12)
    weights_MT = torch.linspace(-1, 1, loss_MT.numel(), dtype=torch.float64).view_as(loss_MT)  # as no mean has them
    leaves = (model.unembed.weight, model.embed.weight, model.norm.weight)
    for one, other in zip(
        torch.autograd.grad((whole_MT * weights_MT).sum(), leaves),
        torch.autograd.grad((loss_MT * weights_MT).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


class Widest(TorchDispatchMode):
    """Notes the most rows of ``WIDE`` columns that anything made has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        wide = [t for t in made if isinstance(t, Tensor) and t.dim() > 1 and t.shape[-1] == WIDE]
        self.rows = max([self.rows, *(t.numel() // WIDE for t in wide)])
        return out


def test_no_more_than_a_chunk_of_logits_is_ever_there() -> None:
    model, batch = make_model("switch", small_config(), vocab_size=WIDE), make_batch(4)

    def rows() -> int:
        with Widest() as seen:
            backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=2)
        return seen.rows

    assert rows() == 16, "a micro-batch"
    model.loss_chunk = 4
    assert rows() == 8, "the weight, turned: as many as it has columns"


def test_in_bfloat16_chunks_are_as_near_as_its_rounding_and_their_sum_is_not_rounded() -> None:
    model = model_of("dense", torch.float32)
    exact = train(model, Device("cpu", torch.float32))[1]["unembed.weight"]
    rounded = train(model, Device("cpu", torch.bfloat16))[1]["unembed.weight"]
    model.loss_chunk = 2
    chunked = train(model, Device("cpu", torch.bfloat16))[1]["unembed.weight"]
    assert chunked.dtype == torch.float32
    assert (chunked - exact).norm() <= 1.5 * (rounded - exact).norm()


# Recomputed blocks


@pytest.mark.parametrize("case", CASES)
def test_recomputed_blocks_have_the_same_bits_and_routes_are_drawn_once(case: str) -> None:
    model, decided, credits = model_of(case), list[RoutingDecision](), list[Tensor]()
    for router in model.routers:
        router.register_forward_hook(lambda _module, _args, decision: decided.append(decision))
        router.observe = observing(router.observe, credits)  # type: ignore[method-assign]
    kept, wanted = train(model)
    times, gates = len(decided), list(credits)
    decided.clear()
    credits.clear()
    set_recompute(model, True)
    again, gradients = train(model)
    assert len(decided) == times == 2 * len(model.routers), "once a site and micro-batch"
    assert torch.equal(kept.loss, again.loss) and gradients.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())
    assert len(gates) == len(credits) and all(map(torch.equal, gates, credits))
    for one, other in zip(kept.sums_L, again.sums_L, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def observing(observe: Any, credits: list[Tensor]) -> Any:
    def noted(decision: RoutingDecision, feedback: Any) -> dict[str, Tensor]:
        if decision.gates_R.requires_grad:
            assert decision.gates_R.grad is not None, "a gate's gradient is its pair's credit"
            credits.append(decision.gates_R.grad.clone())
        found: dict[str, Tensor] = observe(decision, feedback)
        return found

    return noted


@pytest.mark.parametrize("case", ["dense", "switch", "noise", "attention"])
def test_what_is_kept_of_a_block_is_what_routers_and_its_neighbours_keep(case: str) -> None:
    """A count, not a time: two thirds of a tiny model's bytes and more."""
    router, fields, _ = CASES[case]
    wide = small_config(d_model=64, d_expert=64, num_layers=4, **fields)
    model = make_model(router, wide, seq_len=32, dtype=torch.float32)
    sizes = []
    for recompute in (False, True):
        set_recompute(model, recompute)
        batch = make_batch(4, 32)
        context = make_context(batch, Device("cpu", torch.float32), seed=0, step=0, explore=True)
        with keeping(model) as kept:
            forward(model, batch, context, Device("cpu", torch.float32))
        sizes.append(kept.bytes)
    assert sizes[1] < sizes[0] / 3, sizes


def test_an_evaluation_recomputes_nothing() -> None:
    model, batch = model_of("switch"), make_batch()
    set_recompute(model, True)
    with torch.no_grad(), keeping(model) as kept:
        forward(model, batch, make_context(batch, CPU64, seed=0, step=0, explore=False), CPU64)
    assert kept.bytes == 0


# A run


def test_a_run_with_both_is_a_run_of_its_own_with_the_same_figures(tmp_path: Path) -> None:
    runs = []
    for fields in (dict[str, Any](), dict[str, Any](recompute=True, loss_chunk=24)):
        config = build_entry("reinforce", DATA, MODEL, replace(TRAIN, **fields))
        loop.train(config, 0, tmp_path)
        runs.append(read_run(tmp_path / config.run_id(0)))
    plain, both = runs
    assert plain.id != both.id and plain.summary["batches"] == both.summary["batches"]
    assert both.evals[-1]["loss"] == pytest.approx(plain.evals[-1]["loss"], rel=1e-4)
    assert both.summary["measured"] and both.summary["model"] == plain.summary["model"]


def test_recomputation_behind_an_exchange_is_refused_by_name() -> None:
    config = RunConfig(data=DATA, model=MODEL, train=replace(TRAIN, recompute=True, micro_batches=2))
    with pytest.raises(ConfigError, match=r"train\.recompute = True with 2 expert shards: legal is False, or one"):
        check({config: [0]}, workers=2, expert_shards=2)
    check({config: [0]}, workers=2)

    class Two(Group):
        placement = replace(Group.placement, shards=2)

    with pytest.raises(ConfigError, match=r"train\.recompute"):
        build_model(config, load_corpus(DATA.spec), 0, Two())


@pytest.mark.parametrize("field", [{"loss_chunk": 0}, {"loss_chunk": -1}, {"recompute": 1}])
def test_illegal_values_are_refused_by_name(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(ConfigError, match=rf"train\.{name} = "):
        RunConfig(train=replace(TRAIN, **field))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("case", ["dense", "noise", "attention"])
def test_compiled_parts_can_be_recomputed_and_their_losses_cut(case: str) -> None:
    device = Device("cpu", torch.float32)
    model = model_of(case, torch.float32)
    whole, wanted = train(model, device)
    torch.compiler.reset()
    set_compiled(model, True)
    set_recompute(model, True)
    model.loss_chunk = 10
    found, gradients = train(model, device)
    torch.compiler.reset()
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-5, atol=0)
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_routers_are_no_part_that_is_recomputed() -> None:
    model = model_of("switch")
    set_recompute(model, True)
    assert not any(getattr(m, "recompute", False) for m in model.modules() if isinstance(m, Router))
