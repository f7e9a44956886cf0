"""The seam between routers and the rest: choosing, what layers add to the pairs, what routers are told, what is
refused.

Shape suffixes: T tokens, D model width, E experts, K slots per token, C tokens per expert, R pairs, S shared experts.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlroute.balance import (
    communication_balance,
    device_balance,
    entropy_T,
    load_balance,
    router_z,
    sequence_balance,
)
from rlroute.config import RunConfig
from rlroute.errors import ConfigError, DecisionError
from rlroute.kernels.activations import activate
from rlroute.learning import adapt, count, learn
from rlroute.model import ModelShape, Transformer
from rlroute.model.moe import apply_gate_form
from rlroute.model.wishes import stand_in
from rlroute.registry import default_names, router_class
from rlroute.routing import Feedback, RoutingDecision, Sums, Term
from rlroute.training.prepare import check
from rlroute.training.step import backward_batch
from tests.conftest import draw, make_context, make_feedback, make_shape
from tests.tiny import CPU64, DATA, V, make_batch, run_batch, shake, small_config
from tests.toys import ToyRouter, toy_model

slowly = settings(derandomize=True, deadline=None, max_examples=60)

# Choosing

SCORES = st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0]), min_size=5, max_size=5)


@slowly
@given(st.lists(SCORES, min_size=1, max_size=4), st.integers(1, 5))
def test_choose_takes_the_best_ties_to_the_lower_id_and_never_minus_infinity(rows: list[list[float]], k: int) -> None:
    chosen = make_context(len(rows)).choose(torch.tensor(rows), k)
    for row, ids in zip(rows, chosen.tolist(), strict=True):
        legal = sorted((i for i in range(5) if row[i] > -torch.inf), key=lambda i: (-row[i], i))[:k]
        assert ids == legal + [5] * (k - len(legal))


def test_choices_are_forced_at_their_site_and_nowhere_else() -> None:
    forced_TK = torch.tensor([[3, 0], [4, 4]])
    scores_TE, own_TK = draw(2, 4), torch.tensor([[1, 2], [0, 1]])
    context = replace(make_context(2), choices={1: forced_TK})
    for site, taken in ((1, True), ("1.attention", False), (2, False)):
        there = replace(context, site=site)
        assert torch.equal(there.choose(scores_TE, 2), forced_TK) == taken
        assert torch.equal(there.take(own_TK), forced_TK if taken else own_TK)
    for wrong in (forced_TK.t()[:1], forced_TK[:1], forced_TK.flatten()):
        with pytest.raises(DecisionError, match=r"forced at site 1 have shape .*: want \(2, 2\)"):
            replace(context, choices={1: wrong}).choose(scores_TE, 2)


def test_experts_choose_by_transposed_scores_and_leave_slots_unused() -> None:
    scores_TE = torch.tensor([[0.1, -torch.inf], [0.3, -torch.inf], [0.2, 0.5]])
    ids_EC = make_context(3).choose(scores_TE.t(), 2)
    assert ids_EC.tolist() == [[1, 2], [2, 3]]
    decision = RoutingDecision.expert_choice(ids_EC, torch.ones(2, 2), 3)
    assert decision.used_R.tolist() == [True, True, True, False]
    assert decision.demand_E().tolist() == decision.load_E().tolist() == [2, 1]
    assert int(decision.token_ids_R.max()) < 3, "an unused pair still has a token that is there"
    assert decision.token_sum(torch.ones(4)).tolist() == [0, 1, 2]


def test_unused_slots_of_tokens_count_nowhere() -> None:
    ids_TK = torch.tensor([[0, 4], [4, 4], [3, 1]])
    decision = RoutingDecision.token_choice(ids_TK, torch.ones(3, 2), 4)
    assert decision.demand_E().tolist() == decision.load_E().tolist() == [1, 1, 0, 1]
    assert decision.token_sum(torch.ones(6)).tolist() == [1, 0, 2] and decision.k == 2


# What a layer adds beside the pairs


def by_hand(model: Any, x_TD: Tensor, decision: RoutingDecision) -> Tensor:
    """The layer's output, pair by pair and expert by expert."""
    moe, out_TD = model.layers[0].moe, torch.zeros_like(x_TD)

    def expert(x_D: Tensor, in_HD: Tensor, out_DF: Tensor) -> Tensor:
        return out_DF @ activate((in_HD @ x_D)[None], "swiglu")[0]

    pairs = zip(decision.token_ids_R.tolist(), decision.expert_ids_R.tolist(), decision.gates_R, strict=True)
    rows = list(out_TD.unbind(0))
    for (token, chosen, gate), kept in zip(pairs, decision.kept_R.tolist(), strict=True):
        if kept and chosen < decision.num_experts:
            rows[token] = rows[token] + gate * expert(
                x_TD[token], moe.experts.in_EHD[chosen], moe.experts.out_EDF[chosen]
            )
    for token in range(len(rows)):
        if decision.self_T is not None:
            rows[token] = rows[token] + decision.self_T[token] * x_TD[token]
        shared = moe.config.num_shared_experts
        for one in range(shared):
            in_HD, out_DF = moe.shared.experts.in_EHD[0], moe.shared.experts.out_EDF[0]
            inner = out_DF.shape[1] // shared
            part = torch.arange(one * inner, (one + 1) * inner)
            gate = 1.0 if decision.shared_gates_TS is None else decision.shared_gates_TS[token, one]
            y_D = expert(x_TD[token], in_HD[torch.cat([part, part + shared * inner])], out_DF[:, part])
            rows[token] = rows[token] + gate * y_D
    return torch.stack(rows)


ADDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "own input": ({"own": 0.7}, {}),
    "shared gates": ({"shared": True}, {"num_shared_experts": 2}),
    "both, with unused slots": ({"own": 0.7, "shared": True, "rule": "threshold"}, {"num_shared_experts": 2}),
    "both, with a bound": ({"own": 0.7, "shared": True, "share": 1.5}, {"num_shared_experts": 2}),
    "neither": ({}, {"num_shared_experts": 2}),
}


@pytest.mark.parametrize(("router", "fields"), ADDED.values(), ids=ADDED.keys())
def test_own_input_and_shared_gates_are_those_of_a_loop(router: dict[str, Any], fields: dict[str, Any]) -> None:
    model = toy_model(small_config(**fields), **router)
    x_TD, context = draw(12, 8).requires_grad_(), replace(make_context(12), site=0)
    out_TD, decision = model.layers[0].moe(x_TD, context)
    leaves = [x_TD, *model.layers[0].moe.parameters()]
    found, want = (
        torch.autograd.grad((out * draw(12, 8, seed=4)).sum(), leaves, retain_graph=True)
        for out in (out_TD, by_hand(model, x_TD, decision))
    )
    torch.testing.assert_close(out_TD, by_hand(model, x_TD, decision), rtol=0, atol=1e-12)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_shared_gates_of_one_are_none_at_all() -> None:
    mlp, x_TD = toy_model(small_config(num_shared_experts=3)).layers[0].moe.shared, draw(5, 8)
    assert torch.equal(mlp(x_TD, torch.ones(5, 3)), mlp(x_TD))
    halves_TD = mlp(x_TD, torch.full((5, 3), 0.5))
    torch.testing.assert_close(halves_TD, mlp(x_TD) / 2)


# The form of the gate


@pytest.mark.parametrize("rule", ["top", "threshold", "experts", "soft"])
def test_unit_gates_of_a_token_sum_to_one_over_the_pairs_that_it_uses(rule: str) -> None:
    config = small_config(gate_form="unit", num_experts=8)
    _, decisions = run_batch(toy_model(config, rule=rule), make_batch())
    for decision in decisions:
        pairs_T = decision.token_sum(torch.ones_like(decision.gates_R))
        want_T = (pairs_T > 0).double()
        torch.testing.assert_close(decision.token_sum(decision.gates_R), want_T, rtol=0, atol=1e-12)
    assert rule in ("top", "soft") or len(pairs_T.unique()) > 1, "tokens use different numbers of pairs"


