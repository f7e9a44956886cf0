"""Softmax top-k with the f.P balance loss, router z-loss and input jitter.

Switch Transformer, Fedus et al. 2021 (arXiv 2101.03961); z-loss of ST-MoE, Zoph et al. 2022 (arXiv 2202.08906).

For k > 1 the gates are renormalised over the chosen, as in GShard (arXiv 2006.16668) and Mixtral.
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import softmax_meaning, softmax_top_k
from rlroute.limits import BelowOne, NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision


class SwitchRouter(Router):
    """Top-k by probability, kept balanced by E * sum_i f_i P_i."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the Switch router."""

        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss (the paper's alpha)."""
        jitter: BelowOne = 0.0
        """In training the router's own copy of its input is multiplied by U(1 - jitter, 1 + jitter); the paper uses
        1e-2.
        """
        normalize: bool = True
        """Renormalise the gates over the chosen where k > 1."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = softmax_meaning(normalize=True, k=2)
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.gate_meaning = softmax_meaning(config.normalize, shape.k)
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k most probable experts, of a jittered input in training."""
        if context.explore and self.config.jitter:
            uniform_TD = context.noise("switch.jitter", (x_TD.shape[1],)).to(x_TD.dtype)
            x_TD = x_TD * (1 + self.config.jitter * (2 * uniform_TD - 1))
        return softmax_top_k(self.scores(x_TD), self.shape.k, context, normalize=self.config.normalize)
