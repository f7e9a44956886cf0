"""Capacities against their slow definition, for all bins, orders and takers; bounds on running pairs; equal samples.

Shape suffixes: T tokens (rows), E experts, K slots per token, C tokens per expert, R pairs, M routing samples.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlroute.config import ModelConfig
from rlroute.kernels import make_plan
from rlroute.learning import count
from rlroute.metrics import drop_rate
from rlroute.model.capacity import limit
from rlroute.routing import RoutingContext, RoutingDecision
from rlroute.training.step import backward_batch
from tests.conftest import make_context, make_feedback
from tests.tiny import CPU64, make_batch, run_batch, small_config
from tests.toys import toy_model

slowly = settings(derandomize=True, deadline=None, max_examples=150)


@dataclass(frozen=True)
class Case:
    """A decision, where its rows are, and what is asked of the layer."""

    config: ModelConfig
    decision: RoutingDecision
    context: RoutingContext

    def order(self) -> list[int]:
        """The pairs, those that come first before others."""
        decision, pairs = self.decision, list(range(len(self.decision.kept_R)))
        if self.config.capacity_order == "gate":
            return sorted(pairs, key=lambda r: (-float(decision.gates_R[r]), r))
        return self.places()

    def places(self) -> list[int]:
        """First choices before second ones, then by token; by token where experts choose."""
        k, pairs = self.decision.k, list(range(len(self.decision.kept_R)))
        return sorted(pairs, key=lambda r: (r % k, r) if k else (int(self.decision.token_ids_R[r]), r))

    def bins(self) -> list[Any]:
        """Which rows compete with one another."""
        sample, sequence = self.context.sample_T.tolist(), self.context.sequence_T.tolist()
        each = len(sample) // self.context.num_samples
        if self.config.capacity_rows == "sequence":
            return list(zip(sample, sequence, strict=True))
        return [(m, (t % each) * self.config.capacity_groups // each) for t, m in enumerate(sample)]

    def kept(self) -> list[bool]:
        """Let one pair in after the other while its expert (or device) has room in its bin; then hold to the bound."""
        decision, config, bins = self.decision, self.config, self.bins()
        device_E = self.context.expert_device_E.tolist() if self.context.expert_device_E is not None else None
        by_device = config.capacity_of == "device"
        takers = config.devices if by_device else decision.num_experts
        rows, taken, kept = Counter(bins), Counter[Any](), [False] * len(decision.kept_R)
        used = decision.used_R & decision.kept_R
        for r in self.order():
            if used[r]:
                expert, bin_ = int(decision.expert_ids_R[r]), bins[int(decision.token_ids_R[r])]
                place = (bin_, device_E[expert] if by_device and device_E else expert)
                room = math.inf
                if config.capacity_factor is not None:
                    room = math.ceil(config.capacity_factor * config.k * rows[bin_] / takers)
                kept[r] = taken[place] < room
                taken[place] += kept[r]
        if config.round_to and self.context.micro_batch is not None:
            kept = self.rounded(kept)
        if decision.max_pairs is not None:
            running = [r for r in self.places() if kept[r]]
            for r in running[decision.max_pairs :]:
                kept[r] = False
        return kept

    def rounded(self, kept: list[bool]) -> list[bool]:
        """Drop the smallest gates of each sample's expert until its tiles are full, or its last one half full."""
        decision, samples, size = self.decision, self.context.sample_T.tolist(), self.config.round_to
        after = list(kept)
        for place in {self.place(r, samples) for r in range(len(kept))}:
            mine = [r for r in range(len(kept)) if kept[r] and self.place(r, samples) == place]
            mine.sort(key=lambda r: (-float(decision.gates_R[r]), r))
            beyond = len(mine) % size
            stays = self.config.rounding == "nearest" and 2 * beyond >= size
            for r in mine[len(mine) - beyond :]:
                after[r] = stays
        return after

    def place(self, pair: int, samples: list[int]) -> tuple[int, int]:
        """The sample and the expert of a pair."""
        return samples[int(self.decision.token_ids_R[pair])], int(self.decision.expert_ids_R[pair])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts, samples, each = draw(st.sampled_from([2, 4, 6])), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    rows = samples * each
    k = draw(st.integers(1, 2))
    gates = st.integers(1, 8).map(lambda n: n / 8)
    if draw(st.booleans()):
        slots = draw(st.integers(1, min(3, experts)))
        ids = [draw(st.permutations(range(experts + 1)))[:slots] for _ in range(rows)]
        gates_TK = [draw(st.lists(gates, min_size=slots, max_size=slots)) for _ in range(rows)]
        decision = RoutingDecision.token_choice(torch.tensor(ids), torch.tensor(gates_TK), experts)
    else:
        width = draw(st.integers(1, rows))
        ids = [draw(st.permutations(range(rows + 1)))[:width] for _ in range(experts)]
        gates_EC = [draw(st.lists(gates, min_size=width, max_size=width)) for _ in range(experts)]
        decision = RoutingDecision.expert_choice(torch.tensor(ids), torch.tensor(gates_EC), rows)
    lost = draw(st.lists(st.booleans(), min_size=len(decision.kept_R), max_size=len(decision.kept_R)))
    bound = draw(st.none() | st.integers(0, len(lost) + 1))
    decision = replace(
        decision, max_pairs=bound, kept_R=~torch.tensor(lost) if draw(st.booleans()) else decision.kept_R
    )
    of: Literal["expert", "device"] = draw(st.sampled_from(["expert", "device"]))
    by: Literal["sample", "sequence"] = draw(st.sampled_from(["sample", "sequence"]))
    devices = draw(st.sampled_from([d for d in (1, 2, 3) if experts % d == 0]))
    capacity: dict[str, Any] = {
        "capacity_factor": draw(st.sampled_from([0.01, 0.5, 0.8, 1.0, 1.3])),
        "capacity_order": draw(st.sampled_from(["position", "gate"])),
        "capacity_rows": by,
        "capacity_groups": 1 if by == "sequence" else draw(st.integers(1, 9)),
        "capacity_of": of,
    }
    config = small_config(
        num_experts=experts,
        k=k,
        **(capacity if draw(st.booleans()) else {}),
        devices=devices,
        round_to=(size := draw(st.sampled_from([0, 0, 1, 2, 3, 4]))),
        rounding=draw(st.sampled_from(["down", "nearest"])) if size else "down",
    )
    config.check()
    device_E = torch.arange(experts) // (experts // devices)
    keys: dict[str, Any] = {"length": draw(st.integers(1, each)), "samples": samples, "expert_device_E": device_E}
    keys["micro_batch"] = draw(st.none() | st.just(0))
    return Case(config, decision, make_context(each, **keys))


