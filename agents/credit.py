"""The credit router: a sampled policy taught by the gradient of its gates, not by the loss as a number.

Gates have the fixed value 1/k and the gradient of log pi of the draw up to their pair, over k. A gate's gradient is its
pair's credit <dL/dout_t, y_r>: the change of the whole loss, to first order, from running the pair rather than nothing;
so each log-probability moves against the credit of the pairs drawn from there on. It is the score-function estimator
with the loss replaced by its linearisation: one number per pair instead of one per token, hence far less noise, and the
bias of a first-order view. It sees all that a token's route changes, later tokens and auxiliary losses of later layers
included.

Related: straight-through estimators (Bengio et al. 2013, arXiv 1308.3432); unlike theirs, the value of the forward pass
is untouched.

Shape suffixes: T tokens, D model width, E experts, R routed pairs.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from rlroute.limits import Positive
from rlroute.policies import PolicyConfig, perturb, policy_decision
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision


class CreditRouter(Router):
    """Policy gradient with first-order credit in place of a reward."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PolicyConfig):
        """Fields of the credit router."""

        scale: Positive = 1.0
        """Of the gradient that runs from the gates into log pi."""

    learns_from = frozenset({"gate"})
    gate_meaning = "1/k, gradient of log pi"
    stochastic = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Sample k experts in order where exploring, else take the k most probable.

        A gate is 1/k with the gradient of the summed log-probabilities of the draws up to its pair.
        """
        k, logits_TE = self.shape.k, self.scores(x_TD if self.config.shape_body else x_TD.detach())
        policy_TE = logits_TE / self.config.temperature_at(context.step)
        ids_TK = context.choose(perturb(policy_TE, context, "credit"), k)
        decision = policy_decision(logits_TE, policy_TE, ids_TK, context)
        if decision.log_prob_R is None:
            return decision
        # Not cumsum, whose order on a GPU is not fixed; in float64, as it sums on the CPU.
        paths = accumulate(decision.log_prob_R.double().view(-1, k).unbind(1))
        path_R = self.config.scale / k * torch.stack(list(paths), dim=1).to(decision.log_prob_R.dtype).reshape(-1)
        return replace(decision, gates_R=decision.gates_R + path_R - path_R.detach())
