"""Routers that run more experts for one token than for another: Expert Threshold, top-p, ReMoE, SeqTopK.

Shape suffixes: T tokens, D model width, E experts, K slots per token, B bins.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.baselines.remoe import ReMoERouter
from rlroute.baselines.seq_top_k import SeqTopKRouter
from rlroute.baselines.switch import SwitchRouter
from rlroute.baselines.threshold import ThresholdRouter
from rlroute.baselines.top_p import TopPRouter
from rlroute.errors import ConfigError
from rlroute.experiments.laws.steps import gates_TE, same, spread
from rlroute.quantiles import histogram, quantile
from rlroute.routing import Router, RoutingDecision, Sums
from tests.conftest import D, draw, make_context, make_feedback, make_shape, sums_of


def make(router: type[Router], experts: int = 8, k: int = 2, **config: Any) -> Any:
    """A router whose scores differ."""
    return spread(router(router.Config(**config), make_shape(experts, k)).double())


def scores_of(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Return logits_TE and probs_TE."""
    assert decision.logits_TE is not None and decision.probs_TE is not None
    return decision.logits_TE.detach(), decision.probs_TE.detach()


def run(router: Router, x_TD: Tensor) -> RoutingDecision:
    """Let a router see a step; return what it decided before it moved."""
    decision: RoutingDecision = router(x_TD, make_context(len(x_TD)))
    router.adapt(sums_of(router, decision, make_feedback(make_context(len(x_TD)))), 0.0)
    return decision


# threshold


def test_an_expert_runs_where_its_score_is_above_its_threshold_in_training_as_in_evaluation() -> None:
    router = make(ThresholdRouter)
    run(router, draw(256, D, seed=5))
    training, greedy = (router(draw(64, D), make_context(64, explore=explore)) for explore in (True, False))
    assert same(training.detach(), greedy.detach())
    want_TE = torch.zeros(64, 8).double()
    for token, logits_E in enumerate(scores_of(training)[0].tolist()):
        for expert, threshold in enumerate(router.threshold_E.tolist()):
            score = 1 / (1 + math.exp(-logits_E[expert]))
            want_TE[token, expert] = score if score > threshold else 0.0
    torch.testing.assert_close(gates_TE(training), want_TE, rtol=0, atol=1e-12)
    assert len(set((want_TE > 0).sum(1).tolist())) > 2  # few experts for one token, many for another


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 1), (4, 3), (4, 4)])
def test_the_mean_k_is_on_target_and_every_expert_has_its_share(experts: int, k: int) -> None:
    """Of a stream of which all tokens like much the same experts, and like others after a while."""
    router = make(ThresholdRouter, experts, k)
    for shift in (0.5, -0.5):
        for step in range(12):
            run(router, draw(512, D, seed=step) + shift)
        decision = router(draw(4096, D, seed=99) + shift, make_context(4096))
        share_E = decision.load_E() / 4096
        assert float(share_E.sum()) == pytest.approx(k, rel=0.05)
        assert float((share_E - k / experts).abs().max()) < 0.03


def test_the_first_thresholds_are_those_of_normal_inputs() -> None:
    for experts, k in ((8, 2), (16, 1), (4, 4)):
        decision = make_untrained(experts, k)(draw(4096, D), make_context(4096))
        assert float(decision.load_E().sum()) / 4096 == pytest.approx(k, rel=0.1)


def make_untrained(experts: int, k: int) -> Router:
    return ThresholdRouter(ThresholdRouter.Config(), make_shape(experts, k)).double()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.875, 1.0])
def test_quantiles_of_a_histogram_are_those_of_its_values(share: float) -> None:
    values_TE = draw(999, 3).sigmoid()
    counts_EB = histogram(values_TE, torch.ones(999).bool(), 1024)
    assert torch.equal(counts_EB, torch.stack([torch.histc(values_TE[:, e], 1024, 0, 1) for e in range(3)]).long())
    torch.testing.assert_close(quantile(counts_EB, share), values_TE.quantile(share, dim=0), rtol=0, atol=1e-2)


def test_values_at_the_ends_and_beyond_are_in_the_outer_bins() -> None:
    values_TE = torch.tensor([[0.0, 1.0], [-1.0, 2.0], [0.25, 0.75], [0.5, 0.5]]).double()
    counts_EB = histogram(values_TE, torch.tensor([True, True, True, False]), 4)
    assert counts_EB.tolist() == [[2, 1, 0, 0], [0, 0, 0, 3]]
    assert quantile(counts_EB, 0.0).tolist() == [0.0, 0.0] and quantile(counts_EB, 1.0).tolist() == [0.5, 1.0]


