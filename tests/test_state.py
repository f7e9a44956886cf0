"""Routers that carry state over sites: what it is, whose, how far gradients reach, and what sites have in common; and
the bias that holds the number of real experts.

Shape suffixes: T tokens (rows of all routing samples), D model width, E experts, K experts per token, R state's width.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from rlroute.balance import load_balance
from rlroute.baselines.longcat import LongCatRouter
from rlroute.baselines.moe_plus_plus import MoEPlusPlusRouter
from rlroute.baselines.rmoe import STATE as RMOE_STATE
from rlroute.baselines.rmoe import RMoERouter
from rlroute.baselines.zaya import STATE as ZAYA_STATE
from rlroute.baselines.zaya import ZayaRouter
from rlroute.learning import adapt
from rlroute.model import ModelShape, Transformer
from rlroute.model.accounting import costs
from rlroute.model.work import measure_sites
from rlroute.registry import router_class
from rlroute.routing import RoutingContext, RoutingDecision, Site
from rlroute.training.checkpoint import _apart
from rlroute.training.step import backward_batch
from tests.conftest import D, draw, make_context, make_feedback, make_shape
from tests.tiny import CPU64, V, make_batch, make_model, run_batch, shake, small_config

STATEFUL = ("moe_plus_plus", "rmoe", "zaya")
WIDTH: dict[str, dict[str, Any]] = {"moe_plus_plus": {}, "rmoe": {"width": 5}, "zaya": {"width": 5}}


def chain(name: str, sites: int = 3, experts: int | tuple[int, ...] = 8) -> list[Any]:
    """The routers of a model's sites, their parameters moved so that state matters."""
    config, generator = router_class(name).Config(**WIDTH[name]), torch.Generator().manual_seed(3)
    sizes = (experts,) * sites if isinstance(experts, int) else experts
    routers = [
        router_class(name)(config, make_shape(size, 2, site=n, site_index=n, num_sites=len(sizes))).double()
        for n, size in enumerate(sizes)
    ]
    with torch.no_grad():
        for router in routers:
            for parameter in router.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return routers


def decide(
    routers: list[Any], x_L: list[Tensor], context: RoutingContext, earlier: Mapping[Site, RoutingDecision] = {}
) -> list[RoutingDecision]:
    made: dict[Site, RoutingDecision] = dict(earlier)
    for router, x_TD in zip(routers, x_L, strict=True):
        made[router.shape.site] = router(x_TD, context.at(router.shape, made))
    return list(made.values())


def inputs(sites: int = 3, rows: int = 12) -> list[Tensor]:
    return [draw(rows, D, seed=10 + n) for n in range(sites)]


def logits(decision: RoutingDecision) -> Tensor:
    assert decision.logits_TE is not None
    return decision.logits_TE


# What the state is


def test_logits_of_moe_plus_plus_add_a_map_of_those_before() -> None:
    routers, x_L = chain("moe_plus_plus"), inputs()
    made = decide(routers, x_L, make_context())
    want_TE = x_L[0] @ routers[0].scores.weight.t()
    assert routers[0].scores.residual is None
    torch.testing.assert_close(logits(made[0]), want_TE)
    for router, x_TD, decision in zip(routers[1:], x_L[1:], made[1:], strict=True):
        want_TE = x_TD @ router.scores.weight.t() + want_TE @ router.scores.residual.weight.t()
        torch.testing.assert_close(logits(decision), want_TE, rtol=0, atol=1e-12)
        torch.testing.assert_close(decision.gates_R.view(-1, 2), want_TE.topk(2).values.softmax(1))


