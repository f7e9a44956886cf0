"""Quantile balancing: the solution by its definition, a skewed stream balanced, and what the average is of.

Shape suffixes: T tokens, E experts.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.baselines.quantile import QuantileRouter, quantiles
from rlroute.errors import ConfigError
from rlroute.learning import adapt
from tests.conftest import D, draw, make_context, make_feedback, make_shape, sums_of


def make(experts: int = 8, k: int = 2, **config: Any) -> QuantileRouter:
    return QuantileRouter(QuantileRouter.Config(**{"init_std": 0.3} | config), make_shape(experts, k)).double()


def by_definition(scores: list[list[float]], beta: list[float], k: int) -> list[float]:
    cutoffs = [sorted((s - b for s, b in zip(row, beta, strict=True)), reverse=True)[k] for row in scores]
    rank = len(scores) * k // len(beta)
    columns = zip(*scores, strict=True)
    return [sorted((s - c for s, c in zip(column, cutoffs, strict=True)), reverse=True)[rank] for column in columns]


@pytest.mark.parametrize(("tokens", "experts", "k"), [(64, 8, 2), (40, 8, 1), (10, 4, 1), (11, 5, 3), (3, 8, 2)])
def test_the_solution_is_the_quantile_above_the_cutoffs(tokens: int, experts: int, k: int) -> None:
    scores_TE, beta_E = draw(tokens, experts).sigmoid(), 0.3 * draw(experts, seed=1)
    mask_T = torch.arange(tokens) % 3 != 1
    for valid_T in (torch.ones_like(mask_T), mask_T):
        want = by_definition(scores_TE[valid_T].tolist(), beta_E.tolist(), k)
        assert quantiles(scores_TE, beta_E, k, valid_T).tolist() == pytest.approx(want, abs=1e-15)


def test_no_expert_exceeds_the_cutoffs_of_more_than_its_share_of_tokens() -> None:
    """It reaches those of more: where it is what sets the cutoff, it exceeds it by its old beta, token after token."""
    scores_TE, beta_E = draw(64, 8).sigmoid(), 0.3 * draw(8, seed=1)
    cutoff_T = (scores_TE - beta_E).sort(1, descending=True).values[:, 2]
    solved_E = quantiles(scores_TE, beta_E, 2, torch.ones(64, dtype=torch.bool))
    over_TE = scores_TE - cutoff_T[:, None]
    assert int((over_TE > solved_E).sum(0).max()) == 16 and int((over_TE >= solved_E).sum(0).min()) == 17


@pytest.mark.parametrize(("valid", "k"), [(0, 2), (1, 2), (0, 8), (5, 8)])
def test_edges_are_finite(valid: int, k: int) -> None:
    """No valid token, one, and k = E, where there is nothing to balance."""
    router, context = make(k=k), make_context(12, mask_T=torch.arange(12) < valid)
    decision = router(draw(12, D), context)
    router.adapt(sums_of(router, decision, make_feedback(context, num_valid=max(valid, 1))), 0.0)
    assert bool(router.beta_E.isfinite().all()) and (valid > 0 or not router.beta_E.any())


def skewed(step: int, tokens: int = 512) -> Tensor:
    """A stream whose tokens are all on one side of the origin: few experts are best for nearly all."""
    return draw(tokens, D, seed=100 + step) + 2


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 2])
def test_a_skewed_stream_is_balanced_within_steps(k: int, ema_decay: float) -> None:
    router, context, worst = make(k=k, ema_decay=ema_decay), make_context(512), []
    for step in range(30):
        decision = router(skewed(step), context)
        worst.append(float(metrics.max_vio(decision.demand_E())))
        router.adapt(sums_of(router, decision, make_feedback(context)), 0.0)
    assert worst[0] > 1.5 and sum(worst[-5:]) / 5 < 0.35


def test_one_batch_over_and_over_is_balanced_almost_exactly() -> None:
    router, context, x_TD = make(), make_context(512), skewed(0)
    for _ in range(60):
        router.adapt(sums_of(router, router(x_TD, context), make_feedback(context)), 0.0)
    assert float(metrics.max_vio(router(x_TD, context).demand_E())) < 0.05


def test_micro_batches_count_by_their_tokens_and_the_mean_is_taken_off() -> None:
    router = make(ema_decay=0.25)
    router.beta_E.copy_(0.1 * draw(8, seed=3))
    before_E, parts, solved = router.beta_E.clone(), [], []
    for tokens, valid in ((12, 12), (20, 5)):
        context, x_TD = make_context(tokens, mask_T=torch.arange(tokens) < valid), draw(tokens, D, seed=tokens)
        decision = router(x_TD, context)
        parts.append(sums_of(router, decision, make_feedback(context, num_valid=17)))
        assert decision.logits_TE is not None
        scores = decision.logits_TE[:valid].sigmoid().tolist()
        solved.append(torch.tensor(by_definition(scores, before_E.tolist(), 2), dtype=torch.float64))
    adapt([router], [{name: parts[0][name] + parts[1][name] for name in parts[0]}], 0.0)
    mean_E = (12 * solved[0] + 5 * solved[1]) / 17
    torch.testing.assert_close(router.beta_E, 0.25 * before_E + 0.75 * (mean_E - mean_E.mean()))


def test_beta_moves_the_choice_and_never_the_gate() -> None:
    router = make()
    router.beta_E[3] = -100.0
    decision = router(draw(12, D), make_context())
    ids_TK, gates_TK = decision.expert_ids_R.view(-1, 2), decision.gates_R.view(-1, 2)
    assert bool((ids_TK[:, 0] == 3).all()) and decision.logits_TE is not None
    scores_TK = decision.logits_TE.sigmoid().gather(1, ids_TK)
    torch.testing.assert_close(gates_TK, scores_TK / scores_TK.sum(1, keepdim=True))


def test_a_bias_that_never_moves_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantile\.ema_decay = 1\.0: legal are numbers from 0 to below 1"):
        make(ema_decay=1.0)