@slowly
@given(cases())
def test_drops_are_those_of_one_pair_after_the_other(case: Case) -> None:
    limited = limit(case.decision, case.config, case.context)
    assert (limited.kept_R & limited.used_R).tolist() == case.kept()
    if case.config.round_to and case.decision.max_pairs is not None:
        return  # the bound, which comes last, leaves tiles that are not full
    again = limit(limited, case.config, case.context)
    assert (again.kept_R & again.used_R).tolist() == case.kept(), "what is kept once is kept again"


@slowly
@given(cases())
def test_drops_are_seen_in_loads_and_not_in_demand(case: Case) -> None:
    limited = limit(case.decision, case.config, case.context)
    counted = count(limited, make_feedback(case.context))
    assert torch.equal(counted["demand_E"], case.decision.demand_E())
    kept, used = case.kept(), case.decision.used_R.tolist()
    assert int(counted["load_E"].sum()) == sum(kept)
    served = {int(case.decision.token_ids_R[r]) for r, runs in enumerate(kept) if runs}
    assert int(counted["without"]) == case.decision.num_tokens - len(served)
    assert float(drop_rate(limited)) == pytest.approx((sum(used) - sum(kept)) / max(sum(used), 1))


@slowly
@given(cases())
def test_a_plan_has_no_more_rows_than_the_bound(case: Case) -> None:
    limited = limit(case.decision, case.config, case.context)
    plan, runs = make_plan(limited), [r for r, kept in enumerate(case.kept()) if kept]
    slots = len(limited.kept_R)
    assert (
        len(plan.pairs_R) == len(plan.tokens_R) == min(slots, slots if limited.max_pairs is None else limited.max_pairs)
    )
    rows = int(plan.starts_E[-1])
    assert sorted(plan.pairs_R[:rows].tolist()) == runs
    assert torch.equal(plan.starts_E.diff(), limited.load_E())


def test_routing_samples_are_treated_alike() -> None:
    """Each loses the pairs that it would lose alone, though all rows are one batch."""
    ids_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0], [1, 0], [0, 3]])
    for rows, groups in (("sample", 1), ("sample", 3), ("sequence", 1)):
        config = small_config(capacity_factor=0.5, capacity_rows=rows, capacity_groups=groups)
        kept = []
        for samples in (1, 4):
            decision = RoutingDecision.token_choice(ids_TK.repeat(samples, 1), torch.ones(6 * samples, 2), 4)
            context = make_context(6, length=3, samples=samples)
            kept.append(limit(decision, config, context).kept_R.view(samples, -1))
        assert torch.equal(kept[1], kept[0].expand(4, -1)) and not kept[0].all() and kept[0].any()


