"""Decisions that break the contract are refused by name, where somebody looks: when a router's work is measured, at the
first step and the first evaluation of a process, and in the audit at its end. To look at every step would wait for the
device.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from rlroute.decision import RoutingDecision
from rlroute.errors import DecisionError
from rlroute.kernels.engines import check_values
from rlroute.routing import Router, Site


@contextmanager
def named(router: Router, site: Site) -> Iterator[None]:
    """Name the router and its site in what is said of its decisions in the block."""
    try:
        yield
    except DecisionError as error:
        raise DecisionError(f"router {router.config.name} at site {site}: {error}") from error


@contextmanager
def checked(routers: Iterable[Router], finite: bool = True) -> Iterator[None]:
    """Look at every decision that these routers make in the block, as :func:`check` does.

    Raises:
        DecisionError: one is malformed.
    """
    with ExitStack() as hooks:
        for router in routers:
            hook = router.register_forward_hook(lambda router, args, decision: check(router, args[0], decision, finite))
            hooks.callback(hook.remove)
        yield


def check(router: Router, x_TD: Tensor, decision: RoutingDecision, finite: bool = True) -> None:
    """Refuse a malformed decision.

    Args:
        router: whose it is.
        x_TD: what it was decided from.
        decision: any.
        finite: whether gates have to be; those of a model that has diverged are not.

    Raises:
        DecisionError: it is one; the message says what is wrong.
    """
    rows, experts = len(x_TD), router.shape.num_experts
    if not isinstance(decision, RoutingDecision):
        raise DecisionError(f"its forward returned {type(decision).__name__}: want a RoutingDecision")
    if (decision.num_tokens, decision.num_experts) != (rows, experts):
        raise DecisionError(
            f"a decision on {decision.num_tokens} tokens and {decision.num_experts} experts: want {rows} and {experts}"
        )
    _check_pairs(decision)
    if decision.self_T is not None and router.shape.d_value is not None:
        raise DecisionError(
            "self_T: what experts give here are a head's values, of which no token is one; legal is None"
        )
    for name in ("logits_TE", "probs_TE"):
        value = getattr(decision, name)
        if value is not None and (value.dim() != 2 or len(value) != rows or value.shape[1] < experts):
            raise DecisionError(f"{name} has shape {tuple(value.shape)}: want ({rows}, {experts}), or further columns")
    check_values(decision, finite)
    if decision.k is not None:
        in_order_R = torch.arange(rows, device=x_TD.device).repeat_interleave(decision.k)
        if not torch.equal(decision.token_ids_R, in_order_R):
            raise DecisionError(f"token_ids_R is not token-major, as k = {decision.k} says that it is")


def _check_pairs(decision: RoutingDecision) -> None:
    """Refuse pairs of which there are none or a wrong number, and what has no value for each."""
    rows, pairs = decision.num_tokens, decision.token_ids_R.numel()
    if not pairs:
        raise DecisionError(f"no pair for {rows} tokens: a slot left unused is there, with id {decision.num_experts}")
    if decision.k is not None and pairs != rows * decision.k:
        raise DecisionError(f"{pairs} pairs for {rows} tokens with k = {decision.k}: want {rows * decision.k}")
    kinds = {"token_ids_R": torch.int64, "expert_ids_R": torch.int64, "kept_R": torch.bool, "chosen_R": torch.bool}
    for name in (*kinds, "gates_R", "log_prob_R"):
        value = getattr(decision, name)
        if value is None and name in ("chosen_R", "log_prob_R"):
            continue
        fits = value.dtype == kinds[name] if name in kinds else value.is_floating_point()
        if value.shape != (pairs,) or not fits:
            want = kinds.get(name, "floats")
            raise DecisionError(f"{name} is {value.dtype} of shape {tuple(value.shape)}: want {want} of ({pairs},)")