def test_unit_gates_keep_the_gradient_of_the_routers_own() -> None:
    gates_TK = draw(3, 2).requires_grad_()
    decision = RoutingDecision.token_choice(torch.tensor([[0, 4], [4, 4], [3, 1]]), gates_TK, 4)
    unit = apply_gate_form(decision, "unit")
    assert unit.gates_R.view(3, 2)[0, 0] == 1 and unit.gates_R.view(3, 2)[2].tolist() == pytest.approx([0.5, 0.5])
    unit.gates_R.sum().backward()
    assert gates_TK.grad is not None and bool((gates_TK.grad == 1).all())


@pytest.mark.parametrize("order", ["position", "gate"])
def test_the_form_of_the_gate_drops_no_other_pairs(order: str) -> None:
    """The order by gate is that of the router's own gates, also where all values are 1/k."""
    config = small_config(num_layers=1, capacity_factor=0.6, capacity_order=order)
    kept = [
        run_batch(shake(toy_model(replace(config, gate_form=form))), make_batch())[1][0].kept_R
        for form in ("own", "unit")
    ]
    assert torch.equal(*kept) and not kept[0].all()


# What routers are told


def test_adapt_gets_progress_and_sums_over_the_sites_of_the_same_router() -> None:
    model = toy_model(small_config(num_layers=3, attention_experts=4, num_heads=2), rule="threshold")
    result = backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=2, progress=0.25)
    adapt(model.routers, result.sums_L, 0.25)
    seen = [router.seen[-1] for router in model.routers]
    assert len(seen) == 6 and {progress for progress, _, _ in seen} == {0.25}
    assert {total for _, _, total in seen} == {int(result.pairs_L.sum())}
    assert [own for _, own, _ in seen] == result.pairs_L.tolist() and len(set(result.pairs_L.tolist())) > 1


def test_sites_of_another_router_or_size_are_no_peers() -> None:
    toy, other = ToyRouter.Config(), ToyRouter.Config(own=0.5)
    sites = [(toy, 8), (other, 8), (toy, 8), (toy, 4)]
    routers = [ToyRouter(config, make_shape(experts, site=n)) for n, (config, experts) in enumerate(sites)]
    sums_L = [{"load_E": torch.full((experts,), n + 1)} for n, (_, experts) in enumerate(sites)]
    adapt(routers, sums_L, 1.0)
    assert [router.seen[-1][2] for router in routers] == [8 * 4, 8 * 2, 8 * 4, 4 * 4]


def test_progress_and_micro_batches_are_in_the_context() -> None:
    model, seen = toy_model(small_config()), []
    model.routers[0].register_forward_hook(lambda router, inputs, decision: seen.append(inputs[1]))
    backward_batch(model, make_batch(4), CPU64, seed=0, step=0, micro_batches=2, progress=0.75)
    assert [(context.progress, context.micro_batch, context.site) for context in seen] == [(0.75, 0, 0), (0.75, 1, 0)]


def test_the_decision_before_reaches_the_next_site_with_gradients() -> None:
    """In the order of the blocks: attention, feed-forward layer, next block; nothing comes before the first."""
    model, seen = toy_model(small_config(attention_experts=4), rule="carry"), []
    for router in model.routers:
        router.register_forward_hook(lambda router, inputs, decision: seen.append((inputs[1], decision)))
    run_batch(model, make_batch())
    assert [context.site for context, _ in seen] == ["0.attention", 0, "1.attention", 1]
    assert seen[0][0].previous is None
    for (_, before), (context, _) in pairwise(seen):
        assert torch.equal(context.previous.logits_TE, before.logits_TE)
    loss = sum(context.previous.logits_TE[:, 0].sum() for context, _ in seen[1:])
    gradients = torch.autograd.grad(loss, [router.scores.weight for router in model.routers[:3]])
    assert all(bool((gradient != 0).any()) for gradient in gradients)


