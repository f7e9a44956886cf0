"""A fixed table from token id to experts: no scores, nothing learned.

Hash layers, Roller et al. 2021 (arXiv 2106.04426).

Hash by position is kept as the control that must do badly: in the paper it is worse than the dense model. A pair of
tokens is hashed to one of 65,536 rows of a table; a token whose predecessor is not among the rows has none. The paper's
multi-hash splits the weights of an expert into parts, each chosen by a function of its own: here each slot has a
function and its own k-th of the experts. Its clustered and dispersed tables need the embeddings of a trained model,
which a router is not given: they are left out. `hash_gated` has the same tables and learned gates.

Shape suffixes: T tokens, X rows of the table, V vocabulary, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlroute import seeding
from rlroute.config import RouterConfig
from rlroute.gates import constant_gates
from rlroute.routing import Router, RouterShape, RoutingContext, RoutingDecision

POSITIONS = 4096
"""Rows of the position table; later positions wrap around."""
BIGRAMS = 65_536
"""Rows of the bigram table."""


class HashRouter(Router):
    """Each token id (or position, or pair of ids) has its k experts for good."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the hash router."""

        table: Literal["random", "balanced", "position", "bigram", "multi"] = "random"
        """random: seeded draws; balanced: greedy by token frequency, so that loads even out; position: by position, the
        control; bigram: by the token and the one before it in its sequence; multi: a function for each slot, with
        experts of its own.
        """

    gate_meaning = "1/k"
    publishes = frozenset()
    config: Config
    table_XK: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("table_XK", torch.from_numpy(_table(config, shape)))

    @classmethod
    def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
        """Refuse a balanced table where the corpus's token counts are not known."""
        assert isinstance(config, cls.Config)
        if config.table == "balanced" and shape.token_counts_V is None:
            return (
                "table = 'balanced' needs the corpus's token counts: "
                "legal without are 'random', 'position', 'bigram', 'multi'"
            )
        return super().refuses(config, shape)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Look the experts up."""
        ids_TK = self.look_up(context)
        return RoutingDecision.token_choice(ids_TK, constant_gates(ids_TK, x_TD), self.shape.num_experts)

    def look_up(self, context: RoutingContext) -> Tensor:
        """Return each token's experts by the table, or those that are forced; int64 of shape (T, K)."""
        rows_T = context.token_ids_T
        if self.config.table == "position":
            rows_T = context.position_T % POSITIONS
        elif self.config.table == "bigram":
            pair_T = (previous_token(context), rows_T)
            key = seeding.derive_key(*self.shape.key("bigram"))
            rows_T = (seeding.keyed_uniform(key, pair_T, ()) * BIGRAMS).long()
        return context.take(self.table_XK[rows_T])


def previous_token(context: RoutingContext) -> Tensor:
    """Return the id of the token one position before each in its sequence, -1 where there is none; int64 of shape (T,).

    The rows may stand in any order.
    """
    order_T = context.position_T.argsort(stable=True)
    for key_T in (context.sequence_T, context.sample_T):  # by sample, then by sequence, then by position
        order_T = order_T[key_T[order_T].argsort(stable=True)]
    position_T, sequence_T = context.position_T[order_T], context.sequence_T[order_T]
    follows_T = functional.pad((position_T.diff() == 1) & (sequence_T.diff() == 0), (1, 0))
    before_T = context.token_ids_T[order_T].roll(1).masked_fill(~follows_T, -1)
    return torch.empty_like(before_T).scatter_(0, order_T, before_T)


def _table(config: HashRouter.Config, shape: RouterShape) -> np.ndarray:
    generator = seeding.numpy_generator(*shape.key("table"))
    if config.table == "balanced":
        assert shape.token_counts_V is not None
        return _balanced_table(shape.token_counts_V.numpy(), shape, generator)
    if config.table == "multi":
        bounds = np.arange(shape.k + 1) * shape.num_experts // shape.k
        return generator.integers(bounds[:-1], bounds[1:], (shape.vocab_size, shape.k))
    rows = {"position": POSITIONS, "bigram": BIGRAMS}.get(config.table, shape.vocab_size)
    return generator.random((rows, shape.num_experts)).argsort(axis=1)[:, : shape.k]


def _balanced_table(counts_V: np.ndarray, shape: RouterShape, generator: np.random.Generator) -> np.ndarray:
    """Give each token, the most frequent first, the k experts that carry least so far; ties are broken at random."""
    table_VK = np.empty((shape.vocab_size, shape.k), dtype=np.int64)
    load_E = np.zeros(shape.num_experts)
    for token in np.argsort(-counts_V, kind="stable"):
        experts_K = np.lexsort((generator.random(shape.num_experts), load_E))[: shape.k]
        table_VK[token] = experts_K
        load_E[experts_K] += counts_V[token]
    return table_VK