def test_a_step_without_tokens_moves_no_threshold() -> None:
    router = make(ThresholdRouter)
    before_E = router.threshold_E.clone()
    nobody = make_context(12, mask_T=torch.zeros(12).bool())
    decision = router(draw(12, D), nobody)
    router.adapt(sums_of(router, decision, make_feedback(nobody, num_valid=1)), 0.0)
    assert torch.equal(router.threshold_E, before_E) and not bool(router.started)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_it_is_quantile_balancing_with_dynamic_activation(decay: float) -> None:
    """Su's rule: run s > beta, then move beta to (or towards) the (T k / E + 1)-th largest score of the step."""
    router = make(ThresholdRouter, ema_decay=decay, bins=2**20)
    beta_E = router.threshold_E.clone()
    for step in range(4):
        x_TD = draw(256, D, seed=step) + 0.3
        decision = run(router, x_TD)
        scores_TE = scores_of(decision)[0].sigmoid()
        assert torch.equal(gates_TE(decision), torch.where(scores_TE > beta_E, scores_TE, 0.0))
        largest_E = scores_TE.sort(0, descending=True).values[256 * 2 // 8]
        beta_E = largest_E if step == 0 else decay * beta_E + (1 - decay) * largest_E
        torch.testing.assert_close(router.threshold_E, beta_E, rtol=0, atol=2**-20)
        beta_E = router.threshold_E.clone()


@pytest.mark.parametrize("router", [ThresholdRouter, TopPRouter])
def test_few_slots_keep_the_best(router: type[Router]) -> None:
    whole, cut = (make(router, slots=slots)(draw(64, D), make_context(64)) for slots in (None, 2))
    best_TE = gates_TE(whole)
    assert whole.k == 8 and cut.k == 2 and int((best_TE > 0).sum(1).max()) > 2
    kept_TE = torch.zeros_like(best_TE).scatter(1, best_TE.topk(2).indices, best_TE.topk(2).values)
    assert torch.equal(gates_TE(cut), kept_TE)


# top_p


@pytest.mark.parametrize("p", [0.0, 0.3, 0.4, 0.9, 1.0])
def test_the_set_is_the_smallest_whose_mass_reaches_p(p: float) -> None:
    decision = make(TopPRouter, p=p)(draw(64, D), make_context(64))
    probs_TE = scores_of(decision)[1]
    for gates_E, probs_E in zip(gates_TE(decision).tolist(), probs_TE.tolist(), strict=True):
        ranked, taken = sorted(range(8), key=lambda e: -probs_E[e]), [0]
        taken = ranked[:1]
        while sum(probs_E[e] for e in taken) < p - 1e-12:
            taken.append(ranked[len(taken)])
        assert {e for e in range(8) if gates_E[e]} == set(taken)
        assert [gates_E[e] for e in taken] == pytest.approx([probs_E[e] for e in taken])


def test_equal_probabilities_are_taken_in_the_order_of_experts() -> None:
    router = make(TopPRouter, p=0.3)
    decision = router(torch.zeros(5, D).double(), make_context(5))
    assert decision.expert_ids_R.view(5, 8).tolist() == [[0, 1, 2, 8, 8, 8, 8, 8]] * 5


def test_the_entropy_of_the_probabilities_is_a_loss() -> None:
    router, context = make(TopPRouter, dynamic_weight=0.3), make_context(12)
    decision = router(draw(12, D), context)
    term = router.objective(decision, make_feedback(context, num_valid=48))["dynamic"]
    entropy = -(scores_of(decision)[1] * scores_of(decision)[1].log()).sum(1)
    assert term.weight == 0.3 and float(term.value.detach()) == pytest.approx(float(entropy.sum()) / 48)


# remoe


def test_gates_are_relu_and_nothing_else_runs() -> None:
    decision = make(ReMoERouter)(draw(64, D), make_context(64))
    logits_TE, _ = scores_of(decision)
    assert torch.equal(gates_TE(decision), logits_TE.clamp(min=0))
    assert torch.equal(decision.token_sum(torch.ones_like(decision.gates_R)), (logits_TE > 0).double().sum(1))
    nobody = make(ReMoERouter)(torch.zeros(3, D).double(), make_context(3))
    assert not bool(nobody.used_R.any()) and scores_of(nobody)[1].tolist() == [[1 / 8] * 8] * 3


def test_the_penalty_is_that_of_the_paper() -> None:
    router, context = make(ReMoERouter), make_context(12, mask_T=torch.arange(12) != 5)
    router.shape = replace(router.shape, num_sites=3)
    router.penalty.fill_(0.25)
    decision = router(draw(12, D), context)
    rows = [row for token, row in enumerate(gates_TE(decision).tolist()) if token != 5]
    f_E = [8 / (2 * 11) * sum(row[e] > 0 for row in rows) for e in range(8)]
    want = 0.25 * sum(f_E[e] * row[e] for row in rows for e in range(8)) / (3 * 11)
    term = router.objective(decision, make_feedback(context, num_valid=44))["sparsity"]
    assert term.weight * float(term.value.detach()) == pytest.approx(want * 11 / 44)


@pytest.mark.parametrize(("mine", "other", "power"), [(30, 20, 1), (10, 20, -1), (20, 20, 0), (30, 0, -1)])
def test_the_penalty_follows_the_mean_k_of_all_layers(mine: int, other: int, power: int) -> None:
    router = make(ReMoERouter)
    both = [{"demand_E": torch.tensor([pairs, 0]), "tokens": torch.tensor(10)} for pairs in (mine, other)]
    router.adapt(Sums(both[0], both), 0.0)
    assert float(router.penalty) == pytest.approx(1e-8 * 1.2**power)


def test_the_controller_brings_k_to_its_target() -> None:
    """Of a router that is taught to run five of eight experts."""
    x_TD, context = draw(128, D) + 1, make_context(128)  # around 0, half of the scores are positive whatever is learned
    taught_TE = scores_of(make(ReMoERouter)(x_TD, context))[0].relu()
    router, ran = make(ReMoERouter), []
    optimizer, feedback = torch.optim.Adam(router.parameters(), lr=0.01), make_feedback(context)
    for _ in range(240):
        decision = router(x_TD, context)
        lost = (decision.logits_TE.relu() - taught_TE).square().sum(1).mean()
        optimizer.zero_grad()
        (lost + router.objective(decision, feedback)["sparsity"].value).backward()
        optimizer.step()
        router.adapt(sums_of(router, decision, feedback), 0.0)
        ran.append(int(decision.load_E().sum()) / 128)
    assert ran[0] > 5 and sum(ran[-120:]) / 120 == pytest.approx(2, rel=0.2)


# seq_top_k


@pytest.mark.parametrize("slots", [None, 8, 3, 2])
def test_the_best_pairs_of_each_sequence_run(slots: int | None) -> None:
    mask_T = torch.arange(24) % 8 < 7
    context = make_context(24, length=8, mask_T=mask_T, sequence_T=torch.tensor([7, 9, 8] * 8))
    router = make(SeqTopKRouter, slots=slots)
    decision = router(draw(24, D), context)
    probs_TE, want_TE = scores_of(decision)[1], torch.zeros(24, 8).double()
    for sequence in (7, 8, 9):
        tokens = [t for t in range(24) if int(context.sequence_T[t]) == sequence and bool(mask_T[t])]
        pairs = [(float(probs_TE[t, e]), t, e) for t in tokens for e in range(8)]
        taken: dict[int, int] = dict.fromkeys(tokens, 0)
        for gate, token, expert in sorted(pairs, reverse=True):
            if sum(taken.values()) < 2 * len(tokens) and taken[token] < (slots or 8):
                taken[token] += 1
                want_TE[token, expert] = gate
    assert torch.equal(gates_TE(decision), want_TE)
    assert decision.k == (slots or 8) and decision.max_pairs == 48
    assert int(decision.load_E().sum()) == 2 * int(mask_T.sum())


def test_budgets_are_of_each_sequence_and_sample() -> None:
    """One sequence's sure tokens take nothing of another's, and one token may have many experts or none."""
    x_TD = draw(16, D)
    x_TD[:8] *= torch.tensor([0.0] * 6 + [20.0] * 2)[:, None]
    context = make_context(8, length=4, samples=2)
    decision = make(SeqTopKRouter)(x_TD, context)
    ran_T = decision.token_sum(decision.kept_R.long())
    assert ran_T.view(4, 4).sum(1).tolist() == [8] * 4 and int(ran_T.max()) > 2
    alone = make(SeqTopKRouter)(x_TD[8:], make_context(8, length=4))
    assert torch.equal(gates_TE(decision)[8:], gates_TE(alone))


def test_with_k_slots_it_is_token_choice_and_causal() -> None:
    router, plain = make(SeqTopKRouter, slots=2), make(SwitchRouter, normalize=False)
    x_TD, context = draw(64, D), make_context(64)
    assert router.causal and not make(SeqTopKRouter).causal and make(SeqTopKRouter, 4, 4).causal
    torch.testing.assert_close(gates_TE(router(x_TD, context)), gates_TE(plain(x_TD, context)))


def test_slots_below_k_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"seq_top_k: slots = 1: legal are k = 2 and more, or none"):
        make(SeqTopKRouter, slots=1)
