"""Balance and stability losses: pure functions of a decision, and the terms that any router can take from its
configuration.

The load fraction f is counted before capacity drops and per layer: counted after, total collapse under a tight capacity
looks balanced; pooled over layers, layers that collapse onto different experts do.

Shape suffixes: T tokens, E experts, B sequences, G devices (as many columns as experts, the surplus empty).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from rlroute.decision import RoutingDecision
from rlroute.errors import ConfigError
from rlroute.routing import Feedback, Router, RoutingContext, Term


def regularisers(router: Router, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
    """Return the terms to which a router's configuration gives a weight, so that every router can be run with the same
    balance.

    Raises:
        ConfigError: a term reads what the decision does not carry.
    """
    terms = {
        name: Term(_REGULARISERS[name](decision, feedback), weight)
        for name, weight in weights_among(router, _REGULARISERS)
    }
    for name, weight in weights_among(router, ("load",)):  # which asks the router itself
        terms[name] = Term(feedback.share * smooth_load(router.original, decision, feedback.context), weight)
    return terms


def weights_among(router: Router, among: Iterable[str]) -> Iterator[tuple[str, float | Tensor]]:
    """Yield the terms that a router has among some, with their weights."""
    router = router.original
    for name in among:
        weight: float | Tensor = router.config.term_weights[f"{name}_weight"]
        if name == "balance" and router.held_weight is not None:
            weight = router.held_weight.clone()  # which moves before the step is logged
        if isinstance(weight, Tensor) or weight:
            yield name, weight


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
    holds_EG = _holds(device_E, probs_TE.dtype)
    demand_G, mass_G = demand_E @ holds_EG, mass_E @ holds_EG
    f_G = demand_G / demand_G.sum().clamp(min=1)
    return (device_E.max() + 1) * (f_G * _shares(mass_G)).sum()


def communication_balance(probs_TE: Tensor, decision: RoutingDecision, context: RoutingContext) -> Tensor:
    """Return :func:`device_balance` with devices as receivers (DeepSeek-V2, arXiv 2405.04434: the communication loss):
    f counts the tokens that are sent to a device, each once however many of its experts take it.

    The paper divides by the most devices that a token may reach; here it is by the devices that tokens reach, so that 1
    is perfect balance under any limit.
    """
    if context.expert_device_E is None:
        return probs_TE.new_ones(())
    device_E = context.expert_device_E
    experts = len(device_E)
    device_R = device_E[decision.expert_ids_R.clamp(max=experts - 1)]
    sent_R = decision.demanded_R & context.mask_T[decision.token_ids_R] & (device_R >= 0)
    slots_R = decision.token_ids_R * experts + device_R.clamp(min=0)
    pairs_TG = probs_TE.new_zeros(len(probs_TE) * experts).index_add(0, slots_R, sent_R.to(probs_TE.dtype))
    sent_G = context.sum_over_scope((pairs_TG.view(-1, experts) > 0).to(probs_TE.dtype).sum(0))
    mass_E = _mass(probs_TE, decision, context)
    mass_G = mass_E @ _holds(device_E, probs_TE.dtype)
    return (device_E.max() + 1) * (sent_G / sent_G.sum().clamp(min=1) * _shares(mass_G)).sum()


def _shares(mass_G: Tensor) -> Tensor:
    """Divide by the sum, whose gradient is left out; free experts are on no device, and may have all of the mass."""
    return mass_G / mass_G.detach().sum().clamp(min=torch.finfo(mass_G.dtype).tiny)


def _holds(device_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Say of each expert, and of as many devices as there are experts, whether one holds the other; (E, G)."""
    return (device_E[:, None] == torch.arange(len(device_E), device=device_E.device)).to(dtype)


def _demand_and_mass(probs_TE: Tensor, decision: RoutingDecision, context: RoutingContext) -> tuple[Tensor, Tensor]:
    """Return how often each expert was chosen and the sum of its probabilities, over the valid tokens of the balance
    scope.
    """
    demand_E = context.sum_over_scope(decision.demand_E(context.mask_T).to(probs_TE.dtype))
    return demand_E, _mass(probs_TE, decision, context)


def _mass(probs_TE: Tensor, decision: RoutingDecision, context: RoutingContext) -> Tensor:
    return context.sum_over_scope((probs_TE[:, : decision.num_experts] * context.mask_T[:, None]).sum(0))


def sequence_balance(probs_TE: Tensor, decision: RoutingDecision, context: RoutingContext) -> Tensor:
    """Return the mean over sequences of :func:`load_balance` within each (DeepSeek-V3, arXiv 2412.19437), weighted by
    valid tokens.
    """
    rows_T, count, experts = *sequences(context), decision.num_experts
    valid_T = context.mask_T.to(probs_TE.dtype)
    chosen_R = decision.demanded_R & context.mask_T[decision.token_ids_R]
    slots_R = rows_T[decision.token_ids_R] * experts + decision.expert_ids_R.clamp(max=experts - 1)
    demand_BE = probs_TE.new_zeros(count * experts).index_add(0, slots_R, chosen_R.to(probs_TE.dtype)).view(count, -1)
    mass_BE = probs_TE.new_zeros(count, experts).index_add(0, rows_T, probs_TE * valid_T[:, None])
    tokens_B = probs_TE.new_zeros(count).index_add(0, rows_T, valid_T)
    f_BE = demand_BE / demand_BE.sum(1, keepdim=True).clamp(min=1)
    loss_B = experts * (f_BE * mass_BE / tokens_B[:, None].clamp(min=1)).sum(1)
    mean: Tensor = (loss_B * tokens_B).sum() / tokens_B.sum()
    return mean


