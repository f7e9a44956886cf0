"""The way of a batch: what is added to the loss, and in what precision it runs.

Shape suffixes: T tokens, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlroute import metrics
from rlroute.model import Transformer
from rlroute.routing import Feedback, RoutingDecision, Term
from rlroute.training.step import Device, StepResult, backward_batch, forward, make_context
from tests.tiny import CPU64, make_batch, make_model, shake, small_config

Objective = Callable[[RoutingDecision, Feedback], dict[str, Term]]


def learn(*terms: tuple[str, Callable[[Tensor], Tensor], float]) -> tuple[StepResult, dict[str, Tensor]]:
    """Run a batch backward; an objective has these terms: a name, a function of the sum of squared logits, a weight."""
    model = shake(make_model("unbalanced", small_config()))

    def objective(decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        assert decision.logits_TE is not None
        value = feedback.mean(decision.logits_TE.square().sum(1))
        return {name: Term(change(value), weight) for name, change, weight in terms}

    for router in model.routers:
        router.objective = objective  # type: ignore[method-assign]
    result = backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=2)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(value: Tensor) -> Tensor:
    return value


def times_nan(value: Tensor) -> Tensor:
    return value * float("nan")


def test_a_term_of_weight_0_touches_neither_loss_nor_gradient_even_where_it_is_not_a_number() -> None:
    """0 * NaN is NaN: such a term must not be added at all."""
    plain, plain_gradients = learn()
    beside, gradients = learn(("broken", times_nan, 0.0), ("idle", same, 0.0))
    assert beside.loss == plain.loss and gradients.keys() == plain_gradients.keys()
    assert all(torch.equal(gradient, plain_gradients[name]) for name, gradient in gradients.items())
    assert all(value != value for value in beside.terms["broken"]) and all(v > 0 for v in beside.terms["idle"])


def test_a_term_is_added_with_its_weight_and_logged_without() -> None:
    _, plain = learn()
    once, gradients = learn(("squares", same, 0.5))
    thrice, more = learn(("squares", same, 1.0), ("again", same, 0.5))
    router = "layers.0.moe.router.scores.weight"
    assert (gradients[router] - plain[router]).abs().max() > 1e-3
    for name, gradient in plain.items():
        torch.testing.assert_close(more[name] - gradient, 3 * (gradients[name] - gradient), rtol=1e-6, atol=1e-12)
    assert once.loss == thrice.loss, "the language-model loss alone"
    assert once.pairs_L.tolist() == [2 * 16, 2 * 16], "pairs of both micro-batches"
    assert once.terms["squares"].equal(thrice.terms["squares"]) and thrice.terms["squares"].equal(thrice.terms["again"])
    assert once.weights == {"squares": [0.5, 0.5]}
    assert thrice.weights == {"squares": [1.0, 1.0], "again": [0.5, 0.5]}


# What is measured


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_size_of_logits_is_their_root_mean_square_over_all_micro_batches(parts: int) -> None:
    model, batch = shake(make_model("unbalanced", small_config())), make_batch(4)
    result = backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=parts)
    _, decisions = forward(model, batch, make_context(batch, CPU64, seed=0, step=0, explore=True), CPU64)
    for size, decision in zip(result.per_token()["logits_L"], decisions, strict=True):
        assert decision.logits_TE is not None
        torch.testing.assert_close(size, decision.logits_TE.square().mean().sqrt(), rtol=1e-12, atol=0)


def test_routers_without_logits_have_no_size_and_masked_ones_do_not_count() -> None:
    result = backward_batch(make_model("hash", small_config()), make_batch(), CPU64, seed=0, step=0, micro_batches=2)
    assert result.per_token()["logits_L"].isnan().all()
    masked = torch.tensor([[3.0, -torch.inf, 1.0], [2.0, 2.0, 2.0]], requires_grad=True)
    assert float(metrics.square_sum(masked)) == 5 + 4


# Precision


def dtypes(model: Transformer, device: Device) -> dict[str, set[torch.dtype]]:
    """Run a batch and return the precisions of what each kind of module gave, of the gates, and of the losses."""
    seen: dict[str, set[torch.dtype]] = {}

    def note(kind: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.setdefault(kind, set()).add(output.dtype)

    for name, module in model.named_modules():
        if name.endswith(("qkv", "out", "unembed", "shared", "scores")):
            module.register_forward_hook(partial(note, name.rpartition(".")[2]))
    batch = make_batch()
    context = make_context(batch, device, seed=0, step=0, explore=True)
    loss_MT, decisions = forward(model, batch, context, device)
    seen["gates"] = {decision.gates_R.dtype for decision in decisions}
    return seen | {"loss": {loss_MT.dtype}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matrices_are_multiplied_in_the_compute_precision_and_routers_and_losses_are_not(dtype: torch.dtype) -> None:
    model = make_model("switch", small_config(num_shared_experts=1), dtype=torch.float32)
    compute, full = {dtype}, {torch.float32}
    assert dtypes(model, Device("cpu", dtype)) == {
        "qkv": compute,
        "out": compute,
        "shared": compute,
        "unembed": compute,
        "scores": full,
        "gates": full,
        "loss": full,
    }


def test_bfloat16_gives_nearly_the_same_losses_and_not_the_same() -> None:
    model = make_model("switch", small_config(), dtype=torch.float32)
    batch = make_batch()
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        device = Device("cpu", dtype)
        losses.append(forward(model, batch, make_context(batch, device, seed=0, step=0, explore=False), device)[0])
    error = (losses[0] - losses[1]).abs().max()
    assert 1e-5 < error < 0.1


def test_float64_is_float64_throughout() -> None:
    model = make_model("switch", small_config(num_shared_experts=1))
    assert set.union(*dtypes(model, CPU64).values()) == {torch.float64}
