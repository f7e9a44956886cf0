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
from rlroute.errors import ConfigError
from rlroute.routing import Router, RouterShape, RoutingContext, RoutingDecision

POSITIONS = 4096
"""Rows of the position table; later positions wrap around."""


class HashRouter(Router):
    """Each token id (or position) has its k experts for good."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the hash router."""

        table: Literal["random", "balanced", "position"] = "random"
        """random: seeded draws; balanced: greedy by token frequency, so that loads even out; position: by position, the control."""

    gate_meaning = "1/k"
    table_XK: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.register_buffer("table_XK", torch.from_numpy(_table(config, shape)))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Look the experts up."""
        by_position = self.config.table == "position"
        rows_T = context.position_T % POSITIONS if by_position else context.token_ids_T
        ids_TK = self.table_XK[rows_T]
        gates_TK = torch.full(ids_TK.shape, 1 / self.shape.k, dtype=x_TD.dtype, device=x_TD.device)
        return RoutingDecision.token_choice(ids_TK, gates_TK, self.shape.num_experts)


def _table(config: HashRouter.Config, shape: RouterShape) -> np.ndarray:
    generator = seeding.numpy_generator(shape.seed, f"layers.{shape.layer}.router.table")
    if config.table == "balanced":
        if shape.token_counts_V is None:
            raise ConfigError(
                "router hash.table = 'balanced' needs the corpus's token counts: legal without are 'random', 'position'"
            )
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
