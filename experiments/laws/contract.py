"""The laws of the router contract, as functions that assert: what ``rlroute check`` and the tests hold a router to.

Shape suffixes: T tokens (rows of all routing samples), D model width, E experts, K experts per token, R routed pairs.
"""

import pickle
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rlroute import learning
from rlroute.errors import ConfigError
from rlroute.experiments.laws.cases import SHAPES, Case
from rlroute.experiments.laws.steps import (
    Batch,
    adapt,
    backward,
    decide,
    gates_TE,
    make_batch,
    run,
    same,
    spread,
    state,
    terms_of,
    with_a_past,
)
from rlroute.model.capacity import drop_over_capacity


def law_attributes(case: Case) -> None:
    router = case.make()
    assert router.learns_from <= {"gate", "reward", "load"} and router.gate_meaning and router.num_samples >= 1


def law_pairs(case: Case) -> None:
    for tokens, experts, k in case.shapes:
        router = case.make(experts, k)
        for explore in (True, False):
            decision = decide(router, tokens, explore=explore)
            rows = tokens * router.num_samples
            used_R = decision.used_R
            assert (decision.num_tokens, decision.num_experts) == (rows, experts)
            assert bool(((decision.expert_ids_R >= 0) & (decision.expert_ids_R <= experts)).all())
            assert bool(((decision.token_ids_R >= 0) & (decision.token_ids_R < rows)).all())
            pairs_R = (decision.token_ids_R * experts + decision.expert_ids_R)[used_R]
            assert len(set(pairs_R.tolist())) == len(pairs_R), "an expert twice for a token"
            assert bool(decision.gates_R.isfinite().all()) and bool(decision.kept_R.all())
            if decision.k is not None:
                assert torch.equal(decision.token_ids_R, torch.arange(rows).repeat_interleave(decision.k))


def law_scores(case: Case) -> None:
    for tokens, experts, k in case.shapes:
        router = case.make(experts, k)
        decision = decide(router, tokens)
        carried = {"logits": decision.logits_TE, "probs": decision.probs_TE}
        assert router.publishes == {name for name, scores in carried.items() if scores is not None}, "`publishes` lies"
        for scores_TX in carried.values():  # of X columns, of which the first E are experts
            assert scores_TX is None or (len(scores_TX) == decision.num_tokens and scores_TX.shape[1] >= experts)
            assert scores_TX is None or bool(scores_TX.isfinite().all())
        if decision.probs_TE is not None:
            assert bool((decision.probs_TE >= 0).all())
            assert torch.allclose(decision.probs_TE.sum(1), torch.ones(decision.num_tokens).double(), atol=1e-12)
        if decision.log_prob_R is not None:
            assert bool((decision.log_prob_R <= 1e-12).all()) and bool(decision.log_prob_R.isfinite().all())


def law_precision(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        router = case.make(dtype=dtype)
        batch = make_batch(router)
        decision = router(batch.x_TD.to(dtype), batch.context)
        scores = (decision.logits_TE, decision.probs_TE, decision.log_prob_R)
        parts = (decision.gates_R, *scores, decision.self_T, decision.shared_gates_TS)
        assert all(part is None or part.dtype == dtype for part in parts)


def law_terms(case: Case) -> None:
    for tokens, experts, k in case.shapes:
        router = case.make(experts, k)
        batch = make_batch(router, tokens)
        for term in terms_of(router, run(router, batch), batch.feedback).values():
            assert term.value.shape == () and bool(term.value.isfinite()) and term.weight >= 0


def law_evaluation(case: Case) -> None:
    """Greedy evaluation is deterministic, changes no state, samples nothing, and does not ask whether the module is
    training.
    """
    router = with_a_past(case.make())
    before = state(router)
    first, again = decide(router, explore=False), decide(router, explore=False)
    assert same(first, again) and same(first, decide(router.eval(), explore=False))
    assert same(decide(router, explore=True), decide(router.train(), explore=True))
    assert same(before, state(router)) and first.log_prob_R is None


def law_keys(case: Case) -> None:
    """The keys of the context decide what is drawn, and nothing else does."""
    router = spread(case.make())
    torch.manual_seed(1)
    first = decide(router, tokens=64)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same(first, decide(router, tokens=64))
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, decide(router, tokens=64, micro_batch=3)), "micro-batches are cut as the machines allow"
    others = [
        decide(router, tokens=64, **key) for key in ({"seed": 5}, {"step": 5}, {"site": 5}, {"site": "1.attention"})
    ]
    if router.stochastic:
        assert not any(torch.equal(first.expert_ids_R, other.expert_ids_R) for other in others)
    if (
        not case.changed and not router.two_rules
    ):  # a choice may add noise that is no sampling of the policy, as jitter does
        greedy = decide(router, tokens=64, explore=False)
        assert router.stochastic != torch.equal(first.expert_ids_R, greedy.expert_ids_R)


