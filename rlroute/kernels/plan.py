"""The order in which pairs run: sorted by expert, cut into tiles that never span two experts. Nothing here waits for
the device.

Shape suffixes: T tokens, E experts, R routed pairs (rows, once sorted; at most ``max_pairs`` where a decision has that
bound), G tiles.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlroute.decision import RoutingDecision, sort_by_expert


@dataclass(frozen=True, eq=False)
class Plan:
    """How a decision's pairs become rows.

    Attributes:
        num_tokens, num_experts: T and E.
        pairs_R: the pair behind each row; rows are sorted by expert, and within an expert in the order of the pairs.
            Pairs that do not run (dropped or unused) come last.
        tokens_R: the token behind each row.
        starts_E: the first row of each expert and, last, the number of rows that run; int64 of shape (E + 1,).
        rows_R: pairs ordered by token, each as its row, -1 where it does not run.
        first_T: where each token's pairs begin in ``rows_R``; int64 of shape (T + 1,).
    """

    num_tokens: int
    num_experts: int
    pairs_R: Tensor
    tokens_R: Tensor
    starts_E: Tensor
    rows_R: Tensor
    first_T: Tensor
    _tiles: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """Tiles by size: several kernels use one, in forward and backward."""

    def tiles(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the rows of each expert into tiles of at most ``size`` rows.

        Returns:
            The expert and the first row of each of R // size + min(E, R) tiles, a number known on the host; the expert
            of a tile that is not needed is -1. Last, how many are needed, which come first; of shape (1,).
        """
        if size not in self._tiles:
            self._tiles[size] = self._cut(size)
        return self._tiles[size]

    def _cut(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        count = len(self.pairs_R) // size + min(self.num_experts, len(self.pairs_R))
        starts_E = self.starts_E[:-1]
        needed_E = (self.starts_E.diff() + size - 1) // size
        last_E = needed_E.cumsum(0)
        tiles_G = torch.arange(count, device=starts_E.device)
        experts_G = torch.searchsorted(last_E, tiles_G, right=True)
        inside_G = experts_G.clamp(max=self.num_experts - 1)
        rows_G = starts_E[inside_G] + (tiles_G - (last_E - needed_E)[inside_G]) * size
        return torch.where(experts_G < self.num_experts, experts_G, -1), rows_G, last_E[-1:]


def make_plan(decision: RoutingDecision) -> Plan:
    """Sort the pairs of a decision by expert."""
    pairs_R, experts_R, tokens_R = _bounded(decision)
    device = experts_R.device
    order_R, starts_E = sort_by_expert(experts_R, decision.num_experts)
    row_of_pair_R = torch.empty_like(order_R)
    row_of_pair_R[order_R] = torch.arange(len(order_R), device=device)
    row_of_pair_R = torch.where(experts_R < decision.num_experts, row_of_pair_R, -1)
    tokens = torch.arange(decision.num_tokens + 1, device=device)
    if decision.k is not None and pairs_R is None:
        rows_R, first_T = row_of_pair_R, tokens * decision.k
    else:
        sorted_tokens_R, by_token_R = torch.sort(tokens_R, stable=True)
        rows_R, first_T = row_of_pair_R[by_token_R], torch.searchsorted(sorted_tokens_R, tokens)
    pairs_R = order_R if pairs_R is None else pairs_R[order_R]
    return Plan(
        decision.num_tokens, decision.num_experts, pairs_R, decision.token_ids_R[pairs_R], starts_E, rows_R, first_T
    )


def _bounded(decision: RoutingDecision) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the pairs that may run (None: all in their order), the expert that runs each, E for none, and its token.

    Under a bound these are the running pairs, filled up with some that do not run: only they are sorted, and given a
    row each.
    """
    experts_R = torch.where(decision.kept_R, decision.expert_ids_R, decision.num_experts)
    most = decision.max_pairs
    if most is None or most >= len(experts_R):
        return None, experts_R, decision.token_ids_R
    runs_R = experts_R < decision.num_experts
    idle_R = torch.where(runs_R, 0, (~runs_R).cumsum(0) + runs_R.sum())
    places_R = torch.where(runs_R, runs_R.cumsum(0), idle_R) - 1  # running pairs first, in their order
    pairs_R = torch.empty_like(places_R)
    pairs_R[places_R] = torch.arange(len(places_R), device=places_R.device)
    pairs_R = pairs_R[:most]
    return pairs_R, experts_R[pairs_R], decision.token_ids_R[pairs_R]
