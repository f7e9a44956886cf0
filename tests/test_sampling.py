"""Draws without replacement: Plackett-Luce is a distribution, and Gumbel top-k draws from it."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from rlroute.sampling import gumbel_top_k, plackett_luce_log_prob, top_k
from rlroute.seeding import derive_key, keyed_uniform


def _logits(experts: int) -> Tensor:
    return 1.5 * torch.randn(experts, generator=torch.Generator().manual_seed(experts), dtype=torch.float64)


def _draws(experts: int, k: int) -> Tensor:
    return torch.tensor(list(permutations(range(experts), k)))


def _log_prob(logits_E: Tensor, draws_NK: Tensor) -> Tensor:
    return plackett_luce_log_prob(logits_E.expand(len(draws_NK), -1), draws_NK).sum(1)


def _renormalised(probs: list[float], draw: list[int]) -> float:
    """The probability of an ordered draw by its definition: take one out, renormalise, take the next."""
    product, left = 1.0, 1.0
    for expert in draw:
        product *= probs[expert] / left
        left -= probs[expert]
    return product


def test_top_k_is_ordered_and_ties_go_to_the_lower_id() -> None:
    scores_TE = torch.tensor([[0.0, 3.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    assert top_k(scores_TE, 3).tolist() == [[1, 3, 2], [0, 1, 2]]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("experts", [3, 4, 5])
def test_plackett_luce_sums_to_one(experts: int, k: int) -> None:
    logits_E, draws_NK = _logits(experts), _draws(experts, k)
    prob_N = _log_prob(logits_E, draws_NK).exp()
    assert abs(float(prob_N.sum()) - 1) < 1e-12
    expected = [_renormalised(logits_E.softmax(0).tolist(), draw) for draw in draws_NK.tolist()]
    torch.testing.assert_close(prob_N, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


def test_plackett_luce_gradient() -> None:
    ids_TK = torch.tensor([[2, 0, 3], [1, 3, 0]])
    logits_TE = torch.stack([_logits(4), _logits(4).flip(0)]).requires_grad_()
    assert torch.autograd.gradcheck(lambda z_TE: plackett_luce_log_prob(z_TE, ids_TK), (logits_TE,))


def test_plackett_luce_stays_finite_at_extreme_logits() -> None:
    logits_TE = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    log_prob_TK = plackett_luce_log_prob(logits_TE, torch.tensor([[2, 0, 1]]))
    log_prob_TK.sum().backward()
    assert log_prob_TK.tolist() == [[-2e4, 0.0, 0.0]]
    assert logits_TE.grad is not None and bool(logits_TE.grad.isfinite().all())


@pytest.mark.parametrize("k", [1, 3, 5])
def test_no_expert_is_drawn_twice(k: int) -> None:
    rows = torch.arange(1000)
    ids_TK = gumbel_top_k(_logits(5).expand(1000, -1), k, keyed_uniform(7, (rows,), (5,)))
    assert all(len(set(row)) == k for row in ids_TK.tolist())


def _chi_square(logits_E: Tensor, k: int, prob_N: Tensor) -> float:
    """Pearson's statistic of 60,000 Gumbel draws against the probabilities of all ordered draws."""
    draws_NK, count = _draws(len(logits_E), k), 60_000
    uniform_TE = keyed_uniform(derive_key("frequencies"), (torch.arange(count),), (len(logits_E),))
    ids_TK = gumbel_top_k(logits_E.expand(count, -1), k, uniform_TE)
    seen_N = (ids_TK[:, None] == draws_NK).all(2).sum(0)
    return float(((seen_N - count * prob_N) ** 2 / (count * prob_N)).sum())


@pytest.mark.parametrize(("k", "bound"), [(1, 16.3), (2, 31.3)])  # the 99.9 % quantiles at 3 and 11 degrees of freedom
def test_gumbel_top_k_draws_from_plackett_luce(k: int, bound: float) -> None:
    logits_E = _logits(4)
    assert _chi_square(logits_E, k, _log_prob(logits_E, _draws(4, k)).exp()) < bound


def test_gumbel_top_k_does_not_draw_from_the_product_of_softmax() -> None:
    logits_E = _logits(4)
    product_N = logits_E.softmax(0)[_draws(4, 2)].prod(1)
    assert _chi_square(logits_E, 2, product_N / product_N.sum()) > 1000
