"""Scores and gates of top-k routers, as functions.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor
from torch.nn import functional

from rlroute.routing import RoutingContext, RoutingDecision


def softmax_top_k(
    logits_TE: Tensor, k: int, context: RoutingContext, *, normalize: bool, ranked_TE: Tensor | None = None
) -> RoutingDecision:
    """Route each token to its k most probable experts, or to the best by other scores, gated by their probabilities.

    With ``normalize`` and k > 1 the gates are renormalised over the chosen (GShard, Mixtral). A single gate never is:
    it would be a constant 1 and cut the router's gradient.
    """
    probs_TE = logits_TE.softmax(1)
    ids_TK = context.choose(logits_TE if ranked_TE is None else ranked_TE, k)
    gates_TK = probs_TE.gather(1, ids_TK)
    if normalize and k > 1:
        gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
    return RoutingDecision.token_choice(ids_TK, gates_TK, probs_TE.shape[1], logits_TE=logits_TE, probs_TE=probs_TE)


def softmax_meaning(normalize: bool, k: int) -> str:
    """Return what the gates of :func:`softmax_top_k` are, for the table."""
    return "softmax over all experts" + (", renormalised over the chosen" if normalize and k > 1 else "")


def sqrt_softplus(logits: Tensor) -> Tensor:
    """Return sqrt(log(1 + exp(z))), the score of DeepSeek-V4."""
    soft = functional.softplus(logits)
    return soft.clamp(min=torch.finfo(soft.dtype).tiny).sqrt()  # the root of 0 has no gradient


def normalize_rows(scores: Tensor) -> Tensor:
    """Divide each row by its sum, which all sigmoids of a row may underflow to 0.

    The least divisor is DeepSeek-V3's 1e-20: by the least number of all, a gradient would overflow.
    """
    return scores / scores.sum(1, keepdim=True).clamp(min=1e-20)


def gates_of(scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Return the chosen experts' scores as gates, 0 for an unused slot; shape (T, K)."""
    return functional.pad(scores_TE, (0, 1)).gather(1, ids_TK)


def constant_gates(ids_TK: Tensor, like: Tensor) -> Tensor:
    """Return gates of 1/k for ids of shape (T, K), in the precision of ``like``."""
    return torch.full_like(ids_TK, 1 / ids_TK.shape[1], dtype=like.dtype)
