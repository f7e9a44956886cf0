"""Which tokens an expert is chosen for more than others, and how they are spelled."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from rlroute.config import DataConfig
from rlroute.experiments.inspection.measures import label_counts
from rlroute.training.tokenizer import open_encoder

LEAST = 8
"""A token that occurs less often says little."""
SHOWN = 5


def favourites(chosen_TE: Tensor, token_T: np.ndarray) -> list[list[tuple[int, float]]]:
    """Return for each expert the token ids of which it gets the largest shares, each with its share, the largest first
    (OLMoE's vocabulary specialisation, arXiv 2409.02060, section 5.4).

    The share is over all occurrences of a token, of which there are enough; of equal ones the frequent come first.
    """
    ids, label_T, times = np.unique(token_T, return_inverse=True, return_counts=True)
    share_LE = label_counts(chosen_TE, label_T, len(ids)) / times[:, None]
    share_LE[times < LEAST] = 0.0
    order_LE = np.lexsort((np.broadcast_to(-times[:, None], share_LE.shape), -share_LE), axis=0)[:SHOWN]
    return [
        [(int(ids[row]), float(share_LE[row, expert])) for row in order_LE[:, expert] if share_LE[row, expert] > 0]
        for expert in range(share_LE.shape[1])
    ]


class Speller:
    """Spells the tokens of a corpus; where nobody knows how, by their numbers."""

    def __init__(self, data: DataConfig) -> None:
        known = not data.spec.startswith("bin:") or data.tokenizer not in (None, "bytes", "auto")
        self.encoder = open_encoder(data.tokenizer) if known else None

    def __call__(self, token: int) -> str:
        """Return a token as text between quotes."""
        if self.encoder is None:
            return f"#{token}"
        spelled = self.encoder.spelled(token)
        return repr(spelled.decode(errors="backslashreplace")) if spelled else "<bos>"
