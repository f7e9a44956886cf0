"""The order in which pairs run: sorted by expert, cut into tiles that never span two experts. Nothing here waits for the device.

Shape suffixes: T tokens, E experts, R routed pairs (rows, once sorted), G tiles.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlroute.routing import RoutingDecision


@dataclass(frozen=True, eq=False)
class Plan:
    """How a decision's pairs become rows.

    Attributes:
        num_tokens, num_experts: T and E.
        pairs_R: the pair behind each row; rows are sorted by expert, and within an expert in the order of the pairs. Pairs that do not
            run (dropped or unused) come last.
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
    _tiles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """Tiles by size: several kernels use one, in forward and backward."""

    def tiles(self, size: int) -> tuple[Tensor, Tensor]:
        """Cut the rows of each expert into tiles of at most ``size`` rows.

        Returns:
            The expert and the first row of each of R // size + min(E, R) tiles, a number known on the host; the expert of a tile that
            is not needed is -1.
        """
        if size not in self._tiles:
            self._tiles[size] = self._cut(size)
        return self._tiles[size]

    def _cut(self, size: int) -> tuple[Tensor, Tensor]:
        count = len(self.pairs_R) // size + min(self.num_experts, len(self.pairs_R))
        starts_E = self.starts_E[:-1]
        needed_E = (self.starts_E.diff() + size - 1) // size
        last_E = needed_E.cumsum(0)
        tiles_G = torch.arange(count, device=starts_E.device)
        experts_G = torch.searchsorted(last_E, tiles_G, right=True)
        inside_G = experts_G.clamp(max=self.num_experts - 1)
        rows_G = starts_E[inside_G] + (tiles_G - (last_E - needed_E)[inside_G]) * size
        return torch.where(experts_G < self.num_experts, experts_G, -1), rows_G


def make_plan(decision: RoutingDecision) -> Plan:
    """Sort the pairs of a decision by expert."""
    experts_R = torch.where(decision.kept_R, decision.expert_ids_R, decision.num_experts)
    sorted_R, pairs_R = torch.sort(experts_R, stable=True)
    device = experts_R.device
    starts_E = torch.searchsorted(sorted_R, torch.arange(decision.num_experts + 1, device=device))
    rows_of_pairs_R = torch.empty_like(pairs_R)
    rows_of_pairs_R[pairs_R] = torch.arange(len(pairs_R), device=device)
    rows_of_pairs_R = torch.where(experts_R < decision.num_experts, rows_of_pairs_R, -1)
    tokens = torch.arange(decision.num_tokens + 1, device=device)
    if decision.k is not None:
        rows_R, first_T = rows_of_pairs_R, tokens * decision.k
    else:
        sorted_tokens_R, by_token_R = torch.sort(decision.token_ids_R, stable=True)
        rows_R, first_T = rows_of_pairs_R[by_token_R], torch.searchsorted(sorted_tokens_R, tokens)
    return Plan(
        decision.num_tokens, decision.num_experts, pairs_R, decision.token_ids_R[pairs_R], starts_E, rows_R, first_T
    )
