"""Experts choose tokens: each takes exactly C = k T / E of them, so that loads are equal and tokens are not.

Expert choice, Zhou et al. 2022 (arXiv 2202.09368), whose capacity factor is k here; gates are the probabilities as
there.

An expert compares a token with those after it: in a causal language model this leaks the future, in evaluation too, and
the paper uses it in encoders. C is k T / E rounded down, at least 1, of the rows of a micro-batch; padding is never
taken.

Shape suffixes: T tokens, D model width, E experts, C tokens per expert.
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.limits import NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision


class ExpertChoiceRouter(Router):
    """Each expert takes the C tokens that have the highest probability of it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of expert choice."""

        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts"
    causal = False
    batch_dependent = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Let each expert take its C tokens; fewer where all others are padding."""
        tokens, experts = len(x_TD), self.shape.num_experts
        logits_TE = self.scores(x_TD)
        probs_TE = logits_TE.softmax(1)
        valid_TE = probs_TE.masked_fill(~context.mask_T[:, None], float("-inf"))
        ids_EC = context.choose(valid_TE.t(), max(1, tokens * self.shape.k // experts))
        gates_EC = probs_TE.t().gather(1, ids_EC.clamp(max=tokens - 1))
        return RoutingDecision.expert_choice(ids_EC, gates_EC, tokens, logits_TE=logits_TE, probs_TE=probs_TE)
