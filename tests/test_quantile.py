"""Quantile balancing: the solution by its definition, a skewed stream balanced, and what the average is of.

Shape suffixes: T tokens, E experts.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.baselines.quantile import QuantileRouter, above_cutoff, quantiles
from rlroute.errors import ConfigError
from rlroute.learning import adapt
from rlroute.quantiles import moving_quantile
from tests.conftest import D, draw, make_context, make_feedback, make_shape, sums_of

ESTIMATES = ("exact", "histogram", "sequence")


def make(experts: int = 8, k: int = 2, **config: Any) -> QuantileRouter:
    return QuantileRouter(QuantileRouter.Config(**{"init_std": 0.3} | config), make_shape(experts, k)).double()


def by_definition(scores: list[list[float]], beta: list[float], k: int) -> list[float]:
    cutoffs = [sorted((s - b for s, b in zip(row, beta, strict=True)), reverse=True)[k] for row in scores]
    rank = len(scores) * k // len(beta)
    columns = zip(*scores, strict=True)
    return [sorted((s - c for s, c in zip(column, cutoffs, strict=True)), reverse=True)[rank] for column in columns]


def solved_on(scores_TE: Tensor, beta_E: Tensor, k: int, mask_T: Tensor) -> Tensor:
    """The solution on all rows; of shape (E,)."""
    whole_T = torch.zeros(len(scores_TE), dtype=torch.int64)
    solved_GE, tokens_G = quantiles(above_cutoff(scores_TE, beta_E, k), k, mask_T, whole_T, 1)
    assert tokens_G.tolist() == [int(mask_T.sum())]
    return solved_GE[0]


@pytest.mark.parametrize(("tokens", "experts", "k"), [(64, 8, 2), (40, 8, 1), (10, 4, 1), (11, 5, 3), (3, 8, 2)])
def test_the_solution_is_the_quantile_above_the_cutoffs(tokens: int, experts: int, k: int) -> None:
    scores_TE, beta_E = draw(tokens, experts).sigmoid(), 0.3 * draw(experts, seed=1)
    mask_T = torch.arange(tokens) % 3 != 1
    for valid_T in (torch.ones_like(mask_T), mask_T):
        want = by_definition(scores_TE[valid_T].tolist(), beta_E.tolist(), k)
        assert solved_on(scores_TE, beta_E, k, valid_T).tolist() == pytest.approx(want, abs=1e-15)


def test_no_expert_exceeds_the_cutoffs_of_more_than_its_share_of_tokens() -> None:
    """It reaches those of more: where it is what sets the cutoff, it exceeds it by its old beta, token after token."""
    scores_TE, beta_E = draw(64, 8).sigmoid(), 0.3 * draw(8, seed=1)
    cutoff_T = (scores_TE - beta_E).sort(1, descending=True).values[:, 2]
    solved_E = solved_on(scores_TE, beta_E, 2, torch.ones(64, dtype=torch.bool))
    over_TE = scores_TE - cutoff_T[:, None]
    assert int((over_TE > solved_E).sum(0).max()) == 16 and int((over_TE >= solved_E).sum(0).min()) == 17


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize(("valid", "k"), [(0, 2), (1, 2), (0, 8), (5, 8)])
def test_edges_are_finite(valid: int, k: int, estimate: str) -> None:
    """No valid token, which moves nothing, one, and k = E, where there is nothing to balance."""
    router, context = make(k=k, estimate=estimate), make_context(12, mask_T=torch.arange(12) < valid)
    router.beta_E.copy_(0.1 * draw(8, seed=3))
    before_E = router.beta_E.clone()
    decision = router(draw(12, D), context)
    router.adapt(sums_of(router, decision, make_feedback(context, num_valid=max(valid, 1))), 0.0)
    assert bool(router.beta_E.isfinite().all()) and torch.equal(router.beta_E, before_E) == (valid == 0)


def test_sequences_are_solved_each_by_itself() -> None:
    over_TE = draw(24, 8)
    group_T = torch.tensor([2, 0, 0, 3] * 6)  # of five groups, in any order
    mask_T = torch.arange(24) % 5 != 0
    solved_GE, tokens_G = quantiles(over_TE, 2, mask_T, group_T, 5)
    for group in range(5):
        rows = over_TE[(group_T == group) & mask_T]
        assert int(tokens_G[group]) == len(rows)
        want = (
            [sorted(column, reverse=True)[len(rows) * 2 // 8] for column in rows.t().tolist()]
            if len(rows)
            else [0.0] * 8
        )
        assert solved_GE[group].tolist() == want


def test_the_bias_by_sequences_is_their_mean_by_tokens() -> None:
    router = make(estimate="sequence")
    mask_T = torch.tensor([1] * 8 + [1, 1, 1, 0]).bool()
    context, x_TD = make_context(12, mask_T=mask_T), draw(12, D)
    decision = router(x_TD, context)
    router.adapt(sums_of(router, decision, make_feedback(context)), 0.0)
    assert decision.logits_TE is not None
    scores = decision.logits_TE.detach().sigmoid()[mask_T].tolist()
    parts = [(scores[start:end], end - start) for start, end in ((0, 4), (4, 8), (8, 11))]
    solved = [torch.tensor(by_definition(rows, [0.0] * 8, 2), dtype=torch.float64) * tokens for rows, tokens in parts]
    mean_E = torch.stack(solved).sum(0) / 11
    torch.testing.assert_close(router.beta_E, mean_E - mean_E.mean())


def kimi(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """Kimi K3's step, without bins: the k / E quantile of cutoff - s, less its mean."""
    cutoff_T = (scores_TE + bias_E).sort(1, descending=True).values[:, k]
    bias_E = (cutoff_T[:, None] - scores_TE).quantile(k / scores_TE.shape[1], dim=0)
    return bias_E - bias_E.mean()