def test_the_state_of_rmoe_is_that_of_a_gru() -> None:
    routers, x_L = chain("rmoe"), inputs()
    made, state_TR = decide(routers, x_L, make_context()), torch.zeros(12, 5).double()
    for router, x_TD, decision in zip(routers, x_L, made, strict=True):
        gru = nn.GRUCell(5, 5).double()
        with torch.no_grad():
            gru.weight_ih.copy_(router.cell.of_input.weight)
            gru.bias_ih.copy_(router.cell.of_input.bias)
            gru.weight_hh.copy_(router.cell.of_state.weight)
            gru.bias_hh.zero_()
        state_TR = gru(x_TD @ router.down.weight.t(), state_TR)
        torch.testing.assert_close(decision.memo[RMOE_STATE], state_TR, rtol=0, atol=1e-12)
        torch.testing.assert_close(logits(decision), state_TR @ router.scores.weight.t(), rtol=0, atol=1e-12)


def test_the_state_of_zaya_adds_up_and_its_scores_are_an_mlp_of_it() -> None:
    routers, x_L = chain("zaya"), inputs()
    made, state_TR = decide(routers, x_L, make_context()), torch.zeros(12, 5).double()
    assert routers[0].carry_R is None
    for router, x_TD, decision in zip(routers, x_L, made, strict=True):
        carried_TR = 0.0 if router.carry_R is None else router.carry_R * state_TR
        state_TR = x_TD @ router.down.weight.t() + router.down.bias + carried_TR
        torch.testing.assert_close(decision.memo[ZAYA_STATE], state_TR, rtol=0, atol=1e-12)
        scores = router.scores
        normed_TR = state_TR / (state_TR.square().mean(1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
        hidden_TR = functional.gelu((normed_TR * scores.norm.weight) @ scores.first.weight.t() + scores.first.bias)
        hidden_TR = functional.gelu(hidden_TR @ scores.second.weight.t() + scores.second.bias)
        want_TE = hidden_TR @ scores.last.weight.t()
        torch.testing.assert_close(logits(decision), want_TE, rtol=0, atol=1e-9)
        torch.testing.assert_close(decision.gates_R.view(-1, 2), want_TE.softmax(1).topk(2).values, rtol=0, atol=1e-9)


def test_the_skip_of_zaya_starts_where_it_is_told_and_its_bias_moves_the_choice_alone() -> None:
    config, shape = ZayaRouter.Config(free_bias=-1.0), replace(make_shape(9, 1), num_free_experts=1)
    router = ZayaRouter(config, shape).double()
    assert router.bias_E.tolist() == [0.0] * 8 + [-1.0]
    first = router(draw(50, D), make_context(50))
    assert int(first.demand_E()[8]) == 0
    router.bias_E[8] = 1.0
    later = router(draw(50, D), make_context(50))
    assert int(later.demand_E()[8]) == 50 and torch.equal(later.gates_R, later.probs_TE[:, 8])


# Whose it is


@pytest.mark.parametrize("name", STATEFUL)
def test_a_row_goes_by_its_own_state_alone(name: str) -> None:
    """Rows of another routing sample, of another sequence, of another token change nothing."""
    routers, x_L, context = chain(name), inputs(rows=24), make_context(samples=2)
    base = decide(routers, x_L, context)
    changed_T = torch.arange(24) % 5 == 0
    other = decide(routers, [x_TD + 3.0 * changed_T[:, None] for x_TD in x_L[:2]] + x_L[2:], context)
    same_T = (logits(base[2]) == logits(other[2])).all(1)
    assert bool(same_T[~changed_T].all()) and not bool(same_T[changed_T].any())


@pytest.mark.parametrize("name", STATEFUL)
def test_gradients_reach_the_scores_of_earlier_sites(name: str) -> None:
    routers = chain(name)
    made = decide(routers, inputs(), make_context())
    (logits(made[2]) * draw(12, 8, seed=5)).sum().backward()
    for router in routers[:2]:  # whose own decisions are not in the loss
        makes_state = router.scores if name == "moe_plus_plus" else router.down
        assert all(p.grad is not None and bool(p.grad.any()) for p in makes_state.parameters())


@pytest.mark.parametrize("name", STATEFUL)
def test_sites_of_other_routers_and_sizes_are_passed_over(name: str) -> None:
    """A hash router and one of three experts in between: the state is that of the last site that has one."""
    first, between, last = chain(name, experts=(8, 3, 8))
    foreign = router_class("hash")(router_class("hash").Config(), make_shape(8, 2, site=9))
    x_L, context = inputs(), make_context()
    made = decide([first], x_L[:1], context)
    direct = decide([last], x_L[2:], context, {0: made[0]})[-1]
    behind = decide([foreign, last], [x_L[1], x_L[2]], context, {0: made[0]})[-1]
    assert torch.equal(logits(direct), logits(behind))
    through = decide([between, last], x_L[1:], context, {0: made[0]})[-1]
    assert torch.equal(logits(direct), logits(through)) == (name == "moe_plus_plus")
    alone = decide([last], x_L[2:], context)[-1]
    assert not torch.equal(logits(direct), logits(alone)) and bool(logits(alone).isfinite().all())


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("fields", [{}, {"attention_experts": 4}, {"attention_experts": 6, "zero_experts": 1}], ids=str)
def test_models_of_them_learn_at_all_sites(name: str, fields: dict[str, Any]) -> None:
    model = shake(make_model(name, small_config(**fields), **WIDTH[name]))
    result = backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=2)
    adapt(model.routers, result.sums_L, 0.5)
    last = model.routers[-1]
    assert all(p.grad is not None and bool(p.grad.any()) for p in last.parameters())


# What sites have in common


def rmoe(**fields: Any) -> Any:
    return shake(make_model("rmoe", small_config(num_layers=3, attention_experts=4, **fields), width=5))


def test_all_sites_of_rmoe_have_one_gru_and_maps_of_their_own() -> None:
    model = rmoe()
    cells = {id(router.cell) for router in model.routers}
    assert len(model.routers) == 6 and len(cells) == 1
    assert len({id(router.down) for router in model.routers}) == 6
    copied = copy.deepcopy(model)
    assert len({id(router.cell) for router in copied.routers}) == 1
    first = model.routers[0]
    own: Any = RMoERouter(first.config, first.shape).double()
    untouched: Any = make_model("rmoe", small_config(num_layers=3, attention_experts=4), width=5).routers[-1]
    assert torch.equal(untouched.cell.of_state.weight, own.cell.of_state.weight) and first.cell is model.routers[1].cell


def test_the_gradient_of_what_is_in_common_is_the_sum_over_sites() -> None:
    tied, batch = rmoe(), make_batch()
    apart = copy.deepcopy(tied)
    for router in apart.routers:
        router.cell = copy.deepcopy(router.cell)
    for model in (tied, apart):
        backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=1)
    cells = [router.cell for router in apart.routers]
    for name, parameter in tied.routers[0].cell.named_parameters():
        parts = [cell.get_parameter(name).grad for cell in cells]
        want = sum(part for part in parts if part is not None)
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=1e-12)


