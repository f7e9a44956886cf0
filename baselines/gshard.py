"""The best expert of a token, and in training the second best by chance: the more it weighs, the surer.

GShard, Lepikhin et al. 2020 (arXiv 2006.16668).

The second expert is run with probability min(1, 2 g), g being its gate; gates are normalised over the two, also where
the second is not run. Evaluation runs both. The paper's local groups, in which an expert has 2 N / E places for N
tokens, are the layer's: `--model.capacity-groups 4 --model.capacity-factor 1`. Its balance loss counts first choices
alone; the one here, which every router can have, counts all that are run.

For k = 1 there is no second expert, and the gate is the first one's share of the softmax over all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import normalize_rows
from rlroute.limits import NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.sampling import top_k


class GShardRouter(Router):
    """Top-2 with a random second expert."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of GShard's gating."""

        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss; the paper gives no value, this is Switch's (arXiv 2101.03961)."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts, renormalised over the best two"
    stochastic = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.stochastic = shape.k > 1
        if shape.k == 1:
            self.gate_meaning = "softmax over all experts"

    @classmethod
    def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
        """Refuse a third expert."""
        reason = super().refuses(config, shape)
        return f"k = {shape.k}: legal are 1 and 2" if reason is None and shape.k > 2 else reason

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the best two; while exploring leave the second out where the draw says so."""
        logits_TE, experts = self.scores(x_TD), self.shape.num_experts
        probs_TE = logits_TE.softmax(1)
        best_TK = top_k(logits_TE, self.shape.k)
        drawn_TK = self._drawn(probs_TE.gather(1, best_TK), context)
        ids_TK = context.take(best_TK.masked_fill(~drawn_TK, experts))
        # A second expert that is left out still has its share, whichever of the best two was forced to be the first.
        rival_TK = torch.where(ids_TK[:, :1] == best_TK, best_TK.flip(1), best_TK)[:, :1]
        used_TK = ids_TK < experts
        chosen_TK = probs_TE.gather(1, torch.where(used_TK, ids_TK, rival_TK))
        gates_TK = normalize_rows(chosen_TK) if self.shape.k > 1 else chosen_TK
        return RoutingDecision.token_choice(ids_TK, gates_TK * used_TK, experts, logits_TE=logits_TE, probs_TE=probs_TE)

    def _drawn(self, best_TK: Tensor, context: RoutingContext) -> Tensor:
        """Return which of the best are run: the first always, the second with twice its share of the two."""
        drawn_TK = torch.ones_like(best_TK, dtype=torch.bool)
        if not context.explore or self.shape.k == 1:
            return drawn_TK
        second_T = 2 * best_TK[:, 1] / best_TK.sum(1)
        drawn_TK[:, 1] = context.noise("gshard.second", ()) < second_T
        return drawn_TK
