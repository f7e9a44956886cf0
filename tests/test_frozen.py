"""The frozen router sees content and learns nothing."""

from dataclasses import replace
from typing import Any

import torch

from rlroute.balance import load_balance
from rlroute.baselines.frozen import FrozenRouter
from rlroute.config import TrainConfig
from rlroute.experiments.laws.steps import adapt, backward, make_batch, state
from rlroute.training.optimizer import Optimizer
from tests.conftest import D, draw, make_context, make_shape


def make(**weights: Any) -> FrozenRouter:
    return FrozenRouter(FrozenRouter.Config(**weights), make_shape(8, 2)).double()


def test_it_learns_nothing_though_a_term_and_the_loss_pull() -> None:
    router, body = make(balance_weight=1.0, z_weight=1.0), torch.nn.Linear(D, D).double()
    model = torch.nn.ModuleDict({"router": router, "body": body})
    before, optimizer = state(router), Optimizer(model, TrainConfig(lr=1.0, warmup_steps=0, steps=5))
    moved = body.weight.clone()
    for step in range(5):
        batch = make_batch(router, step=step)
        outcome = backward(router, replace(batch, x_TD=body(batch.x_TD)))
        optimizer.step(step, step / 5)
        adapt(router, outcome.sums)
    assert all(torch.equal(value, before[name]) for name, value in state(router).items())
    assert not torch.equal(body.weight, moved), "a term moves the body, and that alone"


def test_gates_are_constant_and_tell_the_body_nothing() -> None:
    x_TD = draw(12, D).requires_grad_()
    decision = make()(x_TD, make_context())
    assert not decision.gates_R.requires_grad and bool((decision.gates_R == 0.5).all())
    assert decision.probs_TE is not None
    load_balance(decision.probs_TE, decision, make_context()).backward()
    assert x_TD.grad is not None and bool(x_TD.grad.any())


def test_routes_go_by_content_alone_and_are_those_of_the_projection() -> None:
    router, x_TD = make(), draw(50, D)
    decision = router(x_TD, make_context(50))
    other = router(x_TD, make_context(50, length=7, seed=3, step=9, token_ids_T=torch.zeros(50, dtype=torch.int64)))
    assert torch.equal(decision.expert_ids_R, other.expert_ids_R)
    assert torch.equal(decision.expert_ids_R, (x_TD @ router.scores.weight.t()).topk(2).indices.flatten())
    assert len(decision.expert_ids_R.unique()) > 4
