"""What is measured of a stored run by its weights: the trained model is looked at on validation tokens, greedily.

Shape suffixes: B sequences, S sequence length, T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlroute import metrics, seeding
from rlroute.experiments.checkpoints.trained import TrainedRun, open_routed
from rlroute.experiments.inspection.masking import Mask
from rlroute.experiments.inspection.measures import Settling, settling
from rlroute.experiments.inspection.probe import loss_T, passes, run_probe
from rlroute.experiments.inspection.worth import masked_loss
from rlroute.routing import RoutingDecision, Site
from rlroute.schema import RunRecord
from rlroute.training.batches import Batch

PREFIX = 8
"""Every so many tokens a sequence is cut off."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A stored run: what its record says, and its weights where they are asked for."""

    record: RunRecord
    store: Path

    @cached_property
    def trained(self) -> TrainedRun:
        """The run's weights and corpus.

        Raises:
            ConfigError: it is of the dense model, or was made from other code or data.
        """
        return open_routed(self.record, self.store)

    @cached_property
    def batches(self) -> list[Batch]:
        """The validation tokens on which it was evaluated."""
        return self.trained.batches(self.trained.config.data.eval_tokens)

    def bits(self, nats: float, batches: Sequence[Batch]) -> float:
        """Return a sum of nats over the text of batches in bits per byte."""
        text_bytes = sum(float(self.trained.corpus.token_bytes_V[batch.targets_BS].sum()) for batch in batches)
        return nats / math.log(2) / text_bytes


def _passes(sample: Sample, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, list[RoutingDecision]]]:
    run = sample.trained
    return passes(run.model, batches, run.device, seed=run.seed, step=run.last_step)


def logit_size(sample: Sample) -> float | None:
    """Return the root mean square of the log-sum-exp of the routers' logits, which the z-loss holds down, over tokens
    and sites; none for routers without logits.
    """
    squares = [
        decision.logits_TE.double().logsumexp(1).square().mean()
        for _, decisions in _passes(sample, sample.batches)
        for decision in decisions
        if decision.logits_TE is not None
    ]
    return float(torch.stack(squares).mean().sqrt()) if squares else None


def _rise(mask: Mask) -> Callable[[Sample], float]:
    """Return a measure of how much the loss rises where every routed MLP does without something."""

    def value(sample: Sample) -> float:
        run = sample.trained
        keys = {"seed": run.seed, "step": run.last_step}
        masks: dict[Site, Mask] = dict.fromkeys(run.config.model.moe_layers, mask)
        without_T = masked_loss(run.model, sample.batches, run.device, masks, **keys)
        whole_T = loss_T(run.model, sample.batches, run.device, **keys)
        return sample.bits(float((without_T - whole_T).sum()), sample.batches)

    return value


without_shared = _rise(Mask(shared=True))
without_best = _rise(Mask(best=1))


def noise_gini(sample: Sample) -> float:
    """Return the Gini coefficient of the loads on uniformly drawn tokens less that on the validation text, the mean
    over sites.
    """
    run, vocab = sample.trained, sample.trained.corpus.vocab_size
    draw = seeding.numpy_generator(run.seed, "claims", "random tokens")
    drawn = [replace(batch, tokens_BS=draw.integers(0, vocab, batch.tokens_BS.shape)) for batch in sample.batches]
    return _gini(sample, drawn) - _gini(sample, sample.batches)


def _gini(sample: Sample, batches: Sequence[Batch]) -> float:
    run = sample.trained
    probe = run_probe(run.model, batches, run.device, seed=run.seed, step=run.last_step)
    return float(torch.stack([metrics.gini(site.load_E) for site in probe.sites.values()]).mean())


def prefix_bits(sample: Sample) -> float:
    """Return the loss on the last tokens of prefixes, of lengths of 8, 16 and so on: what a model would reach that
    writes, and so has no later tokens to look at.
    """
    nats, ends = 0.0, list[Batch]()
    for length in range(PREFIX, sample.trained.config.data.seq_len + 1, PREFIX):
        cut = [_until(batch, length) for batch in sample.batches]
        for found_T, _ in _passes(sample, cut):
            nats += float(found_T.view(-1, length)[:, -1].sum())
        ends += [replace(batch, targets_BS=batch.targets_BS[:, -1:]) for batch in cut]
    return sample.bits(nats, ends)


def _until(batch: Batch, length: int) -> Batch:
    return Batch(batch.tokens_BS[:, :length], batch.targets_BS[:, :length], batch.sequence_B, None)


def settled(share: float) -> Callable[[Sample], float | None]:
    """Return a measure of the share of the final choices that are made after a share of the steps, the mean over sites;
    none where that checkpoint was not kept.
    """
    return lambda sample: _of_settling(sample, share, lambda found, index: found.saturation[index])


def unsettled(share: float) -> Callable[[Sample], float | None]:
    """Return a measure of the share of tokens whose choice is another at that share of the steps, or at a checkpoint
    after it, than at the end.
    """
    return lambda sample: _of_settling(sample, share, lambda found, index: found.unsettled[index])


def _of_settling(sample: Sample, share: float, read: Callable[[Settling, int], float]) -> float | None:
    run, wanted = sample.trained, round(share * sample.trained.last_step)
    if wanted not in run.steps:
        return None
    probes = [run_probe(run.at(step), sample.batches, run.device, seed=run.seed, step=step) for step in run.steps]
    sites = [settling([probe.sites[site].chosen_TE for probe in probes]) for site in probes[-1].sites]
    return float(np.mean([read(found, run.steps.index(wanted)) for found in sites]))
