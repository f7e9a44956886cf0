"""Each token takes its most probable experts until their probabilities add up to p: more of them, the less sure it is.

Dynamic routing, Huang et al. 2024 (arXiv 2403.07652), with its p of 0.4, its load-balance weight of 1e-2 and its weight
of 1e-4 on the entropy of the probabilities, which keeps tokens from taking ever more experts. Gates are the
probabilities as there. The model's k is no part of the rule: what ran is counted.

Shape suffixes: T tokens, D model width, E experts, K slots per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.balance import entropy_T
from rlroute.config import RouterConfig
from rlroute.gates import gates_of
from rlroute.limits import Count, NonNegative, Share
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Term
from rlroute.sampling import top_k


class TopPRouter(Router):
    """The smallest set of experts whose probability reaches p."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of top-p routing."""

        p: Share = 0.4
        """The probability that a token's experts have together, at least."""
        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss (the paper's alpha)."""
        dynamic_weight: NonNegative = 1e-4
        """Weight of the entropy of the probabilities (the paper's beta)."""
        slots: Count | None = None
        """Most experts of a token, the most probable; none: all. Memory of a layer grows with it."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts"
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take an expert unless those before it have p already."""
        logits_TE, experts = self.scores(x_TD), self.shape.num_experts
        probs_TE = logits_TE.softmax(1)
        before_TE = mass_before(probs_TE.detach())
        outside_TE = (before_TE >= self.config.p) & (before_TE > 0)  # at p = 0 the first is taken as well
        slots = min(self.config.slots or experts, experts)
        ids_TK = context.choose(probs_TE.masked_fill(outside_TE, float("-inf")), slots)
        gates_TK = gates_of(probs_TE, ids_TK)
        return RoutingDecision.token_choice(ids_TK, gates_TK, experts, logits_TE=logits_TE, probs_TE=probs_TE)

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the mean entropy of the probabilities, to be made small."""
        assert decision.probs_TE is not None
        return {"dynamic": Term(feedback.mean(entropy_T(decision.probs_TE)), self.config.dynamic_weight)}


def mass_before(probs_TE: Tensor) -> Tensor:
    """Return for each expert the sum of its token's larger probabilities, ties in the order of ids; shape (T, E)."""
    order_TE = top_k(probs_TE, probs_TE.shape[1])
    ranked_TE = probs_TE.gather(1, order_TE)
    before_EE = probs_TE.new_ones(probs_TE.shape[1], probs_TE.shape[1]).triu(1)  # cumsum has no deterministic form
    return torch.empty_like(probs_TE).scatter_(1, order_TE, ranked_TE @ before_EE)
