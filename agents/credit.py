"""The credit router: a sampled policy taught by the gradient of its gates, not by the loss as a number.

Gates have the fixed value 1/k and the gradient of log pi of the draw up to their pair, over k. A gate's gradient is its pair's credit
<dL/dout_t, y_r>: the change of the whole loss, to first order, from running the pair rather than nothing; so each log-probability moves
against the credit of the pairs drawn from there on. It is the score-function estimator with the loss replaced by its linearisation:
one number per pair instead of one per token, hence far less noise, and the bias of a first-order view. It sees all that a token's
route changes, later tokens and auxiliary losses of later layers included.

Related: straight-through estimators (Bengio et al. 2013, arXiv 1308.3432); unlike theirs, the value of the forward pass is untouched.

Shape suffixes: T tokens, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.agents._policy import PolicyConfig, PolicyRouter
from rlroute.limits import Positive
from rlroute.routing import Feedback, RouterShape, RoutingDecision, Term


class CreditRouter(PolicyRouter):
    """Policy gradient with first-order credit in place of a reward."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PolicyConfig):
        """Fields of the credit router."""

        scale: Positive = 1.0
        """Of the gradient that runs from the gates into log pi."""

    learns_from = frozenset({"gate"})
    gate_meaning = "1/k, gradient of log pi"

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.config = config

    def gates(self, ids_TK: Tensor, log_prob_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return 1/k with the gradient of the summed log-probabilities of the draws up to each pair."""
        constant_TK = super().gates(ids_TK, log_prob_TK, dtype)
        if log_prob_TK is None:
            return constant_TK
        path_TK = self.config.scale / self.shape.k * log_prob_TK.cumsum(1).to(dtype)
        return constant_TK + path_TK - path_TK.detach()

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return minus the entropy, and the balance loss."""
        return self.regularisers(decision, feedback)
