"""The host runs ahead of the device: no step of training waits for it, a row of the records and an evaluation wait
once.

On the CPU nothing waits. What is counted there are the operations that would on CUDA: those whose result the host has
to know, and copies from memory that is not pinned. Not counted is what has another in its place on CUDA: the CPU
engines of the experts, which read where each expert's rows begin, and the bandit's sum by expert, for which its sum by
tile is counted. With these in their place PyTorch itself counts on a card, in test_gpu.py.
"""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlroute.agents import bandit
from rlroute.baselines.switch import SwitchRouter
from rlroute.config import DENSE, DataConfig, ModelConfig, RouterConfig, TrainConfig
from rlroute.experiments.recipes.entries import build_entry
from rlroute.kernels import make_plan
from rlroute.registry import default_names
from rlroute.routing import RoutingDecision
from rlroute.training import audit, loop
from rlroute.training.batches import next_link, sample_batch
from rlroute.training.data import load_corpus
from rlroute.training.step import backward_batch
from tests.conftest import draw

DATA = DataConfig(spec="synth:documents=64,length=64", seq_len=16, eval_tokens=128)
MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=4, k=2, d_expert=8)
TRAIN = TrainConfig(steps=6, batch_size=4, warmup_steps=2, eval_every=2, log_every=3, checkpoint_every=4)

READS = (
    *("_local_scalar_dense", "bincount", "equal", "histc", "isin", "masked_select", "nonzero"),
    *("_unique2", "unique_consecutive", "unique_dim", "_linalg_check_errors", "lift_fresh"),
)
"""Operators by whose results the host goes on, and the one that makes a tensor of the host's numbers."""
MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")
NOT_COUNTED = ("kernels/cpu.py:", "kernels/primitives.py:", "transfer.py:put")


