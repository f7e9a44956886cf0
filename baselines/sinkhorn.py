"""S-BASE: in training top-k of a plan that Sinkhorn's rounds balance, in evaluation top-k of the logits.

Clark et al. 2022 (arXiv 2202.01169): entropic optimal transport (Cuturi 2013, arXiv 1306.0895) in place of BASE's
assignment. The gates are those of Megatron-Core's Sinkhorn router: the sigmoid for k = 1, the softmax over all experts
for more; the plan only chooses and has no gradient. Megatron goes on until the scales move by less than 1e-4, which the
host would have to read: here the number of rounds is fixed.

Shape suffixes: T tokens, D model width, E experts, K experts per token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.limits import Count, NonNegative, Positive
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision


class SinkhornRouter(Router):
    """Top-k of a transport plan between tokens and experts of equal load."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the Sinkhorn router."""

        rounds: Count = 20
        """Rounds of Sinkhorn's algorithm, each of which scales all columns and all rows."""
        temperature: Positive = 1.0
        """Of the plan, which is a scaled exp(logits / temperature); the paper and Megatron use none."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts"
    two_rules = True
    batch_dependent = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        if shape.k == 1:
            self.gate_meaning = "sigmoid"
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k experts of the largest plan in training, of the largest logits otherwise."""
        logits_TE = self.scores(x_TD)
        probs_TE = logits_TE.softmax(1)
        ranked_TE = logits_TE
        if context.explore:
            ranked_TE = balanced(logits_TE.detach() / self.config.temperature, context.mask_T, self.config.rounds)
        ids_TK = context.choose(ranked_TE, self.shape.k)
        gates_TE = logits_TE.sigmoid() if self.shape.k == 1 else probs_TE
        gates_TK = gates_TE.gather(1, ids_TK)
        return RoutingDecision.token_choice(
            ids_TK, gates_TK, self.shape.num_experts, logits_TE=logits_TE, probs_TE=probs_TE
        )


def balanced(scores_TE: Tensor, mask_T: Tensor, rounds: int) -> Tensor:
    """Return the logarithm of the plan exp(scores + row scale + column scale) whose rows sum to 1 and whose columns,
    over the rows in the mask, approach equal sums. In logarithms: nothing overflows.
    """
    absent_TE = torch.zeros_like(scores_TE).masked_fill(~mask_T[:, None], -1e30)  # finite, if all rows were padding
    load = mask_T.sum().clamp(min=1).to(scores_TE.dtype).log() - math.log(scores_TE.shape[1])
    rows_TE = scores_TE.log_softmax(1)
    for _ in range(rounds):
        columns_TE = rows_TE - (rows_TE + absent_TE).logsumexp(0) + load
        rows_TE = columns_TE.log_softmax(1)
    return rows_TE
