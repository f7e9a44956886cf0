"""Each expert runs the tokens whose score is above its threshold: more experts for one token than for another, k on
average.

Expert Threshold, 2026 (arXiv 2603.11535): expert choice made causal. A threshold is a moving average of the (1 - k / E)
quantile of the expert's scores over all tokens; training and evaluation have the same rule, and no loss balances.

We know no code of it. Ours are therefore: the sigmoid as score and gate; the decay; quantiles out of a histogram of the
step's scores, which micro-batches and workers can add up; and the thresholds of the first step, which are the quantiles
for inputs that are spread normally with variance 1 in every direction.

Shape suffixes: T tokens, D model width, E experts, K slots per token, B bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import gates_of, normalize_rows
from rlroute.limits import BelowOne, Count, Positive
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
        bins, experts = self.config.bins, self.shape.num_experts
        bin_TE = (decision.logits_TE.detach().sigmoid() * bins).long().clamp(max=bins - 1)
        slot_TE = bin_TE + bins * torch.arange(experts, device=bin_TE.device)
        counts_TE = feedback.context.mask_T[:, None].expand_as(slot_TE).long()
        counts = slot_TE.new_zeros(experts * bins).index_add_(0, slot_TE.reshape(-1), counts_TE.reshape(-1))
        return {"scores_EB": counts.view(experts, bins)}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Move the thresholds towards the step's quantiles."""
        share = self.shape.k / self.shape.num_experts
        found_E = quantile(sums["scores_EB"], 1 - share).to(self.threshold_E.dtype)
        found_E = torch.where(sums["tokens"] > 0, found_E, self.threshold_E)
        moved_E = self.config.ema_decay * self.threshold_E + (1 - self.config.ema_decay) * found_E
        self.threshold_E.copy_(torch.where(self.started, moved_E, found_E))
        self.started |= sums["tokens"] > 0


def quantile(counts_EB: Tensor, share: float) -> Tensor:
    """Return below which value such a share of each expert's scores lies, float64 of shape (E,), interpolated within a
    bin of 0 to 1.
    """
    bins = counts_EB.shape[1]
    upto_EB = counts_EB.cumsum(1)
    wanted_E1 = share * upto_EB[:, -1:].double()
    bin_E1 = (upto_EB < wanted_E1).sum(1, keepdim=True).clamp(max=bins - 1)
    inside_E1 = counts_EB.gather(1, bin_E1)
    before_E1 = upto_EB.gather(1, bin_E1) - inside_E1
    value_E1: Tensor = (bin_E1 + (wanted_E1 - before_E1) / inside_E1.clamp(min=1)) / bins
    return value_E1.squeeze(1)


def _first(weight_ED: Tensor, k: int) -> Tensor:
    """Return the (1 - k / E) quantiles of the scores of normal inputs, whose logits have the norms of the weights as
    standard deviations.
    """
    if k == len(weight_ED):
        return weight_ED.new_zeros(k)
    share = torch.tensor(1 - k / len(weight_ED), device=weight_ED.device)
    first_E: Tensor = (weight_ED.norm(dim=1) * torch.special.ndtri(share)).sigmoid()
    return first_E
