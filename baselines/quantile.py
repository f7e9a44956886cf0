"""Sigmoid top-k whose loads are balanced by a bias that is solved for, not stepped towards: quantile balancing.

Su 2026 (https://kexue.fm/archives/11760, which starts from it); in this form, with its defaults, Megatron-Core's
`quantile_balancing`. Kimi K3 balances so by a histogram of scores.

A token runs the experts whose s - beta exceeds its cutoff, the (k + 1)-th best of these. beta_e is what makes expert e
exceed the cutoffs of k / E of the tokens: the (T k / E + 1)-th largest of s_e less the cutoff. It is solved exactly on
each micro-batch and averaged over micro-batches by their tokens; the next step chooses by it. Where T k / E is no whole
number it is rounded down. For k = 1 the gate is the score itself, as in `bias_balanced`.

Shape suffixes: T tokens, D model width, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import normalize_rows
from rlroute.limits import BelowOne, NonNegative, Positive
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class QuantileRouter(Router):
    """Selection by s - beta; after each step beta is what would have balanced it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of quantile balancing."""

        ema_decay: BelowOne = 0.0
        """What of the bias stays per step; 0, as in Megatron-Core: it is that of the last step alone. More is steadier
        and later.
        """
        route_scale: Positive = 1.0
        """Factor on all gates."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate", "load"})
    gate_meaning = "sigmoid, unbiased, normalised over the chosen for k > 1"
    batch_dependent = True
    config: Config
    beta_E: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.register_buffer("beta_E", torch.zeros(shape.num_experts))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Select by biased scores, gate by unbiased ones."""
        logits_TE = self.scores(x_TD)
        scores_TE = logits_TE.sigmoid()
        ids_TK = context.choose(scores_TE - self.beta_E, self.shape.k)
        gates_TK = scores_TE.gather(1, ids_TK)
        if self.shape.k > 1:
            gates_TK = normalize_rows(gates_TK)
        return RoutingDecision.token_choice(
            ids_TK,
            self.config.route_scale * gates_TK,
            self.shape.num_experts,
            logits_TE=logits_TE,
            probs_TE=normalize_rows(scores_TE),
        )

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return this micro-batch's solution times its valid tokens."""
        assert decision.logits_TE is not None
        scores_TE, mask_T = decision.logits_TE.detach().sigmoid(), feedback.context.mask_T
        return {"beta_E": mask_T.sum() * quantiles(scores_TE, self.beta_E, self.shape.k, mask_T)}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Take the mean solution of the step, its own mean subtracted, which moves no choice."""
        solved_E = (sums["beta_E"] / sums["tokens"].clamp(min=1)).to(self.beta_E.dtype)
        self.beta_E.lerp_(solved_E - solved_E.mean(), 1 - self.config.ema_decay)


def quantiles(scores_TE: Tensor, beta_E: Tensor, k: int, mask_T: Tensor) -> Tensor:
    """Return, for each expert, the (T k / E + 1)-th largest score above the token's cutoff, over the T rows in
    ``mask_T``; 0 where there are none. Shape (E,).

    With k = E there is nothing to balance: the cutoff is the least score, and the least difference the answer.
    """
    experts = scores_TE.shape[1]
    cutoff_T = (scores_TE - beta_E).sort(1, descending=True).values[:, min(k, experts - 1)]
    over_TE = (scores_TE - cutoff_T[:, None]).masked_fill(~mask_T[:, None], float("-inf"))
    tokens = mask_T.sum()
    rank = torch.minimum(tokens * k // experts, tokens - 1).clamp(min=0)
    found_E = over_TE.sort(0, descending=True).values.gather(0, rank.expand(1, experts)).squeeze(0)
    return torch.where(tokens > 0, found_E, torch.zeros_like(found_E))