def test_what_is_in_common_is_counted_once_and_survives_a_file() -> None:
    model = rmoe()
    config = small_config(num_layers=3, attention_experts=4)
    counted = costs(model, config, 8)
    matrices = sum(p.numel() for r in model.routers for n, p in r.named_parameters() if p.dim() > 1 and "cell" not in n)
    once = sum(p.numel() for p in model.routers[0].cell.parameters() if p.dim() > 1)
    assert sum(work.active_parameters for work in counted.work_L) == matrices + once
    assert counted.total_parameters == sum(p.numel() for p in model.parameters())
    other: Any = make_model("rmoe", config, width=5)
    other.load_state_dict(load(save(_apart(model.state_dict()))))
    (one, _), (two, _) = (run_batch(m, make_batch()) for m in (model, other))
    assert torch.equal(one, two) and other.routers[0].cell is other.routers[-1].cell


def test_routers_of_another_configuration_have_a_gru_of_their_own() -> None:
    first, second = (RMoERouter.Config(width=width) for width in (5, 7))
    config = small_config(num_layers=4)
    made = iter([first, second, first, second])
    shape = ModelShape(vocab_size=V, seq_len=8, seed=0, backend="cpu")
    model: Any = Transformer(config, shape, lambda shape: RMoERouter(next(made), shape))
    cells = [router.cell for router in model.routers]
    assert cells[0] is cells[2] and cells[1] is cells[3] and cells[0] is not cells[1]