def law_causal(case: Case) -> None:
    """What comes later in a sequence changes no greedy route, unless the router says that it is not causal; then it
    does. Nor does it change a route in training, but where that has another rule or mixes tokens.
    """
    router = spread(case.make())
    for explore in (False, True):
        batch = make_batch(router, tokens=64, length=16, explore=explore)
        early_T = batch.context.position_T < 9
        later = torch.where(early_T[:, None], batch.x_TD, batch.x_TD.flip(0) - 1)
        unlike, want = (router(x_TD, batch.context) for x_TD in (later, batch.x_TD))
        equal = torch.allclose(gates_TE(unlike)[early_T], gates_TE(want)[early_T], rtol=0, atol=1e-12)
        if not explore:
            assert equal == router.causal
        elif router.causal and not router.batch_dependent and not router.two_rules:
            assert equal


def law_surroundings(case: Case) -> None:
    """A router decides and learns wherever it stands: behind another site, with experts on devices, late in the
    budget.
    """
    router = case.make(devices=2)
    batch = make_batch(router, progress=0.7)
    before = router(batch.x_TD, batch.context.at(router.shape, {}))
    batch = replace(batch, context=batch.context.at(router.shape, {0: before}))
    outcome = backward(router, batch)
    learning.adapt([router], [outcome.sums], progress=0.9)
    parts = [decide(router, progress=1.0).gates_R, *outcome.values.values(), *outcome.gradients.values()]
    assert all(bool(part.isfinite().all()) for part in parts)


def law_initialisation(case: Case) -> None:
    """Initial weights and tables derive from the seed alone."""
    torch.manual_seed(1)
    first = state(case.make(seed=4))
    torch.manual_seed(2)
    assert same(first, state(case.make(seed=4)))


def law_purity(case: Case) -> None:
    """Forward, objective and observe change neither state nor input."""
    router = with_a_past(case.make())
    batch, before = make_batch(router), state(router)
    x_TD = batch.x_TD.clone()
    backward(router, batch)
    assert same(before, state(router)) and torch.equal(x_TD, batch.x_TD)


def law_pickle(case: Case) -> None:
    router = with_a_past(case.make())
    assert same(decide(router).detach(), decide(pickle.loads(pickle.dumps(router))).detach())
    assert pickle.loads(pickle.dumps(case.config)) == case.config


def law_permutation(case: Case) -> None:
    """Tokens in another order, keys with them, get the same experts and gates."""
    router = case.make()
    batch = make_batch(router)
    order_T = torch.arange(12).flip(0).view(4, 3).t().reshape(-1)
    order_T = torch.cat([order_T + 12 * sample for sample in range(router.num_samples)])
    moved = batch.rows(order_T)
    got, want = router(moved.x_TD, moved.context), router(batch.x_TD, batch.context)
    assert torch.allclose(gates_TE(got), gates_TE(want)[order_T], rtol=0, atol=1e-12)


def law_neighbours(case: Case) -> None:
    """Where the rule does not mix tokens, a token is routed alike whatever else is in the batch."""
    router = case.make()
    if not router.batch_dependent:
        batch = make_batch(router)
        first_T = batch.context.sequence_T == batch.context.sequence_T[0]
        part = batch.rows(first_T)
        got, want = router(part.x_TD, part.context), router(batch.x_TD, batch.context)
        assert torch.allclose(gates_TE(got), gates_TE(want)[first_T], rtol=0, atol=1e-12)


