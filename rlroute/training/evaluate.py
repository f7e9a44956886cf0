"""Evaluation on fixed tokens: greedy for every router, and sampled beside it for stochastic ones. It changes no state.

The batches are micro-batches, so that rules that mix tokens see as many as in training; the ranks of a group take turns
with them.

Shape suffixes: T tokens, B sequences of a batch, W windows in all, L routed sites, E experts, P parts of a sequence.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.model import Transformer
from rlroute.routing import RoutingDecision
from rlroute.training.batches import Batch
from rlroute.training.group import ALONE, Group
from rlroute.training.step import Device, forward, load_fractions, make_context, max_vio_L, rounded
from rlroute.transfer import numbers

NATS_DIGITS = 4
"""Digits behind the point of a window's loss, as records have them."""
PARTS = 4
"""Into so many equal parts a sequence is cut, to say where in it pairs are dropped."""
Decisions = Sequence[RoutingDecision]
"""By site."""


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: Sequence[Batch],
    token_bytes_V: np.ndarray,
    device: Device,
    *,
    seed: int,
    step: int,
    final: bool,
    progress: float = 0.0,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Return the greedy loss, bits per byte and balance over all batches; of the final evaluation also the loss of each
    window, and the sampled policy's where there is one.

    Loads are counted over the whole of ``batches``, by site, before capacity drops; pairs per token after them, as they
    ran. Every mean is over tokens or pairs, so that a shorter batch weighs less. One batch's decisions are held at a
    time: memory does not grow with the number of batches.

    Schedules (a policy's temperature) stand at ``step`` and ``progress``; the sequence ids of evaluation batches keep
    their draws apart from training's.
    """
    ends = list(accumulate(len(batch.tokens_BS) for batch in batches))
    totals = _Totals(model, ends[-1])
    modes = [False, True] if final and any(router.stochastic for router in model.routers) else [False]
    for turn in range(-(-len(batches) // group.size)):
        index = turn * group.size + group.rank
        batch = batches[min(index, len(batches) - 1)]
        made: list[Decisions] = []
        for explore in modes:
            context = make_context(batch, device, seed=seed, step=step, progress=progress, explore=explore)
            loss_MT, decisions = forward(model, batch, context, device)
            made.append(decisions)
            if index < len(batches):  # else it ran for the sake of the others, whose pairs its experts take
                totals.add_loss(explore, loss_MT, batch, token_bytes_V)
                if not explore:
                    totals.add_windows(loss_MT, batch, ends[index])
        if index < len(batches):
            totals.add_decisions(*made)
            totals.add_drops(made[0], context.position_T, batch.tokens_BS.shape[1])
    totals.add_up(group)
    drawn = totals.losses(True) | {"overlap_L": totals.overlaps()} if True in modes else None
    row: dict[str, Any]
    windows = {"nats_W": totals.nats_W} if final else {}
    row, scored_L = numbers((totals.losses(False) | totals.balance() | {"sampled": drawn} | windows, totals.scored_L))
    if final:
        row["nats_W"] = [nats if nats is None else round(nats, NATS_DIGITS) for nats in row["nats_W"]]
    entropy_L = row["router_entropy_L"] if any(scored_L) else None
    return row | {"router_entropy_L": entropy_L, "load_LE": rounded(row["load_LE"])}


class _Totals:
    """What the batches add up to. It stays on the device until :func:`numbers` reads it.

    Attributes:
        nats_W: of the greedy policy, by window.
        losses_23: of the greedy and of the sampled policy: nats, tokens and bytes of text.
        demand_L: the pairs that chose each expert, by site.
        sums_L7: what :func:`_sums` returns, by site.
        drops_2P: chosen and dropped pairs, by the part of the sequence.
        overlap_L2: by site, drawn pairs that are greedy ones too, and drawn pairs.
    """

    def __init__(self, model: Transformer, windows: int) -> None:
        device = model.embed.weight.device
        self.nats_W = torch.zeros(windows, dtype=torch.float64, device=device)
        self.losses_23 = torch.zeros(2, 3, dtype=torch.float64, device=device)
        self.demand_L = [
            torch.zeros(router.shape.num_experts, dtype=torch.long, device=device) for router in model.routers
        ]
        self.sums_L7 = torch.zeros(len(self.demand_L), 7, dtype=torch.float64, device=device)
        self.drops_2P = torch.zeros(2, PARTS, dtype=torch.long, device=device)
        self.overlap_L2 = torch.zeros(len(self.demand_L), 2, dtype=torch.float64, device=device)

    def add_loss(self, explore: bool, loss_MT: Tensor, batch: Batch, token_bytes_V: np.ndarray) -> None:
        text_bytes = float(token_bytes_V[batch.targets_BS].sum())
        sums = (loss_MT.double().sum(), batch.targets_BS.size, text_bytes)
        for total, more in zip(self.losses_23[int(explore)], sums, strict=True):
            total += more

    def add_windows(self, loss_MT: Tensor, batch: Batch, end: int) -> None:
        """Take the greedy losses of a batch, the last of whose windows is number ``end`` of all."""
        nats_B = loss_MT.double().view(batch.targets_BS.shape).sum(1)
        self.nats_W[end - len(nats_B) : end] = nats_B

    def add_decisions(self, greedy: Decisions, drawn: Decisions | None = None) -> None:
        for site, decision in enumerate(greedy):
            self.demand_L[site] += decision.demand_E()
            self.sums_L7[site] += _sums(decision)
        for site, (a, b) in enumerate(zip(greedy, drawn or [], strict=drawn is not None)):
            pairs = b.used_R.sum().double()
            self.overlap_L2[site] += torch.stack([pairs * metrics.overlap(b, a).nan_to_num(), pairs])

    def add_drops(self, greedy: Decisions, position_T: Tensor, length: int) -> None:
        for decision in greedy:
            self.drops_2P += metrics.drops_by_position(decision, position_T, length, PARTS)

    def add_up(self, group: Group) -> None:
        """Sum over the ranks of a group."""
        alone = ([total] for total in (*self.losses_23, self.nats_W, self.overlap_L2))
        for tensors in (*alone, [*self.demand_L, self.drops_2P, self.sums_L7]):
            group.add_up(tensors)  # apart: the order in which ranks are summed depends on what travels together

    def losses(self, explore: bool) -> dict[str, Tensor]:
        nats, tokens, text_bytes = self.losses_23[int(explore)]
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / text_bytes}

    @property
    def scored_L(self) -> Tensor:
        """Tokens with probabilities, by site."""
        return self.sums_L7[:, 5]

    def balance(self) -> dict[str, Any]:
        """Return the balance of the greedy decisions, and what they ran, by site."""
        demand_L = self.demand_L
        tokens_L, used_L, kept_L, ran_L, without_L, scored_L, entropy_L = self.sums_L7.t()
        return {
            "max_vio_L": max_vio_L(demand_L),
            "cv_L": [metrics.coefficient_of_variation(d) for d in demand_L],
            "load_entropy_L": [metrics.load_entropy(d) for d in demand_L],
            "router_entropy_L": entropy_L / scored_L,
            "dead_L": [metrics.dead_experts(d) for d in demand_L],
            "drop_rate": (used_L - kept_L).sum() / used_L.sum().clamp(min=1),
            "drop_by_position": self.drops_2P[1].double() / self.drops_2P[0],
            "pairs_L": ran_L / tokens_L,
            "without_L": without_L / tokens_L,
            "load_LE": load_fractions(demand_L),
        }

    def overlaps(self) -> Tensor:
        """Return the share of the drawn pairs that are greedy ones too, by site; NaN where no pair was drawn."""
        return self.overlap_L2[:, 0] / self.overlap_L2[:, 1]


def _sums(decision: RoutingDecision) -> Tensor:
    """Return what is added up of one batch at one site, float64 of shape (7,).

    These are: tokens, pairs, pairs that were kept, pairs that ran, tokens without any of these, tokens with
    probabilities, and their entropies.
    """
    ran_T, probs_TE = decision.token_sum(decision.runs_R.double()), decision.probs_TE
    tokens = ran_T.new_full((), decision.num_tokens)
    scored = 0 * tokens if probs_TE is None else tokens
    entropy = 0 * tokens if probs_TE is None else tokens * metrics.router_entropy(probs_TE).double()
    used, kept = (pairs_R.sum().double() for pairs_R in (decision.used_R, decision.used_R & decision.kept_R))
    return torch.stack([tokens, used, kept, ran_T.sum(), (ran_T == 0).sum().double(), scored, entropy])