class Waits(TorchDispatchMode):
    """Notes, by the lines of ours that lead there, what would make the host wait in its block, in backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._overloadpacket.__name__, kwargs or {}
        masks = [mask for mask in args[1] if mask is not None] if name in MASKED else []
        masked = any(mask.dtype in (torch.bool, torch.uint8) for mask in masks)
        repeated = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in READS or masked or repeated:
            self.note(name)
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        frame: FrameType | None = sys._getframe(2)
        lines = []
        while frame is not None:
            code, frame = frame.f_code, frame.f_back
            lines.append(f"{code.co_filename}:{code.co_name}")
        ours = [line.rpartition("/rlroute/")[2] for line in lines if "/rlroute/" in line]
        if not any(line.startswith(place) or f"/{place}" in line for line in ours for place in NOT_COUNTED):
            self.seen.append(f"{what} in {' < '.join(ours[:3])}")

    def __enter__(self) -> "Waits":
        """Copies to the host that ask no operator where the tensor is on it are noted by their names in Python."""
        self.patches = ExitStack()
        patch = self.patches.enter_context(pytest.MonkeyPatch.context())
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(Tensor, name, self._noted(name, getattr(Tensor, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def _noted(self, name: str, copy: Callable[..., Any]) -> Callable[..., Any]:
        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.note(name)
            return copy(tensor, *args, **kwargs)

        return noted


# What is counted


def decision() -> RoutingDecision:
    ids_TK = draw(12, 4, seed=1).argsort(1)[:, :2]
    return RoutingDecision.token_choice(ids_TK, draw(12, 2, seed=2), 4)


PUT_BACK: dict[str, Callable[[RoutingDecision], Any]] = {
    "int": lambda d: int(d.kept_R.sum()),
    "if": lambda d: 1 if d.kept_R.all() else 0,
    "item": lambda d: d.gates_R.sum().item(),
    "tolist": lambda d: d.gates_R.tolist(),
    "cpu": lambda d: d.gates_R.cpu(),
    "NumPy": lambda d: np.asarray(d.gates_R),
    "mask": lambda d: d.gates_R[d.kept_R],
    "values by mask": lambda d: d.gates_R.clone().index_put_((d.kept_R,), d.gates_R),
    "nonzero": lambda d: d.kept_R.nonzero(),
    "masked_select": lambda d: d.gates_R.masked_select(d.kept_R),
    "bincount": lambda d: torch.bincount(d.expert_ids_R),
    "unique": lambda d: d.expert_ids_R.unique(),
    "repeat": lambda d: d.gates_R.repeat_interleave(d.expert_ids_R),
    "equal": lambda d: torch.equal(d.gates_R, d.gates_R),
    "isin": lambda d: torch.isin(d.expert_ids_R, d.token_ids_R),
    "factorisation": lambda d: torch.linalg.cholesky(torch.eye(3)),
    "host's numbers": lambda d: torch.tensor([0.5], device=d.gates_R.device),
    "host's array": lambda d: torch.from_numpy(np.ones(3)).to(d.gates_R.device),
    "host's ids": lambda d: d.gates_R[[0, 2]],
    "split": lambda d: d.gates_R.split(d.load_E().tolist()),
}


@pytest.mark.parametrize("read", PUT_BACK.values(), ids=PUT_BACK.keys())
def test_what_waits_is_noted(read: Callable[[RoutingDecision], Any]) -> None:
    with Waits() as waits:
        decision()
        before = len(waits.seen)
        read(decision())
    assert before == 0 and waits.seen


# A run


class Counted(loop._Run):
    """A run whose waits are noted by what it does; the first step and the first evaluation, whose decisions are looked
    at, apart.
    """

    seen: dict[str, list[list[str]]]

    def _noted(self, what: str, call: Callable[[], Any]) -> Any:
        with Waits() as waits:
            result = call()
        self.seen.setdefault(what, []).append(waits.seen)
        return result

    def _step(self, used: float) -> Any:
        return self._noted("steps" if self.progress.step else "checked", partial(super()._step, used))

    def _look(self, row: Any = None) -> Any:
        return self._noted("looks", partial(super()._look, row))

    def _log(self, *args: Any) -> None:
        self._noted("rows", partial(super()._log, *args))

    def _evaluate(self, final: bool) -> dict[str, Any]:
        seen = "checked" if "eval" in self.unseen else "evaluations"
        row: dict[str, Any] = self._noted(seen, partial(super()._evaluate, final))
        return row


def waits_of(
    entry: str, store: Path, patch: pytest.MonkeyPatch, model: Mapping[str, Any] | None = None, **train: Any
) -> dict[str, list[list[str]]]:
    """Train a run and return what would have waited, by what the run did and each time that it did."""
    seen: dict[str, list[list[str]]] = {}
    patch.setattr(Counted, "seen", seen, raising=False)
    patch.setattr(loop, "_Run", Counted)
    patch.setattr(bandit, "by_expert", bandit.by_tile)
    patch.setattr(audit, "PLACES", 0)  # nothing is counted there
    config = build_entry(entry, DATA, replace(MODEL, **(model or {})), replace(TRAIN, **train))
    assert loop.train(config, 0, store)["status"] == "finished"
    return seen


EVERY_TERM = ",".join(f"{name}=0.1" for name in RouterConfig().term_weights if name != "importance_weight")
ONE, TIGHT = {"num_layers": 1}, {"capacity_factor": 0.5}
GROUPS = "score=sqrt_softplus,groups=2,expert_scales=true,norm_input=true,linear_bias=true,soft_cap=5,bias_rate=0.01"
ENTRIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, ONE, {}) for name in (DENSE, *default_names())},
    **{f"{name}, tight, in parts": (name, ONE | TIGHT, {"micro_batches": 2}) for name in default_names()},
    "by sequence": ("switch", TIGHT | {"capacity_rows": "sequence", "capacity_order": "gate"}, {}),
    "by device": ("switch", TIGHT | {"devices": 2, "capacity_of": "device", "capacity_groups": 2}, {}),
    "every term": (f"switch:jitter=0.1,importance_weight=0.1,{EVERY_TERM}", {"devices": 2}, {"micro_batches": 2}),
    "held": ("switch:target_max_vio=0.5,balance_rate=0.1", {}, {"micro_batches": 2}),
    "samples": (f"reinforce:baseline=leave_one_out,charge_weight=0.1,discount=0.5,{EVERY_TERM}", TIGHT, {}),
    "one resampled": ("reinforce:resample=one", {}, {}),
    "optimism": ("bandit:exploration=optimism", TIGHT, {}),
    "groups": (f"topk:{GROUPS}", TIGHT, {}),
    "positions": ("hash:table=position", {}, {}),
    "pairs of tokens": ("hash_gated:table=bigram", {}, {}),
    "histograms": ("quantile:estimate=histogram", {}, {"micro_batches": 2}),
    "sequences": ("quantile:estimate=sequence,moving=0.3", {}, {}),
    "momentum": ("bias_balanced:rule=smebu", {}, {}),
    "attention": ("switch", {"attention_experts": 4, "num_shared_experts": 1}, {}),
    "heads": ("switch", {"attention_experts": 4, "attention_form": "switchhead"}, {}),
    "free experts": ("switch", TIGHT | {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2, "devices": 2}, {}),
    "unit gates": ("noisy_topk", {"gate_form": "unit", "num_dense_layers": 1}, {}),
    "variants": (
        "switch",
        {"num_shared_experts": 1, "shared_gate": "sigmoid", "expert_bias": True, "gate_at": "input"}
        | {"activation": "swiglu_clamped", "expert_dropout": 0.2},
        {},
    ),
    "bfloat16": ("actor_critic", {}, {"dtype": "bfloat16"}),
    "time": ("switch", {}, {"budget": "time", "budget_amount": 1e6}),
}


PLAIN = set(default_names()) - {"switch", "base"}
"""Slow: they run in parts, with a capacity, too."""


@pytest.mark.parametrize(
    ("entry", "model", "train"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in PLAIN)) for name, case in ENTRIES.items()],
)
def test_no_step_waits_and_a_row_waits_once(
    entry: str, model: dict[str, Any], train: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = waits_of(entry, tmp_path, monkeypatch, model, **train)
    assert seen["steps"] == [[]] * 5
    assert [len(row) for row in seen["rows"]] == [1, 1], seen["rows"]
    # After step 4 there are steps to look at, after step 6 the row has done so.
    assert [len(evaluation) for evaluation in seen["evaluations"]] == [2, 1], seen["evaluations"]


def test_a_budget_of_flops_reads_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many steps it pays for hangs on what ran."""
    seen = waits_of("switch", tmp_path, monkeypatch, TIGHT, budget="flops", budget_amount=2e7, steps=100)
    assert not any(seen["steps"]) and all(len(look) <= 1 for look in seen["looks"])
    assert sum(map(len, seen["looks"])) == len(seen["steps"]) + 1


