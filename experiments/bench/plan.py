"""``rlroute plan``: what a run will need and take, by arithmetic: parameters, memory by part, FLOPs, tokens per second
and hours on a device.

Parameters and FLOPs are those that the run will record, as long as every token runs k experts. Memory is expected
(:mod:`rlroute.training.memory`), speed assumed: a device's peak, and the share of it that training reached elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rlroute.config import RunConfig
from rlroute.errors import ConfigError
from rlroute.experiments.bench.step import VENDOR
from rlroute.experiments.text import NOTHING, markdown, si
from rlroute.machine import memory as memory_here
from rlroute.model.accounting import Costs
from rlroute.training.data import Corpus
from rlroute.training.memory import Memory, expected_memory
from rlroute.training.prepare import expected_costs, flops_per_step, planned_steps

HOUR, DAY = 3600, 24 * 3600
CPU_PEAK, CPU_SHARE = 55e9, 0.45
"""FLOP/s of a thread: of a dense MLP, forward and backward, in ``experiments/results/kernels-cpu.json``; and the share
that whole runs of ``experiments/results/comparison.jsonl`` reach, 25e9 (16e9 to 35e9).
"""
CPU_SAID = "FLOP/s a thread as a dense MLP reached them in results/kernels-cpu.json; runs of results/comparison.jsonl"
SHARES = {(False, False): (0.260, 0.211), (True, False): (0.409, 0.249), (False, True): (0.249, 0.116)}
"""MFU of the vendor's figure, of dense and of switch, compiled or not and deterministic or not: ``docs/gpu.md``."""
GPU_SAID = "FLOP/s of dense bfloat16 by the vendor; a step of gpu-124m measured on one H200 (docs/gpu.md)"


@dataclass(frozen=True)
class Machine:
    """A device.

    Attributes:
        name: as it is said.
        bytes: its memory.
        flops: per second, at most.
    """

    name: str
    bytes: float
    flops: float


MACHINES = {
    "h100": Machine("NVIDIA H100 80GB HBM3", 80e9, VENDOR["NVIDIA H100 80GB HBM3"]),
    "h200": Machine("NVIDIA H200", 141e9, VENDOR["NVIDIA H200"]),
    "a100": Machine("NVIDIA A100 80GB", 80e9, VENDOR["NVIDIA A100"]),
    "b200": Machine("NVIDIA B200", 180e9, 2250e12),
}
"""GPUs; of the B200 the figures of a DGX B200 over eight."""


@dataclass(frozen=True)
class Plan:
    """What a run needs and takes.

    Attributes:
        costs: parameters and FLOPs of its model.
        pairs_L: pairs a token, by site.
        steps, tokens: in all.
        flops: training FLOPs in all, as the run will record them.
        again: FLOPs per token that are computed once more in backward.
        memory: by part.
        machine: where it is to run.
        share: of the machine's peak that is assumed, of what is computed; None where nothing was measured.
        assumed: what the share was measured on.
    """

    costs: Costs
    pairs_L: list[float]
    steps: int
    tokens: int
    flops: int
    again: int
    memory: Memory
    machine: Machine
    share: float | None
    assumed: str

    @property
    def tokens_per_second(self) -> float | None:
        """As expected."""
        return None if self.share is None else self.machine.flops * self.share / (self.flops / self.tokens + self.again)


