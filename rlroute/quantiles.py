"""Quantiles of each expert's values out of histograms, which micro-batches and workers can add up, and a sequence's
tokens can carry on.

Shape suffixes: T tokens, E experts, B bins, C tokens of a chunk.
"""

import torch
from torch import Tensor

from rlroute.balance import sequences
from rlroute.routing import RoutingContext

CHUNK = 128
"""Tokens whose histograms are there at a time: those of all would be the largest tensor of a layer."""


def histogram(values_TE: Tensor, mask_T: Tensor, bins: int) -> Tensor:
    """Count, over the tokens in ``mask_T``, each expert's values by bins of 0 to 1; int64 of shape (E, B).

    Values beyond fall into the first or last bin.
    """
    experts = values_TE.shape[1]
    bin_TE = (values_TE * bins).long().clamp(0, bins - 1)
    slot_TE = bin_TE + bins * torch.arange(experts, device=bin_TE.device)
    counts_TE = mask_T[:, None].expand_as(slot_TE).long()
    counts = slot_TE.new_zeros(experts * bins).index_add_(0, slot_TE.reshape(-1), counts_TE.reshape(-1))
    return counts.view(experts, bins)


def quantile(counts_EB: Tensor, share: float) -> Tensor:
    """Return below which value such a share of each expert's scores lies, float64 of shape (E,), interpolated within a
    bin of 0 to 1.
    """
    bins = counts_EB.shape[1]
    upto_EB = counts_EB.cumsum(1)
    wanted_E1 = share * upto_EB[:, -1:].double()
    bin_E1 = (upto_EB < wanted_E1).sum(1, keepdim=True).clamp(max=bins - 1)
    inside_E1 = counts_EB.gather(1, bin_E1)
    before_E1 = upto_EB.gather(1, bin_E1) - inside_E1
    value_E1: Tensor = (bin_E1 + (wanted_E1 - before_E1) / inside_E1.clamp(min=1)) / bins
    return value_E1.squeeze(1)


def moving_quantile(scores_TE: Tensor, context: RoutingContext, share: float, decay: float, bins: int) -> Tensor:
    """Return below which value such a share of each expert's scores lies among a token and those before it in its
    sequence, the middle of a bin, shape (T, E).

    A token weighs ``decay`` to the power of how far it is behind: the histogram is a linear recurrence, and only what
    is read off it is not (Su 2026, https://kexue.fm/archives/11760).

    Args:
        scores_TE: from 0 to 1, detached.
        context: whose tokens these are; padding weighs nothing.
        share: from 0 to 1.
        decay: from 0 to below 1.
        bins: of 0 to 1.
    """
    group_T, _ = sequences(context)
    order_T = context.position_T.argsort(stable=True)
    order_T = order_T[group_T[order_T].argsort(stable=True)]
    carried_EB = scores_TE.new_zeros(scores_TE.shape[1], bins, dtype=torch.float64)
    bin_B = torch.arange(bins, device=scores_TE.device)
    upto_BB = carried_EB.new_ones(bins, bins).triu()  # a cumulative sum has no deterministic form on CUDA
    last, found = group_T[order_T[:1]], []
    for rows_C in torch.split(order_T, CHUNK):
        bin_CE = (scores_TE[rows_C] * bins).long().clamp(0, bins - 1)
        seen_CEB = (bin_CE[..., None] == bin_B).double() * context.mask_T[rows_C, None, None]
        place_C = torch.arange(len(rows_C), device=rows_C.device)
        behind_CC = place_C[:, None] - place_C
        same_CC = (group_T[rows_C][:, None] == group_T[rows_C]) & (behind_CC >= 0)
        weight_CC = torch.where(same_CC, decay ** behind_CC.clamp(min=0).double(), 0.0)
        weight_C = torch.where(group_T[rows_C] == last, decay ** (place_C + 1).double(), 0.0)
        moving_CEB = torch.einsum("ij,jeb->ieb", weight_CC, seen_CEB) + weight_C[:, None, None] * carried_EB
        upto_CEB = moving_CEB @ upto_BB
        found.append((upto_CEB < share * upto_CEB[..., -1:]).sum(2).clamp(max=bins - 1))
        carried_EB, last = moving_CEB[-1], group_T[rows_C[-1:]]
    middle_TE = (torch.cat(found).to(scores_TE.dtype) + 0.5) / bins
    return torch.empty_like(middle_TE).index_copy_(0, order_T, middle_TE)
