"""A contextual bandit: each expert has a linear model of the reward it brings a token, and the choice is optimistic or
a posterior draw.

LinUCB (Li et al. 2010, arXiv 1003.0146) and linear Thompson sampling (Agrawal and Goyal 2013, arXiv 1209.3352), with
forgetting, because experts and hidden states move while they are being learned about. No gradient reaches the router: a
posterior moves once per step.

Thompson sampling draws for each token anew, as if it were a round of its own: two tokens of a step share no drawn
weights, but the posterior, which moves between steps.

The models see a fixed random projection of the hidden state and a constant. With k > 1 every chosen expert of a token
is credited with the token's reward.

Shape suffixes: T tokens (rows of all routing samples), D model width, P features, M routing samples, E experts, K
experts per token, R pairs, Q = P + 1 (features and reward), G tiles, N rows of a tile.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlroute import seeding
from rlroute.config import RouterConfig
from rlroute.gates import constant_gates
from rlroute.kernels import Plan, make_plan
from rlroute.limits import BelowOne, Count, NonNegative, Positive
from rlroute.policies import RunningMean, reward
from rlroute.routing import Feedback, Router, RouterShape, RoutingContext, RoutingDecision, Sums

TILE = 16
"""Rows that are multiplied together where the host does not know how many each expert has."""


class BanditRouter(Router):
    """Bayesian linear regression of the reward, per expert."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the bandit."""

        exploration: Literal["optimism", "thompson"] = "thompson"
        """Score by the mean plus ``width`` standard deviations, or by a draw from the posterior widened so."""
        width: NonNegative = 1.0
        """How many posterior standard deviations, in nats."""
        features: Count = 32
        """P, the width of the random projection of the hidden state."""
        ridge: Positive = 1.0
        """Precision of the prior."""
        init_std: NonNegative = 0.02
        """Standard deviation of the prior's means, without which all tokens would start with the same experts."""
        forget: BelowOne = 0.99
        """Decay per step of what was seen."""
        charge_weight: NonNegative = 0.1
        """Charge on the reward for full experts, in nats: times the mean over a token's experts of E f_e - 1."""
        ema_decay: BelowOne = 0.99
        """Decay of the running mean reward, which is subtracted from every reward."""

    learns_from = frozenset({"reward"})
    gate_meaning = "1/k"
    publishes = frozenset()
    config: Config
    projection_DP: Tensor
    prior_EP: Tensor
    gram_EPP: Tensor
    moment_EP: Tensor
    mean_EP: Tensor
    covariance_EPP: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.stochastic = config.exploration == "thompson"
        size, experts = config.features + 1, shape.num_experts
        projection_DP = torch.empty(shape.d_model, config.features)
        shape.init(projection_DP, "projection", shape.d_model**-0.5)
        prior_EP = torch.empty(experts, size)
        shape.init(prior_EP, "prior", config.init_std)
        self.register_buffer("projection_DP", projection_DP)
        self.register_buffer("prior_EP", prior_EP)
        self.register_buffer("gram_EPP", torch.zeros(experts, size, size))
        self.register_buffer("moment_EP", torch.zeros(experts, size))
        self.register_buffer("mean_EP", prior_EP.clone())
        self.register_buffer("covariance_EPP", torch.eye(size).repeat(experts, 1, 1) / config.ridge)
        self.mean_reward = RunningMean(config.ema_decay)
        self.batch_dependent |= config.charge_weight > 0

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k experts of the highest score; of the highest mean where greedy. Gates are 1/k."""
        features_TP = self._features(x_TD.detach())
        scores_TE = features_TP @ self.mean_EP.to(features_TP.dtype).t()
        if context.explore:
            scores_TE = scores_TE + self.config.width * self._spread(features_TP, context)
        ids_TK = context.choose(scores_TE, self.shape.k)
        lost = ~self.mean_EP.isfinite().all()  # a posterior that could not be computed ends the run, as diverged
        gates_TK = constant_gates(ids_TK, x_TD).masked_fill(lost, float("nan"))
        return RoutingDecision.token_choice(ids_TK, gates_TK, self.shape.num_experts, memo={"features_TP": features_TP})

    def _features(self, x_TD: Tensor) -> Tensor:
        return torch.cat([x_TD @ self.projection_DP.to(x_TD.dtype), x_TD.new_ones(len(x_TD), 1)], dim=1)

    def _spread(self, features_TP: Tensor, context: RoutingContext) -> Tensor:
        """Return each expert's posterior standard deviation for each token, times a normal draw under Thompson; (T,
        E).
        """
        covariance_EPP = self.covariance_EPP.to(features_TP.dtype)
        seen_ETP = features_TP @ covariance_EPP
        std_TE = (seen_ETP * features_TP).sum(2).clamp(min=0).sqrt().t()
        if self.config.exploration == "optimism":
            return std_TE
        return std_TE * seeding.normal(context.noise("bandit", (self.shape.num_experts,))).to(std_TE.dtype)

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return the sum of rewards, and each expert's sums of feature products and of rewarded features.

        A pair counts if it ran and its token is valid.
        """
        reward_T, mask_T = reward(decision, feedback, self.config.charge_weight).reshape(-1), feedback.context.mask_T
        features_TP = decision.memo["features_TP"].to(reward_T.dtype)
        seen_TQ = torch.cat([features_TP, self.mean_reward.centre(reward_T)[:, None]], dim=1)
        counts_R = decision.kept_R & mask_T[decision.token_ids_R]
        plan = make_plan(replace(decision, kept_R=counts_R))
        sums_EPQ = (by_tile if features_TP.is_cuda else by_expert)(features_TP, seen_TQ, plan)
        return {"reward": reward_T.sum(), "gram_EPP": sums_EPQ[..., :-1], "moment_EP": sums_EPQ[..., -1]}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Forget a little, add what the step saw, and move the posterior."""
        config, kind = self.config, self.gram_EPP
        self.gram_EPP.copy_(config.forget * self.gram_EPP + sums["gram_EPP"].to(kind))
        self.moment_EP.copy_(config.forget * self.moment_EP + sums["moment_EP"].to(kind))
        precision_EPP = self.gram_EPP + config.ridge * torch.eye(kind.shape[1], dtype=kind.dtype, device=kind.device)
        factor_EPP, failed_E = torch.linalg.cholesky_ex(precision_EPP)  # without a look at whether it did
        factor_EPP = factor_EPP.masked_fill((failed_E != 0)[:, None, None], float("nan"))
        self.covariance_EPP.copy_(torch.cholesky_inverse(factor_EPP))
        moment_EP = self.moment_EP + config.ridge * self.prior_EP
        self.mean_EP.copy_(torch.cholesky_solve(moment_EP[..., None], factor_EPP).squeeze(2))
        self.mean_reward.update(sums, "reward")


def by_expert(features_TP: Tensor, seen_TQ: Tensor, plan: Plan) -> Tensor:
    """Return the sum of outer products over each expert's rows, shape (E, P, Q); the host reads where these begin."""
    bounds = plan.starts_E.tolist()
    rows = [plan.tokens_R[start:end] for start, end in itertools.pairwise(bounds)]
    return torch.stack([features_TP[tokens].t() @ seen_TQ[tokens] for tokens in rows])


def by_tile(features_TP: Tensor, seen_TQ: Tensor, plan: Plan) -> Tensor:
    """Return the same without waiting for the device: each tile's sum, and the sum of an expert's tiles."""
    experts_G, rows_G, _ = plan.tiles(TILE)
    rows_GN = rows_G[:, None] + torch.arange(TILE, device=rows_G.device)
    counts_GN = (experts_G >= 0)[:, None] & (rows_GN < plan.starts_E[experts_G + 1][:, None])
    tokens_GN = plan.tokens_R[rows_GN.clamp(max=len(plan.tokens_R) - 1)]
    products_GPQ = (features_TP[tokens_GN] * counts_GN[..., None]).mT @ seen_TQ[tokens_GN]
    sums_EPQ = products_GPQ.new_zeros(plan.num_experts, *products_GPQ.shape[1:])
    return sums_EPQ.index_add(0, experts_G.clamp(min=0), products_GPQ)
