"""Since when routes are what they are: checkpoints of a run on the same tokens, or its recorded choices.

Shape suffixes: T tokens, E experts, N rows and K columns of a recorded choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from rlroute.choices import ChoiceLog
from rlroute.experiments.checkpoints.trained import TrainedRun
from rlroute.experiments.inspection.measures import Settling, overlap, settling
from rlroute.experiments.inspection.probe import run_probe
from rlroute.model import Transformer
from rlroute.routing import Site
from rlroute.sites import families
from rlroute.training.batches import Batch, sample_batch
from rlroute.training.prepare import cut
from rlroute.training.step import split

STREAM_STEPS = 16
"""Recorded steps that are looked at, ever further apart."""


@dataclass(frozen=True)
class History:
    """How the routes of a run settled.

    Attributes:
        steps: of the models that are compared: the initial one's 0, and those of checkpoints.
        sites: how each site's routes of the same tokens settled over these.
        recorded: steps of which the run recorded its choices.
        agreed: by site, which share of what was chosen in each of these steps, on its own batch, the final model
            chooses there too; none where nothing was recorded.
    """

    steps: list[int]
    sites: dict[Site, Settling]
    recorded: list[int]
    agreed: dict[Site, list[float]]


def look_back(run: TrainedRun, batches: Sequence[Batch]) -> History:
    """Return how the routes of a run settled.

    Args:
        run: its initial weights and every checkpoint that it has are compared.
        batches: the tokens.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        StoreError: recorded choices cannot.
    """
    keys = {"seed": run.seed, "step": run.last_step}
    probes = [run_probe(run.initial(), batches, run.device, **keys)]
    probes += [run_probe(run.at(step), batches, run.device, **keys) for step in run.steps]
    sites = {site: settling([probe.sites[site].chosen_TE for probe in probes]) for site in probes[0].sites}
    steps = _recorded(run) if run.config.train.record_choices else []
    shares = [agreed(run, run.model, step) for step in steps]
    return History(
        [0, *run.steps], sites, steps, {site: [share[site] for share in shares] for site in sites} if steps else {}
    )


def means(values: Mapping[Site, Sequence[float]]) -> dict[str, list[float]]:
    """Return figures by site as means over the sites that are shown as one."""
    columns = list(values.values())
    return {
        name: [fmean(at) for at in zip(*(columns[place] for place in places), strict=True)]
        for name, places in families(values).items()
    }


def _recorded(run: TrainedRun) -> list[int]:
    """Return some of the steps of a run, from the first to the last, by a constant factor."""
    return sorted({int(step) for step in np.geomspace(1, run.last_step, STREAM_STEPS).round() - 1})


def agreed(run: TrainedRun, model: Transformer, step: int) -> dict[Site, float]:
    """Return the share of a step's recorded choices that a model of the run makes too, by site.

    Raises:
        StoreError: they cannot be read.
    """
    log = ChoiceLog(run.folder)
    batch = sample_batch(run.corpus, seed=run.seed, step=step, **cut(run.config))
    parts = split(batch, run.config.train.micro_batches)
    now = run_probe(model, parts, run.device, seed=run.seed, step=run.last_step)
    tokens, found = parts[0].tokens_BS.size, dict[Site, float]()
    for router in model.routers:
        site, experts = router.shape.site, router.shape.num_experts
        then = [table_of(log.read(step, part, site), tokens, experts) for part in range(len(parts))]
        found[site] = overlap(torch.cat(then), now.sites[site].chosen_TE)
    return found


def table_of(ids_NK: Tensor, tokens: int, experts: int) -> Tensor:
    """Return recorded choices as ``chosen_TE``: of routing samples the first, whoever chose.

    Args:
        ids_NK: experts of tokens (T, K), or tokens of experts (E, C); E and T mark unused slots.
        tokens: T of one routing sample.
        experts: E.
    """
    by_token = len(ids_NK) % tokens == 0
    rows, columns = (tokens, experts) if by_token else (experts, tokens)
    table = torch.zeros(rows, columns + 1, dtype=torch.bool).scatter_(1, ids_NK[:rows], True)[:, :-1]
    return table if by_token else table.t()