def test_dense_layers_in_between_hand_nothing_on_and_lose_nothing() -> None:
    model = toy_model(small_config(num_layers=3, num_dense_layers=1), rule="carry")
    _, decisions = run_batch(model, make_batch())
    assert len(decisions) == 2 and [router.shape.site for router in model.routers] == [1, 2]
    assert [router.shape.site_index for router in model.routers] == [0, 1]
    assert {router.shape.num_sites for router in model.routers} == {2}


# Terms by configuration

TERMS = ("entropy", "balance", "z", "device_balance", "sequence_balance", "communication_balance")
WEIGHTS: dict[str, Any] = {f"{name}_weight": 0.1 * (n + 1) for n, name in enumerate(TERMS)}


def by_definition(decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
    """The value of each term where the micro-batch is the step."""
    context = feedback.context
    assert decision.probs_TE is not None and decision.logits_TE is not None
    return {
        "entropy": -entropy_T(decision.probs_TE).mean(),
        "balance": load_balance(decision.probs_TE, decision, context),
        "z": router_z(decision.logits_TE).mean(),
        "device_balance": device_balance(decision.probs_TE, decision, context),
        "sequence_balance": sequence_balance(decision.probs_TE, decision, context),
        "communication_balance": communication_balance(decision.probs_TE, decision, context),
    }


@pytest.mark.parametrize("name", [n for n in default_names() if router_class(n).publishes])
def test_every_scored_router_takes_its_terms_from_its_configuration(name: str) -> None:
    """Gradients are those of the sum written out by hand, beside what the router has of its own."""
    cls = router_class(name)
    gradients = []
    for weights in (dict[str, Any].fromkeys(WEIGHTS, 0.0), WEIGHTS):
        router = cls(cls.Config(**weights), make_shape(8, 2, devices=4)).double()
        context = make_context(12, samples=router.num_samples).at(router.shape, {})
        x_TD = draw(12 * router.num_samples, 6)
        decision = stand_in(router, router(x_TD, context), x_TD)
        feedback = make_feedback(context)
        loss: Tensor | float = 0.0
        if weights is not WEIGHTS:
            loss = sum(WEIGHTS[f"{n}_weight"] * value for n, value in by_definition(decision, feedback).items())
        terms = learn([router], [decision], feedback, loss).terms_L[0]
        gradients.append({n: p.grad for n, p in router.named_parameters()})
        if weights is WEIGHTS:
            assert {n: t.weight for n, t in terms.items() if n in TERMS} == {n: WEIGHTS[f"{n}_weight"] for n in TERMS}
            for term, value in by_definition(decision, feedback).items():
                torch.testing.assert_close(terms[term].value.double(), value.double())
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", [n for n in default_names() if not router_class(n).publishes])
def test_routers_without_scores_refuse_terms_by_name_before_any_work(name: str, weight: str) -> None:
    weights: dict[str, Any] = {weight: 0.5}
    config = router_class(name).Config(**weights)
    with pytest.raises(ConfigError, match=rf"router {name}: {weight} = 0\.5: .* legal is 0"):
        check({RunConfig(data=DATA, router=config): [0]})


def test_weights_are_logged_by_site() -> None:
    """Also where a site has no such term: its weight there is 0."""
    switch = router_class("switch")
    configs = [switch.Config(balance_weight=0.7, z_weight=0.2), switch.Config(balance_weight=0.3)]
    shape = ModelShape(vocab_size=V, seq_len=8, seed=0, backend="cpu")
    model = Transformer(small_config(), shape, lambda site: switch(configs[site.site_index], site)).double()
    result = backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=2)
    assert result.weights == {"balance": [0.7, 0.3], "z": [0.2, 0.0]}
    assert result.terms["z"][0] > 0 == result.terms["z"][1]


@pytest.mark.parametrize("claim", ["demand_E", "load_E", "without", "loss", "tokens"])
def test_what_is_counted_cannot_be_claimed_in_observe(claim: str) -> None:
    class Liar(ToyRouter):
        def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
            return {claim: torch.ones(())}

    router, context = Liar(Liar.Config(), make_shape(8, 2)).double(), make_context(12)
    with pytest.raises(DecisionError, match=f"observes '{claim}', which is counted"):
        learn([router], [router(draw(12, 6), context)], make_feedback(context))


