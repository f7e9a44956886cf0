"""How routers learn from a batch, in one order for every place that trains them: terms, one backward, what ran, what
they observe.

Then the optimizer steps, and :func:`adapt` hands the step's sums to the routers.

Shape suffixes: L routed sites, E experts, T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlroute.balance import hold_max_vio, regularisers
from rlroute.coupling import terms_of_weights
from rlroute.errors import DecisionError
from rlroute.faults import noted
from rlroute.routing import Feedback, Router, RoutingDecision, Site, Sums, Term


@dataclass(frozen=True, eq=False)
class Learned:
    """What one micro-batch yielded, by site.

    Attributes:
        terms_L: each router's terms: those of its configuration, and its own.
        sums_L: what ran, and what each router observed.
    """

    terms_L: list[dict[str, Term]]
    sums_L: list[dict[str, Tensor]]


def learn(
    routers: Sequence[Router], decisions: Sequence[RoutingDecision], feedback: Feedback, loss: Tensor | float = 0.0
) -> Learned:
    """Run backward through a loss and all routers' terms, and observe.

    Args:
        routers: of each site.
        decisions: what each decided, as it was run.
        feedback: what came of it; each site gets it with its own context.
        loss: to minimise beside the terms; 0 where routers learn from rewards alone.

    Raises:
        DecisionError: a router claims to have observed what is counted here.
    """
    told = list(zip(routers, decisions, _by_site(routers, decisions, feedback), strict=True))
    terms_L = [_terms(router, d, f) for router, d, f in told]
    for decision in decisions:
        if decision.gates_R.requires_grad:
            decision.gates_R.retain_grad()  # a gate's gradient is its pair's credit, for whoever reads it in observe()
    total = loss + weighted(terms_L)
    if isinstance(total, Tensor) and total.requires_grad:
        torch.autograd.backward(total)
    return Learned(terms_L, [_sums(router, d, f) for router, d, f in told])


def _by_site(routers: Sequence[Router], decisions: Sequence[RoutingDecision], feedback: Feedback) -> Iterator[Feedback]:
    """Yield the feedback of each site: its context is the one that the site decided in."""
    earlier: dict[Site, RoutingDecision] = {}
    for router, decision in zip(routers, decisions, strict=True):
        yield replace(feedback, context=feedback.context.at(router.shape, dict(earlier)))
        earlier[router.shape.site] = decision


def weighted(terms_L: Sequence[dict[str, Term]]) -> Tensor | float:
    """Return the sum of the weighted terms over sites; a term of weight 0 is left out, so that it cannot touch a
    gradient. (One whose weight is on the device is not looked at.)
    """
    terms = (term for terms in terms_L for term in terms.values())
    counting = (term for term in terms if isinstance(term.weight, Tensor) or term.weight)
    return sum((term.weight * term.value for term in counting), start=0.0)


def count(decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
    """Return what a decision ran over valid rows: :class:`rlroute.routing.Sums` says what."""
    mask_T = feedback.context.mask_T
    ran_T = decision.token_sum(decision.runs_R.long())
    return {
        "demand_E": decision.demand_E(mask_T),
        "load_E": decision.load_E(mask_T),
        "without": ((ran_T == 0) & mask_T).sum(),
        "loss": (feedback.loss_MT.reshape(-1) * mask_T).sum(),
        "tokens": mask_T.sum(),
    }


def _terms(router: Router, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
    with noted(router.config.name, router.shape.site):
        shared = regularisers(router, decision, feedback) | terms_of_weights(router, decision, feedback)
        return shared | router.objective(decision, feedback)


def _sums(router: Router, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
    with noted(router.config.name, router.shape.site):
        counted, observed = count(decision, feedback), observe(router, decision, feedback)
    if taken := sorted(counted.keys() & observed.keys()):
        raise DecisionError(f"router {router.config.name} observes {taken[0]!r}, which is counted from its decision")
    return counted | observed


def observe(router: Router, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
    """Return what a router observed, after backward; a frozen one nothing."""
    return {} if router.frozen else router.observe(decision, feedback)


@torch.no_grad()
def adapt(routers: Sequence[Router], sums_L: Sequence[dict[str, Tensor]], progress: float) -> None:
    """Hand the step's sums to the routers, once per optimizer step.

    Args:
        routers: of each site.
        sums_L: over micro-batches and ranks, by site.
        progress: the share of the budget spent before the step.
    """
    kinds = [(type(r), r.config, r.shape.num_experts) for r in routers]
    for router, kind, sums in zip(routers, kinds, sums_L, strict=True):
        if router.frozen:
            continue
        peers = [other for other, its_kind in zip(sums_L, kinds, strict=True) if its_kind == kind]
        with noted(router.config.name, router.shape.site):
            router.adapt(Sums(sums, peers), progress)
            hold_max_vio(router, sums)
