"""Checkpoints: ``model.safetensors`` and ``trainer.pt`` in one folder that appears whole or not at all.

The trainer's state is read with ``weights_only``: no file of ours can run code when it is loaded.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rlroute.config import SCHEMA
from rlroute.errors import CheckpointError
from rlroute.records import storing

PREFIX = "checkpoint-"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, trainer: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Write ``folder``/checkpoint-<step> and remove the older ones.

    Args:
        folder: the run's folder.
        step: optimizer steps done.
        model: its parameters and persistent buffers are kept.
        trainer: tensors, numbers and strings: whatever else the run needs to go on.
        metadata: what the weights are of (id, seed, configuration), readable from the safetensors header.

    Raises:
        StoreError: the folder cannot be written; the previous checkpoint stays.
    """
    target, temporary = folder / f"{PREFIX}{step:08d}", folder / f".{PREFIX}{step:08d}.tmp"
    with storing(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            header = {"schema": str(SCHEMA), "step": str(step), "run": json.dumps(metadata, sort_keys=True)}
            save_file(
                {k: v.contiguous() for k, v in model.state_dict().items()}, temporary / "model.safetensors", header
            )
            torch.save(trainer, temporary / "trainer.pt")
            for file in temporary.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            temporary.replace(target)
        except (SafetensorError, RuntimeError) as error:  # how both libraries report a write that failed
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in _checkpoints(folder)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes a reader raise into a CheckpointError that says the way out."""
    try:
        yield
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}; remove it to start this run anew") from error


def load_checkpoint(folder: Path, model: nn.Module, run_id: str) -> dict[str, Any] | None:
    """Load the newest checkpoint under ``folder`` into ``model`` and return the trainer's state; None where there is no checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run.
    """
    path = load_weights(folder, model, run_id)
    if path is None:
        return None
    with _reading(path):
        trainer: dict[str, Any] = torch.load(path / "trainer.pt", weights_only=True)
    return trainer


def load_weights(folder: Path, model: nn.Module, run_id: str) -> Path | None:
    """Load the weights of the newest checkpoint under ``folder`` into ``model`` and return its path; None where there is none.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    with _reading(path):
        with safe_open(path / "model.safetensors", framework="pt") as file:
            header = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        owner = json.loads(header["run"])["id"]
    if owner != run_id or header["schema"] != str(SCHEMA):
        raise CheckpointError(
            f"checkpoint {path} is of run {owner!r}, schema {header['schema']}: want {run_id!r}, schema {SCHEMA}"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {path} does not fit the model: {error}") from error
    return path


def drop_trainer_state(folder: Path) -> None:
    """Keep the weights of an ended run and forget what only a resume needs."""
    for path in _checkpoints(folder):
        (path / "trainer.pt").unlink(missing_ok=True)
