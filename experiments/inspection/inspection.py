"""Everything that is shown of a trained run, site by site.

Shape suffixes: T tokens, L labels, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from rlroute import metrics
from rlroute.experiments.checkpoints.trained import TrainedRun
from rlroute.experiments.comparison.regrets import regret_of
from rlroute.experiments.inspection.domains import Domains, find_domains
from rlroute.experiments.inspection.history import History, look_back
from rlroute.experiments.inspection.measures import Agreement, agree, coactivation, label_counts, lifts, shares
from rlroute.experiments.inspection.probe import SiteProbe, run_probe
from rlroute.experiments.inspection.tokens import Speller, favourites
from rlroute.experiments.inspection.worth import Worth, measure_worth
from rlroute.routing import Site
from rlroute.schema import Regret
from rlroute.sites import families

PAIRS = 3
"""Pairs of experts that are named of a site."""


@dataclass(frozen=True)
class Pair:
    """Two experts that are chosen together.

    Attributes:
        one, other: their numbers.
        tokens: that chose both.
        share: of the tokens of the less loaded one.
        lift: how many there are over how many there would be if pairs were spread as loads are.
    """

    one: int
    other: int
    tokens: int
    share: float
    lift: float


@dataclass(frozen=True)
class SiteView:
    """What one site shows.

    Attributes:
        site: its key.
        load_E: pairs that chose each expert.
        max_vio, load_entropy, dead: of these loads.
        router_entropy: of the routing distributions, over log E; None without probabilities.
        dropped: the share of pairs that a capacity dropped.
        domains: how domains and experts belong together; None where the corpus has none.
        by_domain_LE: the share of each domain's pairs that each expert has; empty where there are none.
        tokens: how token ids and experts belong together.
        favourites: each expert's favourite tokens, spelled, with the share of their occurrences that chose it.
        together_EE: the tokens that chose both of two experts; the diagonal has loads.
        pairs: the most connected experts; empty where a token has one expert.
    """

    site: Site
    load_E: list[int]
    max_vio: float
    load_entropy: float
    dead: int
    router_entropy: float | None
    dropped: float
    domains: Agreement | None
    by_domain_LE: list[list[float]]
    tokens: Agreement
    favourites: list[list[tuple[str, float]]]
    together_EE: list[list[int]]
    pairs: list[Pair]


@dataclass(frozen=True)
class Inspection:
    """What a trained run shows.

    Attributes:
        run, router: its id, and the names of its routers.
        step: at which it ended.
        tokens: validation tokens that were looked at.
        loss: on these, nats a token.
        domains: the names of the domains of these tokens, and what they are; none where the corpus says nothing.
        sites: first to last.
        history: since when routes are what they are.
        worth: what the experts are worth; None where it was not asked for.
        worth_tokens: on how many of the tokens that was measured.
        regret: of the routes through the last MoE layer, as the run's record has it, or why there is none; None where
            the record does not say.
    """

    run: str
    router: str
    step: int
    tokens: int
    loss: float
    domains: list[str]
    meaning: str
    sites: list[SiteView]
    history: History
    worth: Worth | None
    worth_tokens: int
    regret: Regret | str | None

    @property
    def families(self) -> dict[str, list[SiteView]]:
        """The sites by what is shown as one."""
        return {
            name: [self.sites[at] for at in places] for name, places in families(of.site for of in self.sites).items()
        }


def as_one(name: str, sites: Sequence[SiteView]) -> SiteView:
    """Return sites that are shown as one: their loads one after the other, the highest MaxVio, all dead experts, and
    means of the other figures.
    """
    one = sites[0]
    if len(sites) == 1:
        return one
    return replace(
        one,
        site=name,
        load_E=[load for of in sites for load in of.load_E],
        max_vio=max(of.max_vio for of in sites),
        load_entropy=_mean([of.load_entropy for of in sites]),
        dead=sum(of.dead for of in sites),
        router_entropy=_mean([of.router_entropy for of in sites]),
        dropped=_mean([of.dropped for of in sites]),
        domains=None if one.domains is None else _agreement([of.domains for of in sites if of.domains]),
        tokens=_agreement([of.tokens for of in sites]),
    )


def _agreement(found: Sequence[Agreement]) -> Agreement:
    return Agreement(*(_mean([getattr(of, name) for of in found]) for name in ("nmi", "chance", "explained")))


def _mean(values: Sequence[float | None]) -> Any:
    """Return the mean of what is there; None where nothing is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def inspect_run(run: TrainedRun, tokens: int, worth_tokens: int) -> Inspection:
    """Look inside a run.

    Args:
        run: an ended run of a router.
        tokens: at least so many validation tokens.
        worth_tokens: of which so many, at least, tell what experts are worth; 0: that is not measured.

    Raises:
        DataError: there are fewer, or the corpus cannot be read.
        StoreError, CheckpointError: its checkpoints cannot be read.
    """
    domains = find_domains(run.corpus)
    batches = run.batches(tokens, None if domains is None else domains.corpus)
    keys = {"seed": run.seed, "step": run.last_step}
    probe, spell = run_probe(run.model, batches, run.device, **keys), Speller(run.config.data)
    labels = [batch.domains_BS.reshape(-1) for batch in batches if batch.domains_BS is not None]
    label_T = np.concatenate(labels) if labels else None
    few, windows = batches[:0], 0
    while windows * run.config.data.seq_len < worth_tokens and len(few) < len(batches):
        few, windows = batches[: len(few) + 1], windows + len(batches[len(few)].tokens_BS)
    return Inspection(
        run=run.id,
        router=run.config.router_name,
        step=run.last_step,
        tokens=len(probe.token_T),
        loss=float(probe.loss_T.mean()),
        domains=[] if domains is None else list(domains.names),
        meaning="" if domains is None else domains.meaning,
        sites=[_view(key, site, probe.token_T, domains, label_T, spell) for key, site in probe.sites.items()],
        history=look_back(run, batches),
        worth=measure_worth(run.model, few, run.device, **keys) if few else None,
        worth_tokens=windows * run.config.data.seq_len,
        regret=regret_of(run.record),
    )


