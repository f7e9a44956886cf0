"""All engines agree, in values and in every gradient, on unused slots, bounds, drops, and experts that choose.

Shape suffixes: T tokens, E experts, K slots per token, C tokens per expert, R pairs, N output columns.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.config import ModelConfig
from rlroute.kernels import gather_linear, linear_combine, make_plan
from rlroute.model.capacity import limit
from rlroute.routing import RoutingDecision
from tests.conftest import draw, make_context
from tests.test_kernels import NAMES, relative_error, run
from tests.tiny import small_config

T, E = 24, 5


def slots(unused: float, **fields: Any) -> RoutingDecision:
    """Three slots a token, about a share of which is unused."""
    ids_TK = draw(T, E).argsort(1)[:, :3]
    ids_TK = ids_TK.masked_fill(draw(T, 3, seed=1).sigmoid() < unused, E)
    return RoutingDecision.token_choice(ids_TK, draw(T, 3, seed=2).sigmoid(), E, **fields)


def by_experts(unused: float, **fields: Any) -> RoutingDecision:
    """Eight tokens an expert, about a share of which is unused."""
    ids_EC = draw(E, T).argsort(1)[:, :8].masked_fill(draw(E, 8, seed=1).sigmoid() < unused, T)
    return RoutingDecision.expert_choice(ids_EC, draw(E, 8, seed=2).sigmoid(), T, **fields)


def limited(decision: RoutingDecision, **fields: Any) -> RoutingDecision:
    config: ModelConfig = small_config(num_experts=E, k=2, **fields)
    return limit(decision, config, make_context(T))


DECISIONS: dict[str, Callable[[], RoutingDecision]] = {
    "some unused": lambda: slots(0.5),
    "most unused": lambda: slots(0.95),
    "all unused": lambda: slots(1.0),
    "bound not reached": lambda: limited(slots(0.5, max_pairs=T * 3 - 1)),
    "bound reached": lambda: limited(slots(0.5, max_pairs=19)),
    "bound of none": lambda: limited(slots(0.5, max_pairs=0)),
    "drops": lambda: limited(slots(0.3), capacity_factor=0.5),
    "drops by gate, then a bound": lambda: limited(
        slots(0.3, max_pairs=15), capacity_factor=0.5, capacity_order="gate"
    ),
    "experts": lambda: by_experts(0.0),
    "experts, some unused": lambda: by_experts(0.5),
    "experts, bound reached": lambda: limited(by_experts(0.3, max_pairs=11)),
    "experts, drops": lambda: limited(by_experts(0.2), capacity_factor=0.5),
}
each_decision = pytest.mark.parametrize("make", DECISIONS.values(), ids=DECISIONS.keys())


def tolerances() -> list[Any]:
    engines = [pytest.param("cpu", torch.float64, 1e-13, id="cpu")]
    try:
        from rlroute.kernels import sparse

        skip = pytest.mark.skipif(not sparse.INTERPRETING, reason="the kernels were defined for a GPU")
        engines.append(pytest.param("triton", torch.float32, 1e-5, id="triton", marks=skip))
    except ImportError:
        pass
    return engines


each_engine = pytest.mark.parametrize(("backend", "dtype", "tolerance"), tolerances())


def poisoned(decision: RoutingDecision) -> RoutingDecision:
    """With gates of NaN where nothing runs: no engine may look at them."""
    return replace(decision, gates_R=decision.gates_R.masked_fill(~(decision.kept_R & decision.used_R), math.nan))


@each_engine
@each_decision
def test_the_expert_mlp_is_that_of_the_loop(
    make: Callable[[], RoutingDecision], backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    want, got = run(make(), 6, 4, "reference"), run(poisoned(make()), 6, 4, backend, dtype)
    for name in NAMES:
        assert relative_error(got[name], want[name]) < tolerance, name
    assert not got["gates_R"][~(make().kept_R & make().used_R)].any(), "what does not run has no credit"


def halves(decision: RoutingDecision, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The two primitives one after the other, each pair's rows squared in between; and every gradient."""
    plan = make_plan(decision)
    leaves = {"x": draw(T, 6, seed=3), "w_in": draw(E, 4, 6, seed=4), "w_out": draw(E, 7, 4, seed=5)}
    leaves |= {"gates": decision.gates_R.detach()}
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    y_RN = gather_linear(leaves["x"], plan, leaves["w_in"], backend)
    out_TN = linear_combine(y_RN.square() + 1, plan, leaves["w_out"], leaves["gates"], backend)
    gradients = torch.autograd.grad((out_TN * draw(T, 7, seed=6).to(dtype)).sum(), list(leaves.values()))
    return {"out": out_TN.detach(), **dict(zip(leaves, gradients, strict=True))}


def halves_by_hand(decision: RoutingDecision) -> dict[str, Tensor]:
    """The same by a loop over pairs, in the decision's order."""
    leaves = {"x": draw(T, 6, seed=3), "w_in": draw(E, 4, 6, seed=4), "w_out": draw(E, 7, 4, seed=5)}
    leaves |= {"gates": decision.gates_R.detach().clone()}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    out_TN = sum((leaf.sum() * 0 for leaf in leaves.values()), torch.zeros(T, 7, dtype=torch.float64))
    for pair in torch.nonzero(decision.kept_R & decision.used_R).flatten().tolist():
        token, expert = int(decision.token_ids_R[pair]), int(decision.expert_ids_R[pair])
        y_N = leaves["w_out"][expert] @ ((leaves["w_in"][expert] @ leaves["x"][token]).square() + 1)
        out_TN = out_TN.index_add(0, torch.tensor([token]), (leaves["gates"][pair] * y_N)[None])
    gradients = torch.autograd.grad((out_TN * draw(T, 7, seed=6)).sum(), list(leaves.values()))
    return {"out": out_TN.detach(), **dict(zip(leaves, gradients, strict=True))}


@each_engine
@each_decision
def test_the_two_halves_are_those_of_the_loop(
    make: Callable[[], RoutingDecision], backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    want, got = halves_by_hand(make()), halves(make(), backend, dtype)
    for name, value in want.items():
        assert relative_error(got[name], value) < 10 * tolerance, name


@each_decision
def test_a_plan_sets_no_more_rows_aside_than_the_bound(make: Callable[[], RoutingDecision]) -> None:
    decision = make()
    most = len(decision.kept_R) if decision.max_pairs is None else decision.max_pairs
    plan = make_plan(decision)
    assert len(plan.pairs_R) == len(plan.tokens_R) == len(plan.rows_R) == most
    assert int(plan.starts_E[-1]) == int(decision.load_E().sum())


def test_a_bound_drops_second_choices_before_first_ones_and_later_tokens_before_earlier() -> None:
    ids_TK = torch.tensor([[0, 1], [4, 4], [2, 0], [4, 3]])
    decision = RoutingDecision.token_choice(ids_TK, draw(4, 2), 4)
    order = [(0, 0), (2, 0), (0, 1), (2, 1), (3, 1)]  # (token, slot)
    for most in range(7):
        bound = limit(replace(decision, max_pairs=most), small_config(), make_context(4))
        runs = torch.nonzero((bound.kept_R & bound.used_R).view(4, 2)).tolist()
        assert sorted(map(tuple, runs)) == sorted(order[:most])
        assert torch.equal(bound.demand_E(), decision.demand_E())
        assert int(bound.load_E().sum()) == min(most, 5)