def law_accumulation(case: Case) -> None:
    """Two micro-batches equal one batch in values, gradients and sums, unless the rule is declared to mix tokens; then
    they do not.
    """
    router = with_a_past(case.make())
    mask_T = torch.tensor(
        [1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool
    )  # 5 + 3 valid tokens, unequal on purpose
    batch = make_batch(router, mask_T=mask_T.repeat(router.num_samples))
    last_T = batch.context.sequence_T == batch.context.sequence_T[-1]
    parts = backward(router, batch.rows(~last_T)) + backward(router, batch.rows(last_T))
    whole = backward(router, batch)
    if not router.batch_dependent:
        assert parts.close_to(whole)
    elif not router.original.config.mixes_tokens:  # a balance term of the configuration may happen not to move
        assert not parts.close_to(whole)


def law_padding(case: Case) -> None:
    """What stands in padding rows counts nowhere."""
    router = with_a_past(case.make())
    mask_T = (torch.arange(12) % 4 != 3).repeat(router.num_samples)
    batch = make_batch(router, mask_T=mask_T)
    other = Batch(
        torch.where(mask_T[:, None], batch.x_TD, 9 * batch.x_TD + 1),
        batch.credit_TE,
        torch.where(mask_T, batch.loss_T, 50.0),
        batch.context,
        batch.num_valid,
    )
    assert backward(router, batch).close_to(backward(router, other))


def law_demand(case: Case) -> None:
    """Demand is what was chosen: dropping pairs changes neither it nor any term but those that speak of rewards."""
    router = with_a_past(case.make())
    batch = make_batch(router)
    decision = run(router, batch)
    dropped = drop_over_capacity(decision, 1 / decision.num_tokens, 1)  # one pair an expert
    assert int(dropped.load_E().sum()) < int(decision.load_E().sum())
    assert torch.equal(dropped.demand_E(), decision.demand_E())
    terms, after = (terms_of(router, d, batch.feedback) for d in (decision, dropped))
    rewarded = router.objective(decision, replace(batch.feedback, loss_MT=2 * batch.feedback.loss_MT + 1))
    for name in terms:
        if name not in rewarded or torch.equal(terms[name].value, rewarded[name].value):
            assert torch.equal(after[name].value, terms[name].value), name


def law_gate_signal(case: Case) -> None:
    """The loss reaches the parameters through the gates exactly where the router says so, k = 1 and an evaluation in
    between included.
    """
    for tokens, experts, k in case.shapes:
        outcome = backward(
            case.make(experts, k), make_batch(case.make(experts, k), tokens), terms=False, interrupted=True
        )
        reached = any(gradient.any() for gradient in outcome.gradients.values())
        assert reached == ("gate" in case.make(experts, k).learns_from), f"T = {tokens}, E = {experts}, k = {k}"


def law_reward_signal(case: Case) -> None:
    """Other losses teach something else exactly where the router says that it learns from reward."""

    def learned(loss_seed: int, experts: int, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        router = with_a_past(case.make(experts, k))
        outcome = backward(router, make_batch(router, loss_seed=loss_seed), interrupted=True)
        adapt(router, outcome.sums)
        return outcome.gradients, state(router), decide(router, tokens=64, explore=False).expert_ids_R

    for _, experts, k in case.shapes[:2]:
        (gradients, after, ids_R), (other_gradients, other_after, other_ids_R) = (
            learned(s, experts, k) for s in (3, 4)
        )
        differs = not same(gradients, other_gradients) or not torch.equal(ids_R, other_ids_R)
        if "reward" in case.make(experts, k).learns_from:
            assert differs or not case.teaches, f"k = {k}"
        else:
            assert not differs and same(after, other_after), f"k = {k}"


def law_load_signal(case: Case) -> None:
    """Only what learns from load or reward moves in ``adapt``, and what learns from load does."""
    router = case.make()
    before = state(router)
    moved = not same(before, state(with_a_past(router)))
    if "load" in router.learns_from:
        assert moved
    elif "reward" not in router.learns_from:
        assert not moved


def law_every_parameter_moves(case: Case) -> None:
    """No parameter is idle: plain gradient descent moves each that is not frozen in four steps, evaluations in between
    or not.
    """
    router = case.make()
    before = state(router)
    for step in range(4):
        outcome = backward(router, make_batch(router, step=step), interrupted=True)
        with torch.no_grad():
            for name, parameter in router.named_parameters():
                parameter.sub_(0.1 * outcome.gradients[name])
        adapt(router, outcome.sums)
    idle = [name for name, p in router.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert not idle or not case.teaches, idle


def law_interruption(case: Case) -> None:
    """A forward without gradient between decision and objective changes nothing of what is learned."""
    router = with_a_past(case.make())
    batch = make_batch(router)
    assert backward(router, batch, interrupted=True).close_to(backward(router, batch), tolerance=0)


def law_choices(case: Case) -> None:
    """Choices that the context forces are taken, in their order, where exploring and where not; gates go with them."""
    router = case.make()
    for explore in (True, False):
        batch = make_batch(router, explore=explore)
        decision = router(batch.x_TD, batch.context)
        own, columns = decision.expert_ids_R, decision.num_experts
        if decision.k is None:
            own, columns = decision.token_ids_R, decision.num_tokens
        forced = torch.where(decision.used_R, (own + 1) % columns, own).view(-1, decision.k or len(own) // columns)
        if decision.k is None:
            forced = forced.view(decision.num_experts, -1)
        got = router(batch.x_TD, replace(batch.context, choices={batch.context.site: forced}, chosen={}))
        taken = got.token_ids_R if decision.k is None else got.expert_ids_R
        assert torch.equal(taken, forced.flatten()), "its choices cannot be forced"
        assert bool(got.gates_R[got.used_R].isfinite().all())


def law_sites(case: Case) -> None:
    """Two sites of one block differ in their initial weights, where these are drawn at all."""
    first, second = (state(case.make(site=site)) for site in (1, "1.attention"))
    other_seed = state(case.make(seed=1))
    for name, value in first.items():
        assert torch.equal(value, second[name]) == torch.equal(value, other_seed[name]), name


def law_shapes(case: Case) -> None:
    """A shape is refused with a reason before anything is built, or taken."""
    for _, experts, k in SHAPES:
        reason, raised = case.reason(experts, k), None
        try:
            case.make(experts, k)
        except ConfigError as error:
            raised = str(error)
        assert (reason is None) == (raised is None) and (reason or "") in (raised or "")


LAWS: list[Callable[[Case], None]] = [law for name, law in list(globals().items()) if name.startswith("law_")]
