"""The contract: a router is a policy.

A router looks at the hidden states of T tokens and answers with a :class:`RoutingDecision`: which (token, expert) pairs
to run and with what weight. Afterwards it may learn from the :class:`Feedback`. Nothing else crosses the seam between
routers and the rest, in a transformer layer and in a Gymnasium environment alike. What ran is counted from the decision
(:mod:`rlroute.learning`), never by the router.

Shape suffixes: T tokens (rows; M x T where a router draws M routing samples), D model width, E experts, K slots per
token, C tokens per expert, R routed (token, expert) pairs, V vocabulary, M routing samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlroute import seeding
from rlroute.config import RouterConfig
from rlroute.decision import RoutingDecision
from rlroute.errors import ConfigError, DecisionError
from rlroute.feedback import Feedback, Sums, Term
from rlroute.sampling import staying_probability, top_k
from rlroute.shape import WISHES, RouterShape
from rlroute.sites import Site

__all__ = [
    "WISHES",
    "Feedback",
    "LinearScores",
    "Router",
    "RouterShape",
    "RoutingContext",
    "RoutingDecision",
    "Site",
    "Sums",
    "Term",
]


def _identity(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingContext:
    """What a router may know besides the hidden states: keys, never a live generator.

    Attributes:
        seed, site, step: what the draws of this forward are keyed by.
        token_ids_T: int64 ids of the tokens.
        position_T: int64 position of each token in its sequence.
        sequence_T: int64 *global* id of each token's sequence.
        mask_T: bool, false for padding.
        explore: whether to sample (training) or to answer greedily (evaluation); ``Router.training`` says neither.
        num_samples: M; the rows are then sample-major, M x T.
        num_sequences: no more than so many different sequences are in a routing sample; None where the host does not
            know.
        micro_batch: which of the step's micro-batches this is; None in evaluation.
        progress: the share of the run's budget that is spent, 0 to 1, whatever the budget.
        expert_device_E: int64, the device of each expert, -1 for a free one, which is on all; None where one device
            holds them all.
        sum_over_scope: a differentiable sum over the balance scope (all ranks, say); the identity when alone.
        earlier: the decisions of the sites before, in their order, differentiable: for routers that carry state.
        choices: by site, ids that :meth:`take` answers with in place of a router's own: (T, K) experts, or (E, C)
            tokens.
        chosen: where :meth:`take` writes down, by site, what it answered with, for whoever records it.
    """

    seed: int
    site: Site
    step: int
    token_ids_T: Tensor
    position_T: Tensor
    sequence_T: Tensor
    mask_T: Tensor
    explore: bool
    num_samples: int = 1
    num_sequences: int | None = None
    micro_batch: int | None = None
    progress: float = 0.0
    expert_device_E: Tensor | None = None
    sum_over_scope: Callable[[Tensor], Tensor] = _identity
    earlier: Mapping[Site, RoutingDecision] = field(default_factory=dict)
    choices: Mapping[Site, Tensor] = field(default_factory=dict)
    chosen: dict[Site, Tensor] | None = None

    def at(self, shape: RouterShape, earlier: Mapping[Site, RoutingDecision]) -> RoutingContext:
        """Return the context of the same tokens at a site, for which the routers of ``earlier`` sites have decided."""
        device_E = None
        if shape.devices > 1:
            experts_E, real = torch.arange(shape.num_experts, device=self.token_ids_T.device), shape.num_real_experts
            device_E = torch.where(experts_E < real, experts_E * shape.devices // real, -1)
        return replace(self, site=shape.site, expert_device_E=device_E, earlier=earlier)

    @property
    def training(self) -> bool:
        """Whether this is a step of training: evaluation may ``explore`` too."""
        return self.micro_batch is not None

    @property
    def previous(self) -> RoutingDecision | None:
        """The decision of the site just before; None at the first."""
        return list(self.earlier.values())[-1] if self.earlier else None

    def latest(self, read: Callable[[RoutingDecision], Tensor | None], columns: int) -> Tensor | None:
        """Return the tensor of so many columns that ``read`` finds in the last decision before that has one; None where
        none has.

        This is how a router carries state over sites: some of them may have other routers, or other numbers of experts.
        """
        found = (read(decision) for decision in reversed(list(self.earlier.values())))
        return next((value for value in found if value is not None and value.shape[1] == columns), None)

    def choose(self, scores_TE: Tensor, k: int) -> Tensor:
        """Return the ids of the k largest scores of each row, best first, ties to the lower id; int64 of shape (T, K).

        This is how a router selects. A score of -inf is never chosen: a slot left over holds the number of columns,
        which marks it as unused where the columns are the experts. Experts choose tokens by the transposed scores.

        A ranking on the way, of groups of experts say, is no choice: it is done by :func:`rlroute.sampling.top_k`.

        Raises:
            DecisionError: choices are forced whose shape is another.
        """
        ids_TK = top_k(scores_TE, k)
        left_over_TK = scores_TE.detach().gather(1, ids_TK) == float("-inf")
        return self.take(ids_TK.masked_fill(left_over_TK, scores_TE.shape[1]))

    def take(self, ids_TK: Tensor) -> Tensor:
        """Return ids that a rule found without ranking (a table, an assignment), or the choices that are forced at this
        site.

        A router calls this, or :meth:`choose`, once per decision, and goes by the answer.

        Raises:
            DecisionError: choices are forced whose shape is another; a router chose twice while choices are written
                down.
        """
        forced_TK = self.choices.get(self.site, ids_TK)
        if forced_TK.shape != ids_TK.shape:
            raise DecisionError(
                f"choices forced at site {self.site} have shape {tuple(forced_TK.shape)}: want {tuple(ids_TK.shape)}"
            )
        if self.chosen is not None:
            if self.site in self.chosen:
                raise DecisionError(
                    f"the router at site {self.site} chose twice: rank what is no choice by torch itself"
                )
            self.chosen[self.site] = forced_TK
        return forced_TK

    def noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Draw uniform numbers in (0, 1) for the purpose ``name``, of shape (T, *shape), from the keys of each token.

        The key is (seed, purpose, site, step, sample, global sequence id, position): neither the batch that a sequence
        sits in nor recomputation changes its draws. :mod:`rlroute.seeding` turns them into Gumbel or normal draws.
        """
        key = seeding.derive_key(self.seed, name, self.site, self.step)
        return seeding.keyed_uniform(key, (self.sample_T, self.sequence_T, self.position_T), shape)

    @property
    def sample_T(self) -> Tensor:
        """The routing sample that each row belongs to, int64 of shape (T,)."""
        rows = torch.arange(len(self.token_ids_T), device=self.token_ids_T.device)
        return rows // (len(self.token_ids_T) // self.num_samples)


