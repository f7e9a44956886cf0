"""The contract: a router is a policy.

A router looks at the hidden states of T tokens and answers with a :class:`RoutingDecision`: which (token, expert) pairs to run and
with what weight. Afterwards it may learn from the :class:`Feedback`. Nothing else crosses the seam between routers and the rest, in a
transformer layer and in a Gymnasium environment alike.

Shape suffixes: T tokens (rows; M x T where a router draws M routing samples), D model width, E experts, K experts per token,
C tokens per expert, R routed (token, expert) pairs, V vocabulary, M routing samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlroute import seeding
from rlroute.config import RouterConfig
from rlroute.errors import ConfigError, DecisionError


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingDecision:
    """Which (token, expert) pairs to run and with what weight, as R flat pairs.

    Attributes:
        num_tokens: T.
        num_experts: E.
        k: experts per token where that number is fixed; the pairs are then token-major, pair t * k + j being token t's j-th choice.
        token_ids_R: int64, the token of each pair.
        expert_ids_R: int64, the expert that was *chosen*; the value E marks an unused slot of a router with variable k, so that R
            is known on the host and nothing waits for the device.
        kept_R: bool, false where a capacity step dropped the pair.
        gates_R: the weight of the pair's expert output in the token's sum. Where it requires a gradient, after backward
            ``gates_R.grad`` is the pair's credit, <dL/dout_t, y_r>; a router of constant gates asks by ``requires_grad_()``.
        logits_TE: clean scores, before noise and bias; None for routers without scores.
        probs_TE: the routing distribution, rows sum to 1 (what f.P and entropy read); None for routers without scores.
        log_prob_R: Plackett-Luce conditional log-probabilities of the *ordered* draw; their sum over a token's pairs is the
            log-probability of its draw. None where nothing was sampled.
        memo: read by the router that made it and by nobody else (value estimates, noise, thresholds).
    """

    num_tokens: int
    num_experts: int
    k: int | None
    token_ids_R: Tensor
    expert_ids_R: Tensor
    kept_R: Tensor
    gates_R: Tensor
    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None
    log_prob_R: Tensor | None = None
    memo: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def token_choice(
        ids_TK: Tensor,
        gates_TK: Tensor,
        num_experts: int,
        *,
        log_prob_TK: Tensor | None = None,
        **scores: Any,
    ) -> RoutingDecision:
        """Build the decision of a router in which each token picks K experts.

        Args:
            ids_TK: int64 expert ids of shape (T, K).
            gates_TK: gates of shape (T, K).
            num_experts: E.
            log_prob_TK: conditional log-probabilities of a sampled draw, shape (T, K).
            scores: ``logits_TE``, ``probs_TE`` and ``memo``.

        Raises:
            DecisionError: the shapes disagree.
        """
        if ids_TK.dim() != 2 or ids_TK.shape != gates_TK.shape:
            raise DecisionError(
                f"ids_TK has shape {tuple(ids_TK.shape)}, gates_TK {tuple(gates_TK.shape)}: want (T, K)"
            )
        num_tokens, k = ids_TK.shape
        tokens_TK = torch.arange(num_tokens, device=ids_TK.device)[:, None].expand(-1, k)
        return RoutingDecision(
            num_tokens=num_tokens,
            num_experts=num_experts,
            k=k,
            token_ids_R=tokens_TK.reshape(-1),
            expert_ids_R=ids_TK.reshape(-1),
            kept_R=torch.ones(num_tokens * k, dtype=torch.bool, device=ids_TK.device),
            gates_R=gates_TK.reshape(-1),
            log_prob_R=None if log_prob_TK is None else log_prob_TK.reshape(-1),
            **scores,
        )

    @staticmethod
    def expert_choice(ids_EC: Tensor, gates_EC: Tensor, num_tokens: int, **scores: Any) -> RoutingDecision:
        """Build the decision of a router in which each expert picks C tokens.

        Args:
            ids_EC: int64 token ids of shape (E, C).
            gates_EC: gates of shape (E, C).
            num_tokens: T.
            scores: ``logits_TE``, ``probs_TE`` and ``memo``.

        Raises:
            DecisionError: the shapes disagree.
        """
        if ids_EC.dim() != 2 or ids_EC.shape != gates_EC.shape:
            raise DecisionError(
                f"ids_EC has shape {tuple(ids_EC.shape)}, gates_EC {tuple(gates_EC.shape)}: want (E, C)"
            )
        num_experts, capacity = ids_EC.shape
        experts_EC = torch.arange(num_experts, device=ids_EC.device)[:, None].expand(-1, capacity)
        return RoutingDecision(
            num_tokens=num_tokens,
            num_experts=num_experts,
            k=None,
            token_ids_R=ids_EC.reshape(-1),
            expert_ids_R=experts_EC.reshape(-1),
            kept_R=torch.ones(num_experts * capacity, dtype=torch.bool, device=ids_EC.device),
            gates_R=gates_EC.reshape(-1),
            **scores,
        )

    def demand_E(self, mask_T: Tensor | None = None) -> Tensor:
        """Count the pairs that *chose* each expert (before capacity drops), over the tokens in ``mask_T``; shape (E,), int64."""
        return self._count(torch.ones_like(self.kept_R), mask_T)

    def load_E(self, mask_T: Tensor | None = None) -> Tensor:
        """Count the pairs that each expert *runs* (after capacity drops), over the tokens in ``mask_T``; shape (E,), int64."""
        return self._count(self.kept_R, mask_T)

    def _count(self, counted_R: Tensor, mask_T: Tensor | None) -> Tensor:
        if mask_T is not None:
            counted_R = counted_R & mask_T[self.token_ids_R]
        slots = torch.where(counted_R, self.expert_ids_R, self.num_experts)
        return torch.bincount(slots, minlength=self.num_experts + 1)[: self.num_experts]

    def token_sum(self, values_R: Tensor) -> Tensor:
        """Sum a value per pair over each token's used pairs; shape (T,)."""
        used_R = self.expert_ids_R < self.num_experts
        values_R = torch.where(used_R, values_R, torch.zeros_like(values_R))
        if self.k is not None:
            return values_R.view(self.num_tokens, self.k).sum(1)
        return values_R.new_zeros(self.num_tokens).index_add(0, self.token_ids_R, values_R)

    def all_kept_T(self) -> Tensor:
        """Say of each token whether all of its pairs were kept; shape (T,), bool."""
        dropped_R = ~self.kept_R & (self.expert_ids_R < self.num_experts)
        return self.token_sum(dropped_R.long()) == 0

    def detach(self) -> RoutingDecision:
        """Return a copy that holds no autograd graph, for whoever keeps one."""

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach()
            return {name: cut(item) for name, item in value.items()} if isinstance(value, Mapping) else value

        return replace(self, **{f.name: cut(getattr(self, f.name)) for f in fields(self)})


