"""Default MoE: output, gradients and mean outputs against plain loops; what a layer hands to routers that wish for it.

Shape suffixes: T tokens, D model width, F expert width, E experts, K experts per token, R pairs.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.baselines.default_moe import DefaultMoERouter
from rlroute.config import ModelConfig
from rlroute.errors import ConfigError
from rlroute.experiments.play.ladder import TASKS, router_shape
from rlroute.kernels import ExpertWeights, expert_mlp
from rlroute.kernels.activations import activate
from rlroute.learning import adapt, learn
from rlroute.model import wishes
from rlroute.model.moe import MoELayer
from rlroute.routing import RoutingDecision
from rlroute.training.step import backward_batch
from tests.conftest import capped, draw, make_context, make_feedback, make_shape
from tests.tiny import CPU64, make_batch, make_model, run_batch, shake, small_config
from tests.toys import toy_model

T, D, E = 12, 6, 5
CONFIG = ModelConfig(num_layers=1, d_model=D, num_heads=1, num_experts=E, k=2, d_expert=4)


def make_layer(capacity: float | None = None, **fields: Any) -> MoELayer:
    router = DefaultMoERouter(DefaultMoERouter.Config(init_std=0.7, **fields), make_shape(E, 2))
    router.default_ED.copy_(draw(E, D, seed=8))
    router.seen_E.fill_(True)
    return MoELayer(replace(CONFIG, capacity_factor=capacity), router, 0, 0, "cpu").double()


def outputs_of(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """What every expert makes of every token, shape (T, E, D)."""
    experts = zip(layer.experts.in_EHD, layer.experts.out_EDF, strict=True)
    return torch.stack([activate(x_TD @ w_in.t(), "swiglu") @ w_out.t() for w_in, w_out in experts], dim=1)


def by_hand(layer: MoELayer, x_TD: Tensor, filled: bool = True) -> Tensor:
    router: Any = layer.router
    outputs_TED, probs_TE = outputs_of(layer, x_TD), router.scores(x_TD).softmax(1)
    rows = []
    for token in range(len(x_TD)):
        chosen = probs_TE[token].topk(2).indices.tolist()
        row = torch.zeros(D).double()
        for e in range(E):
            if e in chosen:
                row = row + probs_TE[token, e] * outputs_TED[token, e]
            elif filled:
                row = row + probs_TE[token, e] * router.default_ED[e]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("explore", [True, False])
def test_output_and_gradients_are_those_of_the_loop(explore: bool) -> None:
    layer, x_TD, dout_TD = make_layer(), draw(T, D).requires_grad_(), draw(T, D, seed=3)
    out_TD, decision = layer(x_TD, make_context(T, explore=explore))
    want_TD = by_hand(layer, x_TD)
    torch.testing.assert_close(out_TD, want_TD, rtol=0, atol=1e-12)
    leaves = [x_TD, *layer.parameters()]
    got, want = (torch.autograd.grad((out * dout_TD).sum(), leaves) for out in (out_TD, want_TD))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    assert torch.equal(decision.load_E(), decision.demand_E())


def test_straight_through_means_have_a_gradient_and_no_value() -> None:
    layer, x_TD, dout_TD = make_layer(straight_through=True), draw(T, D), draw(T, D, seed=3)
    out_TD, _ = layer(x_TD, make_context(T))
    torch.testing.assert_close(out_TD, by_hand(layer, x_TD, filled=False), rtol=0, atol=1e-12)
    (got,) = torch.autograd.grad((out_TD * dout_TD).sum(), layer.router.score_weights)
    (want,) = torch.autograd.grad((by_hand(layer, x_TD) * dout_TD).sum(), layer.router.score_weights)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert layer(x_TD, make_context(T, explore=False))[1].fill_TD is None


@pytest.mark.parametrize("capacity", [None, 0.7])
def test_means_are_of_what_ran_for_valid_tokens_and_move_by_the_decay(capacity: float | None) -> None:
    layer, x_TD = make_layer(capacity, ema_decay=0.75), draw(T, D)
    router: Any = layer.router
    router.seen_E[0] = False
    with torch.no_grad():
        router.scores.weight[3] = -100 * x_TD.sum(0)  # an expert that nobody may want
    context = make_context(T, mask_T=torch.arange(T) % 4 != 3)
    before_ED, (out_TD, decision) = router.default_ED.clone(), layer(x_TD, context)
    outputs_TED = outputs_of(layer, x_TD).detach()
    adapt([router], learn([router], [decision], make_feedback(context), out_TD.sum()).sums_L, 0.0)
    for e in range(E):
        ran_R = decision.kept_R & (decision.expert_ids_R == e) & context.mask_T[decision.token_ids_R]
        want_D = before_ED[e]
        if ran_R.any():
            mean_D = outputs_TED[decision.token_ids_R[ran_R], e].mean(0)
            want_D = 0.75 * before_ED[e] + 0.25 * mean_D if e else mean_D
        torch.testing.assert_close(router.default_ED[e], want_D, rtol=0, atol=1e-12)


def test_means_do_not_hang_on_how_a_step_is_cut() -> None:
    found = []
    for parts in (1, 2, 4):
        model = shake(make_model("default_moe", small_config(), balance_weight=0.0))
        result = backward_batch(model, make_batch(4), CPU64, seed=0, step=0, micro_batches=parts)
        adapt(model.routers, result.sums_L, 0.0)
        found.append(torch.cat([buffer.reshape(-1) for router in model.routers for buffer in router.buffers()]))
    assert bool(found[0].any())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


# The wish


def decision_of(kind: str) -> RoutingDecision:
    """Three slots a token, with unused ones, dropped pairs, or experts that choose."""
    ids_TK = draw(T, E, seed=4).argsort(1)[:, :3]
    if kind == "unused":
        ids_TK[::2, 1] = E
    gates_TK = draw(T, 3, seed=5).requires_grad_()
    decision = RoutingDecision.token_choice(ids_TK, gates_TK, E)
    if kind == "experts choose":
        ids_EC = draw(E, T, seed=4).argsort(1)[:, :4]
        return RoutingDecision.expert_choice(ids_EC, draw(E, 4, seed=5).requires_grad_(), T)
    return capped(decision, 3) if kind == "dropped" else decision


@pytest.mark.parametrize("kind", ["plain", "unused", "dropped", "experts choose"])
def test_outputs_by_pair_are_those_of_the_kernel_and_sum_to_its_output(kind: str) -> None:
    found = []
    for wished in (False, True):
        x_TD, decision = draw(T, D).requires_grad_(), decision_of(kind)
        weights = ExpertWeights(draw(E, 8, D, seed=1).requires_grad_(), draw(E, D, 4, seed=2).requires_grad_())
        decision.gates_R.retain_grad()
        if wished:
            out_TD, decision = wishes.combine(expert_mlp(*wishes.by_pair(x_TD, decision), weights), decision)
        else:
            out_TD = expert_mlp(x_TD, decision, weights)
        (out_TD * draw(T, D, seed=3)).sum().backward()
        found.append([out_TD.detach(), x_TD.grad, decision.gates_R.grad, *(w.grad for w in weights)])
    for plain, by_pair in zip(*found, strict=True):
        torch.testing.assert_close(by_pair, plain, rtol=0, atol=1e-12)
    ran_R = decision.kept_R & decision.used_R
    assert decision.outputs_RD is not None and not decision.outputs_RD[~ran_R].any()
    assert bool(decision.outputs_RD[ran_R].any(1).all())


def test_attention_hands_out_the_outputs_of_its_pairs_too() -> None:
    """A router that wishes for them changes nothing of what comes out, and its pairs add up to it."""
    found = []
    for wished in (frozenset[str](), frozenset({"outputs"})):
        model = shake(toy_model(small_config(attention_experts=4, capacity_factor=1.0), rule="threshold", share=1.5))
        for router in model.routers:
            router.wishes = wished
        logits_BSV, decisions = run_batch(model, make_batch())
        (gradient,) = torch.autograd.grad(logits_BSV.square().sum(), model.routers[0].score_weights)
        found.append((logits_BSV.detach(), gradient))
    for plain, by_pair in zip(*found, strict=True):
        torch.testing.assert_close(by_pair, plain, rtol=0, atol=1e-10)
    for decision in decisions:
        ran_R = decision.kept_R & decision.used_R
        assert decision.outputs_RD is not None
        assert bool(decision.outputs_RD[ran_R].any(1).all()) and not decision.outputs_RD[~ran_R].any()
        assert 0 < int(ran_R.sum()) < len(ran_R)


def test_nothing_is_made_for_routers_without_a_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("not wished for")

    monkeypatch.setattr(wishes, "by_pair", never)
    _, decisions = run_batch(make_model("switch", small_config()), make_batch())
    assert all(decision.outputs_RD is None and decision.fill_TD is None for decision in decisions)
    with pytest.raises(AssertionError, match="not wished for"):
        run_batch(make_model("default_moe", small_config()), make_batch())


def test_a_site_that_does_not_hand_it_out_is_refused_by_name() -> None:
    reason = "router default_moe: it wishes for outputs of the experts, which site 0 does not hand out"
    with pytest.raises(ConfigError, match=reason):
        DefaultMoERouter(DefaultMoERouter.Config(), router_shape(TASKS["uniform"], 0))
