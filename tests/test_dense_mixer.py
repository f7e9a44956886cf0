"""DenseMixer: the output is that of top-k, the router's gradient that of the dense mixture, and only the chosen count.

Shape suffixes: T tokens, D model width, E experts, K experts per token, R routed pairs.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.balance import load_balance, sequence_balance
from rlroute.baselines.dense_mixer import DenseMixerRouter
from rlroute.gates import softmax_top_k
from rlroute.kernels import ExpertWeights, expert_mlp
from rlroute.kernels.activations import activate
from rlroute.model.capacity import drop_over_capacity
from rlroute.routing import RoutingDecision
from rlroute.training.step import backward_batch
from tests.conftest import D, draw, make_context, make_shape
from tests.tiny import CPU64, make_batch, make_model, shake, small_config

T, E = 12, 5


def make(k: int = 2, **fields: Any) -> DenseMixerRouter:
    return DenseMixerRouter(DenseMixerRouter.Config(init_std=0.7, **fields), make_shape(E, k)).double()


def top_k_of(router: DenseMixerRouter, x_TD: Tensor) -> RoutingDecision:
    return softmax_top_k(router.scores(x_TD), router.shape.k, make_context(T), normalize=router.config.normalize)


def by_hand(router: DenseMixerRouter, x_TD: Tensor, weights: ExpertWeights, dout_TD: Tensor) -> Tensor:
    """The loss whose value and gradients are wanted: experts learn as the chosen ones, the router from all."""
    outputs_ETD = torch.stack(
        [activate(x_TD @ w_in.t(), "gelu") @ w_out.t() for w_in, w_out in zip(*weights, strict=True)]
    )
    probs_TE = router.scores(x_TD).softmax(1)
    chosen_TE = probs_TE >= probs_TE.topk(router.shape.k).values[:, -1:]
    total_T1 = torch.ones(T, 1).double()
    if router.config.normalize and router.shape.k > 1:
        total_T1 = (probs_TE * chosen_TE).sum(1, keepdim=True)
    dense_TE = torch.where(chosen_TE, probs_TE / total_T1, probs_TE / total_T1.detach())
    sparse_TD = torch.einsum("te,etd->td", (dense_TE * chosen_TE).detach(), outputs_ETD)
    mixed_TD = torch.einsum("te,etd->td", dense_TE, outputs_ETD.detach())
    return ((sparse_TD + mixed_TD - mixed_TD.detach()) * dout_TD).sum()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, E])
def test_the_output_is_sparse_and_the_routers_gradient_dense(k: int, normalize: bool) -> None:
    router, dout_TD = make(k, normalize=normalize), draw(T, D, seed=3)
    leaves = [draw(T, D), draw(E, 4, D, seed=1), draw(E, D, 4, seed=2)]
    found = []
    for compute in (by_hand, None):
        x_TD, *weights = (leaf.clone().requires_grad_() for leaf in leaves)
        if compute is None:
            decision = router(x_TD, make_context(T))
            out_TD = expert_mlp(x_TD, decision, ExpertWeights(*weights), "cpu", "gelu")
            want_TD = expert_mlp(x_TD, top_k_of(router, x_TD), ExpertWeights(*weights), "cpu", "gelu")
            torch.testing.assert_close(out_TD, want_TD, rtol=0, atol=1e-12)
            loss = (out_TD * dout_TD).sum()
        else:
            loss = compute(router, x_TD, ExpertWeights(*weights), dout_TD)
        found.append(torch.autograd.grad(loss, [router.scores.weight, x_TD, *weights]))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_evaluation_is_top_k() -> None:
    router, x_TD = make(), draw(T, D)
    decision, want = router(x_TD, make_context(T, explore=False)), top_k_of(router, x_TD)
    assert torch.equal(decision.expert_ids_R, want.expert_ids_R) and torch.equal(decision.gates_R, want.gates_R)


def test_only_the_chosen_are_demand_and_enter_balance_losses() -> None:
    router, x_TD = make(), draw(T, D)
    dense, sparse, context = router(x_TD, make_context(T)), top_k_of(router, x_TD), make_context(T)
    assert torch.equal(dense.demand_E(), sparse.demand_E()) and dense.load_E().tolist() == [T] * E
    assert dense.probs_TE is not None
    for loss in (load_balance, sequence_balance):
        assert torch.equal(loss(dense.probs_TE, dense, context), loss(dense.probs_TE, sparse, context))


@pytest.mark.parametrize("order", ["position", "gate"])
def test_a_capacity_goes_to_the_chosen_first(order: Any) -> None:
    router, x_TD = make(), draw(T, D)
    tight = drop_over_capacity(router(x_TD, make_context(T)), 2 * 0.7, E, order=order)
    want = drop_over_capacity(top_k_of(router, x_TD), 2 * 0.7, E, order=order)
    kept_TK = tight.kept_R.view(T, E)[:, :2]
    assert torch.equal(kept_TK.reshape(-1), want.kept_R) and not kept_TK.all()
    assert int(tight.kept_R.sum()) > int(want.kept_R.sum())  # what is left over goes to the others


@pytest.mark.parametrize("form", ["own", "unit"])
def test_all_experts_are_counted_in_training_and_k_in_evaluation(form: Any) -> None:
    config = small_config(gate_form=form)
    model, batch = shake(make_model("dense_mixer", config)), make_batch()
    result = backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=1)
    tokens = batch.tokens_BS.size
    assert result.pairs_L.tolist() == [tokens * config.num_experts] * 2
    assert [int(demand_E.sum()) for demand_E in result.demand_L] == [tokens * config.k] * 2
    plain = shake(make_model("switch", config))
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(result.loss, backward_batch(plain, batch, CPU64, seed=0, step=0, micro_batches=1).loss)
