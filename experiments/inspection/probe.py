"""What a model does on fixed tokens: one greedy pass, as it is evaluated.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.experiments.inspection.measures import choices_of
from rlroute.model import Transformer
from rlroute.routing import RoutingDecision, Site
from rlroute.training.batches import Batch
from rlroute.training.step import Device, forward, make_context


@dataclass(frozen=True, eq=False)
class SiteProbe:
    """What one site did.

    Attributes:
        chosen_TE: bool, which experts each token chose, before any drop.
        dropped: the share of these pairs that did not run.
        entropy: of the routing distributions, over log E; None for a router without probabilities.
    """

    chosen_TE: Tensor
    dropped: float
    entropy: float | None

    @property
    def load_E(self) -> Tensor:
        """Pairs of each expert, int64."""
        return self.chosen_TE.sum(0)


@dataclass(frozen=True, eq=False)
class Probe:
    """What a model did on tokens, on the CPU.

    Attributes:
        token_T, position_T: int64, each token's id and its place in its sequence.
        loss_T: float64, nats.
        sites: first to last.
    """

    token_T: np.ndarray
    position_T: np.ndarray
    loss_T: Tensor
    sites: dict[Site, SiteProbe]


@torch.no_grad()
def passes(
    model: Transformer, batches: Sequence[Batch], device: Device, *, seed: int, step: int
) -> Iterator[tuple[Tensor, list[RoutingDecision]]]:
    """Yield what a model does on each batch: losses in nats, float64 of shape (T,) on the CPU, and sites' decisions.

    Args:
        model: in its final state.
        batches: of any sizes.
        device: where and in what precision it runs.
        seed, step: what draws are keyed by.
    """
    for batch in batches:
        context = make_context(batch, device, seed=seed, step=step, progress=1.0, explore=False)
        loss_MT, decisions = forward(model, batch, context, device)
        yield loss_MT[0].double().cpu(), decisions


def loss_T(model: Transformer, batches: Sequence[Batch], device: Device, *, seed: int, step: int) -> Tensor:
    """Return the losses of :func:`passes` over all batches, at least one."""
    return torch.cat([found_T for found_T, _ in passes(model, batches, device, seed=seed, step=step)])


def run_probe(model: Transformer, batches: Sequence[Batch], device: Device, *, seed: int, step: int) -> Probe:
    """Return what :func:`passes` shows over all batches, at least one."""
    losses, decided = zip(*passes(model, batches, device, seed=seed, step=step), strict=True)
    keys = [router.shape.site for router in model.routers]
    return Probe(
        token_T=np.concatenate([batch.tokens_BS.reshape(-1) for batch in batches]),
        position_T=np.concatenate([np.indices(batch.tokens_BS.shape)[1].reshape(-1) for batch in batches]),
        loss_T=torch.cat(losses),
        sites={key: _site(list(of_site)) for key, of_site in zip(keys, zip(*decided, strict=True), strict=True)},
    )


def _site(decisions: Sequence[RoutingDecision]) -> SiteProbe:
    """Return what a site did, from its decision on each batch."""
    demand = sum(float(decision.demand_E().sum()) for decision in decisions)
    kept = sum(float((decision.demanded_R & decision.kept_R).sum()) for decision in decisions)
    tokens = sum(decision.num_tokens for decision in decisions)
    entropies = [
        float(metrics.router_entropy(decision.probs_TE)) * decision.num_tokens
        for decision in decisions
        if decision.probs_TE is not None
    ]
    return SiteProbe(
        chosen_TE=torch.cat([choices_of(decision) for decision in decisions]),
        dropped=1 - kept / demand if demand else 0.0,
        entropy=sum(entropies) / tokens if len(entropies) == len(decisions) else None,
    )
