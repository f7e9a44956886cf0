"""What training micro-batches give a router's logits, set against the gradient: all of it where it can be enumerated,
else draws.

Shape suffixes: T tokens, M routing samples, X = M * T, N micro-batches, L routed sites, E columns of logits, K choices
per token, P numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.experiments.gradients.exact import (
    CHUNK_ROWS,
    ENUMERABLE,
    Target,
    count_choices,
    joint_choices,
    measure_target,
)
from rlroute.experiments.gradients.probe import Probe
from rlroute.experiments.gradients.signal import Signal, measure, measure_enumerated, without_target_error
from rlroute.experiments.gradients.steering import Unmeasurable
from rlroute.seeding import derive_key

ENUMERABLE_ALONE = 256
"""The most estimates that are enumerated where each takes a forward and a backward of its own."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """One checkpoint of one seed.

    Attributes:
        target: the gradient.
        estimates_NLTE: draws, by the turn that they were drawn in; or all there can be.
        prob_N: the probability of each, where they are all there can be.
        rows: token rows of one micro-batch.
    """

    target: Target
    estimates_NLTE: tuple[Tensor, ...]
    prob_N: Tensor | None
    rows: int

    def signals(self, layer: int) -> tuple[Signal, Signal, int]:
        """Return the quality against the whole gradient and against its choice part, and in how many steps the layer
        learns once.

        Routers may teach one layer per step, in turn: a step in which no draw gives a layer any gradient is not its
        turn.
        """
        by_turn = [estimates[:, layer].flatten(1) for estimates in self.estimates_NLTE]
        live = [estimates for estimates in by_turn if estimates.any()] or by_turn
        estimates_NP = torch.cat(live).numpy()
        targets = [gradient[layer].flatten().numpy() for gradient in (self.target.gradient_LTE, self.target.choice_LTE)]
        if self.prob_N is None:
            whole, choice = (measure(estimates_NP, target_P) for target_P in targets)
        else:
            whole, choice = (measure_enumerated(estimates_NP, self.prob_N.numpy(), target_P) for target_P in targets)
        return without_target_error(whole, self.target.error_L[layer]), choice, len(by_turn) // len(live)


def measure_probe(probe: Probe, *, draws: int, samples: int, seed: int) -> Measurement:
    """Return the target and the estimates: all of them where they can be enumerated, with their probabilities, else
    draws.

    Raises:
        Unmeasurable: a token has too many choices, or something is not finite.
    """
    target = measure_target(probe, samples=samples, seed=seed)
    measured = _measure_estimates(probe, target, draws, seed)
    if not all(part.isfinite().all() for part in (target.gradient_LTE, *measured.estimates_NLTE)):
        raise Unmeasurable("its gradient is not finite")
    return measured


def _measure_estimates(probe: Probe, target: Target, draws: int, seed: int) -> Measurement:
    rows = probe.tokens * probe.num_samples
    choices = count_choices(probe.columns, probe.k) ** (len(probe.routers) * rows)
    if choices <= (ENUMERABLE if probe.independent else ENUMERABLE_ALONE) and probe.samples_its_policy():
        found = enumerate_estimates(probe)
        return Measurement(target, (found[0],), found[1], rows)
    turns = range(len(probe.routers))
    each = -(-draws // len(turns))
    return Measurement(target, tuple(draw(probe, each, seed, turn) for turn in turns), None, rows)


def enumerate_estimates(probe: Probe) -> tuple[Tensor, Tensor]:
    """Return the estimate of every joint choice of all routing samples, shape (N, L, T, E), and its probability, shape
    (N,).
    """
    experts, k, layers, samples, tokens = (
        probe.columns,
        probe.k,
        len(probe.routers),
        probe.num_samples,
        probe.tokens,
    )
    estimates, probabilities = [], []
    for ids_LNXK in joint_choices(experts, k, layers, samples * tokens):
        for ids in torch.split(ids_LNXK, ids_LNXK.shape[1] if probe.independent else 1, dim=1):
            count = ids.shape[1]
            ids_LNTK = ids.view(layers, count, samples, tokens, k).transpose(1, 2).flatten(1, 2)  # sample-major
            with torch.no_grad():
                _, log_prob_LNT = probe.forced(ids_LNTK, probe.zero_shift(), held=True)
            estimates.append(probe.estimates(count, 0, ids_LNTK=ids_LNTK))
            probabilities.append(log_prob_LNT.sum((0, 2)).view(samples, count).sum(0).exp())
    return torch.cat(estimates), torch.cat(probabilities)


def draw(probe: Probe, draws: int, seed: int, turn: int) -> Tensor:
    """Return independent estimates, shape (N, L, T, E): many in one forward where they do not mix, else one by one."""
    most = max(1, CHUNK_ROWS // (probe.tokens * probe.num_samples)) if probe.independent else 1
    sizes = [min(most, draws - start) for start in range(0, draws, most)]
    keys = [derive_key("gradients", "draw", seed, number) for number in range(len(sizes))]
    return torch.cat([probe.estimates(size, key, turn=turn) for size, key in zip(sizes, keys, strict=True)])
