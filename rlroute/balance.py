"""Balance and stability losses: pure functions of a decision, and the terms that any router can take from its
configuration.

The load fraction f is counted before capacity drops and per layer: counted after, total collapse under a tight capacity
looks balanced; pooled over layers, layers that collapse onto different experts do.

Shape suffixes: T tokens, E experts, B sequences, G devices (as many columns as experts, the surplus empty).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rlroute.config import RouterConfig
from rlroute.decision import RoutingDecision
from rlroute.errors import ConfigError
from rlroute.routing import Feedback, RoutingContext, Term


def regularisers(config: RouterConfig, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
    """Return the terms to which a router's configuration gives a weight, so that every router can be run with the same
    balance.

    Raises:
        ConfigError: a term reads what the decision does not carry.
    """
    context, terms = feedback.context, dict[str, Term]()
    for field, weight in config.term_weights.items():
        if weight:
            scores_TE = decision.logits_TE if field == "z_weight" else decision.probs_TE
            if scores_TE is None:
                raise ConfigError(f"router {config.name}.{field} = {weight}: its decisions carry no scores, legal is 0")
            name = field.removesuffix("_weight")
            terms[name] = Term(_REGULARISERS[name](scores_TE, decision, context, feedback), weight)
    return terms


def load_balance(
    probs_TE: Tensor, decision: RoutingDecision, context: RoutingContext, eta_E: Tensor | None = None
) -> Tensor:
    """Return E * sum_i f_i P_i (Switch, arXiv 2101.03961): f_i the share of pairs that chose expert i, P_i its mean
    probability; with ``eta_E``, E * sum_i eta_i f_i P_i.

    It is 1 at perfect balance for every k, 0 where no pair was chosen, and differentiable through P alone. Both are
    taken over the valid tokens of the context's balance scope.
    """
    demand_E, mass_E = _demand_and_mass(probs_TE, decision, context)
    parts_E = demand_E / demand_E.sum().clamp(min=1) * mass_E / mass_E.detach().sum()
    return decision.num_experts * (parts_E if eta_E is None else eta_E * parts_E).sum()


def device_balance(probs_TE: Tensor, decision: RoutingDecision, context: RoutingContext) -> Tensor:
    """Return :func:`load_balance` with the devices that hold the experts in place of the experts (DeepSeek-V2, arXiv
    2405.04434: the device-level loss). It is 1, without gradient, where one device holds all. Free experts, which are
    on all devices, are left out.
    """
    if context.expert_device_E is None:
        return probs_TE.new_ones(())
    demand_E, mass_E = _demand_and_mass(probs_TE, decision, context)
    device_E = context.expert_device_E
    holds_EG = (device_E[:, None] == torch.arange(len(device_E), device=device_E.device)).to(probs_TE.dtype)
    demand_G, mass_G = demand_E @ holds_EG, mass_E @ holds_EG
    f_G = demand_G / demand_G.sum().clamp(min=1)
    tiny = torch.finfo(mass_G.dtype).tiny
    return (device_E.max() + 1) * (f_G * mass_G / mass_G.detach().sum().clamp(min=tiny)).sum()


def _demand_and_mass(probs_TE: Tensor, decision: RoutingDecision, context: RoutingContext) -> tuple[Tensor, Tensor]:
    """Return how often each expert was chosen and the sum of its probabilities, over the valid tokens of the balance
    scope.
    """
    mask_T = context.mask_T
    demand_E = context.sum_over_scope(decision.demand_E(mask_T).to(probs_TE.dtype))
    return demand_E, context.sum_over_scope((probs_TE[:, : decision.num_experts] * mask_T[:, None]).sum(0))


def sequence_balance(probs_TE: Tensor, decision: RoutingDecision, context: RoutingContext) -> Tensor:
    """Return the mean over sequences of :func:`load_balance` within each (DeepSeek-V3, arXiv 2412.19437), weighted by
    valid tokens.
    """
    rows_T, count, experts = *_sequences(context), decision.num_experts
    valid_T = context.mask_T.to(probs_TE.dtype)
    used_R = decision.used_R & context.mask_T[decision.token_ids_R]
    slots_R = rows_T[decision.token_ids_R] * experts + decision.expert_ids_R.clamp(max=experts - 1)
    demand_BE = probs_TE.new_zeros(count * experts).index_add(0, slots_R, used_R.to(probs_TE.dtype)).view(count, -1)
    mass_BE = probs_TE.new_zeros(count, experts).index_add(0, rows_T, probs_TE * valid_T[:, None])
    tokens_B = probs_TE.new_zeros(count).index_add(0, rows_T, valid_T)
    f_BE = demand_BE / demand_BE.sum(1, keepdim=True).clamp(min=1)
    loss_B = experts * (f_BE * mass_BE / tokens_B[:, None].clamp(min=1)).sum(1)
    mean: Tensor = (loss_B * tokens_B).sum() / tokens_B.sum()
    return mean


def _sequences(context: RoutingContext) -> tuple[Tensor, int]:
    """Return which sequence of which sample each row belongs to, shape (T,), and a number above all of these, which the
    host knows.
    """
    most = context.num_sequences or len(context.sequence_T) // context.num_samples
    ids_T, order_T = context.sequence_T.sort()
    rank_T = functional.pad((ids_T.diff() != 0).cumsum(0), (1, 0))
    return torch.empty_like(rank_T).scatter_(0, order_T, rank_T) + context.sample_T * most, most * context.num_samples


def overload_T(decision: RoutingDecision, context: RoutingContext) -> Tensor:
    """Return how full each row's experts are: the mean over its chosen experts of E f_e - 1, float64 of shape (T,).

    0 on average over pairs at perfect balance, E / k - 1 at collapse onto k experts. Not differentiable: for a reward.
    """
    experts = decision.num_experts
    demand_E = context.sum_over_scope(decision.demand_E(context.mask_T).double())
    over_E = torch.cat([experts * demand_E / demand_E.sum().clamp(min=1) - 1, demand_E.new_zeros(1)])  # 0 for unused
    chosen_T = decision.token_sum(decision.used_R.double()).clamp(min=1)
    return decision.token_sum(over_E[decision.expert_ids_R]) / chosen_T


def router_z(logits_TE: Tensor) -> Tensor:
    """Return (logsumexp of a token's logits)^2, shape (T,) (ST-MoE, arXiv 2202.08906)."""
    return logits_TE.logsumexp(1).square()


def cv_squared(values_E: Tensor) -> Tensor:
    """Return variance over squared mean (Shazeer et al. 2017). By the variance: a standard deviation has no gradient at
    balance.
    """
    return values_E.var(correction=0) / values_E.mean().square().clamp(min=torch.finfo(values_E.dtype).tiny)


def entropy_T(probs_TE: Tensor) -> Tensor:
    """Return the entropy of each row in nats, shape (T,)."""
    above_0_TE = probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny)  # at exactly 0 the gradient is 0 * infinity
    entropy: Tensor = torch.special.entr(above_0_TE).sum(1)
    return entropy


_REGULARISERS: dict[str, Callable[[Tensor, RoutingDecision, RoutingContext, Feedback], Tensor]] = {
    "entropy": lambda probs_TE, d, context, feedback: feedback.mean(-entropy_T(probs_TE)),
    "balance": lambda probs_TE, d, context, feedback: feedback.share * load_balance(probs_TE, d, context),
    "z": lambda logits_TE, d, context, feedback: feedback.mean(router_z(logits_TE)),
    "device_balance": lambda probs_TE, d, context, feedback: feedback.share * device_balance(probs_TE, d, context),
    "sequence_balance": lambda probs_TE, d, context, feedback: feedback.share * sequence_balance(probs_TE, d, context),
}
"""What a weight of :class:`rlroute.config.RouterConfig` weighs, of probabilities or (z) logits."""
