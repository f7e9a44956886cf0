"""The budget of k experts a token is a sequence's: its best pairs of token and expert run, many for one token and none
for another.

SeqTopK, Wen et al. 2025 (arXiv 2511.06494): of a sequence of T tokens the T k most probable pairs run. With `slots` a
token has at most so many (the bound U of Megatron-Core's pull request 6208), and others have them in its place.

A token competes with those after it: in a causal language model this leaks the future, in evaluation too. The paper's
form for decoding, which keeps a pool of the pairs so far, is not here. Gates are the probabilities, not normalised over
a token's experts: the gate of one that runs alone would be a constant. Padding has no part in the budget.

Shape suffixes: T tokens, D model width, E experts, K slots per token, G sequences, P pairs of T tokens and E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.balance import sequences
from rlroute.config import RouterConfig
from rlroute.gates import gates_of
from rlroute.limits import Count, NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.sampling import top_k


class SeqTopKRouter(Router):
    """The T k most probable pairs of each sequence."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of sequence-level top-k."""

        slots: Count | None = None
        """Most experts of a token, at least k; none: all. With k it is token choice, and causal."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts"
    causal = False
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.slots = min(config.slots or shape.num_experts, shape.num_experts)
        self.causal = self.slots == shape.k  # every token takes all that it may

    @classmethod
    def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
        """Refuse slots that cannot hold the budget."""
        assert isinstance(config, cls.Config)
        if config.slots is not None and config.slots < shape.k:
            return f"slots = {config.slots}: legal are k = {shape.k} and more, or none"
        return super().refuses(config, shape)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the pairs that are within their sequence's budget."""
        logits_TE = self.scores(x_TD)
        probs_TE = logits_TE.softmax(1)
        within_TE = best_pairs(probs_TE, self.shape.k, self.slots, context)
        ids_TK = context.choose(probs_TE.masked_fill(~within_TE, float("-inf")), self.slots)
        return RoutingDecision.token_choice(
            ids_TK,
            gates_of(probs_TE, ids_TK),
            self.shape.num_experts,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            max_pairs=len(x_TD) * self.shape.k,
        )


def best_pairs(scores_TE: Tensor, k: int, slots: int, context: RoutingContext) -> Tensor:
    """Say which pairs are among the n k best of their sequence of n valid tokens, of each token at most its ``slots``
    best; bool of shape (T, E). Ties go to the earlier row, then to the lower id.
    """
    may_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, top_k(scores_TE, slots), True)
    may_TE &= context.mask_T[:, None]
    sequence_T, count = sequences(context)
    sequence_P = sequence_T.repeat_interleave(scores_TE.shape[1], output_size=may_TE.numel())
    sequence_P = sequence_P.masked_fill(~may_TE.view(-1), count)  # those that may not run are in none
    order_P = scores_TE.detach().reshape(-1).argsort(descending=True, stable=True)
    order_P = order_P[sequence_P[order_P].argsort(stable=True)]
    first_G = torch.searchsorted(sequence_P[order_P], torch.arange(count + 1, device=order_P.device))
    tokens_G = torch.zeros_like(first_G).index_add_(0, sequence_T, context.mask_T.long())
    end_P = (first_G + k * tokens_G)[sequence_P[order_P]]
    within_P = torch.arange(len(order_P), device=order_P.device) < end_P
    return torch.empty_like(within_P).scatter_(0, order_P, within_P).view_as(may_TE)
