"""What a router decides: which (token, expert) pairs to run and with what weight.

Shape suffixes: T tokens (rows; M x T where a router draws M routing samples), D model width, F expert width, E experts,
K slots per token, C tokens per expert, R routed (token, expert) pairs, S shared experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlroute.errors import DecisionError


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingDecision:
    """Which (token, expert) pairs to run and with what weight, as R flat pairs.

    Attributes:
        num_tokens: T.
        num_experts: E.
        k: slots per token where that number is fixed; the pairs are then token-major, pair t * k + j being token t's
            j-th choice. A router of variable k leaves slots unused. None where experts choose tokens.
        token_ids_R: int64, the token of each pair.
        expert_ids_R: int64, the expert that was *chosen*; the value E marks an unused slot, so that R is known on the
            host and nothing waits for the device.
        kept_R: bool, false where a capacity step dropped the pair.
        gates_R: the weight of the pair's expert output in the token's sum. Where it requires a gradient, after backward
            ``gates_R.grad`` is the pair's credit, <dL/dout_t, y_r>; a router of constant gates asks by
            ``requires_grad_()``.
        logits_TE: clean scores, before noise and bias; None for routers without scores.
        probs_TE: the routing distribution, rows sum to 1 (what f.P and entropy read); None for routers without scores.
        log_prob_R: Plackett-Luce conditional log-probabilities of the *ordered* draw; their sum over a token's pairs is
            the log-probability of its draw. None where nothing was sampled.
        chosen_R: bool, which pairs count as demand where a router runs more than it chose (every expert in training,
            say); None: all.
        self_T: the weight of the token's own input in the layer's output (identity experts, MoE++, arXiv 2410.07348);
            None for 0.
        shared_gates_TS: the gate of each shared expert; None for 1.
        fill_TD: what is added to the layer's output as it is (for experts that do not run, say); None for nothing.
        outputs_RD: each pair's output before its gate, differentiable, 0 where it did not run; set by the layer, where
            the router wishes for it.
        gate_EFD: the experts' projections into the activation (of a gated one the gate's), differentiable; set
            likewise.
        num_free_experts: the last so many of the E experts are free: their pairs run nothing. The layer says so, never
            a router.
        max_pairs: no more pairs than this run, where that is fewer than R: what the engines set memory aside for.
            Further ones are dropped, first choices before second ones and then by position.
        memo: read by the router that made it (value estimates, noise, thresholds), and through
            ``RoutingContext.previous`` by the router of the next site.
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
    chosen_R: Tensor | None = None
    self_T: Tensor | None = None
    shared_gates_TS: Tensor | None = None
    fill_TD: Tensor | None = None
    outputs_RD: Tensor | None = None
    gate_EFD: Tensor | None = None
    num_free_experts: int = 0
    max_pairs: int | None = None
    memo: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("self_T", "shared_gates_TS", "fill_TD"):
            value: Tensor | None = getattr(self, name)
            if value is not None and (value.dim() != len(name.rpartition("_")[2]) or len(value) != self.num_tokens):
                raise DecisionError(
                    f"{name} has shape {tuple(value.shape)}: want one row for each of {self.num_tokens} tokens"
                )
        if self.max_pairs is not None and (type(self.max_pairs) is not int or self.max_pairs < 0):
            raise DecisionError(
                f"max_pairs = {self.max_pairs!r}: legal are whole numbers from 0, known on the host, or None"
            )

    @property
    def most_pairs(self) -> int:
        """How many pairs run at most, which the host knows: what engines set memory aside for."""
        pairs = len(self.token_ids_R)
        return pairs if self.max_pairs is None else min(self.max_pairs, pairs)

    @staticmethod
    def token_choice(
        ids_TK: Tensor,
        gates_TK: Tensor,
        num_experts: int,
        *,
        log_prob_TK: Tensor | None = None,
        **scores: Any,
    ) -> RoutingDecision:
        """Build the decision of a router in which each token picks up to K experts.

        Args:
            ids_TK: int64 expert ids of shape (T, K); E for an unused slot.
            gates_TK: gates of shape (T, K).
            num_experts: E.
            log_prob_TK: conditional log-probabilities of a sampled draw, shape (T, K).
            scores: further fields: ``logits_TE``, ``probs_TE``, ``memo`` ...

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
        """Build the decision of a router in which each expert picks up to C tokens.

        Args:
            ids_EC: int64 token ids of shape (E, C); T for an unused slot.
            gates_EC: gates of shape (E, C).
            num_tokens: T.
            scores: further fields: ``logits_TE``, ``probs_TE``, ``memo`` ...

        Raises:
            DecisionError: the shapes disagree.
        """
        if ids_EC.dim() != 2 or ids_EC.shape != gates_EC.shape:
            raise DecisionError(
                f"ids_EC has shape {tuple(ids_EC.shape)}, gates_EC {tuple(gates_EC.shape)}: want (E, C)"
            )
        num_experts, capacity = ids_EC.shape
        experts_EC = torch.arange(num_experts, device=ids_EC.device)[:, None].expand(-1, capacity)
        experts_EC = experts_EC.masked_fill(ids_EC == num_tokens, num_experts)
        return RoutingDecision(
            num_tokens=num_tokens,
            num_experts=num_experts,
            k=None,
            token_ids_R=ids_EC.clamp(max=num_tokens - 1).reshape(-1),
            expert_ids_R=experts_EC.reshape(-1),
            kept_R=torch.ones(num_experts * capacity, dtype=torch.bool, device=ids_EC.device),
            gates_R=gates_EC.reshape(-1),
            **scores,
        )

    def demand_E(self, mask_T: Tensor | None = None) -> Tensor:
        """Count the pairs that *chose* each expert (before capacity drops), over the tokens in ``mask_T``; shape (E,),
        int64.
        """
        return self._count(self.demanded_R, mask_T)

    def load_E(self, mask_T: Tensor | None = None) -> Tensor:
        """Count the pairs that each expert has left after capacity drops, over the tokens in ``mask_T``; shape (E,),
        int64.
        """
        return self._count(self.kept_R, mask_T)

    @property
    def used_R(self) -> Tensor:
        """Say of each pair whether it is one: not an unused slot; bool."""
        return self.expert_ids_R < self.num_experts

    @property
    def demanded_R(self) -> Tensor:
        """Say of each pair whether it counts as demand: one that was chosen, and no unused slot; bool."""
        return self.used_R if self.chosen_R is None else self.used_R & self.chosen_R

    @property
    def runs_R(self) -> Tensor:
        """Say of each pair whether it runs: neither unused nor dropped nor of a free expert; bool."""
        return self.kept_R & (self.expert_ids_R < self.num_experts - self.num_free_experts)

    @property
    def idle_R(self) -> Tensor:
        """Say of each pair whether a free expert has it; bool."""
        return self.kept_R & self.used_R & ~self.runs_R

    def real(self) -> RoutingDecision:
        """Return the decision over the real experts alone, in which pairs of free ones are unused slots."""
        if not self.num_free_experts:
            return self
        real = self.num_experts - self.num_free_experts
        return replace(self, num_experts=real, num_free_experts=0, expert_ids_R=self.expert_ids_R.clamp(max=real))

    def _count(self, counted_R: Tensor, mask_T: Tensor | None) -> Tensor:
        if mask_T is not None:
            counted_R = counted_R & mask_T[self.token_ids_R]
        slots_R = torch.where(counted_R, self.expert_ids_R, self.num_experts)
        return sort_by_expert(slots_R, self.num_experts)[1].diff()

    def token_sum(self, values_R: Tensor) -> Tensor:
        """Sum a value per pair over each token's used pairs; shape (T,)."""
        values_R = torch.where(self.used_R, values_R, torch.zeros_like(values_R))
        if self.k is not None:
            return values_R.view(self.num_tokens, self.k).sum(1)
        return values_R.new_zeros(self.num_tokens).index_add(0, self.token_ids_R, values_R)

    def table(self, values_R: Tensor) -> Tensor:
        """Return a value per pair as a table of tokens and experts, whatever the order of the pairs, shape (T, E + 1):
        unused slots have the last column. Values of pairs that are the same are added.
        """
        table_TE = values_R.new_zeros(self.num_tokens, self.num_experts + 1)
        return table_TE.index_put((self.token_ids_R, self.expert_ids_R), values_R, accumulate=True)

    def all_kept_T(self) -> Tensor:
        """Say of each token whether all of its pairs were kept; shape (T,), bool."""
        return self.token_sum((~self.kept_R).long()) == 0

    def detach(self) -> RoutingDecision:
        """Return a copy that holds no autograd graph, for whoever keeps one."""

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach()
            return {name: cut(item) for name, item in value.items()} if isinstance(value, Mapping) else value

        return replace(self, **{f.name: cut(getattr(self, f.name)) for f in fields(self)})


def sort_by_expert(experts_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by expert; pairs of one expert keep their order, and those of expert E, which is none, come last.

    Nothing waits for the device, as ``bincount`` would, or adds up by place, which with a fixed order is slow where
    many pairs meet in one.

    Returns:
        The pair at each place, of shape (R,), and the first place of each expert and, last, of none, (E + 1,); int64.
    """
    narrow = torch.int16 if num_experts < 2**15 else torch.int64  # a radix sort passes over fewer bits
    sorted_R, order_R = torch.sort(experts_R.to(narrow), stable=True)
    bounds = torch.arange(num_experts + 1, device=experts_R.device, dtype=narrow)
    return order_R, torch.searchsorted(sorted_R, bounds)
