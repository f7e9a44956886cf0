"""Runs that are stopped on the way, and what of a run comes out the same however often it is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlroute.config import RunConfig
from rlroute.reading import read_part, read_rows
from rlroute.schema import untimed
from rlroute.training.loop import train
from rlroute.training.manifest import own_checkpoints


def interrupted(config: RunConfig, store: Path, at: int, **options: Any) -> Path:
    """Train a run of seed 0 up to a step, where Ctrl-C stops it; return its folder."""

    def stop(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, 0, store, on_step=stop, **options)
    return store / config.run_id(0)


def figures(folder: Path) -> dict[str, Any]:
    """Return all figures of an ended run but those that a clock decides."""
    rows = {name: read_rows(folder / f"{name}.jsonl") for name in ("metrics", "loads")}
    return {"summary": untimed(read_part(folder, "summary"))} | untimed(rows)


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a run's newest checkpoint."""
    *_, newest = own_checkpoints(folder).values()
    return load_file(newest / "model.safetensors")


def assert_same_bits(folder: Path, other: Path) -> None:
    """Hold two ended runs to the same figures and weights."""
    assert figures(folder) == figures(other)
    mine, theirs = weights_of(folder), weights_of(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