def sequences(context: RoutingContext) -> tuple[Tensor, int]:
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
    chosen_R = decision.demanded_R.double()
    return decision.token_sum(over_E[decision.expert_ids_R] * chosen_R) / decision.token_sum(chosen_R).clamp(min=1)


def router_z(logits_TE: Tensor) -> Tensor:
    """Return (logsumexp of a token's logits)^2, shape (T,) (ST-MoE, arXiv 2202.08906)."""
    return logits_TE.logsumexp(1).square()


def cv_squared(values_E: Tensor) -> Tensor:
    """Return variance over squared mean (Shazeer et al. 2017). By the variance: a standard deviation has no gradient at
    balance.
    """
    return values_E.var(correction=0) / values_E.mean().square().clamp(min=torch.finfo(values_E.dtype).tiny)


def importance(decision: RoutingDecision, context: RoutingContext) -> Tensor:
    """Return CV^2 of the experts' summed gates over the balance scope (Shazeer et al. 2017, arXiv 1701.06538)."""
    counts_R = decision.used_R & context.mask_T[decision.token_ids_R]
    gates_R = torch.where(counts_R, decision.gates_R, torch.zeros_like(decision.gates_R))
    experts_R = decision.expert_ids_R.clamp(max=decision.num_experts - 1)
    sums_E = gates_R.new_zeros(decision.num_experts).index_add(0, experts_R, gates_R)
    return cv_squared(context.sum_over_scope(sums_E))


def smooth_load(router: Router, decision: RoutingDecision, context: RoutingContext) -> Tensor:
    """Return CV^2 of the experts' smooth loads over the balance scope (Shazeer et al. 2017, arXiv 1701.06538): of the
    sums of :meth:`rlroute.routing.Router.chosen_probability`.
    """
    probability_TE = router.chosen_probability(decision)[:, : decision.num_experts]
    return cv_squared(context.sum_over_scope((probability_TE * context.mask_T[:, None]).sum(0)))


def hold_max_vio(router: Router, sums: Mapping[str, Tensor]) -> None:
    """Move the weight of a router's f.P loss towards its target of MaxVio, where it has one.

    Routers can then be compared at matched balance. The step is a fixed one, up or down; the weight is never below 0.

    Args:
        router: any.
        sums: of the step, ``demand_E`` among them.
    """
    router = router.original
    target, weight = router.config.target_max_vio, router.held_weight
    if target is not None and weight is not None:
        demand_E = sums["demand_E"].double()
        max_vio = demand_E.max() / demand_E.mean() - 1  # NaN where nothing was chosen: the weight then stays
        sign = (max_vio > target).to(weight.dtype) - (max_vio < target).to(weight.dtype)
        weight.add_(router.config.balance_rate * sign).clamp_(min=0)


def entropy_T(probs_TE: Tensor) -> Tensor:
    """Return the entropy of each row in nats, shape (T,)."""
    above_0_TE = probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny)  # at exactly 0 the gradient is 0 * infinity
    entropy: Tensor = torch.special.entr(above_0_TE).sum(1)
    return entropy


def _probs(decision: RoutingDecision) -> Tensor:
    if decision.probs_TE is None:
        raise ConfigError("a balance or entropy term reads probabilities: the decision carries none")
    return decision.probs_TE


def _mean_z(decision: RoutingDecision, feedback: Feedback) -> Tensor:
    if decision.logits_TE is None:
        raise ConfigError("z_weight reads logits: the decision carries none")
    return feedback.mean(router_z(decision.logits_TE))


def _of_probs(
    loss: Callable[[Tensor, RoutingDecision, RoutingContext], Tensor],
) -> Callable[[RoutingDecision, Feedback], Tensor]:
    return lambda decision, f: f.share * loss(_probs(decision), decision, f.context)


_REGULARISERS: dict[str, Callable[[RoutingDecision, Feedback], Tensor]] = {
    "entropy": lambda decision, feedback: feedback.mean(-entropy_T(_probs(decision))),
    "balance": _of_probs(load_balance),
    "z": _mean_z,
    "device_balance": _of_probs(device_balance),
    "sequence_balance": _of_probs(sequence_balance),
    "communication_balance": _of_probs(communication_balance),
    "importance": lambda decision, feedback: feedback.share * importance(decision, feedback.context),
}
"""What weights of a configuration weigh: a term's sum over the step's micro-batches is its value."""
