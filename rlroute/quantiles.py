"""Quantiles of each expert's values out of histograms, which micro-batches and workers can add up.

Shape suffixes: T tokens, E experts, B bins.
"""

import torch
from torch import Tensor


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
