"""The tile tuner: measure candidates for each kernel body at one shape, and pin the fastest in the table.

Opt-in, because other tiles round differently: a comparison under way keeps its table. One body is changed at a time,
and the time is that of a whole forward and backward pass with balanced routing, so that what is gained is what a user
gains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from rlroute.experiments.bench.kernels import Shape, make_problem, passes
from rlroute.experiments.bench.peers import Problem, ours
from rlroute.experiments.bench.timing import measure, median
from rlroute.kernels import sparse, tiles
from rlroute.kernels.tiles import BUCKETS, INTERPRETER, Entry, Tile, Tiles, chip_of, pick_tiles, pinned, with_entry

_ROWS = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 3),
    Tile(64, 256, 64, 4, 4),
)
CANDIDATES: Mapping[str, Sequence[Tile]] = {
    "up": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 64, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
    ),
    "down": _ROWS,
    "back": (
        Tile(128, 128, 64, 8, 3, 128),
        Tile(128, 256, 64, 8, 4),
        Tile(128, 64, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
    ),
    "rows": _ROWS,
    "weights": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 256, 64, 8, 3),
        Tile(256, 128, 64, 8, 3),
        Tile(128, 128, 64, 4, 3),
        Tile(64, 128, 64, 4, 4),
    ),
}
"""A few for each body: each takes seconds to compile. Those that an H200 ran fastest, and smaller ones for few rows."""
LIMIT = 0.02
"""A candidate must be this much faster than what is pinned: less is noise, and every change is another rounding."""


def tune(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    say: Callable[[str], None],
    candidates: Mapping[str, Sequence[Tile]] = CANDIDATES,
) -> Entry:
    """Find the tiles of a shape, have the engine use them for the rest of this process, and return their line of the
    table.

    Args:
        shape: the problem; its widths and its bucket of rows per expert are the line's key.
        device: ``cuda``; ``cpu`` under Triton's interpreter.
        dtype: the compute precision.
        rounds: timed passes per candidate, after one that compiles.
        say: told of every measurement.
        candidates: what is tried, by kernel body.
    """
    problem = make_problem(shape, "balanced", device, dtype)
    rows = shape.T * shape.K / shape.E
    chip = INTERPRETER if sparse.INTERPRETING else chip_of(problem.x_TD.device)
    precision = "float32" if dtype == torch.float32 else "bfloat16"
    bucket = max(bound for bound in BUCKETS if bound <= rows)

    def entry(choice: Tiles) -> Entry:
        return Entry(chip, precision, bucket, shape.D, shape.F, choice)

    best = pick_tiles(chip, precision, rows, shape.D, shape.F)
    for body, tried in candidates.items():
        seconds = {getattr(best, body): _seconds(problem, entry(best), rounds)}
        for tile in tried:
            if tile not in seconds:
                seconds[tile] = _seconds(problem, entry(best._replace(**{body: tile})), rounds)
                say(
                    f"{body} {tuple(tile)}: {seconds[tile] / seconds[getattr(best, body)]:.3f} of the pinned tile's "
                    "time"
                )
        fastest = min(seconds, key=seconds.__getitem__)
        if seconds[fastest] < (1 - LIMIT) * seconds[getattr(best, body)]:
            best = best._replace(**{body: fastest})
    tiles.pin(with_entry(list(pinned()), entry(best)))
    return entry(best)


def _seconds(problem: Problem, entry: Entry, rounds: int) -> float:
    """Return the median time of a pass with these tiles; infinity where they do not fit the chip."""
    before = list(pinned())
    tiles.pin(with_entry(before, entry))
    try:
        work = passes(problem, lambda: ours(problem))["forward+backward"]
        seconds = measure({"ours": work}, "ours", rounds, problem.x_TD.is_cuda).seconds["ours"]
    except Exception as error:  # who wants more shared memory or registers than there are is out of the race
        if "out of resource" not in str(error).lower():
            raise
        return float("inf")
    finally:
        tiles.pin(before)
    return median(seconds)