class Router(nn.Module):
    """A routing policy of one site: decide, and learn from what happened.

    A router is one file: a docstring with its paper, a nested ``Config``, :meth:`forward`, and :meth:`objective` or
    :meth:`adapt` if it learns. Its name is its file's name.

    A router with logits keeps what makes them in a submodule called ``scores``, whose output is the decision's
    ``logits_TE``: there the gradient instrument (``rlroute gradients``) shifts them. Without one a router is named as
    unmeasurable, and is otherwise complete.

    Class attributes, each of which an instance may set otherwise by its configuration:
        learns_from: any of "gate" (the loss's gradient through the gates), "reward" (the loss as a number) and "load"
            (what ``adapt`` moves by sums that know nothing of the loss).
        gate_meaning: one line for the table: what the published gate is.
        causal: false if a token's greedy route depends on later tokens.
        stochastic: true if ``explore`` draws; evaluation then reports the sampled policy beside the greedy one.
        two_rules: true if ``explore`` decides by another rule than evaluation, without drawing (a linear assignment,
            say).
        publishes: which of "logits" and "probs" its decisions carry; terms that read others are refused.
        wishes: what it asks of its layer beyond the gated sums: "outputs" for ``outputs_RD`` of the decisions that its
            terms read and that it observes, "weights" for ``gate_EFD``. It is refused where the site has not that.
        common: names of submodules that all sites of this router (of its class and configuration) have in common: those
            of the first one. The model sees to it.
        batch_dependent: whether the rule, a term of its own or what it observes mixes the tokens of a micro-batch, so
            that two micro-batches cannot equal one batch.

    Attributes:
        config, shape: what it was made of.
        frozen: whether it learns nothing, of whatever it could: it neither observes nor adapts.
        held_weight: the weight of the f.P loss that holds ``config.target_max_vio``, a buffer; None without a target.
    """

    Config: ClassVar[type[RouterConfig]]
    learns_from: frozenset[str] = frozenset()
    gate_meaning: str
    causal: bool = True
    stochastic: bool = False
    two_rules: bool = False
    publishes: frozenset[str] = frozenset({"logits", "probs"})
    wishes: frozenset[str] = frozenset()
    common: tuple[str, ...] = ()
    batch_dependent: bool = False
    frozen: bool = False
    held_weight: Tensor | None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "Config" in vars(cls):
            cls.Config.name = cls.__module__.rpartition(".")[2]

    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        if reason := self.refuses(config, shape):
            raise ConfigError(f"router {config.name}: {reason}")
        super().__init__()
        self.config, self.shape = config, shape
        self.batch_dependent = self.batch_dependent or config.mixes_tokens
        self.wishes = self.wishes | config.wishes
        held = config.target_max_vio is not None
        self.register_buffer("held_weight", torch.tensor(config.balance_weight) if held else None)
        if held:
            self.learns_from = self.learns_from | {"load"}

    def __setattr__(self, name: str, value: Any) -> None:
        """Let score weights start orthogonal where the configuration says so, whichever router makes them."""
        if name == "scores" and isinstance(value, LinearScores) and self.config.orthogonal:
            value.orthogonalise(self.shape)
        super().__setattr__(name, value)

    def freeze(self) -> None:
        """Let it decide as it does now, for ever."""
        self.frozen = True
        self.requires_grad_(False)

    @property
    def original(self) -> Router:
        """The router whose configuration says which terms there are: itself, unless it stands in for another."""
        return self

    @property
    def score_weights(self) -> Tensor:
        """The weights of its linear scores, shape (E, D).

        Raises:
            ConfigError: it has none.
        """
        scores = getattr(self, "scores", None)
        if not isinstance(scores, LinearScores):
            raise ConfigError(f"router {self.config.name} has no linear scores")
        return scores.weight

    @classmethod
    def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
        """Return why a router of this configuration cannot be built for a shape, or None: it can.

        The reason names the value and the legal ones. Overrides ask this one first.
        """
        if not 1 <= shape.k <= shape.num_experts:
            return f"k = {shape.k}: legal are 1 to num_experts = {shape.num_experts}"
        for whose, wished in (("it", cls.wishes), (f"erc_weight = {config.erc_weight}", config.wishes)):
            if vain := ", ".join(sorted(wished - shape.grants)):
                return f"{whose} wishes for {vain} of the experts, which site {shape.site} does not hand out"
        for name, weight in config.term_weights.items():
            if weight and not cls.carries(name):
                return f"{name} = {weight}: its decisions do not carry what that term reads, legal is 0"
        if config.target_max_vio is not None and not cls.carries("balance_weight"):
            return f"target_max_vio = {config.target_max_vio}: its decisions carry no probabilities, legal is none"
        if not (config.simbal_weight or config.erc_weight or config.orthogonal):
            return None
        scores = cls._scores(config, shape)
        if config.simbal_weight and not (scores and scores.weight.requires_grad):
            return f"simbal_weight = {config.simbal_weight}: it has no linear scores that learn, legal is 0"
        if config.erc_weight and (scores is None or scores.weight.shape != (shape.num_experts, shape.d_model)):
            return f"erc_weight = {config.erc_weight}: it has no linear scores of each expert, legal is 0"
        return None if scores else f"orthogonal = {config.orthogonal}: it has no linear scores, legal is false"

    @classmethod
    def _scores(cls, config: RouterConfig, shape: RouterShape) -> LinearScores | None:
        """Return the linear scores that it would have, without weights; None where it has none."""
        with torch.device("meta"):
            router = cls(replace(config, simbal_weight=0.0, erc_weight=0.0, orthogonal=False), shape)
        scores = getattr(router, "scores", None)
        return scores if isinstance(scores, LinearScores) else None

    @classmethod
    def carries(cls, weight: str) -> bool:
        """Whether its decisions carry what the term of a weight reads: logits for ``z_weight``, ``load_weight``,
        ``simbal_weight`` and ``erc_weight``, gates that learn for ``importance_weight``, else probabilities.
        """
        if weight == "importance_weight":
            return "gate" in cls.learns_from
        of_logits = ("z_weight", "load_weight", "simbal_weight", "erc_weight")
        return ("logits" if weight in of_logits else "probs") in cls.publishes

    def chosen_probability(self, decision: RoutingDecision) -> Tensor:
        """Return how probable it is that a token chooses each expert, shape (T, E), differentiable: what
        ``load_weight`` weighs. A router that draws noise of its own goes by that; others suppose some.
        """
        logits_TE, std = decision.logits_TE, self.config.load_std or 1 / self.shape.num_experts
        assert logits_TE is not None
        return staying_probability(logits_TE, logits_TE, std, self.shape.k)

    @property
    def num_samples(self) -> int:
        """M, the routing samples that this router wants of each token in training."""
        return 1

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Decide. ``x_TD`` is float32 (or float64) of shape (T, D); under evaluation this alone is called and changes
        no state.
        """
        raise NotImplementedError

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return named terms to minimise besides those of its configuration, called per micro-batch before backward;
        pure.

        Values are sums over valid tokens divided by ``feedback.num_valid``, so that gradient accumulation does not
        change them.
        """
        return {}

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return sums that :meth:`adapt` wants besides what is counted, called per micro-batch after backward.

        ``decision.gates_R.grad`` is there.
        """
        return {}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Move what is moved without gradients, once per optimizer step.

        Args:
            sums: over micro-batches and ranks.
            progress: the share of the budget spent before this step, 0 to 1.
        """


class LinearScores(nn.Linear):
    """Scores of E experts (or so many ``columns``) from D (or so many) ``features``, in the precision of its input;
    drawn from a key. A bias, where there is one, starts at 0.
    """

    def __init__(
        self,
        shape: RouterShape,
        name: str,
        std: float,
        columns: int | None = None,
        *,
        features: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(features or shape.d_model, columns or shape.num_experts, bias=bias)
        shape.init(self.weight, name, std)
        if bias:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def orthogonalise(self, shape: RouterShape) -> None:
        """Start anew with orthonormal rows, drawn from a key; with orthonormal columns where there are more rows."""
        shape.init(self.weight, "scores.orthogonal", 1.0)
        if not self.weight.is_meta:
            rows_fit = len(self.weight) <= self.weight.shape[1]
            basis, triangle = torch.linalg.qr(self.weight.t() if rows_fit else self.weight)
            basis = basis * torch.sign(triangle.diagonal())  # else the signs are the library's
            self.weight.copy_(basis.t() if rows_fit else basis)
