"""``rlroute bench step``: a whole training step of the dense model and of routers, as the loop takes it: data, forward,
backward, optimizer, adapt. Each can run eager, with compiled dense parts, deterministically, or with both.

What is timed is several steps in a row between two synchronisations, so that the host may run ahead as it does in
training. A matrix product takes part in every round: its rate is what the device reaches here and now. Model FLOPs, by
the pairs that ran, are held against it, and against the vendor's figure where that is known.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from rlroute.config import DENSE, DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.experiments.bench.timing import (
    Call,
    Contest,
    figures,
    measure,
    median,
    peak_bytes,
    set_apart,
)
from rlroute.experiments.recipes.presets import build_comparison
from rlroute.experiments.text import NOTHING, markdown, si, with_ends
from rlroute.learning import adapt
from rlroute.model.accounting import costs
from rlroute.model.compiling import set_compiled
from rlroute.training.batches import next_link, sample_batch
from rlroute.training.data import Corpus, corpus_of
from rlroute.training.determinism import deterministic
from rlroute.training.loop import DTYPES
from rlroute.training.optimizer import Optimizer
from rlroute.training.prepare import build_model, cut
from rlroute.training.step import Device, backward_batch

EAGER = "eager"
VARIANTS: dict[str, dict[str, Any]] = {
    EAGER: {},
    "compiled": {"compile": True},
    "deterministic": {"deterministic": True},
    "both": {"compile": True, "deterministic": True},
}
"""What is set in ``train``."""
WARM = 2
"""Rounds that warm up: the first steps compile, and fill the allocator."""
PRODUCT, PRODUCTS = "matrix product", 8
"""What the device's rate is measured by, so many in a row."""
SIZE = {"cpu": 1024, "cuda": 8192}
"""Its rows and columns."""
VENDOR = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA H200": 989.4e12,
}
"""FLOP/s of dense bfloat16 in the vendor's data sheets, by how a device's name begins, the longer first."""


class Trainee:
    """A model in training; a call takes some steps.

    Args:
        config: of the run.
        corpus: what it reads.
        count: steps a call.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, count: int) -> None:
        self.config, self.corpus, self.count, self.done, self.chain = config, corpus, count, 0, ""
        self.model = build_model(config, corpus, 0)
        set_compiled(self.model, config.train.compile)
        self.optimizer = Optimizer(self.model, config.train)
        self.costs = costs(self.model, config.model, config.data.seq_len)
        self.device = Device(config.train.device, DTYPES[config.train.dtype])
        self.loss: Any = 0.0
        self.pairs: list[Any] = []  # that ran in each step since they were last counted, by site

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.train.batch_size * self.config.data.seq_len

    def __call__(self) -> None:
        """Train for some steps."""
        with deterministic(self.config.train.deterministic, self.device.name):
            for _ in range(self.count):
                self._step()

    def _step(self) -> None:
        train, used = self.config.train, min(1.0, self.done / self.config.train.steps)
        batch = sample_batch(self.corpus, seed=0, step=self.done, **cut(self.config))
        result = backward_batch(
            self.model,
            batch,
            self.device,
            seed=0,
            step=self.done,
            micro_batches=train.micro_batches,
            scope=train.balance_scope,
            progress=used,
        )
        self.optimizer.step(self.done, used)
        adapt(self.model.routers, result.sums_L, used)
        self.chain = next_link(self.chain, batch)
        self.pairs.append(result.pairs_L)
        self.loss = result.loss
        self.done += 1

    def flops(self) -> float:
        """Return the mean FLOPs of the steps since this was last asked, by the pairs that ran."""
        pairs, self.pairs = [torch.as_tensor(pairs_L).long().tolist() for pairs_L in self.pairs], []
        return sum(self.costs.of_training(self.tokens, pairs_L) for pairs_L in pairs) / len(pairs)

    def held_bytes(self) -> int:
        """Return the bytes of weights, their masters and moments."""
        moments = (value for state in self.optimizer.adamw.state.values() for value in state.values())
        tensors = [*self.model.parameters(), *self.model.buffers(), *moments, *self.optimizer.masters.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def contenders(
    entries: Sequence[str], variants: Sequence[str], data: DataConfig, model: ModelConfig, train: TrainConfig
) -> dict[str, RunConfig]:
    """Return the configuration of each entry in each variant, the eager dense model first; ``switch``, and ``switch,
    compiled``.

    Raises:
        ConfigError: an illegal entry.
    """
    names = list(dict.fromkeys((DENSE, *entries)))
    configs: dict[str, RunConfig] = {}
    for variant, name in product(dict.fromkeys((EAGER, *variants)), names):
        if variant in variants or name == DENSE:
            (config,) = build_comparison([name], data, model, replace(train, **VARIANTS[variant]), tuned=False)
            configs[name if variant == EAGER else f"{name}, {variant}"] = config
    return configs


def bench_step(
    what: str, configs: Mapping[str, RunConfig], rounds: int, count: int, minutes: float
) -> Iterator[dict[str, Any]]:
    """Yield the one row of a model and its contenders.

    Args:
        what: what the model is called.
        configs: the contenders; the first is what the others are given over.
        rounds: rounds, besides those that warm up.
        count: steps of each contender a round.
        minutes: no new round is begun after so many, once there are two.
    """
    until = time.monotonic() + 60 * minutes
    base = next(iter(configs))
    config = configs[base]
    corpus = corpus_of(config.data)
    torch.compiler.reset()
    trainees: dict[str, Trainee] = {}
    contest = Contest()
    for name, each in configs.items():
        with set_apart(contest, name, base):
            trainees[name] = Trainee(each, corpus, count)
    device = config.train.device
    calls: dict[str, Call] = {**trainees, PRODUCT: _product(device, DTYPES[config.train.dtype])}
    clock = _cuda_seconds if device == "cuda" else None
    timed = measure(calls, base, rounds, device == "cuda", clock=clock, warm=WARM, until=until)
    if PRODUCT in timed.failed:
        raise RuntimeError(f"the {PRODUCT} failed: {timed.failed[PRODUCT]}")
    rate = PRODUCTS * 2 * SIZE[device] ** 3 / median(timed.seconds.pop(PRODUCT))
    contest.failed |= timed.failed
    contest.seconds = {name: [taken / count for taken in values] for name, values in timed.seconds.items()}
    rows = figures(contest, base, base)
    for name in list(contest.seconds):
        rows[name] |= _of_step(trainees[name], rows[name]["seconds"], rate)
        if not math.isfinite(float(trainees[name].loss)):  # a model of nothing but NaN routes as no model does
            rows[name] = {"failed": "its loss is not finite"}
    yield {
        "what": what,
        "base": base,
        "config": config.to_dict(),
        "steps": count,
        "product_flops_per_second": rate,
        "vendor_flops_per_second": vendor_rate(config.train),
        "contenders": rows,
    }


def _cuda_seconds(call: Call) -> float:
    """Return the seconds until the device is idle again, launches included: a step is what a user waits for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _product(device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Return some products of square matrices, drawn at random: products of zeros draw less power, and are faster."""
    a, b = (torch.randn(SIZE[device], SIZE[device], device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b)

    return multiply


def _of_step(trainee: Trainee, seconds: float, rate: float) -> dict[str, Any]:
    """Return what one step of a contender is besides its seconds."""
    device, flops, vendor = trainee.device.name, trainee.flops(), vendor_rate(trainee.config.train)
    found: dict[str, Any] = {
        "tokens_per_second": trainee.tokens / seconds,
        "flops": flops,
        "mfu": flops / seconds / rate,
        "mfu_of_vendor": None if vendor is None else flops / seconds / vendor,
        "held_bytes": trainee.held_bytes(),
        "peak_bytes": peak_bytes(trainee, device == "cuda"),
        "host_waits": host_waits(trainee) if device == "cuda" else None,
    }
    return found


def host_waits(trainee: Trainee) -> float:
    """Return how often a step has the host wait for the device, as PyTorch counts it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainee()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said) / trainee.count


