"""A fixed table from token id to experts: no scores, nothing learned.

Hash layers, Roller et al. 2021 (arXiv 2106.04426).

Hash by position is kept as the control that must do badly: in the paper it is worse than the dense model. A pair of
tokens is hashed to one of 65,536 rows of a table; a token whose predecessor is not among the rows has none. The paper's
multi-hash splits the weights of an expert into parts, each chosen by a function of its own: here each slot has a
function and its own k-th of the experts. Its clustered and dispersed tables come from the token embeddings of a trained
model, which a router is not given: `rlroute export-clusters` makes them of a run, and `table=file` reads such a file,
or any other table. `hash_gated` has the same tables and learned gates.

Shape suffixes: T tokens, X rows of the table, V vocabulary, L sites, E experts, K experts per token.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlroute import seeding
from rlroute.arrays import Array, arrays
from rlroute.config import RouterConfig
from rlroute.errors import ConfigError
from rlroute.foreign import read_bytes, why
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

        table: Literal["random", "balanced", "position", "bigram", "multi", "file"] = "random"
        """random: seeded draws; balanced: greedy by token frequency, so that loads even out; position: by position, the
        control; bigram: by the token and the one before it in its sequence; multi: a function for each slot, with
        experts of its own; file: that of `file`.
        """
        file: str = ""
        """An array of whole numbers (.npy, .npz, .safetensors) of shape (vocabulary, 1, k), or (vocabulary, sites, k):
        the experts of each token id.
        """
        sha256: str = ""
        """Of that file, and so a part of the run's identity: filled in where it is empty, else the file must have it.
        """

        def __post_init__(self) -> None:
            super().__post_init__()
            if (self.table == "file") != bool(self.file):
                raise ConfigError(
                    f"{self.name}.file = {self.file!r} with table = {self.table!r}: want a file with 'file' alone"
                )
            if self.sha256 and not self.file:
                raise ConfigError(f"{self.name}.sha256 = {self.sha256!r} does nothing without a file: legal is none")
            if self.file and not self.sha256:
                object.__setattr__(self, "sha256", self.reads()["table"])

        def reads(self) -> dict[str, str]:
            """Return the SHA-256 of the table's file as it lies there."""
            if not self.file:
                return {}
            try:
                return {"table": hashlib.sha256(read_bytes(Path(self.file), follow=True)).hexdigest()}
            except OSError as error:
                raise ConfigError(f"{self.name}.file = {self.file!r} cannot be read: {why(error)}") from error

    gate_meaning = "1/k"
    publishes = frozenset()
    config: Config
    table_XK: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("table_XK", torch.from_numpy(_table(config, shape)))

    @classmethod
    def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
        """Refuse a balanced table where the corpus's token counts are not known, and a file that holds no table of this
        shape.
        """
        assert isinstance(config, cls.Config)
        if config.table == "file" and (reason := _misfit(config, shape)):
            return f"file = {config.file!r} {reason}"
        if config.table == "balanced" and shape.token_counts_V is None:
            return (
                "table = 'balanced' needs the corpus's token counts: "
                "legal without are 'random', 'position', 'bigram', 'multi', 'file'"
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


def _misfit(config: HashRouter.Config, shape: RouterShape) -> str | None:
    """Return why the file's table is not one for this shape, or None."""
    if (found := config.reads()["table"]) != config.sha256:
        return f"has SHA-256 {found}, want {config.sha256}: another table needs another run"
    vocabulary, sites, k = there = _array(config).shape
    if (vocabulary, k) != (shape.vocab_size, shape.k) or sites not in (1, shape.num_sites):
        legal = " or ".join(str((shape.vocab_size, n, shape.k)) for n in sorted({1, shape.num_sites}))
        return f"has a table of shape {there}, by tokens, sites and experts of a token: want {legal}"
    table_VK = _read(config, shape)
    if not (table_VK.min() >= 0 and table_VK.max() < shape.num_experts):
        return f"names experts {table_VK.min()} to {table_VK.max()}: legal are 0 to {shape.num_experts - 1}"
    twice_V = (np.diff(np.sort(table_VK, axis=1), axis=1) == 0).any(axis=1)
    return f"gives token {int(twice_V.argmax())} an expert twice: want {k} of its own" if twice_V.any() else None


def _array(config: HashRouter.Config) -> Array:
    found = arrays(Path(config.file))
    if len(found) != 1:
        raise ConfigError(f"{config.name}.file = {config.file!r} holds {len(found)} arrays: want one")
    return found[0]


def _read(config: HashRouter.Config, shape: RouterShape) -> np.ndarray:
    """Return the file's table for a site, int64 of shape (V, K)."""
    table_VLK = np.concatenate(list(_array(config).rows()))
    return table_VLK[:, shape.site_index if table_VLK.shape[1] > 1 else 0].astype(np.int64)


def _table(config: HashRouter.Config, shape: RouterShape) -> np.ndarray:
    if config.table == "file":
        return _read(config, shape)
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
