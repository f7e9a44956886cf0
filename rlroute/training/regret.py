"""Regret: how much lower a token's loss would be on the best route of equal compute through the last MoE layer.

That layer comes after all attention, so a token's route there changes its own next-token loss and no other's: what is
found is exact. The route taken is that of evaluation; the others are all sets of as many real experts, where these are
at most ``SETS``. Beyond that they are found by exchanges: one expert at a time, from the last choice to the first and
round again, gives way to the best of all others, until ``SETS`` sets have been tried or a whole turn has changed
nothing. Regret is then at least what is found, and the record says of how many tokens.

An alternative has the gates that the router itself gives it when its choice is forced to that set, and so it is with
all that it hands out by its choice (gates of shared experts, a fill). This is defined for every router that chooses by
its context. The set stands in the slots of real experts that the token uses, best scores first where the router has
scores; where experts choose, those of the set take the token and the others leave it. All else stays: unused slots,
free experts, and which slots a capacity dropped. A router without such a choice has no regret, and the record says why.

What it costs: a forward of a micro-batch; the outputs of all experts for ``TOKENS`` tokens, once; and for each set the
router on the micro-batch, and norm and head on the ``TOKENS``: at most 2 D V SETS TOKENS FLOPs for the heads. What
follows the experts is in float32 at least. Nothing is changed by it.

After "counterfactual routing" (2026, arXiv 2605.07260), which draws its alternatives, and finds routers near the best
on confident tokens and uninformative on fragile ones. Confidence is the highest probability of a next token: that of
the token that follows would bound the regret by itself.

Shape suffixes: N tokens, M of them, V vocabulary, E experts, S sets.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlroute.model import Transformer
from rlroute.schema import Regret
from rlroute.training.batches import Batch
from rlroute.training.routes import Routes, Unforced
from rlroute.training.step import Device
from rlroute.transfer import numbers

TOKENS = 128
"""So many tokens are measured, evenly spread over a micro-batch of windows that are evenly spread over validation."""
SETS = 512
"""All sets of a token are tried where there are no more than this: 2 of 32 experts."""
PARTS = 10
"""Into so many equal parts the tokens are cut by the confidence of their prediction."""


@torch.no_grad()
def regret(model: Transformer, batches: Sequence[Batch], sequences: int, device: Device, **keys: Any) -> Regret | str:
    """Return the regret of a model's greedy routes in its last MoE layer, or why it has none.

    Args:
        model: as trained.
        batches: all validation tokens.
        sequences: as many as a micro-batch has.
        device: where it runs.
        keys: of the context: ``seed``, ``step`` and so on.
    """
    try:
        routes = Routes(model, spread(batches, sequences), TOKENS, device, **keys)
        logits_NV = routes.logits_taken()
        search = Search(routes, functional.cross_entropy(logits_NV, routes.targets_N, reduction="none"))
        search.run()
    except Unforced as reason:
        return str(reason)
    confidence_N, regret_N, better_N = logits_NV.softmax(1).amax(1), search.regret_N, search.better_share_N
    parts = confidence_N.argsort(stable=True).tensor_split(min(PARTS, len(regret_N)))

    def by_part(values_N: Tensor) -> list[Tensor]:
        return [values_N[part_N].double().nanmean() for part_N in parts]

    found: Regret = numbers(
        {
            "layer": len(model.blocks) - 1,
            "tokens": len(regret_N),
            "exact": search.exact_N.double().mean(),
            "sets": search.tried_N.max(),
            "nats": regret_N.double().mean(),
            "better": better_N.nanmean(),
            "confidence_C": by_part(confidence_N),
            "nats_C": by_part(regret_N),
            "better_C": by_part(better_N),
        }
    )
    return found


def spread(batches: Sequence[Batch], sequences: int) -> Batch:
    """Return a micro-batch of validation windows, evenly spread over all."""
    tokens_BS, targets_BS, sequence_B = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("tokens_BS", "targets_BS", "sequence_B")
    )
    count = min(sequences, len(tokens_BS))
    rows_B = np.arange(count) * len(tokens_BS) // count
    return Batch(tokens_BS[rows_B], targets_BS[rows_B], sequence_B[rows_B], None)


class Search:
    """The best of other routes, token by token.

    Args:
        routes: what they give.
        taken_N: the losses of the routes taken.

    Attributes:
        best_N: the lowest loss so far, of the route taken or another.
        tried_N: other sets tried.
        lower_N: those of them with a lower loss than the route taken.
        exact_N: bool, whose other sets are all tried.
    """

    def __init__(self, routes: Routes, taken_N: Tensor) -> None:
        self.routes, self.taken_N, self.best_N = routes, taken_N, taken_N.clone()
        self.own_NE = routes.sets_NE[:, : routes.real]
        self.sizes_N = self.own_NE.sum(1)
        self.tried_N, self.lower_N = torch.zeros_like(self.sizes_N), torch.zeros_like(self.sizes_N)
        few = [math.comb(routes.real, size) <= SETS for size in range(routes.real + 1)]
        self.exact_N = torch.tensor(few, device=self.own_NE.device)[self.sizes_N]

    @property
    def regret_N(self) -> Tensor:
        """The loss of the route taken minus that of the best, in nats."""
        return self.taken_N - self.best_N

    @property
    def better_share_N(self) -> Tensor:
        """The share of all other sets whose loss is lower; NaN where they were not all tried, or there is no other."""
        return (self.lower_N.double() / self.tried_N).masked_fill(~self.exact_N, math.nan)

    def run(self) -> None:
        """Try all sets, or those of exchanges."""
        sizes = sorted(set(self.sizes_N[self.exact_N].tolist()))
        sets = {size: all_sets(self.routes.real, size).to(self.own_NE.device) for size in sizes}
        for index in range(max(map(len, sets.values()), default=0)):
            sets_NE, valid_N = self.own_NE.clone(), torch.zeros_like(self.exact_N)
            for size, sets_SE in sets.items():
                if index < len(sets_SE):
                    valid_N |= (mine_N := self.sizes_N == size)
                    sets_NE[mine_N] = sets_SE[index]
            self._try(sets_NE, valid_N)
        if not self.exact_N.all():
            self._exchange(~self.exact_N)

    def _try(self, sets_NE: Tensor, valid_N: Tensor) -> Tensor:
        """Return the losses of sets; infinite where one is not valid, or the one that was chosen."""
        other_N = valid_N & (sets_NE != self.own_NE).any(1)
        loss_N = torch.full_like(self.taken_N, math.inf)
        if len(which_M := other_N.nonzero().squeeze(1)):
            loss_M = self.routes.losses(sets_NE[which_M], which_M)
            loss_N[which_M] = loss_M.masked_fill(loss_M.isnan(), math.inf)
        self.tried_N += other_N
        self.lower_N += loss_N < self.taken_N
        self.best_N = torch.minimum(self.best_N, loss_N)
        return loss_N

    def _exchange(self, active_N: Tensor) -> None:
        """Exchange one expert after the other for the best of all others, where that helps."""
        sets_NE, still_N, experts = self.own_NE.clone(), torch.zeros_like(self.sizes_N), self.routes.real
        members_NE = self.routes.ranked(sets_NE, torch.arange(len(sets_NE), device=sets_NE.device))
        for step in range(-(-SETS // experts)):
            place_N1 = (self.sizes_N - 1 - step % self.sizes_N.clamp(min=1)).clamp(min=0)[:, None]
            without_NE = sets_NE.scatter(1, members_NE.gather(1, place_N1), False)
            before_N, losses = self.best_N, []
            for expert in range(experts):
                with_NE = without_NE.clone()
                with_NE[:, expert] = True
                losses.append(self._try(with_NE, active_N & ~sets_NE[:, expert]))
            loss_N, expert_N = torch.stack(losses, 1).min(1)
            moved_N = loss_N < before_N
            moved_NE = without_NE.scatter(1, expert_N[:, None], True)
            sets_NE = torch.where(moved_N[:, None], moved_NE, sets_NE)
            moved_members_NE = members_NE.scatter(1, place_N1, expert_N[:, None])
            members_NE = torch.where(moved_N[:, None], moved_members_NE, members_NE)
            still_N = torch.where(moved_N, 0, still_N + 1)
            active_N = active_N & (still_N < self.sizes_N)
            if not active_N.any():
                break


def all_sets(experts: int, size: int) -> Tensor:
    """Return all sets of so many experts, bool of shape (sets, E)."""
    sets = list(combinations(range(experts), size))
    members = torch.tensor(sets, dtype=torch.int64).view(len(sets), size)
    return torch.zeros(len(sets), experts, dtype=torch.bool).scatter(1, members, True)
