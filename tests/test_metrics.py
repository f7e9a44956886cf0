"""Metrics at loads whose values are known by hand, and the symmetries that they must have; every metric and balance
term against its definition, in loops over Python's numbers.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlroute import balance, metrics
from rlroute.routing import RoutingContext, RoutingDecision
from tests.conftest import capped, make_context

BALANCED = torch.full((8,), 5)
COLLAPSED = torch.tensor([0, 0, 40, 0, 0, 0, 0, 0])
SKEWED = torch.tensor([1, 2, 3, 4, 5, 6, 7, 12])
OF_LOADS = [
    metrics.max_vio,
    metrics.coefficient_of_variation,
    metrics.load_entropy,
    metrics.gini,
    metrics.min_over_max,
    metrics.dead_experts,
]


@pytest.mark.parametrize(
    ("metric", "balanced", "collapsed", "skewed"),
    [
        (metrics.max_vio, 0.0, 7.0, 12 / 5 - 1),
        (metrics.coefficient_of_variation, 0.0, math.sqrt(7), float(np.std(SKEWED.numpy()) / 5)),
        (metrics.load_entropy, 1.0, 0.0, -sum(n / 40 * math.log(n / 40) for n in SKEWED.tolist()) / math.log(8)),
        (metrics.gini, 0.0, 7 / 8, (-7 - 2 * 5 - 3 * 3 - 4 + 5 + 6 * 3 + 7 * 5 + 12 * 7) / (8 * 40)),
        (metrics.min_over_max, 1.0, 0.0, 1 / 12),
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
    assert [float(metric(torch.tensor([7]))) for metric in OF_LOADS] == [0.0, 0.0, 1.0, 0.0, 1.0, 0.0]


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
    assert float(metrics.drop_rate(capped(decision, 2))) == pytest.approx(2 / 8)
    assert float(metrics.drop_rate(capped(decision, 0))) == 1
    with_unused = replace(decision, expert_ids_R=torch.tensor([0, 4, 0, 4, 0, 4, 0, 4]))
    assert float(metrics.drop_rate(capped(with_unused, 3))) == pytest.approx(1 / 4)


def test_overlap_is_the_share_in_common_in_any_order() -> None:
    def chose(*rows: tuple[int, int]) -> RoutingDecision:
        return RoutingDecision.token_choice(torch.tensor(rows), torch.ones(2, 2), 6)

    one = chose((0, 1), (2, 3))
    assert float(metrics.overlap(one, chose((1, 0), (3, 2)))) == 1
    assert float(metrics.overlap(one, chose((2, 3), (0, 1)))) == 0
    assert float(metrics.overlap(one, chose((1, 5), (2, 3)))) == 0.75


def test_overlap_is_over_the_pairs_that_the_first_chose() -> None:
    """Unused slots are no pairs, and experts that choose are compared with tokens that do."""
    spare = RoutingDecision.token_choice(torch.tensor([[0, 2], [2, 2]]), torch.ones(2, 2), 2)  # token 0, expert 0
    by_experts = RoutingDecision.expert_choice(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)  # (0, 0), (1, 1)
    assert float(metrics.overlap(spare, by_experts)) == 1
    assert float(metrics.overlap(by_experts, spare)) == 0.5
    assert float(metrics.overlap(spare, spare)) == 1
    nothing = replace(spare, expert_ids_R=torch.full((4,), 2))
    assert math.isnan(float(metrics.overlap(nothing, spare))) and float(metrics.overlap(spare, nothing)) == 0


def test_where_nothing_was_chosen_no_balance_is_defined_all_experts_are_dead_and_nothing_was_dropped() -> None:
    nothing_E = torch.zeros(8, dtype=torch.long)
    assert all(math.isnan(float(metric(nothing_E))) for metric in OF_LOADS[:-1])
    assert int(metrics.dead_experts(nothing_E)) == 8
    decision = RoutingDecision.token_choice(torch.full((3, 2), 4), torch.ones(3, 2), 4)
    assert float(metrics.drop_rate(decision)) == float(metrics.drop_rate(capped(decision, 1))) == 0


# By definition

LOADS = st.lists(st.integers(0, 40), min_size=2, max_size=12).filter(any)
slowly = settings(derandomize=True, deadline=None, max_examples=60)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def variance(values: list[float]) -> float:
    return mean([(value - mean(values)) ** 2 for value in values])


def entropy(fractions: list[float]) -> float:
    return -sum(f * math.log(f) for f in fractions if f > 0)


@slowly
@given(LOADS)
def test_metrics_of_loads_are_those_of_their_definitions(loads: list[int]) -> None:
    load_E, fair = torch.tensor(loads), sum(loads) / len(loads)
    assert float(metrics.max_vio(load_E)) == pytest.approx(max(loads) / fair - 1)
    deviation = math.sqrt(variance([float(n) for n in loads]))
    assert float(metrics.coefficient_of_variation(load_E)) == pytest.approx(deviation / fair, abs=1e-12)
    evenness = entropy([n / sum(loads) for n in loads]) / math.log(len(loads))
    assert float(metrics.load_entropy(load_E)) == pytest.approx(evenness, abs=1e-12)
    apart = mean([float(abs(one - other)) for one in loads for other in loads])
    assert float(metrics.gini(load_E)) == pytest.approx(apart / (2 * fair), abs=1e-12)
    assert float(metrics.min_over_max(load_E)) == pytest.approx(min(loads) / max(loads))
    assert int(metrics.dead_experts(load_E)) == sum(n < 0.05 * fair for n in loads)
    assert float(balance.cv_squared(load_E.double())) == pytest.approx((deviation / fair) ** 2, abs=1e-12)


@slowly
@given(st.lists(st.floats(-9, 9) | st.just(math.nan), min_size=1, max_size=9), st.integers(0, 100))
def test_percentiles_are_those_of_their_definition(values: list[float], percent: int) -> None:
    """As many as that lie below, the distance between two neighbours shared in proportion; NaN counts for nothing."""
    ordered = sorted(value for value in values if not math.isnan(value))
    (found,) = metrics.percentiles(torch.tensor(values), [percent]).tolist()
    if not ordered:
        assert math.isnan(found)
        return
    whole, part = divmod(percent * (len(ordered) - 1), 100)
    want = ordered[whole] if not part else ordered[whole] * (1 - part / 100) + ordered[whole + 1] * part / 100
    assert found == pytest.approx(want, abs=1e-5)


CHOICES = st.lists(st.tuples(*[st.permutations([-1, -1, 0, 1, 2, 3])] * 2), min_size=1, max_size=5)


@slowly
@given(CHOICES, st.integers(1, 6), st.integers(1, 6))
def test_shared_experts_are_those_of_both_sets(rows: list[tuple[list[int], list[int]]], k: int, other_k: int) -> None:
    one, other = [row[:k] for row, _ in rows], [row[:other_k] for _, row in rows]
    want = [len({*a} & {*b} - {-1}) for a, b in zip(one, other, strict=True)]
    assert metrics.shared_T(torch.tensor(one), torch.tensor(other)).tolist() == want


@dataclass(frozen=True)
class Case:
    """A decision of 8 tokens as lists: each token's probabilities and slots, of which the value E is an unused one."""

    probs: list[list[float]]
    choices: list[list[int]]
    valid: list[bool]
    sequence: list[int]
    device: list[int]
    capacity: int

    @property
    def experts(self) -> int:
        return len(self.device)

    @property
    def probs_TE(self) -> Tensor:
        return torch.tensor(self.probs, dtype=torch.float64)

    @property
    def decision(self) -> RoutingDecision:
        ids_TK = torch.tensor(self.choices)
        gates_TK = torch.ones(ids_TK.shape, dtype=torch.float64)
        return RoutingDecision.token_choice(ids_TK, gates_TK, self.experts)

    @property
    def context(self) -> RoutingContext:
        return make_context(
            len(self.valid),
            mask_T=torch.tensor(self.valid),
            sequence_T=torch.tensor(self.sequence),
            expert_device_E=torch.tensor(self.device),
        )

    def used(self, token: int) -> list[int]:
        """The experts that a token really chose."""
        return [e for e in self.choices[token] if e < self.experts]

    def balance(self, tokens: list[int], group: list[int]) -> float:
        """G * sum_g f_g P_g over the valid ones of some tokens, with the experts merged into G groups."""
        tokens = [t for t in tokens if self.valid[t]]
        pairs = [group[e] for t in tokens for e in self.used(t)]
        total = 0.0
        for one in set(group):
            mass = mean([sum(p for p, g in zip(self.probs[t], group, strict=True) if g == one) for t in tokens])
            total += pairs.count(one) / len(pairs) * mass
        return len(set(group)) * total


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts, tokens = draw(st.integers(2, 5)), 8
    odds = draw(st.lists(st.lists(st.floats(0.01, 1), min_size=experts, max_size=experts), min_size=8, max_size=8))
    slots = [draw(st.permutations(range(experts + 1)))[:2] for _ in range(tokens)]
    valid = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    sequence = draw(st.lists(st.sampled_from([7, 9, 12]), min_size=tokens, max_size=tokens))
    devices = draw(st.integers(1, experts))
    return Case(
        probs=[[value / sum(row) for value in row] for row in odds],
        choices=slots,
        valid=[True, *valid[1:]],
        sequence=sequence,
        device=[e % devices for e in range(experts)],
        capacity=draw(st.integers(0, 8)),
    )


