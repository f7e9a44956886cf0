"""What is measured of the experts that tokens chose: pure functions of a table that says which.

``chosen_TE`` is bool: whether a token chose an expert, before any drop.

Shape suffixes: T tokens, E experts, L labels, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rlroute import seeding
from rlroute.experiments.play.agreement import mutual_information
from rlroute.routing import RoutingDecision

SHUFFLES = 5
"""Of labels among tokens, which say what chance would show."""


def choices_of(decision: RoutingDecision) -> Tensor:
    """Return which experts each token chose, or which chose it; bool of shape (T, E)."""
    table_TE = torch.zeros(decision.num_tokens, decision.num_experts + 1, dtype=torch.bool)
    demanded_R = decision.demanded_R.cpu()
    table_TE[decision.token_ids_R.cpu()[demanded_R], decision.expert_ids_R.cpu()[demanded_R]] = True
    return table_TE[:, :-1]


# Together


def coactivation(chosen_TE: Tensor) -> Tensor:
    """Count the tokens that chose both of two experts, over all pairs of experts; the diagonal has each one's load;
    int64 of shape (E, E).
    """
    wide_TE = chosen_TE.double()  # exact to 2^53
    return (wide_TE.t() @ wide_TE).long()


def shares(together_EE: Tensor) -> Tensor:
    """Return which share of a row's tokens chose the column too (OLMoE, arXiv 2409.02060, section 5.2); NaN for an
    expert without tokens, and on the diagonal.
    """
    shares_EE = together_EE / together_EE.diagonal()[:, None]
    return shares_EE.masked_fill(torch.eye(len(shares_EE), dtype=torch.bool), float("nan"))


def lifts(together_EE: Tensor) -> Tensor:
    """Return how many tokens chose two experts over how many would if as many pairs were spread as loads are; NaN
    without load, and on the diagonal.

    The mean, weighed by the products of loads, is 1 whatever the number of experts a token has.
    """
    load_E = together_EE.diagonal().double()
    apart_EE = ~torch.eye(len(load_E), dtype=torch.bool)
    product_EE = load_E[:, None] * load_E
    lifts_EE = together_EE / product_EE * (product_EE[apart_EE].sum() / together_EE[apart_EE].sum())
    return lifts_EE.masked_fill(~apart_EE, float("nan"))


# Specialised


@dataclass(frozen=True)
class Agreement:
    """How labels of tokens and the experts that these chose belong together, over pairs of token and expert.

    Attributes:
        nmi: mutual information over the mean of both entropies; None where nothing was chosen.
        chance: the same of labels shuffled among tokens: few tokens of a label show some by chance.
        explained: mutual information over the labels' entropy: 1 where an expert says which label its token has, be
            there several experts for one label.
    """

    nmi: float | None
    chance: float | None
    explained: float | None


def label_counts(chosen_TE: Tensor, label_T: np.ndarray, labels: int) -> np.ndarray:
    """Count the tokens of each label that chose each expert; float64 of shape (L, E)."""
    counts_LE = torch.zeros(labels, chosen_TE.shape[1], dtype=torch.float64)
    return np.asarray(counts_LE.index_add_(0, torch.from_numpy(label_T), chosen_TE.double()))


def agree(chosen_TE: Tensor, label_T: np.ndarray) -> Agreement:
    """Measure how labels, numbers of any size, and experts belong together."""
    there, label_T = np.unique(label_T, return_inverse=True)
    counts_LE = label_counts(chosen_TE, label_T, len(there))
    draw = seeding.numpy_generator(0, "inspection", "chance")
    shuffled = [label_counts(chosen_TE, draw.permutation(label_T), len(there)) for _ in range(SHUFFLES)]
    chance = [found for counts in shuffled if (found := mutual_information(counts)) is not None]
    return Agreement(
        mutual_information(counts_LE), sum(chance) / len(chance) if chance else None, _explained(counts_LE)
    )


def _explained(counts_LE: np.ndarray) -> float | None:
    """Return the mutual information over the entropy of rows; 0 where that is none."""
    if not counts_LE.sum():
        return None
    of_label, of_expert, joint = (_entropy(part) for part in (counts_LE.sum(1), counts_LE.sum(0), counts_LE.ravel()))
    return (of_label + of_expert - joint) / of_label if of_label else 0.0


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


# Since when


def overlap(chosen_TE: Tensor, other_TE: Tensor) -> float:
    """Return the share of the choices that are among the other's too; NaN where there are none."""
    return float((chosen_TE & other_TE).sum().double() / chosen_TE.sum())


@dataclass(frozen=True)
class Settling:
    """How routes settle over checkpoints, at one site; the last is the end.

    Attributes:
        saturation: by checkpoint, the share of the final choices that are made already (OLMoE, arXiv 2409.02060,
            section 5.1).
        changed: the share of tokens whose set is another than at the checkpoint before; None at the first.
        unsettled: the share of tokens whose set is another at a later checkpoint, or at this one, than at the end
            (StableMoE, arXiv 2204.08396, asks it of one expert a token).
    """

    saturation: list[float]
    changed: list[float | None]
    unsettled: list[float]


def settling(chosen_C: Sequence[Tensor]) -> Settling:
    """Measure how routes of the same tokens settle.

    Args:
        chosen_C: ``chosen_TE`` of each checkpoint, first to last.
    """
    final_TE = chosen_C[-1]
    differs_CT = torch.stack([(chosen_TE != final_TE).any(1) for chosen_TE in chosen_C])
    later_CT = differs_CT.int().flip(0).cummax(0).values.flip(0)
    moved = [(one != other).any(1).double().mean().item() for one, other in pairwise(chosen_C)]
    return Settling(
        saturation=[overlap(final_TE, chosen_TE) for chosen_TE in chosen_C],
        changed=[None, *moved],
        unsettled=later_CT.double().mean(1).tolist(),
    )
