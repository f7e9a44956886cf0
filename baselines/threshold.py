"""Each expert runs the tokens whose score is above its threshold: more experts for one token than for another, k on
average.

Expert Threshold, 2026 (arXiv 2603.11535): expert choice made causal. A threshold is a moving average of the (1 - k / E)
quantile of the expert's scores over all tokens; training and evaluation have the same rule, and no loss balances.

Quantile balancing with dynamic activation, Su 2026 (https://kexue.fm/archives/11626), is the same rule: at
`ema_decay=0` the thresholds are the quantiles of the step before, at his 0.9 their moving average.

We know no code of the paper. Ours are therefore: the sigmoid as score and gate; the decay; and quantiles out of a
histogram of the step's scores, which micro-batches and workers can add up. The thresholds of the first step are, as
Su's, the quantiles for inputs that are spread normally with variance 1 in every direction; his average starts with
these, ours with the quantiles of the first step.

Shape suffixes: T tokens, D model width, E experts, K slots per token, B bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import gates_of, normalize_rows
from rlroute.limits import BelowOne, Count, Positive
from rlroute.quantiles import histogram, quantile
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class ThresholdRouter(Router):
    """Every expert whose score is above its own threshold, which follows the scores' quantile."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of Expert Threshold."""

        ema_decay: BelowOne = 0.5
        """Decay per step of the thresholds, which start at the first step's quantiles. At 0.9 they lag behind the
        scores of a young router, and k is off its mean for longer.
        """
        bins: Count = 1024
        """Of each expert's histogram of scores, over 0 to 1; quantiles are interpolated within a bin."""
        slots: Count | None = None
        """Most experts of a token, those of the highest scores; none: all. Memory of a layer grows with it."""
        init_std: Positive = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate", "load"})
    gate_meaning = "sigmoid"
    config: Config
    threshold_E: Tensor
    started: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.register_buffer("threshold_E", _first(self.scores.weight.detach(), shape.k))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take every expert whose threshold the score exceeds."""
        logits_TE, experts = self.scores(x_TD), self.shape.num_experts
        scores_TE = logits_TE.sigmoid()
        above_TE = scores_TE > self.threshold_E
        slots = min(self.config.slots or experts, experts)
        ids_TK = context.choose(scores_TE.masked_fill(~above_TE, float("-inf")), slots)
        gates_TK = gates_of(scores_TE, ids_TK)
        return RoutingDecision.token_choice(
            ids_TK, gates_TK, experts, logits_TE=logits_TE, probs_TE=normalize_rows(scores_TE)
        )

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return how many valid tokens have a score of each expert in each bin."""
        assert decision.logits_TE is not None
        scores_TE = decision.logits_TE.detach().sigmoid()
        return {"scores_EB": histogram(scores_TE, feedback.context.mask_T, self.config.bins)}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Move the thresholds towards the step's quantiles."""
        share = self.shape.k / self.shape.num_experts
        found_E = quantile(sums["scores_EB"], 1 - share).to(self.threshold_E.dtype)
        found_E = torch.where(sums["tokens"] > 0, found_E, self.threshold_E)
        moved_E = self.config.ema_decay * self.threshold_E + (1 - self.config.ema_decay) * found_E
        self.threshold_E.copy_(torch.where(self.started, moved_E, found_E))
        self.started |= sums["tokens"] > 0


def _first(weight_ED: Tensor, k: int) -> Tensor:
    """Return the (1 - k / E) quantiles of the scores of normal inputs, whose logits have the norms of the weights as
    standard deviations.
    """
    if k == len(weight_ED):
        return weight_ED.new_zeros(k)
    share = torch.tensor(1 - k / len(weight_ED), device=weight_ED.device)
    first_E: Tensor = (weight_ED.norm(dim=1) * torch.special.ndtri(share)).sigmoid()
    return first_E
