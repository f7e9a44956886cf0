"""Sigmoid top-k whose loads are balanced by a bias that is solved for, not stepped towards: quantile balancing.

Su 2026 (https://kexue.fm/archives/11619). A token runs the experts whose s - beta exceeds its cutoff, the (k + 1)-th
best of these. beta_e is what makes expert e exceed the cutoffs of k / E of the tokens, a quantile of s_e less the
cutoff; the next step chooses by it. `estimate` says how it is found:

- `exact`, with its defaults Megatron-Core's `quantile_balancing`: the (T k / E + 1)-th largest of a micro-batch's T
  tokens, averaged over micro-batches by their tokens. Where T k / E is no whole number it is rounded down.
- `sequence`: likewise of each sequence, so that micro-batches of any size give the same. The bias is the mean, for all
  sequences.
- `histogram`, as in Kimi K3 (as torchtitan's pull request 4577 describes it): the quantile over all tokens of the step,
  interpolated within a bin, out of a histogram from min beta - 1 to max beta + 1, where all values lie. Micro-batches
  and workers add their histograms up. K3's bias is -beta.

One bias for all tokens leaves single sequences uneven. With `moving` the scores are lowered before, by this share of
the quantile that each expert's scores had among the tokens of the same sequence so far (moving quantile balancing, Su
2026, https://kexue.fm/archives/11760): causal, so that training and evaluation choose alike. We know that article by
what others write of it. Its first tokens go by what there is: weights are divided by their sum, which is ours.

Without the cutoffs, which hold a token's experts to k, it is `threshold`. For k = 1 the gate is the score itself, as in
`bias_balanced`.

Shape suffixes: T tokens, D model width, E experts, K experts per token, B bins, G sequences (or one group of all).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlroute.balance import sequences
from rlroute.config import RouterConfig
from rlroute.errors import ConfigError
from rlroute.gates import normalize_rows
from rlroute.limits import BelowOne, Count, NonNegative, Positive, Share, refuse_idle
from rlroute.quantiles import histogram, moving_quantile, quantile
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class QuantileRouter(Router):
    """Selection by s - beta; after each step beta is what would have balanced it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of quantile balancing."""

        estimate: Literal["exact", "histogram", "sequence"] = "exact"
        """What the bias is solved on: exact: each micro-batch; histogram: the whole step, by bins; sequence: each
        sequence, and the mean serves all.
        """
        moving: Share = 0.0
        """How much of its sequence's moving quantile an expert's score is lowered by. Su: 1 balances sequences, and
        costs quality; 0.3 costs next to none.
        """
        moving_decay: BelowOne = 0.99
        """What of the weight of a token stays per token that follows in its sequence."""
        moving_bins: Count = 100
        """Of 0 to 1, in which scores are counted for the moving quantile."""
        bins: Count = 1000
        """Of each expert's histogram, where that is the estimate; Kimi K3: 1000."""
        ema_decay: BelowOne = 0.0
        """What of the bias stays per step; 0, as in Megatron-Core: it is that of the last step alone. More is steadier
        and later.
        """
        route_scale: Positive = 1.0
        """Factor on all gates."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

        def __post_init__(self) -> None:
            super().__post_init__()
            plain = type(self)
            refuse_idle(self, plain, self.name, {"moving_decay": "moving", "moving_bins": "moving"})
            if self.estimate != "histogram" and self.bins != plain.bins:
                raise ConfigError(
                    f"quantile.bins = {self.bins} does nothing with estimate = {self.estimate!r}: legal is {plain.bins}"
                )

    learns_from = frozenset({"gate", "load"})
    gate_meaning = "sigmoid, unbiased, normalised over the chosen for k > 1"
    batch_dependent = True
    config: Config
    beta_E: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.batch_dependent = config.estimate == "exact" or config.mixes_tokens
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.register_buffer("beta_E", torch.zeros(shape.num_experts))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Select by biased scores, gate by unbiased ones."""
        logits_TE = self.scores(x_TD)
        scores_TE = logits_TE.sigmoid()
        lowered_TE = self._lowered(scores_TE.detach(), context)
        ids_TK = context.choose(lowered_TE - self.beta_E, self.shape.k)
        gates_TK = scores_TE.gather(1, ids_TK)
        if self.shape.k > 1:
            gates_TK = normalize_rows(gates_TK)
        return RoutingDecision.token_choice(
            ids_TK,
            self.config.route_scale * gates_TK,
            self.shape.num_experts,
            logits_TE=logits_TE,
            probs_TE=normalize_rows(scores_TE),
            memo={"scores_TE": lowered_TE},
        )

    def _lowered(self, scores_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return the scores less a share of their moving quantiles, shape (T, E)."""
        how = self.config
        if not how.moving:
            return scores_TE
        share = 1 - self.shape.k / self.shape.num_experts
        return scores_TE - how.moving * moving_quantile(scores_TE, context, share, how.moving_decay, how.moving_bins)

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return the micro-batch's histograms, or the sum over its tokens of what was solved on them."""
        context = feedback.context
        over_TE = above_cutoff(decision.memo["scores_TE"], self.beta_E, self.shape.k)
        if self.config.estimate == "histogram":
            low, width = self._range()
            return {"over_EB": histogram((over_TE - low) / width, context.mask_T, self.config.bins)}
        group_T, groups = sequences(context)
        if self.config.estimate == "exact":
            group_T, groups = torch.zeros_like(group_T), 1
        solved_GE, tokens_G = quantiles(over_TE, self.shape.k, context.mask_T, group_T, groups)
        return {"beta_E": (solved_GE * tokens_G[:, None]).sum(0)}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Move to the step's solution, its own mean subtracted, which moves no choice; without tokens there is none."""
        if self.config.estimate == "histogram":
            low, width = self._range()
            solved_E = low + width * quantile(sums["over_EB"], 1 - self.shape.k / self.shape.num_experts)
        else:
            solved_E = sums["beta_E"] / sums["tokens"].clamp(min=1)
        solved_E = solved_E.to(self.beta_E.dtype)
        centred_E = torch.where(sums["tokens"] > 0, solved_E - solved_E.mean(), self.beta_E)
        self.beta_E.lerp_(centred_E, 1 - self.config.ema_decay)

    def _range(self) -> tuple[Tensor, Tensor]:
        """Return where the histograms begin and how wide they are."""
        most = 1 + self.config.moving
        low = self.beta_E.amin() - most
        return low, self.beta_E.amax() + most - low


def above_cutoff(scores_TE: Tensor, beta_E: Tensor, k: int) -> Tensor:
    """Return the scores less their token's cutoff, the (k + 1)-th best of s - beta, shape (T, E).

    With k = E there is nothing to balance: the cutoff is the least.
    """
    cutoff_T1 = (scores_TE - beta_E).sort(1, descending=True).values[:, min(k, scores_TE.shape[1] - 1), None]
    return scores_TE - cutoff_T1


def quantiles(over_TE: Tensor, k: int, mask_T: Tensor, group_T: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return, for each group of rows and each expert, the (T k / E + 1)-th largest of the group's T values in
    ``mask_T``, 0 where there are none.

    Returns:
        These, of shape (G, E), and T of each group, int64 of shape (G,).
    """
    experts = over_TE.shape[1]
    group_T = group_T.masked_fill(~mask_T, groups)  # padding comes last, in none
    order_TE = over_TE.argsort(dim=0, descending=True, stable=True)
    order_TE = order_TE.gather(0, group_T[order_TE].argsort(dim=0, stable=True))
    bounds_G = torch.searchsorted(group_T.sort().values, torch.arange(groups + 1, device=group_T.device))
    tokens_G = bounds_G.diff()
    rank_G = torch.minimum(tokens_G * k // experts, tokens_G - 1).clamp(min=0)
    place_G = (bounds_G[:-1] + rank_G).clamp(max=len(over_TE) - 1)
    solved_GE = over_TE.gather(0, order_TE[place_G])
    return solved_GE.masked_fill(tokens_G[:, None] == 0, 0.0), tokens_G
