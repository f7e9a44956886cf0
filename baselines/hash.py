"""A fixed table from token id to experts: no scores, nothing learned.

Hash layers, Roller et al. 2021 (arXiv 2106.04426).

Hash by position is kept as the control that must do badly: in the paper it is worse than the dense model.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rlroute import seeding
from rlroute.config import RouterConfig
from rlroute.gates import constant_gates
from rlroute.routing import Router, RouterShape, RoutingContext, RoutingDecision

POSITIONS = 4096
"""Rows of the position table; later positions wrap around."""


class HashRouter(Router):
    """Each token id (or position) has its k experts for good."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the hash router."""

        table: Literal["random", "balanced", "position"] = "random"
        """random: seeded draws; balanced: greedy by token frequency, so that loads even out; position: by position, the
        control.
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
            return "table = 'balanced' needs the corpus's token counts: legal without are 'random', 'position'"
        return super().refuses(config, shape)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Look the experts up."""
        by_position = self.config.table == "position"
        rows_T = context.position_T % POSITIONS if by_position else context.token_ids_T
        ids_TK = context.take(self.table_XK[rows_T])
        return RoutingDecision.token_choice(ids_TK, constant_gates(ids_TK, x_TD), self.shape.num_experts)


def _table(config: HashRouter.Config, shape: RouterShape) -> np.ndarray:
    generator = seeding.numpy_generator(*shape.key("table"))
    if config.table == "balanced":
        assert shape.token_counts_V is not None
        return _balanced_table(shape.token_counts_V.numpy(), shape, generator)
    rows = POSITIONS if config.table == "position" else shape.vocab_size
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