def vendor_rate(train: TrainConfig) -> float | None:
    """Return the vendor's FLOP/s of this device in bfloat16, where that is known and what is computed in."""
    if train.device != "cuda" or train.dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name()
    known = sorted((start for start in VENDOR if name.startswith(start)), key=len)
    return VENDOR[known[-1]] if known else None


def to_page(result: Mapping[str, Any]) -> str:
    """Return a result as a table for each model; a pure function of the file."""
    where = result["environment"]
    head = (
        f"{where['device_name']}, torch {where['torch']}, triton {where['triton']}, {where['threads']} thread(s), "
        f"{result['rounds']} rounds, commit {where['commit']}; `{result['command']}`"
    )
    return "\n\n".join([head, *map(_row_table, result["rows"])]) + "\n"


def _row_table(row: Mapping[str, Any]) -> str:
    vendor = row["vendor_flops_per_second"]
    head = f"{row['what']}, {row['steps']} steps in a row. "
    head += f"A matrix product reaches {si(row['product_flops_per_second'])}FLOP/s here"
    head += f", {si(vendor)}FLOP/s by the vendor:" if vendor else ":"
    over = f"time over {row['base']}"
    titles = ("", "ms a step", over, "tokens/s", "MFU", "of the vendor's", "held", "peak of a step", "host waits")
    lines = [[name, *_cells(values)] for name, values in row["contenders"].items()]
    return f"{head}\n\n{markdown(titles, lines, '<' + '>' * 8, tight=True)}"


def _cells(values: Mapping[str, Any]) -> list[str]:
    if "failed" in values:
        return [values["failed"], *[NOTHING] * 7]
    vendor, waits = values["mfu_of_vendor"], values["host_waits"]
    return [
        f"{1e3 * values['seconds']:.2f}",
        with_ends(**values["time_over_base"]),
        f"{values['tokens_per_second']:,.0f}",
        f"{values['mfu']:.1%}",
        NOTHING if vendor is None else f"{vendor:.1%}",
        f"{si(values['held_bytes'])}B",
        f"{si(values['peak_bytes'])}B",
        NOTHING if waits is None else f"{waits:g}",
    ]