def drop_over_capacity(
    decision: RoutingDecision, capacity: int, order: Literal["position", "gate"] = "position"
) -> RoutingDecision:
    """Drop what an expert was given beyond its capacity; a rule of the layer, not a router's business.

    Args:
        decision: any decision.
        capacity: the most pairs that one expert runs.
        order: who comes first: ``position`` (first choices before second ones, then earlier tokens; GShard, arXiv 2006.16668) or
            ``gate`` (larger gates; batch-prioritised routing, arXiv 2106.05974).

    Returns:
        The decision with ``kept_R`` false for pairs over capacity.
    """
    if order == "gate":
        first_R = torch.argsort(decision.gates_R.detach(), descending=True, stable=True)
    elif decision.k is not None:  # all first choices before all second ones
        first_R = torch.arange(len(decision.token_ids_R), device=decision.kept_R.device)
        first_R = first_R.view(decision.num_tokens, decision.k).t().reshape(-1)
    else:
        first_R = torch.argsort(decision.token_ids_R, stable=True)
    experts_R = torch.where(decision.kept_R, decision.expert_ids_R, decision.num_experts)[first_R]
    by_expert_R = torch.argsort(experts_R, stable=True)
    counts = torch.bincount(experts_R, minlength=decision.num_experts + 1)
    starts = counts.cumsum(0) - counts
    rank_R = torch.empty_like(by_expert_R)
    rank_R[by_expert_R] = torch.arange(len(by_expert_R), device=rank_R.device) - starts[experts_R[by_expert_R]]
    kept_R = torch.empty_like(decision.kept_R)
    kept_R[first_R] = (rank_R < capacity) & (experts_R < decision.num_experts)
    return replace(decision, kept_R=kept_R)


