"""The pinned tile table, ``tiles.json``. Tile sizes change the rounding, so they are looked up, never autotuned, and
the table's hash is recorded with every run. ``rlroute bench kernels --tune`` measures candidates on a card and rewrites
the table.

The sizes of each kernel body: BM rows of a tile (or of a weight block), BN output columns, BK of the summed dimension.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlroute.errors import ConfigError

PATH = Path(__file__).with_name("tiles.json")
INTERPRETER = "interpreter"
BODIES = ("up", "down", "back", "rows", "weights")
BUCKETS = (0, 64, 256, 1024)
"""Rows per expert from which a line may serve."""

LEAN = ("swiglu", "gelu", "relu", "relu_squared")
"""Activations whose epilogues, with nothing besides, fit under the caps of the table."""


class Tile(NamedTuple):
    """Sizes and launch parameters of one kernel."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers a thread may have: fewer let a second block onto the multiprocessor."""

    def fitting(self, activation: str, plain: bool) -> Tile:
        """Return what an epilogue of the activation is launched with: one that would not fit under the cap on
        registers, without it.
        """
        return self if plain and activation in LEAN else self._replace(maxnreg=None)


class Tiles(NamedTuple):
    """The tiles of one shape class: forward up and down, backward through down, plain row GEMM, weight gradient."""

    up: Tile
    down: Tile
    back: Tile
    rows: Tile
    weights: Tile


@dataclass(frozen=True)
class Entry:
    """One line of the table. It serves problems of its chip and precision with at least ``rows_from`` rows per expert
    on average.

    ``D`` and ``F`` are the model and expert widths that it was measured for; None serves those that have no line of
    their own.
    """

    chip: str
    dtype: str
    rows_from: int
    D: int | None
    F: int | None
    tiles: Tiles

    def serves(self, chip: str, dtype: str, rows_per_expert: float, D: int, F: int) -> bool:
        """Whether a problem may use this line."""
        fits = self.D in (None, D) and self.F in (None, F)
        return fits and (self.chip, self.dtype) == (chip, dtype) and self.rows_from <= rows_per_expert

    def key(self) -> tuple[Any, ...]:
        """What no two lines share."""
        return self.chip, self.dtype, self.rows_from, self.D, self.F


def read_table(path: Path = PATH) -> list[Entry]:
    """Read a table."""
    return [
        Entry(**(line | {"tiles": Tiles(*(Tile(*line["tiles"][body]) for body in BODIES))}))
        for line in json.loads(path.read_text())
    ]


def write_table(table: list[Entry], path: Path = PATH) -> None:
    """Write a table, one entry a line, in the order of its keys."""
    lines = [
        json.dumps(vars(entry) | {"tiles": {body: _short(tile) for body, tile in entry.tiles._asdict().items()}})
        for entry in sorted(table, key=lambda e: [(part is not None, part) for part in e.key()])
    ]
    path.write_text("[\n " + ",\n ".join(lines) + "\n]\n")


def _short(tile: Tile) -> list[int]:
    """Return a tile's numbers; what is not said is not written."""
    return [number for number in tile if number is not None]


def with_entry(table: list[Entry], entry: Entry) -> list[Entry]:
    """Return the table with an entry in place of the one of the same key."""
    return [other for other in table if other.key() != entry.key()] + [entry]


_PINNED = read_table()


def pinned() -> tuple[Entry, ...]:
    """Return the table that the engine uses."""
    return tuple(_PINNED)


def pin(table: list[Entry]) -> None:
    """Have the engine use another table for the rest of this process; for the tuner."""
    _PINNED[:] = table


def pick_tiles(chip: str, dtype: str, rows_per_expert: float, D: int, F: int) -> Tiles:
    """Return the pinned tiles: those measured for these widths before the general ones, then those of the fullest
    bucket.

    Raises:
        ConfigError: the table has none.
    """
    found = [entry for entry in pinned() if entry.serves(chip, dtype, rows_per_expert, D, F)]
    if not found:
        legal = sorted({f"{entry.chip} {entry.dtype}" for entry in pinned()})
        raise ConfigError(f"no tiles for {dtype} on {chip}: legal are {', '.join(legal)}")
    return max(found, key=lambda entry: (entry.D is not None, entry.F is not None, entry.rows_from)).tiles


def chip_of(device: torch.device) -> str:
    """Return the table's name of a CUDA device's architecture: ``sm_80``, ``sm_90`` or ``sm_100``.

    Raises:
        ConfigError: it is older than those.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ConfigError(f"compute capability {capability[0]}.{capability[1]}: the triton engine wants 8.0 or newer")
    return {8: "sm_80", 9: "sm_90"}.get(capability[0], "sm_100")


def table_hash() -> str:
    """Return 12 hex digits of the table's SHA-256, for the run record."""
    return hashlib.sha256(json.dumps(pinned(), default=vars, sort_keys=True).encode()).hexdigest()[:12]