@slowly
@given(cases())
def test_balance_terms_are_those_of_their_definitions(case: Case) -> None:
    probs_TE, decision, context = case.probs_TE, case.decision, case.context
    everyone, alone = list(range(len(case.valid))), list(range(case.experts))
    value = float(balance.load_balance(probs_TE, decision, context))
    assert value == pytest.approx(case.balance(everyone, alone))
    value = float(balance.device_balance(probs_TE, decision, context))
    assert value == pytest.approx(case.balance(everyone, case.device))
    rows = [[t for t in everyone if case.valid[t] and case.sequence[t] == one] for one in sorted({*case.sequence})]
    costs = [(len(tokens), case.balance(tokens, alone)) for tokens in rows if tokens]
    value = float(balance.sequence_balance(probs_TE, decision, context))
    assert value == pytest.approx(sum(n * cost for n, cost in costs) / sum(n for n, _ in costs))


@slowly
@given(cases())
def test_overload_is_the_mean_over_a_tokens_experts_of_how_full_they_are(case: Case) -> None:
    pairs = [e for t, valid in enumerate(case.valid) if valid for e in case.used(t)]
    want = [
        mean([case.experts * pairs.count(e) / len(pairs) - 1 for e in case.used(token)])
        for token in range(len(case.valid))
    ]
    assert balance.overload_T(case.decision, case.context).tolist() == pytest.approx(want, abs=1e-12)


