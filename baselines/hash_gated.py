"""Experts from a fixed table, gates from a learned linear layer.

The hash layers of DeepSeek-V4, by its public code: each expert of a token is gated by the square root of the softplus
of its logit, divided by their sum over the token's experts, times `route_scale`. There they are the first layers, as in
`topk:score=sqrt_softplus,route_scale=1.5,bias_rate=0.001+hash_gated@0-2`, and their table comes with the weights: ours
are those of `hash` (Roller et al. 2021, arXiv 2106.04426), a buffer of the same shape.

The logits weigh experts and choose none. A single gate is not normalised: it would be a constant and teach nothing.

Shape suffixes: T tokens, D model width, E experts, K experts per token.
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.baselines.hash import HashRouter
from rlroute.gates import gates_of, normalize_rows, sqrt_softplus
from rlroute.limits import NonNegative, Positive
from rlroute.routing import LinearScores, RouterShape, RoutingContext, RoutingDecision


class HashGatedRouter(HashRouter):
    """Each token id has its experts for good; how much each of them counts is learned."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HashRouter.Config):
        """Fields of the hash router, and of its gates."""

        route_scale: Positive = 1.5
        """Factor on all gates; DeepSeek-V4 uses 1.5."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = "sqrt-softplus, normalised over the chosen for k > 1, times route_scale"
    publishes = frozenset({"logits", "probs"})
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        over = ", normalised over the chosen" if shape.k > 1 else ""
        self.gate_meaning = f"sqrt-softplus{over}, times {config.route_scale:g}"

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Look the experts up, and gate them by their scores."""
        logits_TE = self.scores(x_TD)
        scores_TE = sqrt_softplus(logits_TE)
        ids_TK = self.look_up(context)
        gates_TK = gates_of(scores_TE, ids_TK)
        if self.shape.k > 1:
            gates_TK = normalize_rows(gates_TK)
        return RoutingDecision.token_choice(
            ids_TK,
            self.config.route_scale * gates_TK,
            self.shape.num_experts,
            logits_TE=logits_TE,
            probs_TE=normalize_rows(scores_TE),
        )
