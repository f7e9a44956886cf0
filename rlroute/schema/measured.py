"""What the audit at the end of a run measured (:mod:`rlroute.training.audit`).

Shape suffixes: L routed sites, M earlier steps, C equal parts of the tokens by their confidence.
"""

from typing import NotRequired

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.schema.values import Amount, Part, Signed, Whole


class Dependence(TypedDict):
    """Which share of the tokens that should not have changed did, when others were."""

    routes_L: list[Part]
    """Pairs chosen, or gates, by site."""
    routes_ML: NotRequired[list[list[Part]]]
    """The same as of the earlier steps of ``steps_M``; older records do not say."""
    drops_L: list[Part]
    """Pairs dropped over capacity, by site."""
    outputs: Part
    """The model's outputs."""


class MeasuredMode(TypedDict):
    """What a trained model showed in training (draws and all) or in evaluation."""

    pairs_L: list[Amount]
    """Pairs that ran per token, by site."""
    repeats: bool
    """Whether the same tokens are routed alike twice."""
    steps_M: NotRequired[list[Whole]]
    """Earlier steps as of which the trained routers decided too: their context said so; older records do not say."""
    later: Dependence
    """Of a token on those behind it in its sequence."""
    others: Dependence | None
    """Of a token on other sequences of its micro-batch; None where there is no other."""


class RouterFlops(TypedDict):
    """FLOPs of a router per row."""

    greedy: Whole
    """Its greedy forward."""
    training: Whole
    """Its part of a training step, backward included."""


class MeasuredFlops(TypedDict):
    """FLOPs of each site's router."""

    booked_L: list[RouterFlops]
    """What costs and budgets went by, measured before the first step."""
    measured_L: list[RouterFlops]
    """What the trained router runs."""
    declared_L: list[Signed | None]
    """What a router says of its greedy forward; nobody is asked."""
    elementwise_L: list[bool]
    """Whether its elementwise work is more than is left out, and so counted in."""
    foreign_L: list[list[str]]
    """Operators that it ran and nobody can count, and methods by which a number a row or more left PyTorch."""


class Regret(TypedDict):
    """How much lower losses would be on the best routes of equal compute through the last MoE layer
    (:mod:`rlroute.training.regret`).
    """

    layer: Whole
    """Which layer that is."""
    tokens: Whole
    """Validation tokens that were measured."""
    exact: Part
    """The share of them all of whose sets of as many experts were tried; the regret of the others is at least what was
    found by exchanges.
    """
    sets: Whole
    """The most other sets that were tried for a token."""
    nats: Amount
    """The loss of the route taken minus that of the best one, nats per token."""
    better: Part | None
    """The share of other sets that have a lower loss than the one chosen, mean over tokens all of whose sets were
    tried: 0 where it is the best, 0.5 where it is as good as any.
    """
    confidence_C: list[Part]
    """The highest probability of a next token, mean over each tenth of the tokens, from the least confident on."""
    nats_C: list[Amount]
    """``nats`` of each tenth."""
    better_C: list[Part | None]
    """``better`` of each tenth."""


class Measured(TypedDict):
    """What was measured of a trained model on validation tokens (:mod:`rlroute.training.audit`)."""

    tokens: Whole
    """How many."""
    causal_L: list[bool]
    """Whether each site's router says that no greedy route depends on later tokens."""
    two_rules_L: NotRequired[list[bool]]
    """Whether it says that training has another rule, which may; older records do not say."""
    training: MeasuredMode
    """With exploration."""
    evaluation: MeasuredMode
    """Without."""
    flops: MeasuredFlops
    """What the routers run."""
    regret: NotRequired[Regret | str]
    """Of its routes; or why there is none. Older records do not say."""
