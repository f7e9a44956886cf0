"""The expert MLP as one operator of PyTorch, ``rlroute::expert_mlp``: shapes that are known without running it, and
gradients. A compiled region may hold it without a break; within it the host may read what it needs.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows of an expert, E experts, R routed pairs, of which
at most a number that the host knows runs.
"""

from typing import Any

import torch
from torch import Tensor

from rlroute.decision import RoutingDecision
from rlroute.kernels import cpu
from rlroute.kernels.form import Form

Made = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""out_TD; then what backward wants: pre-activations of the rows, the pair and the token of each, where each expert's
rows begin, and the rows by token and where each token's begin (of which the CPU's engine has none).
"""
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of the operator's first six arguments; of what is not wanted, no number."""


def run(
    x_TD: Tensor,
    decision: RoutingDecision,
    in_EHD: Tensor,
    out_EDF: Tensor,
    backend: str,
    activation: str,
    form: Form,
) -> Tensor:
    """Return out_TD as :func:`rlroute.kernels.expert_mlp` defines it, by the ``cpu`` or the ``triton`` engine."""
    leaves = (x_TD, in_EHD, out_EDF, decision.gates_R, form.in_bias_EH, form.out_bias_ED)
    save = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    pairs = (decision.token_ids_R, decision.expert_ids_R, decision.kept_R)
    how = (backend, activation, form.gate_at_input, form.dropout)
    arguments = (*leaves, form.keys_R, *pairs, decision.k, decision.max_pairs, *how, save)
    out_TD: Tensor = _Differentiated.apply(*arguments)  # type: ignore[no-untyped-call]
    return out_TD


def _engine(backend: str) -> Any:
    if backend == "triton":
        from rlroute.kernels import sparse  # triton is not there on every machine

        return sparse
    return cpu


@torch.library.custom_op("rlroute::expert_mlp", mutates_args=())
def _expert_mlp(
    x_TD: Tensor,
    in_EHD: Tensor,
    out_EDF: Tensor,
    gates_R: Tensor,
    in_bias_EH: Tensor | None,
    out_bias_ED: Tensor | None,
    keys_R: Tensor | None,
    token_ids_R: Tensor,
    expert_ids_R: Tensor,
    kept_R: Tensor,
    k: int | None,
    max_pairs: int | None,
    backend: str,
    activation: str,
    gate_at_input: bool,
    dropout: float,
    save: bool,
) -> Made:
    decision = RoutingDecision(
        num_tokens=len(x_TD),
        num_experts=len(in_EHD),
        k=k,
        token_ids_R=token_ids_R,
        expert_ids_R=expert_ids_R,
        kept_R=kept_R,
        gates_R=gates_R,
        max_pairs=max_pairs,
    )
    form = Form(in_bias_EH, out_bias_ED, gate_at_input, dropout, keys_R)
    made: Made = _engine(backend).forward(x_TD, decision, in_EHD, out_EDF, activation, form, save)
    return made


@_expert_mlp.register_fake
def _expert_mlp_shapes(x_TD: Tensor, in_EHD: Tensor, out_EDF: Tensor, gates_R: Tensor, *rest: Any) -> Made:
    *_, max_pairs, backend, _, _, _, save = rest
    rows = len(gates_R) if max_pairs is None else min(max_pairs, len(gates_R))
    by_token = (rows, len(x_TD) + 1) if backend == "triton" else (0, 0)
    sizes = (rows, rows, len(in_EHD) + 1, *by_token)
    pairs, tokens, starts, by, first = (x_TD.new_empty(size, dtype=torch.int64) for size in sizes)
    hidden_RH = x_TD.new_empty(rows if save else 0, in_EHD.shape[1])
    return torch.empty_like(x_TD), hidden_RH, pairs, tokens, starts, by, first


@torch.library.custom_op("rlroute::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    dout_TD: Tensor,
    x_TD: Tensor,
    in_EHD: Tensor,
    out_EDF: Tensor,
    gates_R: Tensor,
    in_bias_EH: Tensor | None,
    out_bias_ED: Tensor | None,
    keys_R: Tensor | None,
    hidden_RH: Tensor,
    pairs_R: Tensor,
    tokens_R: Tensor,
    starts_E: Tensor,
    rows_R: Tensor,
    first_T: Tensor,
    backend: str,
    activation: str,
    gate_at_input: bool,
    dropout: float,
    wanted: list[bool],
) -> Gradients:
    form = Form(in_bias_EH, out_bias_ED, gate_at_input, dropout, keys_R)
    kept = (hidden_RH, pairs_R, tokens_R, starts_E, rows_R, first_T)
    gradients = _engine(backend).backward(dout_TD, x_TD, in_EHD, out_EDF, gates_R, activation, form, kept, wanted)
    found = zip(wanted, gradients, strict=True)
    dx, din, dout, dgates, din_bias, dout_bias = (gradient if asked else x_TD.new_empty(0) for asked, gradient in found)
    return dx, din, dout, dgates, din_bias, dout_bias


@_expert_mlp_backward.register_fake
def _expert_mlp_backward_shapes(dout_TD: Tensor, *rest: Any) -> Gradients:
    wanted, leaves = rest[-1], rest[:6]
    found = zip(wanted, leaves, strict=True)
    dx, din, dout, dgates, din_bias, dout_bias = (
        leaf.new_empty(leaf.shape) if asked else dout_TD.new_empty(0) for asked, leaf in found
    )
    return dx, din, dout, dgates, din_bias, dout_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], made: Made) -> None:
    ctx.save_for_backward(*inputs[:7], *made[1:])
    ctx.how = inputs[12:16]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Made) -> None:
    ctx.set_materialize_grads(False)  # of what only backward reads
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output)


def _differentiate(ctx: Any, dout_TD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:6])
    if dout_TD is None:
        return (None,) * len(ctx.needs_input_grad)
    gradients = _expert_mlp_backward(dout_TD, *ctx.saved_tensors, *ctx.how, wanted)
    found = (gradient if asked else None for asked, gradient in zip(wanted, gradients, strict=True))
    return *found, *[None] * (len(ctx.needs_input_grad) - len(wanted))


_expert_mlp.register_autograd(_differentiate, setup_context=_set_up)


class _Differentiated(torch.autograd.Function):
    """The operator with the gradients that are registered, which through PyTorch's registry take 0.1 ms longer."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        made: Made = _expert_mlp(*inputs)
        _keep(ctx, inputs, made)
        return made[0]

    backward = staticmethod(_differentiate)
