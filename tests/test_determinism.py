"""Runs that give the same bits again: what PyTorch's switch must find, and that it is set back.

A CPU has few operators without a deterministic form. Those that a GPU lacks are known from PyTorch's own list
(`torch.use_deterministic_algorithms`), and a step is watched for them, backward included.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.utils.deterministic
from torch.utils._python_dispatch import TorchDispatchMode

from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ComparisonError, ConfigError
from rlroute.experiments.comparison.entries import check_comparable, make_entries
from rlroute.experiments.recipes.entries import build_entry
from rlroute.learning import adapt
from rlroute.reading import read_run
from rlroute.registry import default_names
from rlroute.training import loop
from rlroute.training.audit import audit
from rlroute.training.batches import sample_batch
from rlroute.training.data import load_corpus
from rlroute.training.determinism import WORKSPACE, deterministic
from rlroute.training.evaluate import evaluate
from rlroute.training.optimizer import Optimizer
from rlroute.training.prepare import build_model, check, cut, expected_costs, validation_batches
from rlroute.training.step import Device, backward_batch

DATA = DataConfig(spec="stdlib", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_experts=4, k=2, d_expert=8)
TRAIN = TrainConfig(steps=2, batch_size=2, log_every=1, eval_every=2, warmup_steps=1)
CPU = Device("cpu", torch.float32)
TERMS = "balance_weight=0.1,z_weight=0.1,entropy_weight=0.1,sequence_balance_weight=0.1"
ENTRIES = ("dense", f"switch:{TERMS}", f"noisy_topk:{TERMS}", *default_names())
SHAPES = {
    "plain": MODEL,
    "with all else": replace(
        MODEL,
        capacity_factor=1.0,
        num_shared_experts=1,
        zero_experts=1,
        copy_experts=1,
        constant_experts=2,
        gate_form="unit",
        attention_experts=4,
        devices=2,
    ),
    "variants": replace(
        MODEL, num_shared_experts=1, shared_gate="sigmoid", expert_bias=True, gate_at="input", expert_dropout=0.2
    ),
}
CASES = [("switch", "variants"), ("quantile:moving=0.3", "plain"), *((entry, "with all else") for entry in ENTRIES)]

SCANS = {"cumsum", "cumsum_", "cumprod", "cumprod_", "logcumsumexp", "_logcumsumexp"}
RAISES = {
    *("put_", "put", "histc", "median", "nanmedian", "kthvalue", "nll_loss2d_forward", "nll_loss2d_backward"),
    *("adaptive_max_pool2d_backward", "max_unpool2d", "grid_sampler_2d_backward", "_ctc_loss_backward"),
}
"""Without a deterministic form on a GPU, whatever their arguments."""


def undetermined(func, args, kwargs):
    """Return why an operator has no deterministic form on a GPU, or None: it has."""
    name, tensors = func._overloadpacket.__name__, [a for a in args if isinstance(a, torch.Tensor)]
    if name in RAISES:
        return name
    if name in SCANS and (kwargs.get("dtype") or tensors[0].dtype).is_floating_point:
        return f"{name} of {tensors[0].dtype}"
    if name == "bincount" and (kwargs.get("weights") is not None or len(tensors) > 1):
        return "bincount with weights"
    if name.startswith("scatter_reduce") and "prod" in (*args, *kwargs.values()):
        return f"{name} prod"
    return None


class Watch(TorchDispatchMode):
    """Notes the operators that have no deterministic form on a GPU."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._overloadpacket.__name__)
        if why := undetermined(func, args, kwargs or {}):
            self.found.add(why)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "call",
    [
        lambda x, ids: torch.bincount(ids, weights=x),
        lambda x, ids: torch.bincount(ids, x),
        lambda x, ids: x.cumsum(0),
        lambda x, ids: ids.cumsum(0, dtype=torch.float32),
        lambda x, ids: torch.zeros(3).scatter_reduce(0, ids, x, "prod"),
        lambda x, ids: torch.zeros(3).put_(ids, x, accumulate=True),
        lambda x, ids: x.logcumsumexp(0).sum().backward(),
    ],
)
def test_the_watch_finds_what_it_looks_for(call):
    with Watch() as watch:
        call(torch.rand(4, requires_grad=True), torch.tensor([0, 1, 1, 2]))
    assert watch.found


