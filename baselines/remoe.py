"""ReLU routing: an expert runs where its score is positive, and a penalty that adapts keeps k of them on average.

ReMoE, Wang et al. 2024 (arXiv 2412.14711): gates relu(x W), and an L1 penalty on them, each expert's weighted by how
often it runs, which balances as well. The penalty's coefficient is one for all layers: after each step it is multiplied
by 1.2 where more than k experts ran for a token on average, and divided by 1.2 where fewer did; it starts at 1e-8. Both
are the paper's.

At first half of the experts run (the paper's dense stage, 100 steps and more): what ran is counted. The probabilities
that terms read are the gates over their sum, equal where all are 0.

Shape suffixes: T tokens, D model width, E experts, K slots per token (E of them).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import gates_of, normalize_rows
from rlroute.limits import Between, Positive
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums, Term

FLOOR = 1e-9
"""Added to gates before they are divided by their sum."""


class ReMoERouter(Router):
    """Gates are ReLU; their number is held at k by the weight of their L1 norm."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of ReMoE."""

        first_penalty: Positive = 1e-8
        """The penalty's coefficient at the start (the paper's lambda_0)."""
        factor: Annotated[float, Between(1, 2)] = 1.2
        """By which the coefficient is multiplied or divided after each step (the paper's alpha)."""
        init_std: Positive = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate", "load"})
    gate_meaning = "ReLU of the score"
    batch_dependent = True
    config: Config
    penalty: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.register_buffer("penalty", torch.tensor(config.first_penalty))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take every expert whose score is positive."""
        logits_TE, experts = self.scores(x_TD), self.shape.num_experts
        ids_TK = context.choose(logits_TE.masked_fill(logits_TE <= 0, float("-inf")), experts)
        gates_TE = logits_TE.relu()
        gates_TK = gates_of(gates_TE, ids_TK)
        probs_TE = normalize_rows(gates_TE + FLOOR)
        return RoutingDecision.token_choice(ids_TK, gates_TK, experts, logits_TE=logits_TE, probs_TE=probs_TE)

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the penalty: its coefficient times the mean over tokens and layers of sum_e f_e relu(z_e), where f_e
        is E / (k T) times the tokens that chose e.
        """
        assert decision.logits_TE is not None
        context, shape = feedback.context, self.shape
        gates_TE = decision.logits_TE.relu() * context.mask_T[:, None]
        demand_E = context.sum_over_scope(decision.demand_E(context.mask_T).to(gates_TE.dtype))
        tokens = context.sum_over_scope(context.mask_T.sum().to(gates_TE.dtype)).clamp(min=1)
        f_E = shape.num_experts * demand_E / (shape.k * tokens)
        mean = (f_E * context.sum_over_scope(gates_TE.sum(0))).sum() / (tokens * shape.num_sites)
        return {"sparsity": Term(feedback.share * self.penalty * mean, 1.0)}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Raise the penalty where too many experts ran, over all layers, and lower it where too few did."""
        wanted = self.shape.k * sums.over_sites("tokens")
        over = torch.sign(sums.over_sites("demand_E").sum() - wanted).to(self.penalty.dtype)
        self.penalty *= self.config.factor**over
