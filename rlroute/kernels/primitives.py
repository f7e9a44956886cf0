"""The two halves of an expert layer, for layers that put something else between them (experts of attention, say).

Rows are pairs in a plan's order, sorted by expert; on CUDA these are the kernels that the expert MLP is made of.

Shape suffixes: T tokens, D model width, E experts, R routed pairs (rows), N output columns, K the summed dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlroute.kernels.plan import Plan


def gather_linear(x_TK: Tensor, plan: Plan, weights_ENK: Tensor, backend: str = "cpu") -> Tensor:
    """Return y_RN, one row per pair in the plan's order: y_r = W_expert(r) x_token(r). Rows that do not run are zero.

    Args:
        x_TK: inputs of shape (T, K).
        plan: from :func:`rlroute.kernels.plan.make_plan`.
        weights_ENK: one (N, K) matrix per expert.
        backend: ``triton`` runs the kernel; others run plain PyTorch, expert by expert.
    """
    if backend == "triton":
        from rlroute.kernels import sparse  # triton is not there on every machine

        return sparse.gather_linear(x_TK, plan, weights_ENK)
    bounds = plan.starts_E.tolist()
    rows = [
        x_TK[plan.tokens_R[start:end]] @ weights_NK.t()
        for start, end, weights_NK in zip(bounds, bounds[1:], weights_ENK.unbind(0), strict=False)
    ]
    return torch.cat([*rows, x_TK.new_zeros(len(plan.pairs_R) - bounds[-1], weights_ENK.shape[1])])


def linear_combine(y_RK: Tensor, plan: Plan, weights_ENK: Tensor, gates_R: Tensor, backend: str = "cpu") -> Tensor:
    """Return out_TN: each token's sum over its running pairs of gate * W_expert y_r.

    Args:
        y_RK: one row per pair in the plan's order.
        plan: from :func:`rlroute.kernels.plan.make_plan`.
        weights_ENK: one (N, K) matrix per expert.
        gates_R: one gate per *pair*, in the order of the decision.
        backend: ``triton`` runs the kernel; others run plain PyTorch, expert by expert.
    """
    if backend == "triton":
        from rlroute.kernels import sparse

        return sparse.linear_combine(y_RK, plan, weights_ENK, gates_R)
    bounds = plan.starts_E.tolist()
    gates_R1 = gates_R[plan.pairs_R, None].to(y_RK.dtype)
    rows = [
        (gates_R1[start:end] * y_RK[start:end]) @ weights_NK.t()
        for start, end, weights_NK in zip(bounds, bounds[1:], weights_ENK.unbind(0), strict=False)
    ]
    out_TN = y_RK.new_zeros(plan.num_tokens, weights_ENK.shape[1])
    return out_TN.index_add(0, plan.tokens_R[: bounds[-1]], torch.cat(rows))


def sum_rows(y_RD: Tensor, plan: Plan, backend: str = "cpu") -> Tensor:
    """Return each token's sum of its rows, of shape (T, D), in an order that does not change; for use inside autograd
    functions.

    Args:
        y_RD: rows in the plan's order, at least those that run.
        plan: from :func:`rlroute.kernels.plan.make_plan`.
        backend: ``triton`` runs the kernel; others add row by row.
    """
    if backend == "triton":
        from rlroute.kernels import sparse

        return sparse.sum_rows(y_RD, plan)
    rows = int(plan.starts_E[-1])
    return y_RD.new_zeros(plan.num_tokens, y_RD.shape[1]).index_add_(0, plan.tokens_R[:rows], y_RD[:rows])


def combine(y_RD: Tensor, plan: Plan, gates_R: Tensor, backend: str = "cpu") -> Tensor:
    """Return out_TD: each token's sum over its running pairs of gate * y_r, in the precision of the gates where that is
    higher.

    Args:
        y_RD: rows in the plan's order, at least those that run; those that do not are zero.
        plan: from :func:`rlroute.kernels.plan.make_plan`.
        gates_R: one gate per *pair*, in the order of the decision.
        backend: as of :func:`sum_rows`.
    """
    out_TD: Tensor = _Combine.apply(y_RD, gates_R, plan, backend)  # type: ignore[no-untyped-call]
    return out_TD


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gates_R: Tensor, plan: Plan, backend: str) -> Tensor:
        ctx.save_for_backward(y_RD, gates_R)
        ctx.plan = plan
        return sum_rows(y_RD * gates_R[plan.pairs_R[: len(y_RD)], None], plan, backend).to(y_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_RD, gates_R = ctx.saved_tensors
        pairs_R, tokens_R = ctx.plan.pairs_R[: len(y_RD)], ctx.plan.tokens_R[: len(y_RD)]
        drows_RD = dout_TD.index_select(0, tokens_R)
        dgates_R = None
        if ctx.needs_input_grad[1]:
            dgates_R = torch.zeros_like(gates_R)  # pairs that did not run have no row, and no gradient
            dgates_R[pairs_R] = torch.linalg.vecdot(drows_RD.to(gates_R.dtype), y_RD.to(gates_R.dtype))
        return (drows_RD * gates_R[pairs_R, None]).to(y_RD.dtype), dgates_R, None, None