ANYWHERE: dict[str, Callable[..., Any]] = {
    "forward": lambda made, x_TD, context: bool(made.used_R.all()),
    "objective": lambda made, decision, feedback: float(feedback.share),
    "observe": lambda made, decision, feedback: decision.gates_R.grad.tolist(),
    "adapt": lambda made, sums, progress: int(sums["tokens"]),
    "backward": lambda made, x_TD, context: (
        made.gates_R.requires_grad
        and made.gates_R.register_hook(lambda gradient: gradient * gradient.nonzero().numel())
    ),
}


@pytest.mark.parametrize("where", ANYWHERE)
def test_a_read_that_is_put_back_is_found(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "forward" if where == "backward" else where
    plain = getattr(SwitchRouter, method)

    def reading(router: Any, *args: Any) -> Any:
        made = plain(router, *args)
        ANYWHERE[where](made, *args)
        return made

    monkeypatch.setattr(SwitchRouter, method, reading)
    seen = waits_of("switch", tmp_path, monkeypatch)
    assert [len(step) for step in seen["steps"]] == [MODEL.num_layers] * 5, seen["steps"]


# What the host does not wait for is booked all the same


class Broken(Exception):
    """What a router raises at numbers that are not finite."""


@pytest.mark.parametrize("often", [{"log_every": 1}, {"log_every": 4}, {"log_every": 100, "eval_every": 100}], ids=str)
@pytest.mark.parametrize("what", ["language-model loss", "gradient"])
@pytest.mark.parametrize("raises", [False, True], ids=["", "raises"])
def test_a_run_that_diverges_ends_at_the_step_at_which_it_did(
    raises: bool, what: str, often: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = 6

    def broken(model: Any, *args: Any, **keys: Any) -> Any:
        if raises and keys["step"] > step:
            raise Broken
        result = backward_batch(model, *args, **keys)
        if keys["step"] == step and what == "gradient":
            model.unembed.weight.grad.mul_(float("nan"))
        return replace(result, loss=result.loss / 0) if keys["step"] == step and what != "gradient" else result

    corpus, settings = load_corpus(DATA.spec), dict[str, Any](steps=20, eval_every=4) | often
    config = build_entry("switch", DATA, MODEL, replace(TRAIN, **settings))
    whole = loop.train(replace(config, train=replace(config.train, steps=step)), 0, tmp_path / "whole")
    monkeypatch.setattr(loop, "backward_batch", broken)
    summary = loop.train(config, 0, tmp_path / "broken")
    assert summary["diverged"] == {"step": step, "what": f"the {what} is not finite"}
    chain = ""
    for done in range(step):
        chain = next_link(chain, sample_batch(corpus, seed=0, step=done, batch_size=4, seq_len=16))
    assert summary["batches"] == {"chain": chain, "steps": step}
    assert summary["model"]["training_flops"] == whole["model"]["training_flops"]
    (folder,) = (tmp_path / "broken").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    every = often["log_every"]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(every, step + 1, every))
    assert max((row["step"] for row in rows), default=0) <= step
    assert [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")] == [4]


def test_what_a_router_raises_in_a_sound_run_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **keys: Any) -> Any:
        raise Broken

    monkeypatch.setattr(loop, "backward_batch", broken)
    with pytest.raises(Broken):
        loop.train(build_entry("switch", DATA, MODEL, TRAIN), 0, tmp_path)


# The bandit's sums


@pytest.mark.parametrize("experts", [1, 5, 40])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_sums_by_tile_are_those_by_expert(tokens: int, experts: int) -> None:
    ids_TK = (draw(tokens, 3, seed=1).abs() * experts).long().clamp(max=experts)  # some unused, some experts idle
    made = RoutingDecision.token_choice(ids_TK, draw(tokens, 3, seed=2), experts)
    made = replace(made, kept_R=draw(3 * tokens, seed=3) > 0)
    left_TP, right_TQ = draw(tokens, 4, seed=4), draw(tokens, 5, seed=5)
    sums = [by(left_TP, right_TQ, make_plan(made)) for by in (bandit.by_expert, bandit.by_tile)]
    torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=1e-12)
