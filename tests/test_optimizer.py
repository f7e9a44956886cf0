"""The optimizer against AdamW, two clips and a schedule written out by hand; parameters are grouped by name."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlroute.config import TrainConfig
from rlroute.model import Transformer
from rlroute.training.optimizer import Optimizer, learning_rate
from tests.tiny import make_model, shake, small_config

CONFIG = TrainConfig(lr=3e-2, warmup_steps=3, weight_decay=0.2, clip=1e9, router_clip=1e9, router_lr_scale=0.25)
STEPS = 5
ROUTERS = {f"layers.{layer}.moe.router.scores.weight" for layer in range(2)}
GAINS = {f"layers.{layer}.{part}_norm.weight" for layer in range(2) for part in ("attention", "ffn")} | {"norm.weight"}


def shaken_model() -> Transformer:
    return shake(make_model("switch", small_config(num_shared_experts=1)))


def draw_gradients(model: Transformer, step: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Give every parameter a drawn gradient, and return all of them."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rate_by_hand(step: int, progress: float) -> float:
    """The schedule of ``CONFIG``: three steps of warm-up, and half a cosine from 1 to 0.1."""
    return 3e-2 * min(1.0, (step + 1) / 3) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


class AdamW:
    """Loshchilov and Hutter 2019, arXiv 1711.05101, for one parameter, with betas 0.9 and 0.95."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach().clone()
        self.first, self.second = torch.zeros_like(self.value), torch.zeros_like(self.value)
        self.steps = 0

    def step(self, gradient: Tensor, rate: float, decay: float) -> None:
        """Move the value; the decay is of the value itself, not a gradient."""
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.95 * self.second + 0.05 * gradient**2
        mean, square = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.95**self.steps)
        self.value = self.value - rate * decay * self.value - rate * mean / (square.sqrt() + 1e-8)


def total_norm(gradients: dict[str, Tensor], routers: bool) -> float:
    squares = (float((g**2).sum()) for name, g in gradients.items() if (name in ROUTERS) == routers)
    return math.sqrt(sum(squares))


def test_the_names_above_are_those_of_the_model() -> None:
    sizes = {name: p.dim() for name, p in shaken_model().named_parameters()}
    assert {name for name, dim in sizes.items() if dim == 1} == GAINS
    assert set(sizes) > ROUTERS | GAINS


@pytest.mark.parametrize(
    ("clip", "router_clip"), [(1e9, 1e9), (2.0, 1e9), (1e9, 0.5), (2.0, 0.5)], ids=["none", "all", "router", "both"]
)
def test_every_parameter_moves_as_by_hand(clip: float, router_clip: float) -> None:
    model = shaken_model()
    optimizer = Optimizer(model, replace(CONFIG, clip=clip, router_clip=router_clip))
    by_hand = {name: AdamW(parameter) for name, parameter in model.named_parameters()}
    for step in range(STEPS):
        gradients = draw_gradients(model, step)
        logged = optimizer.step(step, step / STEPS)
        rate = rate_by_hand(step, step / STEPS)
        norms = {routers: total_norm(gradients, routers) for routers in (False, True)}
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
        assert logged["grad_norm"] == pytest.approx(norms[False], rel=1e-9)
        assert logged["router_grad_norm"] == pytest.approx(norms[True], rel=1e-9)
        assert norms[False] > 10 and norms[True] > 2, "the limits above are below the norms"
        for name, one in by_hand.items():
            is_router = name in ROUTERS
            limit, norm = (router_clip if is_router else clip), norms[is_router]
            decay = 0.0 if is_router or name in GAINS else 0.2
            one.step(gradients[name] * min(1.0, limit / norm), rate * (0.25 if is_router else 1.0), decay)
        assert all(parameter.grad is None for parameter in model.parameters()), "the next step starts from none"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), by_hand[name].value, rtol=1e-6, atol=1e-9, msg=name)


def test_gradients_below_the_limit_are_not_enlarged() -> None:
    """AdamW hides a constant factor, hence a small step after a large one."""
    ends = []
    for clip in (1.0, 1e9):
        model = shaken_model()
        optimizer = Optimizer(model, replace(CONFIG, clip=clip, router_clip=clip))
        for step, scale in enumerate((1e-2, 1e-4)):
            norms = total_norm(draw_gradients(model, step, scale), False)
            optimizer.step(step, 0.0)
            assert norms < 1
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=0, msg=name)


def test_a_parameter_without_a_gradient_stays() -> None:
    """It does not decay either."""
    model = shaken_model()
    name = "layers.1.moe.experts.in_EHD"
    before = model.get_parameter(name).detach().clone()
    optimizer = Optimizer(model, CONFIG)
    draw_gradients(model, 0)
    model.get_parameter(name).grad = None
    optimizer.step(0, 0.0)
    assert torch.equal(model.get_parameter(name).detach(), before)
    assert not torch.equal(model.get_parameter("embed.weight").detach(), shaken_model().embed.weight.detach())


# The schedule


@pytest.mark.parametrize(
    ("step", "progress", "share"),
    [
        (0, 0.0, 0.25),
        (1, 0.0, 0.5),
        (3, 0.0, 1.0),
        (0, 0.5, 0.25 * 0.6),
        (9, 0.5, 0.6),
        (9, 0.25, 0.2 + 0.8 * (2 + math.sqrt(2)) / 4),
        (9, 0.75, 0.2 + 0.8 * (2 - math.sqrt(2)) / 4),
        (9, 1.0, 0.2),
        (9, 1.5, 0.2),
    ],
)
def test_four_steps_of_warm_up_and_half_a_cosine_to_a_fifth(step: int, progress: float, share: float) -> None:
    config = TrainConfig(lr=0.5, warmup_steps=4, final_lr=0.2)
    assert learning_rate(config, step, progress) == pytest.approx(0.5 * share, rel=1e-12)


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert learning_rate(TrainConfig(lr=0.5, warmup_steps=0), 0, 0.0) == 0.5
