"""summary.json, and what stands beside it once a run has ended: its seal, or why it failed."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.schema.measured import Measured
from rlroute.schema.rows import EvalRow
from rlroute.schema.values import Amount, ConfigHash, Digest, Moment, Name, Signed, Whole


class Failure(TypedDict):
    """failed.json: a run that was set aside."""

    id: Name
    """The run's id."""
    reason: str
    """Why."""


class Divergence(TypedDict):
    """Where a run stopped, and what was not finite."""

    step: Whole
    """The step at which it was seen."""
    what: str
    """What was not finite."""


class Data(TypedDict):
    """The corpus."""

    spec: str
    """How it was named: package:NAME, stdlib, synth:..., file:GLOB or bin:GLOB."""
    sha256: Digest
    """SHA-256 of all documents in order; for ``bin`` of the tokens."""
    train_sha256: NotRequired[Digest]
    """SHA-256 of the training stream as it is read; records of schema 1 do not say."""
    valid_sha256: NotRequired[Digest]
    """SHA-256 of the validation stream as it is read; records of schema 1 do not say."""
    distribution: str | None
    """The Python distribution that it was read from."""
    version: str | None
    """And its version."""
    tokenizer_sha256: NotRequired[Digest | None]
    """SHA-256 of the tokenizer's file; None for bytes."""
    vocab_size: Whole
    """Different tokens."""
    train_tokens: Whole
    """Tokens to train on."""
    valid_tokens: Whole
    """Tokens to validate on."""
    floor_bits_per_byte: Amount | None
    """What the best model would reach, where that is known."""


class ModelCosts(TypedDict):
    """Parameters, and FLOPs by the pairs that ran: forward ones per token, and those that all steps took."""

    active_parameters: Whole
    """Parameters that a token runs."""
    total_parameters: Whole
    """All parameters."""
    router_parameters: Whole
    """The routers' own."""
    flops_per_token: Whole
    """Forward FLOPs of the greedy model."""
    training_only_flops_per_token: Signed
    """Forward FLOPs that training took beyond those. Below 0 where it took fewer: training dropped more pairs than the
    last evaluation, or a router of variable k ran fewer in it. Both are what ran, over the tokens of each.
    """
    training_flops: NotRequired[Whole]
    """What all steps took, backwards included; old records do not say."""


class Gate(TypedDict):
    """The gate's form, and what the published gate is."""

    form: Literal["own", "unit"]
    """own: as published; unit: value 1/k, gradient of the router's gate."""
    meaning: str
    """What the published gate is."""


class Fingerprint(TypedDict):
    """SHA-256 of the initial parameters that runs share."""

    shared: Digest
    """Of all but the routers' own."""
    backbone: Digest
    """Of those outside the layers that have experts."""


class Batches(TypedDict):
    """The hash chain over the batches of so many steps."""

    chain: Digest
    """The chain's last link."""
    steps: Whole
    """How many batches it covers."""


class BudgetSpent(TypedDict):
    """What a comparison holds equal."""

    kind: Literal["tokens", "flops", "time"]
    """Training tokens, training FLOPs, or seconds of training."""
    amount: Amount
    """How much of it."""


class Summary(TypedDict):
    """summary.json: written last; a run that has one has ended."""

    schema: Whole
    """As in config.json."""
    id: Name
    """As in config.json."""
    router: Name
    """As in config.json."""
    seed: Whole
    """As in config.json."""
    config_hash: ConfigHash
    """As in config.json."""
    status: Literal["finished", "diverged"]
    """How it ended."""
    diverged: Divergence | None
    """Where it diverged; None where it finished."""
    steps: Whole
    """Optimizer steps done."""
    tokens: Whole
    """Training tokens seen."""
    final: EvalRow | None
    """The last evaluation; None where the run diverged."""
    fingerprint: Fingerprint
    """Of the weights that it began with."""
    batches: Batches
    """Of the batches that it saw."""
    eval_tokens_sha256: Digest
    """SHA-256 of the validation tokens."""
    data: Data
    """The corpus."""
    model: ModelCosts
    """What the model costs."""
    gate: Gate
    """The gate's form and meaning."""
    learns_from: NotRequired[list[str]]
    """The signals that its routers learn from, of gate, reward and load; old records do not say."""
    causal: bool
    """Whether no token's route depends on later tokens, as its routers say."""
    measured: NotRequired[Measured | None]
    """What the trained model showed; None where the run diverged; old records do not say."""
    budget: BudgetSpent
    """The budget that it was given."""
    seconds: dict[str, Amount]
    """Seconds spent in training steps (``train``) and in evaluations (``eval``)."""
    tokens_per_second: Amount | None
    """Training tokens over the seconds of training."""
    ended: NotRequired[Moment]
    """When."""
    peak_memory: NotRequired[Whole | None]
    """The most bytes that tensors took on the GPU of the first process since it took the run up; None on a CPU."""


class Seal(TypedDict):
    """seal.json: SHA-256 of each part of the record as it was when the run ended (:mod:`rlroute.seal`)."""

    config: Digest
    """Of config.json."""
    environment: Digest
    """Of environment.json."""
    evals: Digest
    """Of the evaluations of metrics.jsonl."""
    train: Digest
    """Of all training steps of metrics.jsonl."""
    loads: Digest
    """Of all rows of loads.jsonl."""
    summary: Digest
    """Of summary.json."""
