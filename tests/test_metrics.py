"""Metrics at loads whose values are known by hand, and the symmetries that they must have.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.routing import RoutingDecision, drop_over_capacity

BALANCED = torch.full((8,), 5)
COLLAPSED = torch.tensor([0, 0, 40, 0, 0, 0, 0, 0])
SKEWED = torch.tensor([1, 2, 3, 4, 5, 6, 7, 12])
OF_LOADS = [metrics.max_vio, metrics.coefficient_of_variation, metrics.load_entropy, metrics.dead_experts]


@pytest.mark.parametrize(
    ("metric", "balanced", "collapsed", "skewed"),
    [
        (metrics.max_vio, 0.0, 7.0, 12 / 5 - 1),
        (metrics.coefficient_of_variation, 0.0, math.sqrt(7), float(np.std(SKEWED.numpy()) / 5)),
        (metrics.load_entropy, 1.0, 0.0, -sum(n / 40 * math.log(n / 40) for n in SKEWED.tolist()) / math.log(8)),
        (metrics.dead_experts, 0, 7, 0),
    ],
)
def test_known_loads(metric: Callable[[Tensor], Tensor], balanced: float, collapsed: float, skewed: float) -> None:
    values = [float(metric(load_E)) for load_E in (BALANCED, COLLAPSED, SKEWED)]
    assert values == pytest.approx([balanced, collapsed, skewed], abs=1e-12)


@pytest.mark.parametrize("metric", OF_LOADS)
@pytest.mark.parametrize("load_E", [BALANCED, COLLAPSED, SKEWED])
def test_neither_order_nor_scale_nor_dtype_of_the_counts_matters(
    metric: Callable[[Tensor], Tensor], load_E: Tensor
) -> None:
    want = metric(load_E)
    assert isinstance(want, Tensor) and want.dim() == 0
    for same_E in (load_E.flip(0), 1000 * load_E, load_E.float(), load_E.double() / 40):
        assert float(metric(same_E)) == pytest.approx(float(want), abs=1e-6)


def test_a_single_expert_is_balanced() -> None:
    assert [float(metric(torch.tensor([7]))) for metric in OF_LOADS] == [0.0, 0.0, 1.0, 0.0]


def test_an_expert_is_dead_below_the_share_not_at_it() -> None:
    load_E = torch.tensor([4, 5, 6, 385])  # the fair share is 100
    assert int(metrics.dead_experts(load_E)) == 1
    assert int(metrics.dead_experts(load_E, share=0.06)) == 2
    assert int(metrics.dead_experts(load_E, share=0.0)) == 0


def test_router_entropy_is_one_for_uniform_and_zero_for_certain_rows() -> None:
    probs_TE = torch.tensor([[0.25] * 4, [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert float(metrics.router_entropy(probs_TE)) == pytest.approx((1 + 0 + 0.5) / 3)
    assert float(metrics.router_entropy(probs_TE, torch.tensor([True, False, True]))) == pytest.approx(0.75)
    assert float(metrics.router_entropy(torch.ones(3, 1))) == 0


def test_drop_rate_counts_chosen_pairs_alone() -> None:
    ids_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3]])
    decision = RoutingDecision.token_choice(ids_TK, torch.ones(4, 2), 4)
    assert float(metrics.drop_rate(decision)) == 0
    assert float(metrics.drop_rate(drop_over_capacity(decision, 2))) == pytest.approx(2 / 8)
    assert float(metrics.drop_rate(drop_over_capacity(decision, 0))) == 1
    with_unused = replace(decision, k=None, expert_ids_R=torch.tensor([0, 4, 0, 4, 0, 4, 0, 4]))
    assert float(metrics.drop_rate(drop_over_capacity(with_unused, 3))) == pytest.approx(1 / 4)


def test_overlap_is_the_share_in_common_in_any_order() -> None:
    ids_TK = torch.tensor([[0, 1], [2, 3]])
    assert float(metrics.overlap(ids_TK, ids_TK.flip(1))) == 1
    assert float(metrics.overlap(ids_TK, torch.tensor([[2, 3], [0, 1]]))) == 0
    assert float(metrics.overlap(ids_TK, torch.tensor([[1, 5], [2, 3]]))) == 0.75
