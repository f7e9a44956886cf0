"""A random linear router that stays as it was drawn: the control that sees the token's content and learns nothing.

A frozen random projection as the control of learned routers: marin (https://github.com/marin-community/marin, issue
5502), where it cost 0.09 nats.

`uniform` and `hash` know nothing of the hidden state; this one knows it and cannot choose what to look at. What still
moves its routes is the body, whose hidden states change; no gradient tells it where the routes should go, since the
gates are constant. A balance term, if it is given a weight, can move the body alone.
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import constant_gates
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision


class FrozenRouter(Router):
    """The k largest of a random projection."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """The frozen router has no fields of its own."""

    gate_meaning = "1/k"

    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", shape.d_model**-0.5)  # the scale is that of the logits alone
        self.scores.requires_grad_(False)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k largest."""
        logits_TE = self.scores(x_TD)
        ids_TK = context.choose(logits_TE, self.shape.k)
        return RoutingDecision.token_choice(
            ids_TK,
            constant_gates(ids_TK, x_TD),
            self.shape.num_experts,
            logits_TE=logits_TE,
            probs_TE=logits_TE.softmax(1),
        )