@slowly
@given(cases())
def test_entropies_and_the_z_loss_are_those_of_their_definitions(case: Case) -> None:
    entropies = [entropy(row) for row in case.probs]
    assert balance.entropy_T(case.probs_TE).tolist() == pytest.approx(entropies)
    evenness = [value / math.log(case.experts) for value in entropies]
    assert float(metrics.router_entropy(case.probs_TE)) == pytest.approx(mean(evenness))
    counted = [value for value, valid in zip(evenness, case.valid, strict=True) if valid]
    assert float(metrics.router_entropy(case.probs_TE, torch.tensor(case.valid))) == pytest.approx(mean(counted))
    z = [math.log(sum(map(math.exp, row))) ** 2 for row in case.probs]
    assert balance.router_z(case.probs_TE).tolist() == pytest.approx(z)


@slowly
@given(cases())
def test_drop_rate_and_overlap_are_those_of_their_definitions(case: Case) -> None:
    room, dropped = [case.capacity] * case.experts, 0
    for expert in (e for choice in zip(*case.choices, strict=True) for e in choice if e < case.experts):
        dropped += room[expert] == 0
        room[expert] -= room[expert] > 0
    chosen = sum(len(case.used(t)) for t in range(len(case.valid)))
    after = capped(case.decision, case.capacity)
    assert float(metrics.drop_rate(after)) == pytest.approx(dropped / chosen)
    other = replace(case, choices=case.choices[1:] + case.choices[:1])
    shared = sum(len({*case.used(t)} & {*other.used(t)}) for t in range(len(case.valid)))
    assert float(metrics.overlap(case.decision, other.decision)) == pytest.approx(shared / chosen)
