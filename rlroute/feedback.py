"""What comes of a decision: the losses of its tokens, the terms of a router's objective, the sums of a step.

Shape suffixes: T tokens (rows; M x T where a router draws M routing samples), M routing samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlroute.routing import RoutingContext


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
        """Sum a value per row over valid tokens and divide by the step's valid tokens (and samples), so that
        accumulation is exact.
        """
        valid_T = torch.where(self.context.mask_T, values_T, torch.zeros_like(values_T))
        return valid_T.sum() / (self.num_valid * self.context.num_samples)

    @property
    def share(self) -> Tensor:
        """This micro-batch's share of the step's valid tokens: the weight of a term that is a mean over the
        micro-batch.
        """
        return self.context.mask_T.sum().double() / (self.num_valid * self.context.num_samples)


class Term(NamedTuple):
    """A named part of a router's objective: the loop adds ``weight * value`` to the loss and logs both."""

    value: Tensor
    weight: float | Tensor


class Sums(dict[str, Tensor]):
    """A step's sums at one site, over micro-batches and ranks: what the loop counted, and what the router's ``observe``
    returned.

    The loop counts ``demand_E`` (pairs that chose each expert), ``load_E`` (those that no capacity dropped),
    ``without`` (tokens for which no real expert ran), ``loss`` and ``tokens``, all of them over valid rows.

    Args:
        values: the sums.
        peers: those of all sites whose router has the same class, configuration and number of experts, this one
            included.
    """

    def __init__(self, values: Mapping[str, Tensor], peers: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__(values)
        self.peers = peers

    def over_sites(self, name: str) -> Tensor:
        """Return the sum called ``name`` over all sites of this router, for rules that are global."""
        return torch.stack([peer[name] for peer in self.peers]).sum(0)
