"""BASE: in training the assignment of tokens to experts of the largest total score under exactly equal loads, in
evaluation top-k.

BASE layers, Lewis et al. 2021 (arXiv 2103.16716). The gate is the sigmoid of the score as there: with the residual
inside the paper's expert, its output is x + sigmoid(x . w_e) f_e(x).

The linear program is solved where the scores are, in two parts, since the host must not read on the way. First prices:
by turns each token's margin and each expert's price are set to the middle between the last that is in and the first
that is out (dual coordinate descent). Then experts take their places one after another, each the tokens that gain most
by it and those that would else go without: whatever the prices, loads are equal, to 1 where they cannot be. fairseq's
auction ends when nobody bids any more, which a fixed number of rounds cannot promise.

Tokens are assigned in groups of neighbours, of at most 512, as is the load that is equal. k > 1 is ours: every token
gets k different experts. Padding takes places as a token without preferences.

Shape suffixes: T tokens, G groups, N tokens of a group, D model width, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.limits import Count, NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.sampling import top_k


class BaseRouter(Router):
    """A balanced linear assignment in training, greedy in evaluation."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of BASE."""

        group: Count = 512
        """Tokens that are assigned together, at most."""
        rounds: Count = 20
        """Rounds of prices. 20 bring the total of random scores to 0.1 % below the best at 16 experts, 0.3 % at 64."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights; the paper's, orthogonal of gain 0.1, have 0.1 / sqrt(D)."""

    learns_from = frozenset({"gate"})
    gate_meaning = "sigmoid"
    two_rules = True
    batch_dependent = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Assign in training, take the k largest scores otherwise."""
        logits_TE = self.scores(x_TD)
        ranked_TE = logits_TE
        if context.explore:
            scores_TE = logits_TE.detach().masked_fill(~context.mask_T[:, None], 0.0)
            taken_TE = assign(scores_TE, self.shape.k, self.config.group, self.config.rounds)
            ranked_TE = logits_TE.masked_fill(~taken_TE, float("-inf"))
        ids_TK = context.choose(ranked_TE, self.shape.k)
        gates_TK = logits_TE.sigmoid().gather(1, ids_TK)
        return RoutingDecision.token_choice(
            ids_TK, gates_TK, self.shape.num_experts, logits_TE=logits_TE, probs_TE=logits_TE.softmax(1)
        )


def assign(scores_TE: Tensor, k: int, group: int, rounds: int) -> Tensor:
    """Return which k experts each token is assigned to, bool of shape (T, E), in groups of at most ``group`` tokens.

    Within a group the loads of experts differ by at most 1, and are equal where E divides k times its tokens.
    """
    tokens, experts = scores_TE.shape
    groups = -(-tokens // group)
    size, longer = divmod(tokens, groups)  # so many groups have one token more
    cut = longer * (size + 1)
    parts = [(scores_TE[:cut], size + 1), (scores_TE[cut:], size)]
    taken = [_places(part.view(-1, each, experts), k, rounds).view(-1, experts) for part, each in parts if len(part)]
    return torch.cat(taken)


def _places(scores_GNE: Tensor, k: int, rounds: int) -> Tensor:
    """Let the experts of each group take their places one after another; bool of shape (G, N, E)."""
    _, tokens, experts = scores_GNE.shape
    gain_GNE, price_GE = _gains(scores_GNE, k, rounds)
    order_GE = top_k(price_GE, experts)  # those that are asked for most take the places that are left over
    load, more = divmod(k * tokens, experts)
    gain_GNE = gain_GNE.gather(2, order_GE[:, None].expand_as(gain_GNE))
    taken_GNE = torch.zeros_like(gain_GNE, dtype=torch.bool)
    wanted_GN = torch.full_like(gain_GNE[..., 0], k)
    for turn in range(experts):
        must_GN = wanted_GN == experts - turn  # take this expert and all that follow
        gain_GN = gain_GNE[..., turn].masked_fill(must_GN, float("inf")).masked_fill(wanted_GN == 0, float("-inf"))
        ids_GC = top_k(gain_GN, load + (turn < more))
        taken_GNE[..., turn].scatter_(1, ids_GC, value=True)
        wanted_GN = wanted_GN - taken_GNE[..., turn].to(wanted_GN.dtype)
    return torch.zeros_like(taken_GNE).scatter_(2, order_GE[:, None].expand_as(taken_GNE), taken_GNE)


def _gains(scores_GNE: Tensor, k: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Return what each pair is worth beyond its token's margin and its expert's price, shape (G, N, E), and the prices,
    shape (G, E).
    """
    load = k * scores_GNE.shape[1] // scores_GNE.shape[2]
    margin_GN1 = _middle(scores_GNE, k, 2)
    for _ in range(rounds):
        price_G1E = _middle(scores_GNE - margin_GN1, load, 1)
        margin_GN1 = _middle(scores_GNE - price_G1E, k, 2)
    return scores_GNE - price_G1E - margin_GN1, price_G1E.squeeze(1)


def _middle(values: Tensor, count: int, dim: int) -> Tensor:
    """Return the middle between the ``count`` largest values along a dimension and the others."""
    size = values.shape[dim]
    ranked = values.topk(min(count + 1, size), dim).values
    last_in, first_out = max(count - 1, 0), min(count, size - 1)
    return (ranked.narrow(dim, last_in, 1) + ranked.narrow(dim, first_out, 1)) / 2