def _view(
    key: Site, site: SiteProbe, token_T: np.ndarray, domains: Domains | None, label_T: np.ndarray | None, spell: Speller
) -> SiteView:
    load_E, together_EE, by_domain = site.load_E, coactivation(site.chosen_TE), np.zeros((0, 0))
    if domains is not None and label_T is not None:
        counts_LE = label_counts(site.chosen_TE, label_T, len(domains.names))
        by_domain = counts_LE / counts_LE.sum(1, keepdims=True).clip(min=1)
    return SiteView(
        site=key,
        load_E=load_E.tolist(),
        max_vio=float(metrics.max_vio(load_E)),
        load_entropy=float(metrics.load_entropy(load_E)),
        dead=int(metrics.dead_experts(load_E)),
        router_entropy=site.entropy,
        dropped=site.dropped,
        domains=None if label_T is None else agree(site.chosen_TE, label_T),
        by_domain_LE=by_domain.tolist(),
        tokens=agree(site.chosen_TE, token_T),
        favourites=[[(spell(token), share) for token, share in of] for of in favourites(site.chosen_TE, token_T)],
        together_EE=together_EE.tolist(),
        pairs=connected(together_EE),
    )


def connected(together_EE: Tensor) -> list[Pair]:
    """Return the pairs of experts that are chosen together most for their loads.

    Args:
        together_EE: from :func:`.measures.coactivation`.
    """
    share_EE, lift_EE = shares(together_EE), lifts(together_EE)
    pairs = [(one, other) for one in range(len(lift_EE)) for other in range(one) if together_EE[one, other]]
    pairs = [pair for pair in pairs if math.isfinite(lift_EE[pair])]
    pairs.sort(key=lambda pair: (-float(lift_EE[pair]), pair))
    return [
        Pair(
            other,
            one,
            int(together_EE[one, other]),
            float(max(share_EE[one, other], share_EE[other, one])),
            float(lift_EE[one, other]),
        )
        for one, other in pairs[:PAIRS]
    ]
