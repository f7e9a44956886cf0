"""The head in chunks: cross-entropies of a few rows at a time, so that no (T, V) array of logits is ever there.

A chunk's logits are made twice, forward and backward; what is kept is one number a row, the logarithm of the sum of
their exponentials.

Shape suffixes: T tokens (rows), C rows of one chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Run = Callable[..., Any]
"""Runs a plain function of (None or a module, tensors), compiled or not: :meth:`.compiling.DenseParts.part`."""


def chunked_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, dtype: torch.dtype, run: Run
) -> Tensor:
    """Return each row's cross-entropy in nats, in float32 at least; shape (T,).

    Args:
        x_TD: the normed residual stream.
        weight_VD: of the unembedding; its gradient is summed over chunks in float32 at least.
        targets_T: int64, what follows each token.
        chunk: rows whose logits are there at a time.
        dtype: that of the products.
        run: runs the two parts of a chunk.
    """
    loss_T: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_TD.to(dtype), weight_VD, targets_T, chunk, dtype, run
    )
    return loss_T


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, dtype: torch.dtype, run: Run
    ) -> Tensor:
        weight, wide = weight_VD.to(dtype), torch.promote_types(dtype, torch.float32)
        lse_T, loss_T = x_TD.new_empty(2, len(x_TD), dtype=wide).unbind(0)
        for rows in _chunks(len(x_TD), chunk):
            lse_T[rows], loss_T[rows] = run(_losses, x_TD[rows], weight, targets_T[rows])
        ctx.save_for_backward(x_TD, weight_VD, targets_T, lse_T)
        ctx.chunk, ctx.run = chunk, run
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_VD, targets_T, lse_T = ctx.saved_tensors
        weight = weight_VD.to(x_TD.dtype)
        dx_TD, dweight_VD = torch.empty_like(x_TD), torch.zeros_like(weight_VD, dtype=lse_T.dtype)
        for rows in _chunks(len(x_TD), ctx.chunk):
            dx_TD[rows], more_VD = ctx.run(_gradients, x_TD[rows], weight, targets_T[rows], lse_T[rows], dloss_T[rows])
            dweight_VD += more_VD
        return dx_TD, dweight_VD.to(weight_VD.dtype), None, None, None, None


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _wide(logits_CV: Tensor) -> Tensor:
    return logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()


def _losses(_: object, x_CD: Tensor, weight_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of the sum of exponentials of each row's logits, and its cross-entropy."""
    logits_CV = _wide(x_CD @ weight_VD.t())
    lse_C = logits_CV.logsumexp(1)
    return lse_C, lse_C - logits_CV.gather(1, targets_C[:, None]).squeeze(1)


def _gradients(
    _: object, x_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, lse_C: Tensor, dloss_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a chunk's rows and of the weight."""
    dlogits_CV = (_wide(x_CD @ weight_VD.t()) - lse_C[:, None]).exp() * dloss_C[:, None]
    dlogits_CV = dlogits_CV.scatter_add(1, targets_C[:, None], -dloss_C[:, None]).to(x_CD.dtype)
    return dlogits_CV @ weight_VD, dlogits_CV.t() @ x_CD