def test_whom_a_row_competes_with_is_as_configured() -> None:
    """All rows want one expert, so that what they keep says how many rows each bin has."""

    def kept_T(**fields: Any) -> Tensor:
        config = small_config(k=1, num_experts=2, capacity_factor=1.0, devices=2, **fields)
        decision = RoutingDecision.token_choice(torch.zeros(12, 1, dtype=torch.long), torch.arange(12.0)[:, None], 2)
        context = make_context(12, length=4, expert_device_E=torch.arange(2))
        return limit(decision, config, context).kept_R

    first = [*range(6)]
    assert torch.nonzero(kept_T()).flatten().tolist() == first
    assert torch.nonzero(kept_T(capacity_order="gate")).flatten().tolist() == [t + 6 for t in first]
    assert torch.nonzero(kept_T(capacity_groups=2)).flatten().tolist() == [0, 1, 2, 6, 7, 8]
    assert torch.nonzero(kept_T(capacity_rows="sequence")).flatten().tolist() == [0, 1, 4, 5, 8, 9]
    assert torch.nonzero(kept_T(capacity_of="device")).flatten().tolist() == first


def test_experts_of_one_device_share_its_capacity() -> None:
    ids_TK = torch.tensor([[0, 2], [1, 3], [0, 1], [1, 0]])
    config = small_config(capacity_factor=0.5, capacity_of="device", devices=2)
    context = make_context(4, expert_device_E=torch.tensor([0, 0, 1, 1]))
    limited = limit(RoutingDecision.token_choice(ids_TK, torch.ones(4, 2), 4), config, context)
    assert limited.kept_R.view(4, 2).tolist() == [[True, True], [True, True], [False, False], [False, False]]


@pytest.mark.parametrize("fields", [{"capacity_factor": 0.5}, {"capacity_factor": 0.7, "capacity_rows": "sequence"}])
def test_the_model_runs_under_capacities_at_every_site(fields: dict[str, Any]) -> None:
    config = small_config(attention_experts=4, **fields)
    _, decisions = run_batch(toy_model(config), make_batch(3))
    for decision in decisions:
        most = math.ceil(fields["capacity_factor"] * 2 * 8 / 4) * 3
        whole = math.ceil(fields["capacity_factor"] * 2 * 24 / 4)
        assert int(decision.load_E().max()) <= (most if "capacity_rows" in fields else whole)
        assert not decision.kept_R.all()


def test_a_batch_of_fewer_rows_than_groups_runs() -> None:
    _, decisions = run_batch(toy_model(small_config(capacity_factor=1.0, capacity_groups=99)), make_batch())
    assert all(bool(decision.kept_R.all()) for decision in decisions), "each row competes with none"


def test_tiles_are_filled_in_training_alone_and_drop_the_smallest_gates() -> None:
    ids_T1, gates_T1 = torch.tensor([[0], [0], [0], [1], [1], [1], [1], [1]]), torch.arange(8.0)[:, None] + 1
    decision = RoutingDecision.token_choice(ids_T1, gates_T1, 2)
    config, context = small_config(num_experts=2, k=1, round_to=2), make_context(8, micro_batch=0)
    want = [False, True, True, False, True, True, True, True]
    assert limit(decision, config, context).kept_R.tolist() == want
    assert limit(decision, replace(config, rounding="nearest"), context).kept_R.all(), "a last tile that is half full"
    assert limit(decision, config, replace(context, micro_batch=None)).kept_R.all()
    four = limit(decision, replace(config, round_to=4, rounding="nearest"), context)
    assert four.load_E().tolist() == [3, 4] and four.demand_E().tolist() == [3, 5]


def test_training_books_the_pairs_that_are_left() -> None:
    model = toy_model(small_config(num_layers=1, round_to=8))
    result = backward_batch(model, make_batch(4), CPU64, seed=0, step=0, micro_batches=1)
    load_E, demand_E = result.sums_L[0]["load_E"], result.sums_L[0]["demand_E"]
    assert load_E.tolist() == (demand_E // 8 * 8).tolist() and 0 < int(load_E.sum()) < int(demand_E.sum())
    assert result.pairs_L.tolist() == [int(load_E.sum())]
