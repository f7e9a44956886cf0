"""Sigmoid top-k whose loads are balanced by a bias that is solved for, not stepped towards: quantile balancing.

Su 2026 (https://kexue.fm/archives/11619). A token runs the experts whose s - beta exceeds its cutoff, the (k + 1)-th
best of these. beta_e is what makes expert e exceed the cutoffs of k / E of the tokens, a quantile of s_e less the
cutoff; the next step chooses by it. `estimate` says how it is found:

- `exact`, with its defaults Megatron-Core's `quantile_balancing`: the (T k / E + 1)-th largest of a micro-batch's T
  tokens, averaged over micro-batches by their tokens. Where T k / E is no whole number it is rounded down.
- `sequence`: likewise of each sequence, so that micro-batches of any size give the same. The bias is the mean, for all
  sequences.
- `own`: every sequence is balanced by itself (Su 2026, https://kexue.fm/archives/11760): while exploring, its tokens
  choose by a bias that was solved on these same tokens, cutoffs and bias by turns, `rounds` times from the stored one.
  A token then sees later ones; evaluation, which must not, chooses by the mean over the sequences of the steps before.
  We read of that article only what others say of it, so that the turns and the evaluation are ours.
- `histogram`, as in Kimi K3 (as torchtitan's pull request 4577 describes it): the quantile over all tokens of the step,
  interpolated within a bin, out of a histogram from min beta - 1 to max beta + 1, where all values lie. Micro-batches
  and workers add their histograms up. K3's bias is -beta.

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
from rlroute.gates import normalize_rows
from rlroute.limits import BelowOne, Count, NonNegative, Positive
from rlroute.quantiles import histogram, quantile
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class QuantileRouter(Router):
    """Selection by s - beta; after each step beta is what would have balanced it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of quantile balancing."""

        estimate: Literal["exact", "histogram", "sequence", "own"] = "exact"
        """What the bias is solved on: exact: each micro-batch; histogram: the whole step, by bins; sequence: each
        sequence, and the mean serves all; own: each sequence, which chooses by its own while exploring.
        """
        rounds: Count = 10
        """Of cutoffs and biases by turns, where sequences have their own."""
        bins: Count = 1000
        """Of each expert's histogram; Kimi K3: 1000."""
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
        self.batch_dependent = config.estimate == "exact" or config.mixes_tokens
        self.two_rules = config.estimate == "own"
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.register_buffer("beta_E", torch.zeros(shape.num_experts))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Select by biased scores, gate by unbiased ones."""
        logits_TE = self.scores(x_TD)
        scores_TE = logits_TE.sigmoid()
        beta_TE, memo = self.beta_E, dict[str, Tensor]()
        if self.config.estimate == "own" and context.explore:
            beta_TE, memo = self._own(scores_TE.detach(), context)
        ids_TK = context.choose(scores_TE - beta_TE, self.shape.k)
        gates_TK = scores_TE.gather(1, ids_TK)
        if self.shape.k > 1:
            gates_TK = normalize_rows(gates_TK)
        return RoutingDecision.token_choice(
            ids_TK,
            self.config.route_scale * gates_TK,
            self.shape.num_experts,
            logits_TE=logits_TE,
            probs_TE=normalize_rows(scores_TE),
            memo=memo,
        )

    def _own(self, scores_TE: Tensor, context: RoutingContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return for each token the bias that balances its sequence, shape (T, E), and these biases' sum over valid
        tokens.
        """
        (group_T, groups), beta_TE = sequences(context), self.beta_E.expand_as(scores_TE)
        for _ in range(self.config.rounds):
            over_TE = above_cutoff(scores_TE, beta_TE, self.shape.k)
            solved_GE, tokens_G = quantiles(over_TE, self.shape.k, context.mask_T, group_T, groups)
            solved_GE = solved_GE - solved_GE.mean(1, keepdim=True)
            beta_TE = solved_GE[group_T]
        return beta_TE, {"beta_E": (solved_GE * tokens_G[:, None]).sum(0)}

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return the micro-batch's histograms, or the sum over its tokens of what was solved on them."""
        if "beta_E" in decision.memo:
            return {"beta_E": decision.memo["beta_E"]}
        assert decision.logits_TE is not None
        scores_TE, context = decision.logits_TE.detach().sigmoid(), feedback.context
        over_TE = above_cutoff(scores_TE, self.beta_E, self.shape.k)
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
        low = self.beta_E.amin() - 1
        return low, self.beta_E.amax() + 1 - low


def above_cutoff(scores_TE: Tensor, beta_TE: Tensor, k: int) -> Tensor:
    """Return the scores less their token's cutoff, the (k + 1)-th best of s - beta, shape (T, E); beta is each token's
    or, of shape (E,), the same for all.

    With k = E there is nothing to balance: the cutoff is the least.
    """
    cutoff_T1 = (scores_TE - beta_TE).sort(1, descending=True).values[:, min(k, scores_TE.shape[1] - 1), None]
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