def _identity(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingContext:
    """What a router may know besides the hidden states: keys, never a live generator.

    Attributes:
        seed, layer, step: what the draws of this forward are keyed by.
        token_ids_T: int64 ids of the tokens.
        position_T: int64 position of each token in its sequence.
        sequence_T: int64 *global* id of each token's sequence.
        mask_T: bool, false for padding.
        explore: whether to sample (training) or to answer greedily (evaluation); ``Router.training`` says neither.
        num_samples: M; the rows are then sample-major, M x T.
        expert_device_E: int64, the device of each expert, all 0 in one process; None stands for that.
        sum_over_scope: a differentiable sum over the balance scope (all ranks, say); the identity when alone.
    """

    seed: int
    layer: int
    step: int
    token_ids_T: Tensor
    position_T: Tensor
    sequence_T: Tensor
    mask_T: Tensor
    explore: bool
    num_samples: int = 1
    expert_device_E: Tensor | None = None
    sum_over_scope: Callable[[Tensor], Tensor] = _identity

    def noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Draw uniform numbers in (0, 1) for the purpose ``name``, of shape (T, *shape), from the keys of each token.

        The key is (seed, purpose, layer, step, sample, global sequence id, position): neither the batch that a sequence sits in nor
        recomputation changes its draws. :mod:`rlroute.seeding` turns them into Gumbel or normal draws.
        """
        key = seeding.derive_key(self.seed, name, self.layer, self.step)
        return seeding.keyed_uniform(key, (self.sample_T, self.sequence_T, self.position_T), shape)

    @property
    def sample_T(self) -> Tensor:
        """The routing sample that each row belongs to, int64 of shape (T,)."""
        rows = torch.arange(len(self.token_ids_T), device=self.token_ids_T.device)
        return rows // (len(self.token_ids_T) // self.num_samples)


@dataclass(frozen=True, eq=False, kw_only=True)
class Feedback:
    """What came of a decision.

    Attributes:
        context: the context that the decision was made in.
        loss_MT: each token's own next-token loss in nats, detached, shape (M, T).
        num_valid: the number of valid tokens of the whole *step*, over all micro-batches and ranks.
    """

    context: RoutingContext
    loss_MT: Tensor
    num_valid: int

    def mean(self, values_T: Tensor) -> Tensor:
        """Sum a value per row over valid tokens and divide by the step's valid tokens (and samples), so that accumulation is exact."""
        valid_T = torch.where(self.context.mask_T, values_T, torch.zeros_like(values_T))
        return valid_T.sum() / (self.num_valid * self.context.num_samples)

    @property
    def share(self) -> Tensor:
        """This micro-batch's share of the step's valid tokens: the weight of a term that is a mean over the micro-batch."""
        return self.context.mask_T.sum().double() / (self.num_valid * self.context.num_samples)


class Term(NamedTuple):
    """A named part of a router's objective: the loop adds ``weight * value`` to the loss and logs both."""

    value: Tensor
    weight: float


@dataclass(frozen=True, kw_only=True)
class RouterShape:
    """What a router is built for.

    Attributes:
        d_model, num_experts, k: D, E and experts per token.
        layer: index of the transformer layer.
        moe_index, moe_layers: which of how many MoE layers this is.
        vocab_size: V.
        seed: initial weights and tables derive from it.
        token_counts_V: how often each token occurs in the training corpus, int64 (V,); None where unknown.
    """

    d_model: int
    num_experts: int
    k: int
    layer: int
    vocab_size: int
    seed: int
    token_counts_V: Tensor | None = None
    moe_index: int = 0
    moe_layers: int = 1


class Router(nn.Module):
    """A routing policy of one MoE layer: decide, and learn from what happened.

    A router is one file: a docstring with its paper, a nested ``Config``, :meth:`forward`, and :meth:`objective` or :meth:`adapt` if
    it learns. Its name is its file's name.

    A router with logits keeps what makes them in a submodule called ``scores``, whose output is the decision's ``logits_TE``: there the
    gradient instrument (``rlroute gradients``) shifts them. Without one a router is named as unmeasurable, and is otherwise complete.

    Class attributes:
        learns_from: any of "gate" (the loss's gradient through the gates), "reward" (the loss as a number) and "load".
        gate_meaning: one line for the table: what the published gate is.
        causal: false if a token's route depends on later tokens.
        stochastic: true if ``explore`` draws; evaluation then reports the sampled policy beside the greedy one. An instance may say
            otherwise than its class.
    """

    Config: ClassVar[type[RouterConfig]]
    learns_from: ClassVar[frozenset[str]] = frozenset()
    gate_meaning: ClassVar[str]
    causal: ClassVar[bool] = True
    stochastic: bool = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "Config" in vars(cls):
            cls.Config.name = cls.__module__.rpartition(".")[2]

    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        if not 1 <= shape.k <= shape.num_experts:
            raise ConfigError(f"k = {shape.k}: legal are 1 to num_experts = {shape.num_experts}")
        super().__init__()
        self.shape = shape

    @property
    def batch_dependent(self) -> bool:
        """Whether the rule or a term mixes the tokens of a micro-batch, so that two micro-batches cannot equal one batch."""
        return False

    @property
    def num_samples(self) -> int:
        """M, the routing samples that this router wants of each token in training."""
        return 1

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Decide. ``x_TD`` is float32 (or float64) of shape (T, D); under evaluation this alone is called and changes no state."""
        raise NotImplementedError

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return named terms to minimise, called per micro-batch before backward; pure. Values are sums over valid tokens divided
        by ``feedback.num_valid``, so that gradient accumulation does not change them."""
        return {}

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return sums for :meth:`adapt`, called per micro-batch after backward (``decision.gates_R.grad`` is there)."""
        mask_T = feedback.context.mask_T
        return {
            "demand_E": decision.demand_E(mask_T),
            "load_E": decision.load_E(mask_T),
            "loss": (feedback.loss_MT.reshape(-1) * mask_T).sum(),
            "tokens": mask_T.sum(),
        }

    def adapt(self, sums: Mapping[str, Tensor]) -> None:
        """Move what is moved without gradients, once per optimizer step, from the sums over micro-batches and ranks."""

    def flops_per_token(self) -> int:
        """FLOPs per token of the greedy forward: two per weight of every matrix but those that only training needs."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() == 2) - self.training_flops_per_token()

    def training_flops_per_token(self) -> int:
        """Forward FLOPs per token that only training needs (value heads; extra routing samples are counted by the loop)."""
        return 0


class LinearScores(nn.Linear):
    """Scores of E experts from D features, without bias, in the precision of its input; initialised from a key."""

    def __init__(self, shape: RouterShape, name: str, std: float) -> None:
        super().__init__(shape.d_model, shape.num_experts, bias=False)
        seeding.init_normal(self.weight, std, shape.seed, f"layers.{shape.layer}.router.{name}")
