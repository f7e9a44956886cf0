"""What the files of a run's record hold, by name. A schema only ever grows: fields that old records lack are marked.

Figures by site are lists in the order of the model's routed sites; their keys follow from the configuration
(:func:`rlroute.model.transformer.sites`). None stands for what is not defined; there is no NaN and no infinity.

Shape suffixes: L routed sites, E experts.
"""

from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict


class MadeFrom(TypedDict):
    """What a run is made from besides its configuration, by SHA-256: see :func:`rlroute.provenance.made_from`."""

    core: str
    """rlroute's own sources without its wings, and the tile table."""
    routers: dict[str, dict[str, str]]
    """Each router's code: its file, the others that belong to it, its distribution and that one's version."""
    reads: dict[str, str]
    """What routers read: a policy's file, the choices of a replayed run."""
    data: dict[str, str]
    """The documents, the training stream and the validation stream, domains included."""
    tokenizer: str | None
    """The tokenizer's file."""


class Described(TypedDict):
    """config.json: which run this is."""

    schema: int
    id: str
    router: str
    """The names of its routers, or ``dense``."""
    seed: int
    config_hash: str
    command: str | None
    """The command line behind it."""
    config: dict[str, Any]
    """Its configuration: :meth:`rlroute.config.RunConfig.to_dict`."""
    made_from: NotRequired[MadeFrom]
    """Records of schema 1 do not say."""


class Environment(TypedDict):
    """environment.json: where the run happened, as far as it can change the result."""

    rlroute: str
    commit: str | None
    dirty: bool | None
    python: str
    torch: str
    numpy: str
    platform: str
    device: str
    device_name: str
    cpu_capability: str
    threads: int
    kernel_backend: str
    kernel_tiles: NotRequired[str | None]
    routers: NotRequired[dict[str, dict[str, str]]]
    """In late records of schema 1, what ``made_from`` says now."""
    workers: NotRequired[int]
    expert_parallel: NotRequired[int]
    notes: NotRequired[list[str]]


class Sampled(TypedDict):
    """The losses of a stochastic router that draws as in training."""

    loss: float
    bits_per_byte: float
    overlap_L: list[float | None]
    """The share of the drawn pairs that are greedy ones too."""


class EvalRow(TypedDict):
    """A line of metrics.jsonl: an evaluation, greedy over the fixed validation tokens."""

    kind: Literal["eval"]
    step: int
    tokens: int
    seconds: float
    loss: float
    bits_per_byte: float
    max_vio_L: list[float | None]
    cv_L: list[float | None]
    load_entropy_L: list[float | None]
    router_entropy_L: list[float | None] | None
    dead_L: list[int]
    drop_rate: float
    pairs_L: NotRequired[list[float]]
    """Pairs that ran per token; old records do not say."""
    without_L: NotRequired[list[float]]
    """The share of tokens for which no expert ran; old records do not say."""
    load_LE: list[list[float]]
    sampled: Sampled | None
    chain: str


class TrainRow(TypedDict):
    """A line of metrics.jsonl: a training step."""

    kind: Literal["train"]
    step: int
    tokens: int
    seconds: float
    loss: float
    terms: dict[str, list[float | None]]
    """Each term's value by site, unweighted."""
    weights: dict[str, list[float]] | dict[str, float]
    """Each term's weight by site; in old records one for all."""
    lr: float
    grad_norm: float
    router_grad_norm: float
    max_vio_L: list[float | None]
    pairs_L: NotRequired[list[float]]
    without_L: NotRequired[list[float]]
    traffic: NotRequired[dict[str, Any]]


class LoadRow(TypedDict):
    """A line of loads.jsonl: each expert's share of the pairs that were chosen in a step."""

    step: int
    load_LE: list[list[float]]


class Divergence(TypedDict):
    """Where a run stopped, and what was not finite."""

    step: int
    what: str


class Data(TypedDict):
    """The corpus."""

    spec: str
    sha256: str
    train_sha256: NotRequired[str]
    valid_sha256: NotRequired[str]
    """Of each stream as it is read; records of schema 1 do not say."""
    distribution: str | None
    version: str | None
    vocab_size: int
    train_tokens: int
    valid_tokens: int
    floor_bits_per_byte: float | None


class ModelCosts(TypedDict):
    """Parameters, and FLOPs by the pairs that ran: forward ones per token, and those that all steps took."""

    active_parameters: int
    total_parameters: int
    router_parameters: int
    flops_per_token: int
    training_only_flops_per_token: int
    training_flops: NotRequired[int]
    """Old records do not say."""


class Gate(TypedDict):
    """The gate's form, and what the published gate is."""

    form: str
    meaning: str


class Fingerprint(TypedDict):
    """SHA-256 of the initial parameters that runs share."""

    shared: str
    backbone: str


class Batches(TypedDict):
    """The hash chain over the batches of so many steps."""

    chain: str
    steps: int


class BudgetSpent(TypedDict):
    """What a comparison holds equal."""

    kind: str
    amount: float


class Dependence(TypedDict):
    """Which share of the tokens that should not have changed did, when others were."""

    routes_L: list[float]
    """Pairs chosen, or gates, by site."""
    drops_L: list[float]
    """Pairs dropped over capacity, by site."""
    outputs: float


class MeasuredMode(TypedDict):
    """What a trained model showed in training (draws and all) or in evaluation."""

    pairs_L: list[float]
    """Pairs that ran per token, by site."""
    repeats: bool
    """Whether the same tokens are routed alike twice."""
    later: Dependence
    """Of a token on those behind it in its sequence."""
    others: Dependence | None
    """Of a token on other sequences of its micro-batch; None where there is no other."""


class RouterFlops(TypedDict):
    """FLOPs of a router per row: its greedy forward, and its part of a training step, backward included."""

    greedy: int
    training: int


class MeasuredFlops(TypedDict):
    """FLOPs of each site's router."""

    booked_L: list[RouterFlops]
    """What costs and budgets went by, measured before the first step."""
    measured_L: list[RouterFlops]
    declared_L: list[int | None]
    """What a router says of its greedy forward; nobody is asked."""
    elementwise_L: list[bool]
    """Whether its elementwise work is more than is left out, and so counted in."""
    foreign_L: list[list[str]]
    """Operators that it ran and nobody can count."""


class Measured(TypedDict):
    """What was measured of a trained model on validation tokens (:mod:`rlroute.training.audit`)."""

    tokens: int
    causal_L: list[bool]
    """What each site's router says of itself."""
    training: MeasuredMode
    evaluation: MeasuredMode
    flops: MeasuredFlops


class Summary(TypedDict):
    """summary.json: written last; a run that has one has ended."""

    schema: int
    id: str
    router: str
    seed: int
    config_hash: str
    status: Literal["finished", "diverged"]
    diverged: Divergence | None
    steps: int
    tokens: int
    final: EvalRow | None
    fingerprint: Fingerprint
    batches: Batches
    eval_tokens_sha256: str
    data: Data
    model: ModelCosts
    gate: Gate
    learns_from: NotRequired[list[str]]
    causal: bool
    measured: NotRequired[Measured | None]
    """None of a run that diverged; old records do not say."""
    budget: BudgetSpent
    seconds: dict[str, float]
    tokens_per_second: float | None


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind: the content of its files."""

    id: str
    config: Described
    environment: Environment
    summary: Summary
    evals: list[EvalRow]
    loads: list[LoadRow]
    train: list[TrainRow]
    seal: dict[str, str] | None = None
    """SHA-256 of the parts as they were when the run ended: :mod:`rlroute.seal`. Records of schema 1 have none."""
