"""The gradient instrument: how good is the signal that a router's logits get from one training micro-batch?

For every entry, size and checkpoint: build the model, train it so far, warm up what a router keeps beside its policy,
take one held-out micro-batch, and compare what training gives its logits, over many draws, with the exact gradient
(:mod:`.exact`).

Shape suffixes: T tokens, L routed sites, E experts, N draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Annotated

from rlroute.config import DENSE, DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.gradients.estimates import Measurement, measure_probe
from rlroute.experiments.gradients.exact import ENUMERABLE, count_choices
from rlroute.experiments.gradients.probe import Probe
from rlroute.experiments.gradients.signal import Signal
from rlroute.experiments.gradients.snapshots import Training, warmed_up
from rlroute.experiments.gradients.steering import Unmeasurable
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.verdicts import Seeds
from rlroute.limits import Between, Experts, Layers, Positive, Size, Whole, check_fields, option
from rlroute.registry import default_names, refusals, router_names
from rlroute.routing import Site
from rlroute.sites import sites
from rlroute.training.batches import sample_batch
from rlroute.training.data import load_corpus
from rlroute.training.prepare import meta_model, shapes

MEASURED_STEP = 2**32
"""The measured micro-batch is the first sequence of this step: no training step gets there."""
ESTIMATORS = (
    "reinforce:baseline=none",
    "reinforce:baseline=batch",
    "reinforce:baseline=ema",
    "reinforce:discount=1",
    "reinforce:baseline=leave_one_out,discount=1",
    "reinforce:baseline=leave_one_out,discount=1,resample=one",
)
"""What the default sweep adds to the routers' own defaults."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is measured: all combinations of entries and sizes (or one size varied at a time), at all checkpoints, with
    all seeds.

    Raises:
        ConfigError: a value is illegal.
    """

    entries: tuple[str, ...]
    experts: tuple[Experts, ...] = (4,)
    k: tuple[Experts, ...] = (1,)
    layers: tuple[Layers, ...] = (1, 2)
    tokens: tuple[Annotated[int, Between(1, 4096)], ...] = (3,)
    one_at_a_time: bool = False
    """Vary one of the sizes above at a time, the others at their first value."""
    train_steps: tuple[Whole, ...] = (0, 50)
    draws: Annotated[int, Between(3, 10**7)] = 1000
    """Estimates drawn where they cannot all be enumerated."""
    samples: Annotated[int, Between(2, 10**6)] = 32
    """Sampled joint choices of a conditional gradient."""
    warm_up: Annotated[int, Between(0, 10**6)] = 20
    """Steps for the routers' running means and value heads before each measurement; model and policy stay."""
    seeds: Seeds = 4
    gate_form: str = "own"
    attention: bool = False
    """Give each attention as many experts, and a router of its own."""
    corpus: str = "synth:documents=512,vocab=32,domains=4"
    d_model: Size = 32
    batch_size: Size = 32
    """Sequences per training step; a sequence is as long as the measured micro-batch."""
    lr: Positive = 8e-3

    def __post_init__(self) -> None:
        check_fields(self, None)
        for name in ("experts", "k", "layers", "tokens", "train_steps"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                shown = ",".join(map(str, values))
                raise ConfigError(f"{option(name)} = {shown!r}: want different numbers, parted by commas")
        twice = [entry for entry in self.entries if self.entries.count(entry) > 1]
        if twice or not self.entries:
            raise ConfigError(f"entries = {' '.join(twice)!r}: want at least one entry, each once")

    def cases(self) -> list[Case]:
        """Return what is to be measured, in order.

        Raises:
            ConfigError: an entry or a size is illegal.
        """
        return [Case(entry, self._config(entry, model)) for model in self.bare() for entry in self.entries]

    def bare(self) -> list[RunConfig]:
        """Return each size once, with nobody to route.

        Raises:
            ConfigError: a size is illegal.
        """
        return [self._bare(*size) for size in self._sizes()]

    def _sizes(self) -> list[tuple[int, ...]]:
        axes = (self.layers, self.k, self.experts, self.tokens)
        base = tuple(values[0] for values in axes)
        apart = 1 if self.one_at_a_time else len(axes)
        return [size for size in product(*axes) if sum(a != b for a, b in zip(size, base, strict=True)) <= apart]

    def _config(self, entry: str, bare: RunConfig) -> RunConfig:
        if entry.partition(":")[0] == DENSE:
            raise ConfigError(f"entry {entry!r}: the dense model has no router, legal are {', '.join(router_names())}")
        return build_entry(entry, bare.data, bare.model, bare.train)

    def _bare(self, layers: int, k: int, experts: int, tokens: int) -> RunConfig:
        if k >= experts:
            raise ConfigError(f"k = {k} with experts = {experts}: nothing is chosen, legal are k below experts")
        if count_choices(experts, k) > ENUMERABLE:
            raise ConfigError(
                f"experts = {experts} with k = {k}: {count_choices(experts, k)} choices of a token, legal are "
                f"{ENUMERABLE}"
            )
        model = ModelConfig(
            num_layers=layers,
            d_model=self.d_model,
            num_experts=experts,
            k=k,
            d_expert=self.d_model,
            attention_experts=experts if self.attention else 0,
            gate_form=self.gate_form,  # type: ignore[arg-type]  # RunConfig holds it to its choices
        )
        train = TrainConfig(steps=max(*self.train_steps, 1), batch_size=self.batch_size, lr=self.lr, warmup_steps=10)
        return RunConfig(data=DataConfig(spec=self.corpus, seq_len=tokens), model=model, train=train)


@dataclass(frozen=True)
class Case:
    """An entry at one size."""

    entry: str
    config: RunConfig

    @property
    def size(self) -> str:
        """The size in words."""
        model = self.config.model
        sizes = {"E": model.num_experts, "k": model.k, "layers": model.num_layers, "tokens": self.config.data.seq_len}
        return ", ".join(f"{name} = {size}" for name, size in sizes.items())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One routed site of one case after so many steps, measured with every seed.

    Attributes:
        layer: the site: a layer's number, or "n.attention" for its attention.
        target: ``exact`` or ``conditional``.
        target_error: of a conditional target: its sampling error over its norm, the largest of the seeds.
        rows_per_estimate: token rows that one estimate costs, forward and backward: T for each routing sample, times
            the steps of which this layer learns in one only.
        signals: by seed; how the estimates compare with the gradient of the expected loss.
        choices: by seed; how they compare with its part through the choices alone.
    """

    entry: str
    experts: int
    k: int
    layers: int
    layer: Site
    tokens: int
    train_steps: int
    target: str
    target_error: float
    rows_per_estimate: float
    signals: tuple[Signal, ...]
    choices: tuple[Signal, ...]


@dataclass(frozen=True)
class Unmeasured:
    """An entry without figures, and why; ``where`` says at which size and step, if it has figures at another."""

    entry: str
    reason: str
    where: str = ""

    @property
    def place(self) -> str:
        """Where, behind the name of the entry."""
        return f" at {self.where}" if self.where else ""


def default_entries() -> tuple[str, ...]:
    """Return every router that needs no field, and the estimators of REINFORCE."""
    return (*default_names(), *ESTIMATORS)


def parse_numbers(name: str, text: str) -> tuple[int, ...]:
    """Read whole numbers parted by commas.

    Raises:
        ConfigError: they are none.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        raise ConfigError(f"{option(name)} = {text[:100]!r}: want whole numbers parted by commas, as 2,4")
    return tuple(map(int, parts))


def without_refusals(sweep: Sweep) -> tuple[Sweep, list[Unmeasured]]:
    """Return the sweep without the routers that refuse one of its sizes, and why each of them is left out.

    Raises:
        ConfigError, DataError: bad input; or nobody is left.
    """
    corpus = load_corpus(sweep.corpus)
    reasons = refusals([shape for bare in sweep.bare() for shape in shapes(bare, corpus)])
    names = {entry: entry.partition(":")[0] for entry in sweep.entries}
    left_out = [Unmeasured(entry, f"left out, {reasons[name]}") for entry, name in names.items() if name in reasons]
    kept = tuple(entry for entry, name in names.items() if name not in reasons)
    return replace(sweep, entries=kept), left_out


def run(sweep: Sweep, report: Callable[[str], None] = lambda text: None) -> tuple[list[Row], list[Unmeasured]]:
    """Measure everything. A router that fails on the way is named, and costs the others nothing.

    Args:
        sweep: what.
        report: told what is being measured.

    Raises:
        ConfigError, DataError: bad input, found before any work.
    """
    cases = sweep.cases()
    load = cache(load_corpus)
    for case in cases:  # what does not fit is found here
        meta_model(case.config, load(case.config.data.spec))
        sample_batch(load(case.config.data.spec), seed=0, step=0, batch_size=1, seq_len=case.config.data.seq_len)
    rows: list[Row] = []
    failed: dict[str, list[Unmeasured]] = {}
    for case in cases:
        training = cache(partial(Training, case.config, load(case.config.data.spec)))
        for step in sorted(sweep.train_steps):
            where = f"{case.size}, train_steps = {step}"
            report(f"{case.entry}: {where}")
            try:
                rows += measure_case(case, step, training, sweep)
            except Exception as error:  # a router may be another distribution's, and fail in any way
                failed.setdefault(case.entry, []).append(Unmeasured(case.entry, _reason(error), where))
    places = len(cases) // len(sweep.entries) * len(sweep.train_steps)
    everywhere = {entry: [replace(found[0], where="")] for entry, found in failed.items() if len(found) == places}
    return rows, [item for found in (failed | everywhere).values() for item in found]


def _reason(error: Exception) -> str:
    if isinstance(error, Unmeasurable):
        return str(error)
    return f"it fails by {type(error).__name__}: {' '.join(str(error).split())}"


def measure_case(case: Case, step: int, training: Callable[[int], Training], sweep: Sweep) -> list[Row]:
    """Return a row for each routed site, after so many steps of the training with each seed.

    Raises:
        Unmeasurable: the instrument does not apply to this router.
    """
    measurements = [_measure(training(seed), step, sweep) for seed in range(sweep.seeds)]
    return [_row(case, step, index, site, measurements) for index, site in enumerate(sites(case.config.model))]


def _measure(training: Training, step: int, sweep: Sweep) -> Measurement:
    config, corpus, seed = training.config, training.corpus, training.seed
    warm = warmed_up(training.after(step), config, corpus, seed, step, sweep.warm_up)
    batch = sample_batch(corpus, seed=seed, step=MEASURED_STEP, batch_size=1, seq_len=config.data.seq_len)
    probe = Probe(warm, batch, step, step / config.train.steps)
    return measure_probe(probe, draws=sweep.draws, samples=sweep.samples, seed=seed)


def _row(case: Case, step: int, index: int, site: Site, measurements: Sequence[Measurement]) -> Row:
    model, tokens = case.config.model, case.config.data.seq_len
    found = [measurement.signals(index) for measurement in measurements]
    return Row(
        entry=case.entry,
        experts=model.num_experts,
        k=model.k,
        layers=model.num_layers,
        layer=site,
        tokens=tokens,
        train_steps=step,
        target=measurements[0].target.kind,
        target_error=max(measurement.target.error_L[index] for measurement in measurements),
        rows_per_estimate=float(measurements[0].rows * max(turns for _, _, turns in found)),
        signals=tuple(whole for whole, _, _ in found),
        choices=tuple(choice for _, choice, _ in found),
    )
