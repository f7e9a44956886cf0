"""Learned scores of token ids: what of a learned router is a table, with the hidden state or without.

A control of this project's own, between `hash` and `switch`. The table of `hash` is drawn and its gates are constant;
here each token id has scores of its own, which learn through the gates as those of `switch` do, under the same balance
loss. With `hidden` the scores of the hidden state are added: what that brings beside a table is what a router sees of
the context. (DeepSeek-V4's first layers have `hash_gated`: a fixed table, with gates of the hidden state.)

Shape suffixes: T tokens, D model width, V vocabulary, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute.config import RouterConfig
from rlroute.gates import softmax_meaning, softmax_top_k
from rlroute.limits import NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision


class TokenScoresRouter(Router):
    """Top-k by probability, of the token's id."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of learned scores of token ids."""

        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss of Switch."""
        hidden: bool = False
        """Add scores of the hidden state."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial scores of ids, and of the weights of those of the hidden state."""

    learns_from = frozenset({"gate"})
    gate_meaning = softmax_meaning(normalize=True, k=2)
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.gate_meaning = softmax_meaning(normalize=True, k=shape.k)
        self.scores = Scores(config, shape)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k most probable experts."""
        return softmax_top_k(self.scores(x_TD, context.token_ids_T), self.shape.k, context, normalize=True)


class Scores(nn.Module):
    """Of token ids, and of hidden states where that is said."""

    def __init__(self, config: TokenScoresRouter.Config, shape: RouterShape) -> None:
        super().__init__()
        self.table_VE = nn.Parameter(torch.empty(shape.vocab_size, shape.num_experts))
        shape.init(self.table_VE, "table", config.init_std)
        self.of_hidden = LinearScores(shape, "scores", config.init_std) if config.hidden else None

    def forward(self, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        """Return logits of shape (T, E)."""
        logits_TE = functional.embedding(ids_T, self.table_VE).to(x_TD.dtype)
        return logits_TE if self.of_hidden is None else logits_TE + self.of_hidden(x_TD)
