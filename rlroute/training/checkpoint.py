"""Checkpoints: ``model.safetensors`` and ``trainer.pt`` in one folder that appears whole or not at all.

Where the experts are cut into n shards there is a pair of files per shard, ``model-<i>-of-<n>.safetensors`` and
``trainer-<i>-of-<n>.pt``; the first holds everything that is not an expert's as well. Any number of shards loads into
any other.

The trainer's state is read with ``weights_only``: no file of ours can run code when it is loaded.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlroute.config import SCHEMA
from rlroute.errors import CheckpointError
from rlroute.model.accounting import is_expert
from rlroute.records import storing
from rlroute.training.group import ALONE, Group

PREFIX = "checkpoint-"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Mapping[str, Mapping[str, Tensor]],
    progress: Mapping[str, Any],
    metadata: dict[str, Any],
    group: Group = ALONE,
) -> None:
    """Write ``folder``/checkpoint-<step> and remove the older ones. All ranks of a group call it, and see the same
    folder.

    Args:
        folder: the run's folder.
        step: optimizer steps done.
        model: its parameters and persistent buffers are kept.
        optimizer: the optimizer's state of each parameter, by name.
        progress: numbers and strings: whatever else the run needs to go on.
        metadata: what the weights are of (id, seed, configuration), readable from the safetensors header.
        group: the processes that train together.

    Raises:
        StoreError: the folder cannot be written, by any of them; the previous checkpoint stays.
    """
    target, temporary = folder / f"{PREFIX}{step:08d}", folder / f".{PREFIX}{step:08d}.tmp"
    header = {"schema": str(SCHEMA), "step": str(step), "run": json.dumps(metadata, sort_keys=True)}
    first = group.rank == 0
    try:
        with group.together(), _storing(target):
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        with group.together(), _storing(target):
            if group.writes_shard:
                state = {"optimizer": optimizer, "progress": dict(progress)}
                _write_shard(temporary, model, state, header, group.placement.shard, group.placement.shards)
        with group.together(), _storing(target):
            if first:
                temporary.replace(target)
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    if first:
        for old in _checkpoints(folder)[:-1]:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _storing(target: Path) -> Iterator[None]:
    with storing(target):
        try:
            yield
        except (SafetensorError, RuntimeError) as error:  # how both libraries report a write that failed
            raise OSError(str(error)) from error


def _write_shard(
    folder: Path, model: nn.Module, state: dict[str, Any], header: dict[str, str], shard: int, shards: int
) -> None:
    kept = {name: v.contiguous() for name, v in model.state_dict().items() if shard == 0 or is_expert(name)}
    moments = {name: v for name, v in state["optimizer"].items() if shard == 0 or is_expert(name)}
    end = f"-{shard + 1}-of-{shards}" if shards > 1 else ""
    model_file, trainer_file = folder / f"model{end}.safetensors", folder / f"trainer{end}.pt"
    save_file(kept, model_file, header)
    torch.save(state | {"optimizer": moments}, trainer_file)
    for file in (model_file, trainer_file):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


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


def load_checkpoint(folder: Path, model: nn.Module, run_id: str, group: Group = ALONE) -> dict[str, Any] | None:
    """Load the newest checkpoint under ``folder`` into ``model`` and return the trainer's state; None where there is no
    checkpoint.

    Returns:
        ``optimizer``, the state by parameter name, for the experts held here; and ``progress``.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run.
    """
    path = load_weights(folder, model, run_id, group)
    if path is None:
        return None
    with _reading(path):
        shards = [torch.load(file, weights_only=True, map_location="cpu") for file in _shards(path, "trainer", ".pt")]
        optimizer: dict[str, Any] = {}
        for name, values in shards[0]["optimizer"].items():
            parts = [shard["optimizer"][name] for shard in shards] if is_expert(name) else [values]
            optimizer[name] = {key: _held(group, [part[key] for part in parts], is_expert(name)) for key in values}
    return {"optimizer": optimizer, "progress": shards[0]["progress"]}


def load_weights(folder: Path, model: nn.Module, run_id: str, group: Group = ALONE) -> Path | None:
    """Load the weights of the newest checkpoint under ``folder`` into ``model`` and return its path; None where there
    is none.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    with _reading(path):
        shards = [_read_shard(file) for file in _shards(path, "model", ".safetensors")]
        header = shards[0][0]
        owner = json.loads(header["run"])["id"]
        state = {
            name: _held(group, [shard[name] for _, shard in shards] if is_expert(name) else [value], is_expert(name))
            for name, value in shards[0][1].items()
        }
    if owner != run_id or header["schema"] != str(SCHEMA):
        raise CheckpointError(
            f"checkpoint {path} is of run {owner!r}, schema {header['schema']}: want {run_id!r}, schema {SCHEMA}"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {path} does not fit the model: {error}") from error
    return path


def _shards(path: Path, stem: str, suffix: str) -> list[Path]:
    """Return the files of all shards in their order."""
    one = path / f"{stem}{suffix}"
    if one.exists():
        return [one]
    some = next(path.glob(f"{stem}-*-of-*{suffix}"), one)
    shards = int(some.stem.rpartition("-")[2]) if some != one else 0
    return [path / f"{stem}-{shard + 1}-of-{shards}{suffix}" for shard in range(shards)] or [one]


def _read_shard(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)


def _held(group: Group, parts: Sequence[Tensor], expert: bool) -> Tensor:
    """Return the rows of the experts that this process holds, from all shards; the value itself where it is none of
    theirs.
    """
    if not expert or parts[0].dim() == 0:
        return parts[0]
    rows_E = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    held = group.placement.held(len(rows_E))
    return rows_E[held.start : held.stop]


def drop_trainer_state(folder: Path) -> None:
    """Keep the weights of an ended run and forget what only a resume needs."""
    for path in _checkpoints(folder):
        for file in path.glob("trainer*.pt"):
            file.unlink(missing_ok=True)