@pytest.mark.parametrize(("k", "bins", "tolerance"), [(2, 1000, 0.01), (1, 4000, 0.005), (3, 100, 0.05)])
def test_the_histogram_finds_the_quantile_of_all_tokens(k: int, bins: int, tolerance: float) -> None:
    router = make(k=k, estimate="histogram", bins=bins)
    for step in range(3):
        context, x_TD = make_context(2000), draw(2000, D, seed=step) + 0.5
        decision = router(x_TD, context)
        assert decision.logits_TE is not None
        want_E = kimi(decision.logits_TE.detach().sigmoid(), -router.beta_E, k)
        router.adapt(sums_of(router, decision, make_feedback(context)), 0.0)
        torch.testing.assert_close(-router.beta_E, want_E, rtol=0, atol=tolerance)


def test_all_values_lie_within_the_histogram() -> None:
    """At the ends of what scores and biases can be."""
    scores_TE = torch.tensor([[0.0] * 7 + [1.0], [1.0] * 7 + [0.0], [0.0, 1.0] * 4]).double()
    for seed in range(20):
        beta_E, k = 3 * draw(8, seed=seed), 1 + seed % 7
        over_TE = above_cutoff(scores_TE, beta_E, k)
        assert float(over_TE.min()) >= float(beta_E.min()) - 1 and float(over_TE.max()) <= float(beta_E.max()) + 1


@pytest.mark.parametrize("estimate", ["histogram", "sequence"])
def test_micro_batches_add_up_to_the_batch(estimate: str) -> None:
    moved = []
    for size in (12, 4):
        router, parts = make(estimate=estimate), []
        assert not router.batch_dependent and make().batch_dependent
        for start in range(0, 12, size):
            context = make_context(size, sequence_T=torch.arange(start, start + size) // 4)
            decision = router(draw(12, D)[start : start + size], context)
            parts.append(sums_of(router, decision, make_feedback(context, num_valid=12)))
        adapt([router], [{name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}], 0.0)
        moved.append(router.beta_E)
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-14)


def skewed(step: int, tokens: int = 512) -> Tensor:
    """A stream whose tokens are all on one side of the origin: few experts are best for nearly all."""
    return draw(tokens, D, seed=100 + step) + 2


@pytest.mark.parametrize(("estimate", "ema_decay"), [*((estimate, 0.0) for estimate in ESTIMATES), ("exact", 0.5)])
@pytest.mark.parametrize("k", [1, 2])
def test_a_skewed_stream_is_balanced_within_steps(k: int, estimate: str, ema_decay: float) -> None:
    router, context, worst = make(k=k, estimate=estimate, ema_decay=ema_decay), make_context(512, length=128), []
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


# Moving quantiles


