"""The gradient instrument: its target is the derivative of the enumerated expected loss, unbiased estimators meet it,
wrong ones do not.

Longer than most: the routers that it measures, refuses or names are tried on one small case, defined once.

Shape suffixes: T tokens, N replicas or draws, L MoE layers, E experts, K experts per token, P numbers of a gradient.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlroute import registry
from rlroute.agents.reinforce import ReinforceRouter
from rlroute.baselines.switch import SwitchRouter
from rlroute.config import DataConfig, ModelConfig, RouterConfig, RunConfig, SitedRouter, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.gradients import exact
from rlroute.experiments.gradients import signal as gradient_statistics
from rlroute.experiments.gradients.estimates import enumerate_estimates, measure_probe
from rlroute.experiments.gradients.instrument import (
    Case,
    Sweep,
    default_entries,
    measure_case,
    run,
    without_refusals,
)
from rlroute.experiments.gradients.probe import Probe
from rlroute.experiments.gradients.snapshots import Training
from rlroute.experiments.gradients.steering import VARIABLE_K, Unmeasurable
from rlroute.experiments.gradients.summary import summary
from rlroute.gates import softmax_top_k
from rlroute.model import ModelShape, Transformer
from rlroute.policies import perturb
from rlroute.registry import default_names, router_class
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums, Term
from rlroute.sampling import plackett_luce_log_prob, top_k
from rlroute.training.batches import Batch
from rlroute.training.data import load_corpus
from tests import ROOT
from tests.commands import rlroute

V = 11
SMALLEST: dict[str, Any] = {"d_model": 8, "num_heads": 2, "d_expert": 6}
SIZES = [(1, 1, 2, 3), (2, 1, 2, 2), (1, 2, 3, 2), (2, 2, 3, 1)]  # (L, k, E, T)


def make_batch(tokens: int) -> Batch:
    ids = np.random.default_rng(5).integers(0, V, (1, tokens + 1))
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.array([77]), None)


def make_probe(
    router: type[Router],
    layers: int = 1,
    k: int = 1,
    experts: int = 2,
    tokens: int = 2,
    form: str = "own",
    **fields: Any,
) -> Probe:
    """A probe of a small model whose routers have opinions and, where they keep any, a past."""
    settings = router.Config(**fields)
    sizes: dict[str, Any] = {"num_layers": layers, "num_experts": experts, "k": k, "gate_form": form}
    return probe_of(ModelConfig(**sizes, **SMALLEST), tokens, lambda shape: router(settings, shape))


def probe_of(config: ModelConfig, tokens: int, make_router: Callable[[RouterShape], Router]) -> Probe:
    shape = ModelShape(vocab_size=V, seq_len=tokens, seed=3, backend="reference")
    model = Transformer(config, shape, make_router).double()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".router." in name or ".experts." in name:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    for each in model.routers:
        if isinstance(each, ReinforceRouter):
            each.adapt(Sums({"return": torch.tensor(-5.2), "tokens": torch.tensor(2)}, ()), 0.0)
    return Probe(model, make_batch(tokens), step=0)


def reinforce(**fields: Any) -> Callable[..., Probe]:
    return lambda *sizes: make_probe(ReinforceRouter, *sizes, **({"value_hidden": 6} | fields))


def expected(probe: Probe, shift_LTE: Tensor, *, held: bool) -> Tensor:
    return torch.stack([part for part, _ in exact.expected_loss(probe, shift_LTE, held=held)]).sum()


def mean_estimate(probe: Probe) -> Tensor:
    estimates_NLTE, prob_N = enumerate_estimates(probe)
    assert abs(float(prob_N.sum()) - 1) < 1e-12
    return torch.einsum("n,nlte->lte", prob_N, estimates_NLTE)


def error(probe: Probe) -> float:
    """The largest error of the enumerated mean of what training gives, from the exact gradient."""
    return float((mean_estimate(probe) - exact.exact_gradient(probe, held=not probe.gates_follow)).abs().max())


# The target.


@pytest.mark.parametrize(("experts", "k"), [(2, 1), (4, 2), (4, 3), (5, 4)])
def test_probabilities_of_all_ordered_choices_sum_to_1(experts: int, k: int) -> None:
    choices_CK = exact.ordered_choices(experts, k)
    assert len(choices_CK) == exact.count_choices(experts, k) == len({tuple(c) for c in choices_CK.tolist()})
    logits_E = torch.randn(experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_prob_CK = plackett_luce_log_prob(logits_E.expand(len(choices_CK), -1), choices_CK)
    assert abs(float(log_prob_CK.sum(1).exp().sum()) - 1) < 1e-12


@pytest.mark.parametrize(("layers", "k", "experts", "tokens"), SIZES)
def test_joint_choices_are_all_there_are(layers: int, k: int, experts: int, tokens: int) -> None:
    ids_LNTK = torch.cat(list(exact.joint_choices(experts, k, layers, tokens)), dim=1)
    rows = {tuple(ids_LNTK[:, n].flatten().tolist()) for n in range(ids_LNTK.shape[1])}
    assert len(rows) == ids_LNTK.shape[1] == len(list(permutations(range(experts), k))) ** (layers * tokens)


@pytest.mark.parametrize("router", [ReinforceRouter, SwitchRouter], ids=["constant gates", "gates that follow"])
@pytest.mark.parametrize(("layers", "k", "experts", "tokens"), SIZES)
def test_exact_gradient_is_the_finite_difference_of_the_enumerated_loss(
    layers: int, k: int, experts: int, tokens: int, router: type[Router]
) -> None:
    probe = make_probe(router, layers, k, experts, tokens)
    assert probe.gates_follow == (router is SwitchRouter)
    check_finite_difference(probe, exact.exact_gradient(probe, held=not probe.gates_follow))


def check_finite_difference(probe: Probe, gradient_LTE: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        way_LTE = torch.randn(gradient_LTE.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (expected(probe, h * way_LTE, held=False) for h in (1e-4, -1e-4))
        assert float((ahead - behind) / 2e-4 - (gradient_LTE * way_LTE).sum()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("layers", "tokens"), [(1, 3), (2, 2)])
def test_exact_gradient_is_the_score_function_written_out(layers: int, tokens: int) -> None:
    """For k = 1, d log pi(e) / d logits = onehot(e) - softmax; written out it equals autograd through the
    expectation.
    """
    probe = reinforce()(layers, 1, 3, tokens)
    ids_LNTK = torch.cat(list(exact.joint_choices(3, 1, layers, tokens)), dim=1)
    with torch.no_grad():
        loss_N, log_prob_LNT = probe.forced(ids_LNTK, probe.zero_shift(), held=True)
        probs = [probe.policy(ids_LNTK, layer).softmax(1).view(-1, tokens, 3) for layer in range(layers)]
    score_LNTE = torch.nn.functional.one_hot(ids_LNTK[..., 0], 3) - torch.stack(probs)
    by_hand_LTE = torch.einsum("n,n,lnte->lte", log_prob_LNT.sum((0, 2)).exp(), loss_N, score_LNTE)
    assert float((by_hand_LTE - exact.exact_gradient(probe, held=True)).abs().max()) < 1e-10


@pytest.mark.parametrize("router", [ReinforceRouter, SwitchRouter])
@pytest.mark.parametrize(("layers", "k", "experts", "tokens"), SIZES)
def test_conditional_gradients_average_to_the_exact_one(
    layers: int, k: int, experts: int, tokens: int, router: type[Router], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "CHUNK_ROWS", 20)  # some slots at a time
    probe = make_probe(router, layers, k, experts, tokens)
    ids_LNTK = torch.cat(list(exact.joint_choices(experts, k, layers, tokens)), dim=1)
    with torch.no_grad():
        prob_N = probe.forced(ids_LNTK, probe.zero_shift(), held=True)[1].sum((0, 2)).exp()
    held, baseline = not probe.gates_follow, torch.tensor(2.0)
    each = torch.stack([exact._conditional(probe, ids_LTK, baseline, held) for ids_LTK in ids_LNTK.unbind(1)])
    mean_LTE = torch.einsum("n,nlte->lte", prob_N, each)
    assert float((mean_LTE - exact.exact_gradient(probe, held=held)).abs().max()) < 1e-10


def test_conditional_gradient_of_one_token_and_one_layer_is_exact() -> None:
    for router in (ReinforceRouter, SwitchRouter):
        probe = make_probe(router, 1, 2, 4, 1)
        ids_LSTK = exact.sample_choices(probe, 2, seed=0)
        found_SLTE = exact.conditional_gradients(probe, ids_LSTK, held=not probe.gates_follow)
        want_LTE = exact.exact_gradient(probe, held=not probe.gates_follow)
        assert float((found_SLTE - want_LTE).abs().max()) < 1e-12


def test_sampled_conditional_gradient_is_near_the_exact_one_and_says_how_near(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = reinforce()(2, 1, 2, 3)
    want = exact.measure_target(probe, samples=2, seed=0)
    monkeypatch.setattr(exact, "ENUMERABLE", 63)
    target = exact.measure_target(probe, samples=100, seed=0)
    assert (want.kind, target.kind) == ("exact", "conditional") and want.error_L == (0.0, 0.0)
    for layer, stated in enumerate(target.error_L):
        real = float((target.gradient_LTE[layer] - want.gradient_LTE[layer]).norm() / want.gradient_LTE[layer].norm())
        assert 0 < real < 3 * stated


# What training gives, against it.


@pytest.mark.parametrize("baseline", ["none", "ema", "value"])
@pytest.mark.parametrize(("layers", "k", "experts", "tokens"), SIZES)
def test_reinforce_with_the_sum_of_future_losses_is_unbiased(
    layers: int, k: int, experts: int, tokens: int, baseline: str
) -> None:
    assert error(reinforce(baseline=baseline, discount=1.0, temperature=0.7)(layers, k, experts, tokens)) < 1e-10


def test_own_token_reward_is_biased_but_in_the_last_layer() -> None:
    assert error(reinforce(baseline="ema")(1, 1, 3, 3)) < 1e-10  # no attention comes after the only layer's routes
    probe = reinforce(baseline="ema")(2, 1, 2, 3)
    measured = measure_probe(probe, draws=10, samples=2, seed=0)
    first, last = (measured.signals(layer)[0].squared_bias.mean for layer in (0, 1))
    assert first > 1e-3 and abs(last) < 1e-20


@dataclass(frozen=True, eq=False)
class Seen:
    """What an objective gets to see."""

    router: Router
    decision: RoutingDecision
    feedback: Feedback

    def policy(self, **feedback: Tensor) -> Tensor:
        told = replace(self.feedback, **feedback)  # type: ignore[arg-type]
        terms = ReinforceRouter.objective(self.router, self.decision, told)  # type: ignore[arg-type]
        return terms["policy"].value


def arg_max_log_prob(seen: Seen) -> Tensor:
    logits_TE = seen.decision.logits_TE
    assert logits_TE is not None
    greedy = plackett_luce_log_prob(logits_TE, top_k(logits_TE, seen.router.shape.k)).flatten()
    return Seen(seen.router, replace(seen.decision, log_prob_R=greedy), seen.feedback).policy()


def attached_reward(seen: Seen) -> Tensor:
    assert seen.decision.log_prob_R is not None
    return seen.policy() * (1 + seen.decision.log_prob_R.sum() - seen.decision.log_prob_R.sum().detach())


MISTAKES: dict[str, Callable[[Seen], Tensor]] = {
    "wrong sign": lambda seen: -seen.policy(),
    "own reward in the baseline": lambda seen: seen.policy(
        loss_MT=seen.feedback.loss_MT - seen.feedback.loss_MT.mean()
    ),
    "log-probability of the arg-max": arg_max_log_prob,
    "reward not detached": attached_reward,
}


@pytest.mark.parametrize("mistake", ["none", *MISTAKES])
def test_wrong_estimators_fail_the_same_check(mistake: str) -> None:
    class Wrong(ReinforceRouter):
        def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
            seen = Seen(self, decision, feedback)
            return {"policy": Term(MISTAKES.get(mistake, Seen.policy)(seen), 1.0)}

    probe = make_probe(Wrong, 1, 1, 3, 3, baseline="none", discount=1.0)
    assert error(probe) < 1e-10 if mistake == "none" else error(probe) > 1e-3


class LeaveOneOut(Router):
    """REINFORCE whose baseline is the same token's return in a second routing sample, which may be held at the
    first.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """What goes wrong."""

        held: bool = False

    learns_from, gate_meaning, stochastic, num_samples = frozenset({"reward"}), "1/k", True, 2
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.config, self.scores = config, LinearScores(shape, "scores", 1.0)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.scores(x_TD.detach())
        scores_TE = perturb(logits_TE, context, "test")
        if context.explore and self.config.held:
            scores_TE = scores_TE[: len(scores_TE) // 2].repeat(2, 1)
        ids_TK = context.choose(scores_TE, self.shape.k)
        return RoutingDecision.token_choice(
            ids_TK,
            torch.full_like(ids_TK, 1 / self.shape.k, dtype=x_TD.dtype),
            self.shape.num_experts,
            log_prob_TK=plackett_luce_log_prob(logits_TE, ids_TK) if context.explore else None,
            logits_TE=logits_TE,
        )

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        assert decision.log_prob_R is not None
        return_MT = -feedback.loss_MT  # one layer: the own token's loss is all that a route changes
        advantage_T = (return_MT - return_MT.flip(0)).flatten()
        return {"policy": Term(feedback.mean(-advantage_T * decision.token_sum(decision.log_prob_R)), 0.3)}


def test_two_routing_samples_are_enumerated_together_and_their_tokens_counted() -> None:
    probe = make_probe(LeaveOneOut, 1, 1, 2, 3)
    assert probe.samples_its_policy() and error(probe) < 1e-10
    measured = measure_probe(probe, draws=10, samples=2, seed=0)
    assert measured.prob_N is not None and len(measured.prob_N) == 2**6 and measured.rows == 6


def test_samples_that_are_held_are_drawn_and_not_enumerated() -> None:
    probe = make_probe(LeaveOneOut, 1, 1, 2, 3, held=True)
    assert not probe.samples_its_policy() and measure_probe(probe, draws=10, samples=2, seed=0).prob_N is None


def test_a_layer_that_learns_in_its_turn_is_measured_in_its_turn_and_pays_for_the_others() -> None:
    class InTurn(ReinforceRouter):
        def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
            mine = feedback.context.step % 2 == self.shape.site_index
            return super().objective(decision, replace(feedback, loss_MT=feedback.loss_MT * mine))

        @property
        def num_samples(self) -> int:
            return 2  # of which it makes nothing, but 16 choices in two layers of two samples are too many to enumerate

    probe = make_probe(InTurn, 2, 1, 4, 3, baseline="none", discount=1.0)
    measured = measure_probe(probe, draws=200, samples=2, seed=0)
    for layer in (0, 1):
        signal, _, turns = measured.signals(layer)
        assert (signal.draws, turns) == (100, 2) and signal.gain.half_width is not None
        assert abs(signal.gain.mean - 1) < 2 * signal.gain.half_width and signal.variance.mean > 0


def test_draws_agree_with_what_is_enumerated() -> None:
    probe = reinforce(baseline="ema")(2, 1, 2, 2)
    drawn_NLTE = torch.cat([probe.estimates(500, seed) for seed in range(4)])
    estimates_NLTE, prob_N = enumerate_estimates(probe)
    for layer in range(2):
        target_P = exact.exact_gradient(probe, held=True)[layer].flatten().numpy()
        drawn = gradient_statistics.measure(drawn_NLTE[:, layer].flatten(1).numpy(), target_P)
        known = gradient_statistics.measure_enumerated(
            estimates_NLTE[:, layer].flatten(1).numpy(), prob_N.numpy(), target_P
        )
        for name in ("cosine", "gain", "variance"):
            interval, value = getattr(drawn, name), getattr(known, name).mean
            assert abs(interval.mean - value) < 2.5 * interval.half_width, name


def test_a_term_that_mixes_sequences_is_noticed_and_each_micro_batch_runs_alone() -> None:
    class Mixing(ReinforceRouter):
        def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
            centred = replace(feedback, loss_MT=feedback.loss_MT - feedback.loss_MT.mean())
            return {"policy": super().objective(decision, centred)["policy"]}

    assert reinforce()(1, 1, 2, 3).independent
    probe = make_probe(Mixing, 1, 1, 2, 3, baseline="none")
    alone = torch.cat(
        [probe.estimates(1, 0, ids_LNTK=ids) for ids in next(exact.joint_choices(2, 1, 1, 3)).split(1, 1)]
    )
    assert not probe.independent and torch.equal(enumerate_estimates(probe)[0], alone)


def test_weights_and_other_terms_are_no_part_of_the_signal() -> None:
    plain, other = (
        reinforce(baseline="ema", policy_weight=w, balance_weight=b, entropy_weight=b)(1, 1, 3, 2)
        for w, b in ((0.1, 0.0), (0.7, 0.5))
    )
    torch.testing.assert_close(plain.estimates(5, 1), other.estimates(5, 1), rtol=1e-12, atol=1e-14)


# Every router.

UNMEASURABLE = {
    **dict.fromkeys(("bandit", "hash", "uniform"), "no scores, so no gradient at logits"),
    **dict.fromkeys(("expert_choice", "remoe", "seq_top_k", "threshold", "top_p"), VARIABLE_K),
    "hash_gated": "its logits choose nothing",
    "soft": "it runs all experts, so nothing is chosen",
}


@pytest.mark.parametrize("form", ["own", "unit"])
@pytest.mark.parametrize("name", default_names())
def test_every_router_is_measured_or_says_why_not(name: str, form: str) -> None:
    try:
        probe = make_probe(router_class(name), 2, 1, 3, 2, form)
    except Unmeasurable as reason:
        assert str(reason) == UNMEASURABLE[name]
        return
    measured = measure_probe(probe, draws=20, samples=2, seed=0)
    signals = [measured.signals(layer)[0] for layer in (0, 1)]
    assert all(signal.norm > 0 and -1 <= signal.cosine.mean <= 1 for signal in signals)
    assert not probe.gates_follow or (form == "own" and "gate" in probe.routers[0].learns_from)


def test_the_model_that_is_measured_stays_as_it_is() -> None:
    config = ModelConfig(num_layers=1, num_experts=2, k=1, **SMALLEST)
    shape = ModelShape(vocab_size=V, seq_len=2, seed=3, backend="reference")
    model = Transformer(config, shape, lambda layer: SwitchRouter(SwitchRouter.Config(), layer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe = Probe(model, make_batch(2), step=0)
    probe.estimates(2, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.routers[0].forward.__func__ is SwitchRouter.forward  # type: ignore[attr-defined]


def test_routers_that_the_instrument_cannot_read_say_so() -> None:
    class OtherScores(SwitchRouter):
        def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
            return replace(super().forward(x_TD, context), logits_TE=x_TD @ self.scores.weight.T)

    class OwnRanking(SwitchRouter):
        def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
            logits_TE = self.scores(x_TD)
            ids_TK = logits_TE.argmax(1, keepdim=True)
            return RoutingDecision.token_choice(ids_TK, logits_TE.gather(1, ids_TK), 2, logits_TE=logits_TE)

    class Surrogate(SwitchRouter):
        def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
            decision = super().forward(x_TD, context)
            return replace(decision, gates_R=decision.gates_R + decision.gates_R - decision.gates_R.detach())

    for router, reason in ((OtherScores, "module"), (OwnRanking, "forced"), (Surrogate, "derivative")):
        with pytest.raises(Unmeasurable, match=reason):
            make_probe(router).forced(
                torch.ones(1, 1, 2, 1, dtype=torch.int64), torch.zeros(1, 2, 2).double(), held=True
            )


# Routers of other distributions.


class GroupLimited(SwitchRouter):
    """The better half of the groups of two experts, then the best experts in them (DeepSeek-V2)."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.scores(x_TD)
        best_TG = logits_TE.view(len(x_TD), -1, 2).amax(2)
        groups_TG = top_k(best_TG, best_TG.shape[1] // 2)
        kept_TE = torch.zeros_like(best_TG).scatter(1, groups_TG, 1).repeat_interleave(2, dim=1) > 0
        ids_TK = context.choose(logits_TE.masked_fill(~kept_TE, float("-inf")), self.shape.k)
        probs_TE = logits_TE.softmax(1)
        return RoutingDecision.token_choice(
            ids_TK, probs_TE.gather(1, ids_TK), logits_TE.shape[1], logits_TE=logits_TE, probs_TE=probs_TE
        )


class ZeroExperts(SwitchRouter):
    """Beside the experts two columns that return the token's input as it is (LongCat-Flash)."""

    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        assert isinstance(config, SwitchRouter.Config)
        super().__init__(config, shape)
        self.scores = LinearScores(replace(shape, num_experts=shape.num_experts + 2), "scores", 0.02)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = softmax_top_k(self.scores(x_TD), self.shape.k, context, normalize=False)
        experts, k = self.shape.num_experts, self.shape.k
        own_T = (decision.gates_R * (decision.expert_ids_R >= experts)).view(-1, k).sum(1)
        ids_R = decision.expert_ids_R.clamp(max=experts)
        return replace(decision, num_experts=experts, expert_ids_R=ids_R, self_T=own_T)


class Threshold(SwitchRouter):
    """As many of k slots as have a logit above -1, which untrained is all of them."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.scores(x_TD)
        ids_TK = context.choose(logits_TE.masked_fill(logits_TE < -1, float("-inf")), self.shape.k)
        gates_TK = torch.cat([logits_TE.sigmoid(), torch.zeros(len(x_TD), 1)], dim=1).gather(1, ids_TK)
        return RoutingDecision.token_choice(ids_TK, gates_TK, logits_TE.shape[1], logits_TE=logits_TE)


class ExpertChoice(SwitchRouter):
    """Each expert takes a token."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.scores(x_TD)
        ids_EC = context.choose(logits_TE.T, 1)
        return RoutingDecision.expert_choice(ids_EC, logits_TE.T.gather(1, ids_EC), len(x_TD), logits_TE=logits_TE)


class Soft(SwitchRouter):
    """All experts."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        return softmax_top_k(self.scores(x_TD), self.shape.num_experts, context, normalize=False)


@pytest.mark.parametrize("router", [GroupLimited, ZeroExperts])
@pytest.mark.parametrize(("layers", "k", "experts", "tokens"), [(1, 1, 4, 2), (1, 2, 4, 1), (2, 1, 4, 1)])
def test_first_rankings_over_groups_and_columns_beyond_the_experts_are_measured(
    layers: int, k: int, experts: int, tokens: int, router: type[Router]
) -> None:
    probe = make_probe(router, layers, k, experts, tokens)
    assert probe.gates_follow and probe.columns == experts + 2 * (router is ZeroExperts)
    check_finite_difference(probe, exact.exact_gradient(probe, held=False))
    measured = measure_probe(probe, draws=10, samples=2, seed=0)
    assert all(measured.signals(layer)[0].norm > 0 for layer in range(layers))


def test_the_choice_part_holds_all_weights_of_the_output() -> None:
    """On one layer it is the derivative of the probabilities alone."""
    probe = make_probe(ZeroExperts, 1, 2, 2, 2)
    shift_LTE, total = probe.zero_shift(), torch.zeros(())
    for ids_LNTK in exact.joint_choices(probe.columns, 2, 1, 2):
        loss_N, log_prob_LNT = probe.forced(ids_LNTK, shift_LTE, held=False)
        total = total + (log_prob_LNT.sum((0, 2)).exp() * loss_N.detach()).sum()
    want_LTE = torch.autograd.grad(total, shift_LTE)[0]
    assert float((exact.exact_gradient(probe, held=True) - want_LTE).abs().max()) < 1e-12
    assert float((exact.exact_gradient(probe, held=False) - want_LTE).abs().max()) > 1e-4


@pytest.mark.parametrize("router", [Threshold, ExpertChoice])
@pytest.mark.parametrize("sites", [(0,), (1,), (0, 1)])
def test_no_fixed_number_of_choices_at_any_site_is_named(router: type[Router], sites: tuple[int, ...]) -> None:
    config = ModelConfig(num_layers=2, num_experts=4, k=1, **SMALLEST)
    with pytest.raises(Unmeasurable, match="not a token choice of fixed k"):
        probe_of(config, 2, lambda s: (router if s.site in sites else SwitchRouter)(SwitchRouter.Config(), s))


def test_where_nothing_is_chosen_there_is_nothing_to_measure() -> None:
    with pytest.raises(Unmeasurable, match="runs all experts"):
        make_probe(Soft)


def test_attention_is_a_site_of_its_own_where_it_chooses_as_the_layers_do() -> None:
    def probe(experts: int) -> Probe:
        config = ModelConfig(num_layers=1, num_experts=2, k=1, attention_experts=experts, **SMALLEST)
        return probe_of(config, 2, lambda shape: SwitchRouter(SwitchRouter.Config(), shape))

    check_finite_difference(probe(2), exact.exact_gradient(probe(2), held=False))
    with pytest.raises(Unmeasurable, match="1 of 3 and 1 of 2 experts"):
        probe(3)
    sweep = Sweep(
        entries=("switch",), experts=(2,), layers=(1,), tokens=(2,), train_steps=(0,), seeds=1, attention=True
    )
    rows, unmeasured = run(sweep)
    assert [row.layer for row in rows] == ["0.attention", 0] and not unmeasured


def test_each_site_is_read_by_its_own_router() -> None:
    class OtherScores(SwitchRouter):
        def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
            return replace(super().forward(x_TD, context), logits_TE=x_TD @ self.scores.weight.T)

    config = ModelConfig(num_layers=2, num_experts=2, k=1, **SMALLEST)
    routers: list[type[Router]] = [ReinforceRouter, SwitchRouter]
    mixed = probe_of(config, 2, lambda shape: routers[shape.site_index](routers[shape.site_index].Config(), shape))
    check_finite_difference(mixed, exact.exact_gradient(mixed, held=False))
    with pytest.raises(Unmeasurable, match="module `scores`"):
        probe_of(config, 2, lambda s: (OtherScores if s.site == 1 else SwitchRouter)(SwitchRouter.Config(), s))


def test_a_run_of_several_routers_has_a_row_for_each_site() -> None:
    sweep = Sweep(entries=("switch",), train_steps=(1,), draws=5, seeds=1, warm_up=1)
    run_config = RunConfig(
        data=DataConfig(spec=sweep.corpus, seq_len=2),
        model=ModelConfig(num_layers=2, num_experts=2, k=1, **SMALLEST),
        router=SwitchRouter.Config(),
        others=(SitedRouter(sites="1", router=ReinforceRouter.Config()),),
        train=TrainConfig(steps=1, batch_size=4),
    )
    training = partial(Training, run_config, load_corpus(sweep.corpus))
    assert [r.layer for r in measure_case(Case("both", run_config), 1, training, sweep)] == [0, 1]


@dataclass(frozen=True)
class Point:
    """An entry point of a class that is here already."""

    router: type[Router]
    dist: None = None

    def load(self) -> type[Router]:
        return self.router


def named(router: type[Router], name: str) -> type[Router]:
    """Return a router under another name."""

    class Config(SwitchRouter.Config):
        pass

    made = type("Renamed", (router,), {"Config": Config})
    Config.name = name
    return made


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers of another distribution: failing late with 3 experts, not listening, wanting k = 2."""

    class Failing(SwitchRouter):
        def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
            if self.shape.num_experts == 3 and context.step > 0:
                raise RuntimeError("two lines\nof trouble")
            return super().forward(x_TD, context)

    class Deaf(SwitchRouter):
        def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
            return super().forward(x_TD, replace(context, choices={}))

    class Endless(SwitchRouter):
        def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
            decision = super().forward(x_TD, context)
            return replace(decision, gates_R=decision.gates_R * torch.inf) if context.explore else decision

    class Groups(SwitchRouter):
        def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
            context.choose(torch.zeros(len(x_TD), 5), 5)  # a ranking on the way, passed off as the choice
            return super().forward(x_TD, context)

    class Picky(SwitchRouter):
        @classmethod
        def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
            return super().refuses(config, shape) or (f"k = {shape.k}: legal is 2" if shape.k != 2 else None)

    made = {"failing": Failing, "deaf": Deaf, "endless": Endless, "groups": Groups, "picky": Picky}
    points = {name: Point(named(router, name)) for name, router in made.items()}
    found = registry._sources() | points
    monkeypatch.setattr(registry, "_sources", lambda: found)


@pytest.mark.usefixtures("others")
def test_who_fails_is_named_and_costs_the_others_nothing() -> None:
    size = {"layers": (1,), "tokens": (2,), "train_steps": (0, 2), "draws": 5, "seeds": 1, "warm_up": 1}
    alone = Sweep(entries=("switch",), experts=(4, 3), **size)  # type: ignore[arg-type]
    rows, unmeasured = run(replace(alone, entries=("failing", "deaf", "endless", "groups", "switch")))
    assert [row for row in rows if row.entry == "switch"] == run(alone)[0]
    assert [(row.experts, row.train_steps) for row in rows if row.entry == "failing"] == [(4, 0), (4, 2), (3, 0)]
    reasons = {(item.entry, item.where): item.reason for item in unmeasured}
    where = "E = 3, k = 1, layers = 1, tokens = 2, train_steps = 2"
    assert set(reasons) == {("failing", where), ("deaf", ""), ("endless", ""), ("groups", "")}
    assert reasons["failing", where] == "it fails by RuntimeError: two lines of trouble"
    assert "cannot be forced" in reasons["deaf", ""] and reasons["endless", ""] == "its gradient is not finite"
    assert "DecisionError: " in reasons["groups", ""] and "choices forced at site 0" in reasons["groups", ""]


@pytest.mark.usefixtures("others")
def test_where_nobody_is_named_routers_that_refuse_a_size_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(entries=default_entries(), k=(1, 2))
    kept, left_out = without_refusals(sweep)
    assert [(item.entry, item.reason) for item in left_out] == [("picky", "left out, k = 1: legal is 2")]
    assert set(kept.entries) == set(sweep.entries) - {"picky"}
    assert without_refusals(replace(sweep, k=(2,)))[1] == []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlroute.experiments.gradients.instrument.default_entries", lambda: ("picky", "switch"))
    done = rlroute("gradients", *SMALL, "--out", "g")
    assert done.code == 0 and "No figures for `picky`: left out, k = 1: legal is 2." in done.out, done.err
    assert {row["entry"] for row in json.loads((tmp_path / "g" / "gradients.json").read_text())["rows"]} == {"switch"}
    refused = rlroute("gradients", "picky", *SMALL, "--out", "h")
    assert refused.code == 2 and "k = 1: legal is 2" in refused.err and not (tmp_path / "h" / "gradients.md").exists()


# The statistics.


def synthetic(n: int, bias_P: np.ndarray, sd: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    target_P = np.array([3.0, 0.0, 4.0])
    noise_NP = np.random.default_rng(seed).normal(0, sd, (n, 3))
    return target_P + bias_P + noise_NP, target_P


def test_statistics_recover_a_known_bias_variance_and_ratio() -> None:
    signal = gradient_statistics.measure(*synthetic(4000, np.array([0.0, 2.5, 0.0]), 1.0))
    assert signal.draws == 4000 and signal.norm == 5.0
    assert gradient_statistics.relative_bias(signal.squared_bias).mean == pytest.approx(0.5, abs=0.02)
    assert signal.gain.mean == pytest.approx(1.0, abs=0.01)
    assert signal.variance.mean == pytest.approx(3 / 25, rel=0.05)
    assert signal.snr is not None and signal.snr.mean == pytest.approx(25 / 3, rel=0.05)
    assert signal.mean_cosine.mean == pytest.approx(1 / np.sqrt(1.25), abs=0.01)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_bias_interval_covers_as_often_as_it_says(offset: float) -> None:
    bias_P, hits, means = np.array([0.0, offset, 0.0]), 0, []
    for seed in range(200):
        interval = gradient_statistics.measure(*synthetic(30, bias_P, 3.0, seed)).squared_bias
        assert interval.low is not None and interval.high is not None
        hits += interval.low <= (offset / 5) ** 2 <= interval.high
        means.append(interval.mean)
    assert hits >= 176  # of 200: 95 %, less four standard errors
    assert np.mean(means) == pytest.approx((offset / 5) ** 2, abs=4 * np.std(means) / np.sqrt(200))


def test_the_noise_of_a_target_is_no_bias_of_the_estimator() -> None:
    random, found = np.random.default_rng(0), []
    for _ in range(300):
        target_P = np.array([3.0, 0.0, 4.0]) + random.normal(0, 0.5, 3)
        signal = gradient_statistics.measure(np.array([3.0, 0.0, 4.0]) + random.normal(0, 0.1, (20, 3)), target_P)
        corrected = gradient_statistics.without_target_error(signal, float(np.sqrt(0.75) / signal.norm))
        found.append((signal.squared_bias.mean, corrected.squared_bias.mean))
    noisy, rid = np.mean(found, axis=0)
    assert noisy == pytest.approx(0.75 / 25, rel=0.2) and abs(rid) < 0.2 * noisy


def test_statistics_of_signals_without_noise_and_without_direction() -> None:
    target_P = np.array([3.0, 4.0])
    still = gradient_statistics.measure(np.tile([6.0, 8.0], (5, 1)), target_P)
    assert (
        still.deterministic and still.snr is None and still.variance.mean == 0 and still.gain.mean == pytest.approx(2)
    )
    silent = gradient_statistics.measure(np.zeros((5, 2)), target_P)
    assert silent.cosine.mean == 0 and silent.squared_bias.mean == pytest.approx(1)
    away = gradient_statistics.measure(*synthetic(50, np.array([-6.0, 0.0, -8.0]), 1.0))
    assert away.snr is not None and away.snr.mean == 0 and away.cosine.mean < -0.9


# The command.

SMALL = ("--tokens", "2", "--layers", "1", "--experts", "2", "--seeds", "2", "--warm-up", "2", "--train-steps", "0,2")


def test_the_command_prints_a_table_and_writes_everything(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ("--d-model", "16", "--batch-size", "4", "--lr", "0.01")
    entries = ("reinforce:baseline=none", "switch", "hash")
    done = rlroute("gradients", *entries, *SMALL, *sizes, "--draws", "10", "--out", "g")
    assert done.code == 0, done.err
    rows = [line for line in done.out.splitlines() if line.startswith("| `")]
    assert len(rows) == 4 and "No figures for `hash`: no scores" in done.out
    assert (tmp_path / "g" / "gradients.md").read_text().strip() in done.out
    stored = json.loads((tmp_path / "g" / "gradients.json").read_text())
    assert (
        stored["command"].startswith("rlroute gradients")
        and stored["environment"]["torch"]
        and stored["seeds"] == [0, 1]
    )
    for config in stored["configs"].values() if isinstance(stored["configs"], dict) else stored["configs"]:
        text = json.dumps(config)
        assert '"d_model": 16' in text and '"batch_size": 4' in text and '"lr": 0.01' in text
    assert len(stored["rows"]) == 4 and len(stored["configs"]) == 3 and stored["unmeasured"][0]["entry"] == "hash"
    page = (tmp_path / "g" / "gradients.html").read_text()
    drawn = json.loads(re.findall(r'id="figures">(.*?)</script>', page, re.S)[0])
    assert set(drawn) == {"cosine", "bias", "tokens"} and all(f'id="{name}"' in page for name in drawn)
    assert "http://" not in page.partition("<script")[0]


def test_the_figures_of_the_documentation_are_those_of_the_stored_record() -> None:
    text = (ROOT / "docs" / "gradients.md").read_text()
    ((path, shown),) = re.findall(r"<!-- bench: (\S+) -->\n(.*?)<!-- end of bench -->", text, re.S)
    stored = json.loads((ROOT / path).read_text())
    assert shown == summary(stored)
    assert f"```\n{stored['command']}\n```" in text and not stored["environment"]["dirty"]
    measured = {row["entry"] for row in stored["rows"]} | {row["entry"] for row in stored["unmeasured"]}
    assert measured <= set(default_entries())  # those that there were when it was made
    table = (ROOT / path).with_suffix(".md").read_text()
    assert table.count("\n| `") == len(stored["rows"]) and (ROOT / path).stat().st_size < 10**6


def test_sizes_vary_together_or_one_at_a_time() -> None:
    sweep = Sweep(entries=("switch",), experts=(4, 2, 8), k=(1, 2), layers=(1,), one_at_a_time=True)
    assert [(c.config.model.num_experts, c.config.model.k) for c in sweep.cases()] == [(4, 1), (2, 1), (8, 1), (4, 2)]
    with pytest.raises(ConfigError, match="k = 2 with experts = 2"):
        replace(sweep, one_at_a_time=False).cases()


def test_the_same_command_gives_the_same_figures() -> None:
    sweep = Sweep(
        entries=("noisy_topk",), experts=(2,), layers=(1,), tokens=(2,), train_steps=(1,), draws=9, seeds=1, warm_up=1
    )
    assert run(sweep) == run(sweep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--experts", "2,x"), "experts = '2,x': want whole numbers parted by commas"),
        (("--experts", "2,2"), "--experts = '2,2': want different numbers, parted by commas"),
        (("--tokens", "0"), "--tokens = 0: legal are numbers from 1 to 4096"),
        (("--k", "4"), "k = 4 with experts = 4: nothing is chosen"),
        (("--experts", "64", "--k", "3"), "experts = 64 with k = 3: 249984 choices of a token, legal are 4096"),
        (("--draws", "2"), "--draws = 2: legal are numbers from 3"),
        (("--seeds", "0"), "--seeds = 0: legal are numbers from 1"),
        (("--d-model", "0"), "--d-model = 0: legal are numbers from 1"),
        (("--d-model", "10"), "model.d_model = 10"),
        (("--lr", "0"), "--lr = 0"),
        (("dense",), "entry 'dense': the dense model has no router"),
        (("swich",), "unknown router 'swich'"),
        (("switch", "switch"), "entries = 'switch switch'"),
        (("--corpus", "tarball"), "corpus 'tarball': unknown"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = rlroute("gradients", *arguments)
    assert done.code == 2 and done.err.startswith("error:") and message in done.err and len(done.err.splitlines()) == 1
    assert not any(tmp_path.rglob("*.*"))


def test_an_unknown_gate_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.gate_form = 'soft'"):
        Sweep(entries=("switch",), gate_form="soft").cases()
