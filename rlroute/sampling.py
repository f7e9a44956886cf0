"""Choosing k of E experts, and the log-probability of a sampled choice.

Arg-max is not a sample: for k > 1 the choice is drawn without replacement by Gumbel top-k (Kool et al. 2019, arXiv
1903.06059), and its log-probability is Plackett-Luce's, not the sum of the chosen log-softmax values.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor

from rlroute.seeding import gumbel


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest scores of each row, best first, ties to the lower id; int64 of shape (T, K)."""
    return torch.argsort(scores_TE.detach(), dim=1, descending=True, stable=True)[:, :k]


def perturbed(logits_TE: Tensor, uniform_TE: Tensor) -> Tensor:
    """Return logits with Gumbel noise, whose k largest are k experts drawn in order, without replacement, from
    softmax(logits).

    Args:
        logits_TE: unnormalised log-probabilities.
        uniform_TE: uniform draws strictly between 0 and 1.
    """
    return logits_TE.detach() + gumbel(uniform_TE).to(logits_TE.dtype)


def gumbel_top_k(logits_TE: Tensor, k: int, uniform_TE: Tensor) -> Tensor:
    """Draw k experts of each row in order, without replacement, from softmax(logits); int64 of shape (T, K).

    Args:
        logits_TE: unnormalised log-probabilities.
        k: how many to draw.
        uniform_TE: uniform draws strictly between 0 and 1.
    """
    return top_k(perturbed(logits_TE, uniform_TE), k)


def plackett_luce_log_prob(logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Return log pi(e_j | e_1 .. e_{j-1}) = z_{e_j} - logsumexp over the experts not yet chosen; shape (T, K),
    differentiable.

    The sum over j is the log-probability of the ordered draw.
    """
    left_TE = logits_TE
    conditionals = []
    for choice in range(ids_TK.shape[1]):
        ids_T1 = ids_TK[:, choice, None]
        conditionals.append(left_TE.gather(1, ids_T1) - left_TE.logsumexp(1, keepdim=True))
        left_TE = left_TE.scatter(1, ids_T1, float("-inf"))
    return torch.cat(conditionals, dim=1)


def staying_probability(clean_TE: Tensor, noisy_TE: Tensor, std: Tensor | float, k: int) -> Tensor:
    """Return the probability that each expert is among a row's k best if its own Gaussian noise is drawn anew and that
    of the others stays (Shazeer et al. 2017, arXiv 1701.06538): a smooth count of choices; shape (T, E).

    Args:
        clean_TE: logits.
        noisy_TE: the same with the noise that was drawn, or without any.
        std: standard deviation of the noise.
        k: experts of a row.
    """
    if k == clean_TE.shape[1]:
        return torch.ones_like(clean_TE)
    ranked_TK = noisy_TE.topk(k + 1, dim=1).values
    inside_TE = noisy_TE > ranked_TK[:, k, None]
    # What expert i has to beat: the k-th largest of the others.
    threshold_TE = torch.where(inside_TE, ranked_TK[:, k, None], ranked_TK[:, k - 1, None])
    probability_TE: Tensor = torch.special.ndtr((clean_TE - threshold_TE) / std)
    return probability_TE