def moving_by_definition(scores: list[float], valid: list[bool], share: float, decay: float, bins: int) -> list[float]:
    """Of one expert in one sequence, token after token: a histogram of what came before, each weighed by its age."""
    found, weights = list[float](), [0.0] * bins
    for score, counts in zip(scores, valid, strict=True):
        weights = [decay * weight for weight in weights]
        weights[min(int(score * bins), bins - 1)] += counts
        upto, place = weights[0], 0
        while upto < share * sum(weights) and place < bins - 1:
            place += 1
            upto += weights[place]
        found.append((place + 0.5) / bins)
    return found


@pytest.mark.parametrize(("length", "decay", "bins"), [(8, 0.9, 100), (192, 0.99, 10), (64, 0.0, 7)])
def test_the_moving_quantile_is_that_of_a_sequence_so_far(length: int, decay: float, bins: int) -> None:
    tokens = 3 * length
    order_T = draw(tokens, seed=5).argsort()  # the rows stand in any order
    keys: dict[str, Any] = {"sequence_T": order_T // length, "position_T": order_T % length}
    context = make_context(tokens, mask_T=order_T % length < length - 2, **keys)
    scores_TE = draw(tokens, 4, seed=1).sigmoid()
    found_TE = moving_quantile(scores_TE, context, 0.75, decay, bins)
    for sequence in range(3):
        rows_T = torch.tensor([int((order_T == sequence * length + i).nonzero()) for i in range(length)])
        valid = context.mask_T[rows_T].tolist()
        for expert in range(4):
            want = moving_by_definition(scores_TE[rows_T, expert].tolist(), valid, 0.75, decay, bins)
            got = found_TE[rows_T, expert][: length - 2].tolist()
            assert got == pytest.approx(want[: length - 2], abs=1e-15)


def test_scores_are_lowered_by_a_share_of_it_and_gates_are_not() -> None:
    router, x_TD = make(moving=0.3), draw(12, D)
    router.beta_E.copy_(0.1 * draw(8, seed=3))
    context = make_context(12, length=6)
    decision = router(x_TD, context)
    assert decision.logits_TE is not None
    scores_TE = decision.logits_TE.detach().sigmoid()
    lowered_TE = scores_TE - 0.3 * moving_quantile(scores_TE, context, 0.75, 0.99, 100)
    ids_TK = decision.expert_ids_R.view(12, 2)
    assert torch.equal(ids_TK, (lowered_TE - router.beta_E).topk(2).indices)
    chosen_TK = scores_TE.gather(1, ids_TK)
    torch.testing.assert_close(decision.gates_R.view(12, 2).detach(), chosen_TK / chosen_TK.sum(1, keepdim=True))
    greedy = router(x_TD, replace(context, explore=False))
    assert torch.equal(greedy.expert_ids_R, decision.expert_ids_R) and router.causal and not router.two_rules
    want = by_definition(lowered_TE.tolist(), router.beta_E.tolist(), 2)
    router.adapt(sums_of(router, decision, make_feedback(context)), 0.0)
    assert (router.beta_E - router.beta_E[0]).tolist() == pytest.approx([b - want[0] for b in want], abs=1e-12)


def test_sequences_are_more_even_the_larger_the_share() -> None:
    """Where one bias for all leaves each sequence uneven, however well it balances all of them together."""
    length, context = 128, make_context(512, length=128)
    x_TD = skewed(0) + 2 * draw(4, D, seed=7).repeat_interleave(length, 0)  # each has a bent of its own
    worst = []
    for share in (0.0, 0.3, 1.0):
        router = make(moving=share)
        for _ in range(30):
            router.adapt(sums_of(router, router(x_TD, context), make_feedback(context)), 0.0)
        rows = router(x_TD, context).expert_ids_R.view(4, length * 2)
        worst.append(max(float(metrics.max_vio(torch.bincount(row, minlength=8))) for row in rows))
    assert worst[2] < worst[1] < worst[0] and worst[2] < 0.7


@pytest.mark.parametrize(
    "config", [{"moving_decay": 0.5}, {"moving_bins": 10}, {"bins": 10}, {"bins": 10, "estimate": "sequence"}]
)
def test_a_field_that_does_nothing_is_refused(config: dict[str, Any]) -> None:
    name = next(iter(config))
    plain = getattr(QuantileRouter.Config, name)
    with pytest.raises(ConfigError, match=rf"quantile\.{name} = {config[name]} does nothing .*legal is {plain}"):
        QuantileRouter.Config(**config)
