"""metrics.jsonl and loads.jsonl: what was seen at a step.

Shape suffixes: L routed sites, E experts, W validation windows.
"""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.schema.values import Amount, Digest, Number, Part, Vio, Whole


class Sampled(TypedDict):
    """The losses of a stochastic router that draws as in training."""

    loss: Amount
    """Nats per token."""
    bits_per_byte: Amount
    """Bits per byte of text."""
    overlap_L: list[Part | None]
    """The share of the drawn pairs that are greedy ones too."""


class Losses(TypedDict):
    """The losses over other tokens."""

    loss: Amount
    """Nats per token."""
    bits_per_byte: Amount
    """Bits per byte of text."""


class EvalRow(TypedDict):
    """A line of metrics.jsonl: an evaluation, greedy over the fixed validation tokens."""

    kind: Literal["eval"]
    """Which row this is."""
    step: Whole
    """Optimizer steps done."""
    tokens: Whole
    """Training tokens seen."""
    seconds: Amount
    """Seconds spent in training steps, evaluations left out."""
    loss: Amount
    """Validation loss, nats per token."""
    bits_per_byte: Amount
    """Validation loss, bits per byte of text."""
    max_vio_L: list[Vio | None]
    """The highest load of an expert over the fair share, minus 1, before drops."""
    cv_L: list[Amount | None]
    """Standard deviation of the loads over their mean."""
    load_entropy_L: list[Part | None]
    """Entropy of the loads over its largest value."""
    router_entropy_L: list[Part | None] | None
    """Mean entropy of a token's probabilities over its largest value; None where no router has any."""
    dead_L: list[Whole]
    """Experts below 5% of the fair share."""
    drop_rate: Part
    """The share of the chosen pairs that a capacity dropped."""
    drop_by_position: NotRequired[list[Part | None]]
    """The same of the pairs of each quarter of the sequences, first to last; old records do not say."""
    pairs_L: NotRequired[list[Amount]]
    """Pairs that ran per token, those of free experts left out; old records do not say."""
    without_L: NotRequired[list[Part]]
    """The share of tokens for which no real expert ran; old records do not say."""
    load_LE: list[list[Part]]
    """Each expert's share of the chosen pairs."""
    sampled: Sampled | None
    """The last evaluation of a stochastic router has this too."""
    nats_W: NotRequired[list[Amount]]
    """Nats of each validation window (data.seq_len tokens), in their order: the last evaluation has them; old records
    do not say.
    """
    training: NotRequired[Losses]
    """Of training tokens, evaluated in the same way, where the run does so."""
    chain: Digest
    """The hash chain over the batches of all steps done."""


class TrainRow(TypedDict):
    """A line of metrics.jsonl: a training step."""

    kind: Literal["train"]
    """Which row this is."""
    step: Whole
    """Optimizer steps done."""
    tokens: Whole
    """Training tokens seen."""
    seconds: Amount
    """Seconds spent in training steps, evaluations left out."""
    loss: Number
    """The step's language-model loss alone, nats per token."""
    terms: dict[str, list[float | None]]
    """Each term's value by site, unweighted."""
    weights: dict[str, list[float]] | dict[str, float]
    """Each term's weight by site; in old records one for all."""
    lr: Amount
    """Learning rate of the step."""
    grad_norm: float
    """Gradient norm of all but the routers, before it is clipped."""
    router_grad_norm: float
    """Gradient norm of the routers, before it is clipped."""
    max_vio_L: list[Vio | None]
    """As in evaluations, of the step's batch."""
    pairs_L: NotRequired[list[Amount]]
    """Pairs that ran per token, those of free experts left out; old records do not say."""
    without_L: NotRequired[list[Part]]
    """The share of tokens for which no real expert ran; old records do not say."""
    logits_L: NotRequired[list[Amount | None]]
    """Root mean square of the router's logits over the step's tokens and all experts, by site; None where it has none;
    old records do not say.
    """
    traffic: NotRequired[dict[str, Any]]
    """What was sent between the processes of an expert-parallel group: see docs/parallel.md."""


class LoadRow(TypedDict):
    """A line of loads.jsonl: each expert's share of the pairs that were chosen in a step."""

    step: Whole
    """Optimizer steps done."""
    load_LE: list[list[Part]]
    """Each expert's share of the chosen pairs."""