def make_plan(config: RunConfig, corpus: Corpus, device: str) -> Plan:
    """Return what a run needs and takes on a device: one of ``MACHINES``, or ``cpu``, which is this machine's.

    Raises:
        ConfigError: the router does not fit, the run's device is another kind, or its budget is time itself.
    """
    train = config.train
    if train.budget == "time":
        raise ConfigError("train.budget = 'time': how long a run takes is known then, legal are tokens and flops")
    if (device == "cpu") != (train.device == "cpu"):
        legal = "cpu" if train.device == "cpu" else ", ".join(MACHINES)
        raise ConfigError(f"--device {device} with train.device = {train.device!r}: legal are {legal}")
    costs = expected_costs(config, corpus)
    steps = planned_steps(config, costs)
    tokens = steps * train.batch_size * config.data.seq_len
    share, assumed = _share(config)
    return Plan(
        costs=costs,
        pairs_L=[float(config.model.k)] * len(costs.pair_flops_L),
        steps=steps,
        tokens=tokens,
        flops=steps * flops_per_step(config, costs),
        again=_again(config, costs, corpus.vocab_size),
        memory=expected_memory(
            config, costs.total_parameters, corpus.vocab_size, costs.samples, costs.trained_parameters
        ),
        machine=MACHINES.get(device) or Machine("this machine's CPU", memory_here(), CPU_PEAK * train.threads),
        share=share,
        assumed=assumed,
    )


def _share(config: RunConfig) -> tuple[float | None, str]:
    """Return the share of the peak that is assumed, and what it was measured on."""
    train = config.train
    if train.device == "cpu":
        return (None, "nothing measured in bfloat16") if train.dtype == "bfloat16" else (CPU_SHARE, CPU_SAID)
    if train.dtype != "bfloat16":
        return None, f"nothing measured in {train.dtype}"
    measured = SHARES.get((train.compile, train.deterministic))
    if measured is None:
        return None, "nothing measured with compile and deterministic together"
    return measured[config.router is not None], GPU_SAID


def _again(config: RunConfig, costs: Costs, vocab_size: int) -> int:
    """Return the FLOPs per token that saving memory takes: another forward of the blocks, or of the head."""
    head = 2 * vocab_size * config.model.d_model
    pairs = config.model.k * sum(costs.pair_flops_L)
    blocks = costs.fixed_flops - sum(work.greedy for work in costs.work_L) - head + pairs
    train = config.train
    return costs.samples * (train.recompute * blocks + (train.loss_chunk is not None) * head)


def to_page(plan: Plan, what: str) -> str:
    """Return a plan as text."""
    costs, machine, memory = plan.costs, plan.machine, plan.memory
    greedy = costs.per_token(plan.pairs_L)
    speed = plan.tokens_per_second
    rows: dict[str, str] = {
        "parameters": f"{costs.total_parameters:,}",
        "of them active": f"{greedy['active_parameters']:,}",
        "of routers": f"{costs.router_parameters:,}",
        "FLOPs per token, forward": f"{greedy['flops_per_token']:,}",
        "in training": f"{plan.flops // plan.tokens:,}",
        "computed again": f"{plan.again:,}",
        "steps": f"{plan.steps:,}",
        "tokens": f"{plan.tokens:,}",
        "training FLOPs": f"{plan.flops:,}",
    }
    rows |= {f"memory: {name}": f"{si(value)}B" if value else "0 B" for name, value in asdict(memory).items()}
    fits = "fits" if memory.total < machine.bytes else "does not fit"
    rows["memory"] = f"{si(memory.total)}B of {si(machine.bytes)}B: {fits}"
    rows |= _times(plan, speed)
    said = f"{si(machine.flops)}{plan.assumed}" if plan.share is not None else plan.assumed
    head = f"{what} on {machine.name}. Assumed: {said}"
    head += "." if plan.share is None else f": {plan.share:.1%} of them."
    head += " Evaluations and checkpoints take time beside that."
    return f"{head}\n\n{markdown(('', ''), rows.items(), '<>', tight=True)}"


def _times(plan: Plan, speed: float | None) -> Mapping[str, str]:
    names = ("tokens/s", "hours", "tokens in an hour", "tokens in a day")
    if speed is None:
        return dict.fromkeys(names, NOTHING)
    values = (si(speed), f"{plan.tokens / speed / HOUR:,.2f}", si(speed * HOUR), si(speed * DAY))
    return dict(zip(names, values, strict=True))
