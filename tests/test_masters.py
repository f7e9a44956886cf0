"""Parameters in bfloat16 with masters in float32: what moves is the master, what runs is the master rounded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlroute.config import RunConfig
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.model.accounting import fingerprint, is_router
from rlroute.reading import read_run
from rlroute.training import loop
from rlroute.training.batches import sample_batch
from rlroute.training.checkpoint import load_checkpoint, save_checkpoint
from rlroute.training.data import load_corpus
from rlroute.training.memory import expected_memory
from rlroute.training.optimizer import Optimizer
from rlroute.training.prepare import build_model, cut
from rlroute.training.progress import Progress
from rlroute.training.step import Device, backward_batch
from tests.runs import interrupted
from tests.tiny import DATA, MODEL, TRAIN

BF16 = Device("cpu", torch.bfloat16)
LOW = replace(TRAIN, dtype="bfloat16", param_dtype="bfloat16")
VARIED = replace(MODEL, num_shared_experts=1, tie_embeddings=True, kv_rank=8, mixers="gated_delta+attention")
CORPUS = load_corpus(DATA.spec)


def config_of(entry: str = "switch", **train: object) -> RunConfig:
    return build_entry(entry, DATA, VARIED, replace(LOW, **train))  # type: ignore[arg-type]


def trained(config: RunConfig, steps: int, save: Path | None = None):
    """Return model and optimizer after some steps; ``save``: written and read again after each."""
    model = build_model(config, CORPUS, 0)
    optimizer = Optimizer(model, config.train)
    for step in range(steps):
        batch = sample_batch(CORPUS, seed=0, step=step, **cut(config))
        backward_batch(model, batch, BF16, seed=0, step=step, micro_batches=2)
        optimizer.step(step, step / 12)
        if save is not None:
            save_checkpoint(save, model, optimizer, Progress(step + 1, "0" * 64), "run")
            model = build_model(config, CORPUS, 1)
            optimizer = Optimizer(model, config.train)
            progress, damaged = load_checkpoint(save, model, optimizer, "run")
            assert progress is not None and progress.step == step + 1 and not damaged
    return model, optimizer


@pytest.mark.parametrize("entry", ["dense", "switch", "reinforce"])
def test_matrices_are_bfloat16_and_routers_and_norms_float32(entry: str) -> None:
    model, optimizer = trained(config_of(entry), 2)
    for name, parameter in model.named_parameters():
        low = parameter.dim() > 1 and not is_router(name)
        assert parameter.dtype == (torch.bfloat16 if low else torch.float32), name
        assert (parameter in optimizer.masters) == low
    for state in optimizer.adamw.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}
    plain = build_model(config_of(entry, param_dtype="float32"), CORPUS, 0)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert not Optimizer(plain, TRAIN).masters


def test_the_update_is_that_of_the_masters_in_float32() -> None:
    """Against AdamW on copies in float32, given the same gradients: a parameter is its master rounded, and what
    bfloat16 would lose adds up in the master.
    """
    config = config_of(lr=1e-5, warmup_steps=0, clip=1e9, router_clip=1e9)
    model = build_model(config, CORPUS, 0)
    optimizer = Optimizer(model, config.train)
    copy = build_model(replace(config, train=replace(config.train, param_dtype="float32")), CORPUS, 0)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(named[name])
    wanted = Optimizer(copy, config.train)
    start = {name: p.detach().clone() for name, p in named.items()}
    for step in range(3):
        batch = sample_batch(CORPUS, seed=0, step=step, **cut(config))
        backward_batch(model, batch, BF16, seed=0, step=step, micro_batches=2)
        for name, parameter in copy.named_parameters():
            grad = named[name].grad
            parameter.grad = None if grad is None else grad.float()
        found, norms = optimizer.step(step, 0.0), wanted.step(step, 0.0)
        assert torch.equal(torch.as_tensor(found["grad_norm"]), torch.as_tensor(norms["grad_norm"]))
    still = moved = 0
    for name, parameter in copy.named_parameters():
        master = optimizer.masters.get(named[name], named[name])
        assert torch.equal(master, parameter) and torch.equal(named[name], parameter.to(named[name].dtype)), name
        if named[name] in optimizer.masters:
            still += int((named[name] == start[name]).sum())
            moved += int((master != start[name].float()).sum())
    assert still > 0 and moved > 2 * sum(p.numel() for p in optimizer.masters) / 3


def test_a_checkpoint_after_every_step_changes_no_bit(tmp_path: Path) -> None:
    """Masters are kept: what is rounded could not be taken up again."""
    whole, optimizer = trained(config_of(), 3)
    resumed, again = trained(config_of(), 3, save=tmp_path)
    assert fingerprint(whole.named_parameters()) == fingerprint(resumed.named_parameters())
    for name, state in optimizer.state().items():
        assert state.keys() == again.state()[name].keys()
        assert all(torch.equal(value, again.state()[name][key]) for key, value in state.items()), name


def test_a_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    config = config_of("switch")
    interrupted(config, tmp_path / "a", 6)
    loop.train(config, 0, tmp_path / "a")
    loop.train(config, 0, tmp_path / "b")
    one, other = (read_run(tmp_path / store / config.run_id(0)) for store in "ab")
    assert [row["loss"] for row in one.evals] == [row["loss"] for row in other.evals]
    assert one.summary["fingerprint"] == other.summary["fingerprint"]


def test_a_master_that_is_none_is_refused() -> None:
    config = config_of()
    _, optimizer = trained(config, 1)
    name = "embed.weight"
    for change, message in (
        (lambda s: s.pop("master"), f"the optimizer's state of {name} is"),
        (lambda s: s.update(master=s["master"].bfloat16()), f"master of {name} is torch.bfloat16"),
        (lambda s: s.update(master=s["master"] * float("nan")), f"master of {name} holds a value"),
    ):
        state = optimizer.state()
        change(state[name])
        with pytest.raises(ValueError, match=message):
            optimizer.check_state(state, 1)
    plain = Optimizer(build_model(replace(config, train=replace(LOW, param_dtype="float32")), CORPUS, 0), LOW)
    with pytest.raises(ValueError, match="the optimizer's state of"):
        plain.check_state(optimizer.state(), 1)


def test_memory_is_planned_for_both() -> None:
    low, full = (expected_memory(config_of(param_dtype=dtype), 1000, 257) for dtype in ("bfloat16", "float32"))
    assert (low.weights, low.gradients, low.moments, low.copies) == (6000, 2000, 8000, 0)
    assert (full.weights, full.gradients, full.moments, full.copies) == (4000, 4000, 8000, 2000)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_another_compute_precision_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.param_dtype = 'bfloat16' with train\.dtype = '{dtype}': legal is"):
        RunConfig(train=replace(LOW, dtype=dtype))  # type: ignore[arg-type]
