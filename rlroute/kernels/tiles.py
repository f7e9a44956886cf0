"""The pinned tile table. Tile sizes change the rounding, so they are looked up, never autotuned, and the table's hash is recorded.

The sizes of each kernel body: BM rows of a tile (or of a weight block), BN output columns, BK of the summed dimension.
"""

import hashlib
import json
from typing import NamedTuple


class Tile(NamedTuple):
    """Sizes and launch parameters of one kernel."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of one shape class: forward up and down, backward through down, plain row GEMM, weight gradient."""

    up: Tile
    down: Tile
    back: Tile
    rows: Tile
    weights: Tile


TABLE: dict[str, Tiles] = {
    # float32 products run on the plain cores; small tiles keep registers.
    "float32": Tiles(*[Tile(64, 64, 32, 8, 2)] * 5),
    # Few rows per expert: a tall tile would be mostly padding.
    "bfloat16/few": Tiles(
        up=Tile(32, 128, 64, 4, 4),
        down=Tile(32, 128, 64, 4, 4),
        back=Tile(32, 64, 64, 4, 4),
        rows=Tile(32, 128, 64, 4, 4),
        weights=Tile(128, 128, 32, 8, 3),
    ),
    "bfloat16/many": Tiles(
        up=Tile(128, 128, 64, 8, 3),
        down=Tile(128, 128, 64, 8, 3),
        back=Tile(64, 64, 64, 8, 3),
        rows=Tile(128, 128, 64, 8, 3),
        weights=Tile(128, 128, 64, 8, 3),
    ),
    # Triton's interpreter pays per operation, not per element; odd sizes leave remainders everywhere.
    "interpreter": Tiles(*[Tile(32, 32, 16, 1, 1)] * 5),
}
MANY_ROWS = 256
"""Rows per expert from which tall tiles are used."""


def pick_tiles(dtype: str, rows_per_expert: float, interpreting: bool) -> Tiles:
    """Return the pinned tiles for a compute precision and a mean number of rows per expert."""
    if interpreting:
        return TABLE["interpreter"]
    if dtype == "float32":
        return TABLE["float32"]
    return TABLE["bfloat16/many" if rows_per_expert >= MANY_ROWS else "bfloat16/few"]


def table_hash() -> str:
    """Return 12 hex digits of the table's SHA-256, for the run record."""
    return hashlib.sha256(json.dumps(TABLE, sort_keys=True).encode()).hexdigest()[:12]
