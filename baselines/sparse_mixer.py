"""Two experts, drawn one after the other among those whose scores are near the best; the draw itself has a gradient.

SparseMixer, Liu et al. 2023 (arXiv 2310.00811, one expert), in the form of GRIN, Liu et al. 2024 (arXiv 2409.12136, two
experts), which is that of Phi-3.5-MoE.

For each choice, with z the scores of the experts that are left and m the largest of them: experts with
(m - z_e) / max(|z_e|, m) > 2 jitter are masked, and p is the softmax of z over the others. Evaluation takes the largest
z, training draws from p (Gumbel). The gate is p of the taken expert; the gates of two choices do not add up to 1.

In training the gate of an expert that is not the largest is p with probability 1/4 and p / 3 else, each with the
gradient of p. That is Heun's third-order rule: f(p) - f(0), what the expert was worth against none, is about
p (f'(p) + 3 f'(p / 3)) / 4. The gate of the largest is p.

Where no other expert is near, p is 1 and tells the router nothing. The authors' code has jitter 0.1, Phi-3.5-MoE 0.01,
with which nearly all gates of a young router are 1. An expert that is forced counts as near.

Shape suffixes: T tokens, D model width, E experts, K choices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.limits import NonNegative, Share
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.sampling import gumbel_top_k, top_k


class SparseMixerRouter(Router):
    """Draws among the near best, and Heun's rule for the gates."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of SparseMixer."""

        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss (Switch's alpha)."""
        jitter: Share = 0.1
        """How near an expert's score has to be to the best one's, relative and over 2; 0.5 lets through all scores of
        the best one's sign, 1 all.
        """
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over the experts that are near the best one left"
    stochastic = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)

    @classmethod
    def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
        """Refuse a third expert, for which nothing is published."""
        reason = super().refuses(config, shape)
        return f"k = {shape.k}: legal are 1 and 2" if reason is None and shape.k > 2 else reason

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Draw in training, take the largest scores otherwise."""
        logits_TE = self.scores(x_TD)
        ids_TK = context.take(self._chosen(logits_TE.detach(), context))
        return RoutingDecision.token_choice(
            ids_TK,
            self._gates(logits_TE, ids_TK, context),
            self.shape.num_experts,
            logits_TE=logits_TE,
            probs_TE=logits_TE.softmax(1),
        )

    def _chosen(self, left_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return an expert for each choice, int64 of shape (T, K)."""
        if not context.explore:
            return top_k(left_TE, self.shape.k)
        uniform_TKE = context.noise("sparse_mixer", (self.shape.k, self.shape.num_experts))
        ids = []
        for uniform_TE in uniform_TKE.unbind(1):
            near_TE = left_TE.masked_fill(far(left_TE, self.config.jitter), float("-inf"))
            ids.append(gumbel_top_k(near_TE, 1, uniform_TE))
            left_TE = left_TE.scatter(1, ids[-1], float("-inf"))
        return torch.cat(ids, dim=1)

    def _gates(self, left_TE: Tensor, ids_TK: Tensor, context: RoutingContext) -> Tensor:
        """Return the gate of each choice, of shape (T, K)."""
        shares: list[Tensor] = []
        for ids_T1 in torch.split(ids_TK, 1, dim=1):
            far_TE = far(left_TE.detach(), self.config.jitter).scatter(1, ids_T1, False)
            share_T1 = left_TE.masked_fill(far_TE, float("-inf")).softmax(1).gather(1, ids_T1)
            if context.explore:
                best_T1 = top_k(left_TE, 1) == ids_T1
                whole_T1 = best_T1 | (context.noise(f"sparse_mixer.heun{len(shares)}", (1,)) > 0.75)
                share_T1 = heun(share_T1, whole_T1)
            shares.append(share_T1)
            left_TE = left_TE.scatter(1, ids_T1, float("-inf"))
        return torch.cat(shares, dim=1)


def far(left_TE: Tensor, jitter: float) -> Tensor:
    """Say which experts are too far from the best of those that are left, whose scores are not -inf; bool, (T, E)."""
    best_T1 = left_TE.amax(1, keepdim=True)
    return (best_T1 - left_TE) / torch.maximum(left_TE.abs(), best_T1) > 2 * jitter


def heun(share_T1: Tensor, whole_T1: Tensor) -> Tensor:
    """Return a share, or where it is not whole a third of it, with the gradient of the share."""
    return share_T1 + torch.where(whole_T1, 0.0, -2 / 3 * share_T1.detach())