def test_what_a_gate_means_depends_on_the_configuration() -> None:
    switch: Any = router_class("switch")
    told = {
        (n, k): switch(switch.Config(normalize=n), make_shape(8, k)).gate_meaning for n in (True, False) for k in (1, 2)
    }
    plain = "softmax over all experts"
    assert told == {
        (True, 2): f"{plain}, renormalised over the chosen",
        **dict.fromkeys([(True, 1), (False, 1), (False, 2)], plain),
    }


def test_objectives_hold_what_is_a_routers_own() -> None:
    """Else a term of the configuration would count twice."""
    for name in default_names():
        cls = router_class(name)
        router = cls(cls.Config(**(WEIGHTS if cls.publishes else {})), make_shape(8, 2)).double()
        context = make_context(12, samples=router.num_samples)
        x_TD = draw(12 * router.num_samples, 6)
        decision = stand_in(router, router(x_TD, context), x_TD)
        own: dict[str, Term] = router.objective(decision, make_feedback(context))
        assert not own.keys() & set(TERMS), name
        assert not router.observe(decision, make_feedback(context)).keys() & {"demand_E", "load_E", "tokens", "loss"}


def test_sums_over_sites_are_those_of_all_peers() -> None:
    sums = Sums({"a": torch.ones(2)}, [{"a": torch.ones(2)}, {"a": torch.full((2,), 3.0)}])
    assert sums.over_sites("a").tolist() == [4, 4] and sums["a"].tolist() == [1, 1]


def test_a_pair_that_runs_for_its_gradient_alone_weighs_nothing_under_unit() -> None:
    """So does a router that runs every expert in training: what it did not choose has gates of 0, and a gradient."""
    gates_TK = torch.tensor([[0.0, 0.5, 0.2], [0.3, 0.0, 0.0]], requires_grad=True)
    decision = RoutingDecision.token_choice(torch.tensor([[0, 1, 2], [2, 1, 4]]), gates_TK, 4)
    unit = apply_gate_form(decision, "unit")
    assert unit.gates_R.tolist() == pytest.approx([0.0, 0.5, 0.5, 1.0, 0.0, 0.0])
    unit.gates_R.sum().backward()
    assert gates_TK.grad is not None and bool((gates_TK.grad == 1).all())


def test_each_site_learns_in_the_context_that_it_decided_in_and_finds_its_gates_gradients() -> None:
    model, decided, told = toy_model(small_config(attention_experts=4, devices=2)), [], []
    for router in model.routers:
        router.register_forward_hook(lambda router, inputs, decision: decided.append(inputs[1]))

        def observe(decision: RoutingDecision, feedback: Any) -> dict[str, Tensor]:
            assert decision.gates_R.grad is not None and bool((decision.gates_R.grad != 0).any())
            told.append(feedback.context)
            return {}

        router.observe = observe
    backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=1)
    assert [context.site for context in told] == ["0.attention", 0, "1.attention", 1]
    for context, before in zip(told, decided, strict=True):
        assert context.site == before.site and list(context.earlier) == list(before.earlier)
        devices = (context.expert_device_E, before.expert_device_E)
        assert devices == (None, None) if isinstance(context.site, str) else torch.equal(*devices)


def test_tokens_for_which_no_expert_ran_are_counted() -> None:
    """A token without a pair, one whose pairs were all dropped, one with a pair left; padding counts nowhere."""
    ids_TK = torch.tensor([[4, 4], [0, 1], [2, 4], [4, 4]])
    decision = RoutingDecision.token_choice(ids_TK, torch.ones(4, 2), 4)
    decision = replace(decision, kept_R=torch.tensor([1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.bool))
    context = make_context(4, mask_T=torch.tensor([True, True, True, False]))
    assert int(count(decision, make_feedback(context))["without"]) == 2