def test_work_is_counted_behind_the_sites_before() -> None:
    """The residual of MoE++ is a product of E x E, in the greedy forward and twice in the backward."""
    model = make_model("moe_plus_plus", small_config(num_layers=3))
    first, *later = measure_sites(model.routers)
    for work in later:
        assert work.greedy - first.greedy == 2 * 4 * 4
        assert work.training - first.training == 3 * 2 * 4 * 4
        assert work.active_parameters - first.active_parameters == 4 * 4


# Balance


def test_tau_is_what_a_free_expert_counts_in_the_balance_loss() -> None:
    shape, context = replace(make_shape(6, 2), num_free_experts=2), make_context()
    value = {}
    for tau in (0.0, 0.5, 1.0):
        router = MoEPlusPlusRouter(MoEPlusPlusRouter.Config(tau=tau, init_std=0.5), shape).double()
        decision = router(draw(12, D), context)
        value[tau] = float(router.objective(decision, make_feedback(context))["mixed_balance"].value.detach())
    assert decision.probs_TE is not None
    f_E = decision.demand_E().double() / 24
    parts_E = 6 * f_E * decision.probs_TE.detach().mean(0)
    assert value[1.0] == pytest.approx(float(load_balance(decision.probs_TE, decision, context).detach()))
    assert value[1.0] == pytest.approx(float(parts_E.sum())) and value[0.0] == pytest.approx(float(parts_E[:4].sum()))
    assert value[0.5] == pytest.approx((value[0.0] + value[1.0]) / 2)


def longcat(free: int = 4, **fields: Any) -> LongCatRouter:
    config = LongCatRouter.Config(**{"init_std": 0.4} | fields)
    return LongCatRouter(config, replace(make_shape(8 + free, 3), num_free_experts=free)).double()


@pytest.mark.parametrize("share", [1 / 3, 2 / 3, 0.9])
def test_the_bias_holds_the_share_of_real_experts_and_evens_their_loads(share: float) -> None:
    router, x_TD = longcat(real_share=share, update_rate=0.05), draw(600, D) + 0.5
    demand_E = torch.zeros(12)
    for step in range(600):
        decision = router(x_TD, make_context(600))
        demand_E = decision.demand_E().double()
        router.adapt({"demand_E": demand_E, "tokens": torch.tensor(600)}, 0.0)  # type: ignore[arg-type]
        assert step or demand_E[:8].std() > 30, "even from the start: this shows nothing"
    assert float(demand_E[:8].sum() / 1800) == pytest.approx(share, abs=0.01)
    assert float(demand_E[:8].std() / demand_E[:8].mean()) < 0.05
    assert not router.bias_E[8:].any()


def test_a_step_of_the_bias_is_its_error_times_the_rate() -> None:
    sums = {"demand_E": torch.tensor([9, 0, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0]), "tokens": torch.tensor(10)}
    for free, share in ((4, 0.5), (0, 1.0)):
        router = longcat(free, real_share=0.5, update_rate=0.1)
        router.adapt(dict(sums, demand_E=sums["demand_E"][: 8 + free]), 0.0)  # type: ignore[arg-type]
        want = [0.1 * (share / 8 - int(n) / 30) for n in sums["demand_E"][:8]] + [0.0] * free
        assert router.bias_E.tolist() == pytest.approx(want)


def test_gates_of_longcat_are_probabilities_times_the_scale() -> None:
    router = longcat(route_scale=6.0)
    decision = router(draw(12, D), make_context())
    assert decision.probs_TE is not None
    want_TK = 6 * decision.probs_TE.topk(3).values
    torch.testing.assert_close(decision.gates_R.view(12, 3), want_TK)
