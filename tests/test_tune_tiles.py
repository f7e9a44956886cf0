"""The tile tuner, in Triton's interpreter: what it measures is meaningless there, what it does with it is not."""

import pytest
import torch

pytest.importorskip("triton")

from rlroute.experiments.bench import tiles as tune_tiles
from rlroute.experiments.bench.kernels import Shape
from rlroute.experiments.bench.timing import Contest
from rlroute.kernels import sparse, tiles
from rlroute.kernels.tiles import Tile

pytestmark = pytest.mark.skipif(not sparse.INTERPRETING, reason="tunes what the interpreter runs")
SHAPE = Shape(8, 16, 16, 2, 1)
SLOW, FAST = Tile(16, 16, 16, 1, 1), Tile(32, 16, 16, 1, 1)


@pytest.fixture(autouse=True)
def restored():
    before = list(tiles.pinned())
    yield
    tiles.pin(before)


def tune(monkeypatch, seconds, candidates):
    """Tune with made-up times: ``seconds`` of the tiles in use."""

    def measure(calls, ours, rounds, cuda):
        calls[ours]()
        used = tiles.pick_tiles("interpreter", "float32", 4, SHAPE.D, SHAPE.F)
        return Contest({ours: [seconds(used)] * rounds})

    monkeypatch.setattr(tune_tiles, "measure", measure)
    return tune_tiles.tune(SHAPE, "cpu", torch.float32, 3, lambda text: None, candidates)


def test_each_body_gets_its_fastest_candidate_and_the_engine_uses_the_line(monkeypatch):
    def seconds(used):
        return (1.0 if used.up == FAST else 2.0) + (1.0 if used.weights == SLOW else 2.0)

    entry = tune(monkeypatch, seconds, {"up": (SLOW, FAST), "weights": (SLOW, FAST)})
    general = tiles.pick_tiles("interpreter", "float32", 4, 999, 999)
    assert (entry.D, entry.F, entry.rows_from) == (SHAPE.D, SHAPE.F, 0)
    assert entry.tiles == general._replace(up=FAST, weights=SLOW)
    assert tiles.pick_tiles("interpreter", "float32", 4, SHAPE.D, SHAPE.F) == entry.tiles


def test_a_gain_within_the_noise_changes_nothing(monkeypatch):
    general = tiles.pick_tiles("interpreter", "float32", 4, SHAPE.D, SHAPE.F)
    entry = tune(monkeypatch, lambda used: 0.99 if used.up == FAST else 1.0, {"up": (FAST,)})
    assert entry.tiles == general


def test_a_candidate_that_does_not_fit_the_chip_is_out_and_other_errors_are_not_hidden(monkeypatch):
    def failing(message):
        def seconds(used):
            if used.up == FAST:
                raise RuntimeError(message)
            return 1.0 if used.up == SLOW else 2.0

        return seconds

    entry = tune(monkeypatch, failing("out of resource: shared memory"), {"up": (FAST, SLOW)})
    assert entry.tiles.up == SLOW
    before = tiles.pinned()
    with pytest.raises(RuntimeError, match="a defect"):
        tune(monkeypatch, failing("a defect"), {"up": (FAST,)})
    assert tiles.pinned() == before
