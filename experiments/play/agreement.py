"""How clusters and experts belong together, counted from pairs of token and expert, whoever chose them.

So it holds for one expert a token, for several, for a number that varies, and where experts choose tokens. As in a
transformer, choices are counted before and runs after what a bound drops; what is not defined, because nothing was
chosen, is None.

Shape suffixes: T tokens, E clusters and experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.routing import RoutingDecision
from rlroute.transfer import defined


def agreement(label_T: Tensor, decision: RoutingDecision) -> dict[str, Any]:
    """Return how the clusters of tokens and the experts chosen for them belong together, and how much ran.

    The values are ``merged``, ``nmi``, ``max_vio``, ``pairs`` and ``without``: see
    :class:`rlroute.experiments.play.ladder.Outcome`.
    """
    joint_EE = joint_counts(label_T, decision)
    main_E = joint_EE.argmax(1)[joint_EE.sum(1) > 0]
    ran_T = decision.token_sum(decision.kept_R.double())
    return {
        "merged": decision.num_experts - len(np.unique(main_E)),
        "nmi": mutual_information(joint_EE),
        "max_vio": defined(metrics.max_vio(torch.from_numpy(joint_EE.sum(0)))),
        "pairs": float(ran_T.mean()),
        "without": float((ran_T == 0).double().mean()),
    }


def joint_counts(label_T: Tensor, decision: RoutingDecision) -> Any:
    """Count the chosen pairs of each cluster (row) and expert (column), a float64 array of shape (E, E)."""
    used_R = decision.used_R
    labels_R, experts_R = label_T[decision.token_ids_R[used_R]], decision.expert_ids_R[used_R]
    joint_EE = np.zeros((decision.num_experts, decision.num_experts))
    np.add.at(joint_EE, (labels_R.numpy(), experts_R.numpy()), 1.0)
    return joint_EE


def mutual_information(counts: Any) -> float | None:
    """Return the mutual information of rows and columns over the mean of their entropies.

    It is 0 where both are constant, and None where nothing was counted.
    """
    if not counts.sum():
        return None
    joint = counts / counts.sum()
    rows, columns = joint.sum(1), joint.sum(0)

    def entropy(p: Any) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    total = entropy(rows) + entropy(columns)
    return 2 * (total - entropy(joint.ravel())) / total if total else 0.0
