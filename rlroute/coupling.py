"""Terms of a router's weights, which read no token.

Shape suffixes: D model width, F expert width, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlroute import seeding
from rlroute.balance import weights_among
from rlroute.decision import RoutingDecision
from rlroute.routing import Feedback, Router, RoutingContext, Term


def terms_of_weights(router: Router, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
    """Return the terms of a router's configuration that read weights alone. They are computed once a step, in its first
    micro-batch, and are 0 in the others; where micro-batches have no numbers, each has its share.
    """
    number, terms = feedback.context.micro_batch, dict[str, Term]()
    for name, weight in weights_among(router, _OF_WEIGHTS):
        if number:
            value = feedback.loss_MT.new_zeros(())
        else:
            whole = _OF_WEIGHTS[name](router.original, decision, feedback.context)
            value = whole * (1.0 if number == 0 else feedback.share)
        terms[name] = Term(value, weight)
    return terms


def simbal(weights_ED: Tensor) -> Tensor:
    """Return sum_ij |W W^T - I|_ij of score weights W (SimBal, arXiv 2506.14038): 0 where scores keep distances."""
    gram_EE = weights_ED @ weights_ED.t()
    return (gram_EE - torch.eye(len(gram_EE), dtype=gram_EE.dtype, device=gram_EE.device)).abs().sum()


def erc(weights_ED: Tensor, gate_EFD: Tensor, uniform_ED: Tensor, alpha: float) -> Tensor:
    """Return the expert-router coupling loss (ERC, arXiv 2512.23447): each expert answers its own row of the score
    weights, taken for a token, with the largest activation, and no other row with a larger one.

    With W the score weights, the proxy of expert i is W_i times numbers within 1 +- eps_i, where eps_i is half the
    distance to the nearest other row over the length of W_i, and M_ij is the length of what expert j's gate projection
    makes of it. The loss is the sum over i and j != i of max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0), over
    E^2. Both the score weights and the experts learn from it. E^2 F numbers are held.

    Args:
        weights_ED: score weights.
        gate_EFD: the experts' projections into the activation.
        uniform_ED: draws between 0 and 1.
        alpha: how much of an expert's activation by its own proxy the others may reach.
    """
    experts = len(weights_ED)
    same_EE = torch.eye(experts, dtype=torch.bool, device=weights_ED.device)
    rows_ED = weights_ED.detach()
    nearest_E = torch.cdist(rows_ED, rows_ED).masked_fill(same_EE, float("inf")).amin(1)
    lengths_E = rows_ED.norm(dim=1).clamp(min=torch.finfo(rows_ED.dtype).tiny)
    within_E = (nearest_E / (2 * lengths_E)).clamp(max=1)  # infinite where there is one expert
    proxies_ED = weights_ED * (1 + within_E[:, None] * (2 * uniform_ED.to(rows_ED.dtype) - 1))
    made_EEF = (proxies_ED @ gate_EFD.to(rows_ED.dtype).flatten(0, 1).t()).view(experts, experts, -1)
    lengths_EE = torch.linalg.vector_norm(made_EEF, dim=2)
    own_E1 = alpha * lengths_EE.diagonal()[:, None]
    over_EE = (lengths_EE - own_E1).relu() + (lengths_EE.t() - own_E1).relu()
    total: Tensor = over_EE.masked_fill(same_EE, 0.0).sum()
    return total / experts**2


def _simbal(router: Router, decision: RoutingDecision, context: RoutingContext) -> Tensor:
    return simbal(router.score_weights)


def _erc(router: Router, decision: RoutingDecision, context: RoutingContext) -> Tensor:
    assert decision.gate_EFD is not None
    weights_ED = router.score_weights
    key = seeding.derive_key(context.seed, "erc", context.site, context.step)
    zero_1 = torch.zeros(1, dtype=torch.int64, device=weights_ED.device)
    uniform_ED = seeding.keyed_uniform(key, (zero_1,), tuple(weights_ED.shape)).squeeze(0)
    return erc(weights_ED, decision.gate_EFD, uniform_ED, router.config.erc_alpha)


_OF_WEIGHTS: dict[str, Callable[[Router, RoutingDecision, RoutingContext], Tensor]] = {"simbal": _simbal, "erc": _erc}
"""What weights of a configuration weigh."""