def test_the_watch_lets_the_others_pass():
    x, ids = torch.rand(4, requires_grad=True), torch.tensor([0, 1, 1, 2])
    with Watch() as watch:
        torch.zeros(3).index_add(0, ids, x).sum().backward()
        ids.cumsum(0), torch.bincount(ids), x[ids].sum().backward()
    assert not watch.found and {"index_add", "cumsum", "bincount", "index_put"} <= {
        name.rstrip("_") for name in watch.seen
    }


@pytest.mark.parametrize(
    ("entry", "shape"), [*CASES, *(pytest.param(entry, "plain", marks=pytest.mark.slow) for entry in ENTRIES)]
)
def test_nothing_in_a_run_lacks_a_deterministic_form(entry, shape):
    """Two steps, an evaluation and, for one entry and in the slow cases for all, the audit, with the switch on."""
    corpus, config = load_corpus(DATA.spec, "bytes"), build_entry(entry, DATA, SHAPES[shape], TRAIN)
    net, batches = build_model(config, corpus, 0), validation_batches(config, corpus)
    optimizer, costs = Optimizer(net, config.train), expected_costs(config, corpus)
    with deterministic(True, "cuda"), Watch() as watch:
        for step in range(2):
            batch = sample_batch(corpus, seed=0, step=step, **cut(config))
            result = backward_batch(net, batch, CPU, seed=0, step=step, micro_batches=2, progress=step / 2)
            optimizer.step(step, step / 2)
            adapt(net.routers, result.sums_L, step / 2)
        evaluate(net, batches, corpus.token_bytes_V, CPU, seed=0, step=2, final=True)
        if entry == ENTRIES[1] or shape == "plain":
            audit(net, costs, batches, 2, CPU, seed=0, step=1, progress=1.0)
    assert watch.seen and not watch.found


def switches():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return (*modes, filled)


@pytest.mark.parametrize("warn_only", [None, True])
def test_the_switch_is_set_back_whatever_happens(warn_only):
    if warn_only:
        torch.use_deterministic_algorithms(True, warn_only=True)
    before = switches()
    try:
        with pytest.raises(KeyError), deterministic(True):
            assert switches() == (True, False, False)
            raise KeyError
        assert switches() == before
    finally:
        torch.use_deterministic_algorithms(False)
    for wanted, device in ((False, "cuda"), (True, "cpu")):
        with deterministic(wanted, device):
            assert switches() == (False, False, True)


def test_a_workspace_that_breaks_the_promise_is_refused(monkeypatch):
    assert os.environ[WORKSPACE] in (":4096:8", ":16:8")
    config = RunConfig(data=DATA, model=MODEL, train=replace(TRAIN, deterministic=True))
    monkeypatch.setenv(WORKSPACE, ":4096:2:16:8")
    with pytest.raises(ConfigError, match=rf"{WORKSPACE} = ':4096:2:16:8'.*:4096:8, :16:8"):
        check({config: [0]})
    with pytest.raises(ConfigError, match=WORKSPACE), deterministic(True):
        pass
    check({replace(config, train=TRAIN): [0]})


def test_on_the_cpu_the_field_changes_the_record_and_no_bit(tmp_path: Path):
    runs = []
    for chosen in (False, True):
        config = build_entry("switch", DATA, MODEL, replace(TRAIN, deterministic=chosen))
        loop.train(config, 0, tmp_path)
        runs.append(read_run(tmp_path / config.run_id(0)))
    off, on = runs
    assert [run.config["config"]["train"]["deterministic"] for run in runs] == [False, True]
    losses = [[(row["step"], row["loss"]) for row in (*run.train, *run.evals)] for run in runs]
    assert off.id != on.id and losses[0] == losses[1]
    with pytest.raises(ComparisonError, match=r"train\.deterministic differs"):
        check_comparable(make_entries(runs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_on_the_card_two_runs_are_bit_equal(entry, dtype, tmp_path: Path):
    """Losses, evaluations and the audit: all that a run does is in the scope of the switch."""
    model = replace(MODEL, d_model=128, num_experts=8, d_expert=64)
    train = replace(TRAIN, steps=12, batch_size=16, device="cuda", dtype=dtype, deterministic=True)
    config = build_entry(entry, replace(DATA, seq_len=256, eval_tokens=8192), model, train)
    summaries = [loop.train(config, 0, tmp_path / name) for name in "ab"]
    runs = [read_run(tmp_path / name / config.run_id(0)) for name in "ab"]
    losses = [[(row["step"], row["loss"]) for row in (*run.train, *run.evals)] for run in runs]
    assert losses[0] == losses[1] and summaries[0]["measured"] == summaries[1]["measured"]
