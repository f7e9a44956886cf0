"""Softmax top-k over real and free experts, with a bias that holds the number of real ones per token on average.

LongCat-Flash, Meituan 2025 (arXiv 2509.01322); scores and gates by its public code.

A token chooses k of all experts by softmax + bias, so that an easy one may spend less. Its gates are the probabilities,
not normalised over the chosen, times a scale. After each step the bias of each of the N real experts moves by a rate
times (K_e / k) / N - n_e / (k T): of a token's k experts K_e are then real on average, and real ones equally loaded.
The biases of free experts stay 0. The paper's zero-computation experts return their input: `--model.copy-experts 8`.
Without free experts all k are real. The rate is ours, the paper's not being known to us. Its loss by device,
in which the free experts are one group more, is not here: every router's `device_balance_weight` leaves them out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.limits import NonNegative, Positive, Share
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class LongCatRouter(Router):
    """Selection by p + b; after each step b of the real experts moves towards their share."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of LongCat-Flash's router."""

        update_rate: NonNegative = 0.01
        """How far a bias moves per step, times the error in the expert's share of pairs (the paper's mu)."""
        real_share: Share = 2 / 3
        """The share of a token's k experts that are real on average (K_e / k), where there are free ones; the paper
        has 8 of 12.
        """
        route_scale: Positive = 6.0
        """Factor on all gates."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate", "load"})
    gate_meaning = "softmax over all experts, unbiased, times 6"
    config: Config
    bias_E: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.gate_meaning = f"softmax over all experts, unbiased, times {config.route_scale:g}"
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.register_buffer("bias_E", torch.zeros(shape.num_experts))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Select by biased probabilities, gate by unbiased ones."""
        logits_TE = self.scores(x_TD)
        probs_TE = logits_TE.softmax(1)
        ids_TK = context.choose(probs_TE + self.bias_E, self.shape.k)
        gates_TK = self.config.route_scale * probs_TE.gather(1, ids_TK)
        return RoutingDecision.token_choice(
            ids_TK, gates_TK, self.shape.num_experts, logits_TE=logits_TE, probs_TE=probs_TE
        )

    def adapt(self, sums: Sums, progress: float) -> None:
        """Raise the bias of real experts that have less than their share of all pairs, lower that of the others."""
        real = self.shape.num_real_experts
        wanted = (self.config.real_share if self.shape.num_free_experts else 1.0) / real
        pairs = (self.shape.k * sums["tokens"]).clamp(min=1)
        self.bias_E[:real] += self.config.update_rate * (wanted - sums["demand_E"][:real] / pairs).to(self.bias_E.dtype)
