"""Checkpoints: ``model.safetensors``, ``trainer.pt`` and their ``manifest.json`` in one folder that appears whole or
not at all.

Where the experts are cut into n shards there is a pair of files per shard, ``model-<i>-of-<n>.safetensors`` and
``trainer-<i>-of-<n>.pt``; the first holds everything that is not an expert's as well. Any number of shards loads into
any other.

Nothing is taken from a checkpoint before all of it has been looked at: the bytes that are used are those whose hash is
checked, the trainer's state is read with ``weights_only``, which runs no code, and every tensor must be one that this
run could have written. The newest two are kept, so that there is one before a damaged one.
"""

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from rlroute.config import SCHEMA, StartConfig
from rlroute.errors import CheckpointError, RlrouteError
from rlroute.execution import Keep
from rlroute.model.accounting import is_expert
from rlroute.records import storing, sync_folder
from rlroute.training import manifest
from rlroute.training.group import ALONE, Group
from rlroute.training.manifest import Entry, HashedFile, Manifest, folder_name, own_checkpoints, shard_names
from rlroute.training.optimizer import Optimizer
from rlroute.training.progress import Progress

KEPT = 2
"""How many checkpoints of an unfinished run there are."""
State = dict[str, dict[str, Tensor]]


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    run_id: str,
    group: Group = ALONE,
    keep: Keep = "weights",
) -> None:
    """Write the checkpoint of a step, and remove all but the one before it. All ranks of a group call this, and see the
    same folder.

    Args:
        folder: the run's folder.
        model: its parameters and persistent buffers are kept.
        optimizer: of its parameters.
        progress: where the run stands.
        run_id: whose the weights are, readable from the safetensors header.
        group: the processes that train together.
        keep: ``all`` keeps the earlier ones too.

    Raises:
        StoreError: the folder cannot be written, by any of them; the previous checkpoint stays.
    """
    target = folder / folder_name(progress.step)
    temporary = folder / f".{target.name}.tmp"
    shard, shards = group.placement.shard, group.placement.shards
    first = group.rank == 0
    entries: list[Entry] = []
    try:
        with group.together(), _storing(target):
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        with group.together(), _storing(target):
            if group.writes_shard:
                entries = _write_shard(temporary, model, optimizer, progress, run_id, shard, shards)
        files = _gather(entries, group, next(model.parameters()).device)
        with group.together(), _storing(target):
            if first:
                _appear(temporary, target, Manifest(run_id, progress.step, files))
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    if first:
        steps = [step for step in own_checkpoints(folder) if step <= progress.step]
        _keep(folder, steps if keep == "all" else steps[-KEPT:])


@contextmanager
def _storing(target: Path) -> Iterator[None]:
    with storing(target):
        try:
            yield
        except (SafetensorError, RuntimeError) as error:  # how both libraries report a write that failed
            raise OSError(str(error)) from error


def _write_shard(
    folder: Path, model: nn.Module, optimizer: Optimizer, progress: Progress, run_id: str, shard: int, shards: int
) -> list[Entry]:
    """Write a shard's two files and return what the manifest says of them."""
    kept = _apart({name: v for name, v in model.state_dict().items() if shard == 0 or is_expert(name)})
    moments = {name: v for name, v in optimizer.state().items() if shard == 0 or is_expert(name)}
    header = {"schema": str(SCHEMA), "step": str(progress.step), "run": run_id}
    entries = []
    for name in shard_names(shard, shards):
        with (folder / name).open("wb") as handle:
            file = HashedFile(handle)
            if name.startswith("model"):
                file.write(save(kept, header))
            else:
                torch.save({"optimizer": moments, "progress": vars(progress)}, file)  # type: ignore[arg-type]
            handle.flush()
            os.fsync(handle.fileno())
        entries.append(file.entry)
    return entries


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as the file format takes them: contiguous, and none in the memory of another, where routers have
    something in common.
    """
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        apart[name] = value.clone() if value.data_ptr() in seen else value.contiguous()
        seen.add(value.data_ptr())
    return apart


def _gather(entries: Sequence[Entry], group: Group, device: torch.device) -> dict[str, Entry]:
    """Return what all ranks have written, by name; those that write nothing add nothing."""
    placement = group.placement
    numbers = torch.zeros(placement.shards, 2, 33, dtype=torch.int64, device=device)
    for file, entry in enumerate(entries):
        row = [entry["size"], *bytes.fromhex(entry["sha256"])]
        numbers[placement.shard, file] = torch.tensor(row, dtype=torch.int64)
    group.add_up([numbers])
    names = [name for shard in range(placement.shards) for name in shard_names(shard, placement.shards)]
    rows = numbers.flatten(0, 1).tolist()
    return {name: {"sha256": bytes(row[1:]).hex(), "size": row[0]} for name, row in zip(names, rows, strict=True)}


def _appear(temporary: Path, target: Path, whole: Manifest) -> None:
    """Write the manifest and let the folder appear; what a rewound run left under its name goes."""
    with (temporary / manifest.FILE).open("w", encoding="utf-8") as file:
        file.write(whole.to_text())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    if own_checkpoints(target.parent).get(whole.step) == target:
        shutil.rmtree(target)
    temporary.replace(target)
    sync_folder(target.parent)


def _keep(folder: Path, steps: Iterable[int]) -> None:
    for step, path in own_checkpoints(folder).items():
        if step not in steps:
            shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, run_id: str, group: Group = ALONE
) -> tuple[Progress | None, list[str]]:
    """Load the newest sound checkpoint of a run into its model and optimizer.

    Returns:
        Where the run stood, None where there is no checkpoint; and what is wrong with those that are newer.

    Raises:
        CheckpointError: there are some, and none is sound.
    """
    damaged: list[str] = []
    found = own_checkpoints(folder)
    newest = max(found, default=-1)
    while (step := int(group.agree(newest))) >= 0:  # the ranks look at the same, whatever each one's disk shows
        path = folder / folder_name(step)
        try:
            with group.together():
                loaded = _read(path, model, optimizer, run_id, group)
            model.load_state_dict(loaded[0])
            optimizer.load_state(loaded[1])
            return loaded[2], damaged
        except RlrouteError as error:  # mine, or that another rank could not
            damaged.append(f"{path}: {error}")
        newest = max((other for other in found if other < step), default=-1)
    if damaged:
        raise CheckpointError(
            f"no checkpoint of run {run_id} is sound, remove them to start it anew: {'; '.join(damaged)}"
        )
    return None, []


def load_weights(folder: Path, model: nn.Module, run_id: str, at: int | None = None) -> int | None:
    """Load the weights of the newest checkpoint of a run, or of the one ``at`` a step, and return its step; None where
    there is none.

    Raises:
        CheckpointError: it is not sound: an older one is not what the run ended with.
    """
    found = {step: path for step, path in own_checkpoints(folder).items() if at in (None, step)}
    if not found:
        return None
    step, path = max(found.items())
    try:
        with _reading():
            state = _read_weights(path, manifest.read_manifest(path, run_id), model, ALONE)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}; remove {folder} to train run {run_id} anew") from error
    model.load_state_dict(state)
    return step


def read_whole(path: Path, start: StartConfig) -> tuple[dict[str, Tensor], State]:
    """Return a model's state out of the checkpoint that a run starts from, all experts together, whatever model it is;
    and the optimizer's state where that is carried, else nothing.

    Raises:
        CheckpointError: it is not sound, or not that of the SHA-256; the message names the checkpoint.
    """
    carried = start.optimizer == "carried"
    try:
        with _reading():
            found = manifest.read_manifest(path, start.run)
            if found.sha256(carried) != start.sha256:
                raise CheckpointError(f"it has SHA-256 {found.sha256(carried)}, want {start.sha256}")
            most = max(entry["size"] for entry in found.files.values())
            states = [shard["optimizer"] for shard in _trainers(path, found, most)] if carried else [{}]
            moments = {
                name: {key: _whole([part[name][key] for part in _holding(states, name)], name) for key in kept}
                for name, kept in states[0].items()
            }
            shards = _shards(path, found, most)
            return {name: _whole([part[name] for part in _holding(shards, name)], name) for name in shards[0]}, moments
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error


def _holding(shards: Sequence[Any], name: str) -> Sequence[Any]:
    """Return the shards that hold something of a parameter: all of them some experts, the first all else."""
    return shards if is_expert(name) else shards[:1]


def _whole(parts: Sequence[Tensor], name: str) -> Tensor:
    """Return the parts of a parameter, or of a moment, as one: all experts of those that are cut."""
    return torch.cat(list(parts)) if is_expert(name) and parts[0].dim() else parts[0]


def end_checkpoints(folder: Path, keep: Keep = "weights") -> None:
    """Keep the newest weights of an ended run, or more where that is wanted, and forget what only a resume needs."""
    _keep(folder, list(own_checkpoints(folder))[0 if keep == "all" else -1 :])
    for path in own_checkpoints(folder).values() if keep != "state" else ():
        for file in path.glob("trainer*.pt"):
            file.unlink(missing_ok=True)


@contextmanager
def _reading() -> Iterator[None]:
    """Turn whatever a foreign file makes a reader raise into a CheckpointError."""
    try:
        yield
    except RlrouteError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        name = f"{Path(error.filename).name}: " if isinstance(error, OSError) and error.filename else ""
        raise CheckpointError(f"{name}{reason or f'{type(error).__name__}: {error}'}") from error


def _read(
    path: Path, model: nn.Module, optimizer: Optimizer, run_id: str, group: Group
) -> tuple[dict[str, Tensor], State, Progress]:
    """Return the weights, the optimizer's state and the progress of a checkpoint; nothing is changed.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another run.
    """
    with _reading():
        found = manifest.read_manifest(path, run_id)
        state = _read_weights(path, found, model, group)
        shards = _trainers(path, found, _most_bytes(model, group))
        progress = [Progress.read(shard["progress"], found.step) for shard in shards]
        states, parameters = [shard["optimizer"] for shard in shards], dict(model.named_parameters())
        moments: State = {}
        for name, values in states[0].items():
            parts = _holding(states, name)
            moments[name] = {key: _held([p[name][key] for p in parts], name, parameters[name], group) for key in values}
        optimizer.check_state(moments, found.step)
    return state, moments, progress[0]


def _read_weights(path: Path, found: Manifest, model: nn.Module, group: Group) -> dict[str, Tensor]:
    """Return the model's state from a checkpoint's shards, for the experts held here.

    Raises:
        CheckpointError: it is not what the manifest says, or does not fit the model.
    """
    shards, own = _shards(path, found, _most_bytes(model, group)), model.state_dict()
    if shards[0].keys() != own.keys():
        raise CheckpointError(f"it does not fit the model: {min(shards[0].keys() ^ own.keys())}")
    state = {}
    for name in own:
        parts = [part[name] for part in _holding(shards, name)]
        state[name] = value = _held(parts, name, own[name], group)
        if (value.shape, value.dtype) != (own[name].shape, own[name].dtype):
            raise CheckpointError(f"it does not fit the model: {name} is {value.dtype} of {tuple(value.shape)}")
    return state


def _trainers(path: Path, found: Manifest, most: int) -> list[dict[str, Any]]:
    """Return what a checkpoint's shards hold of the trainer's state; no file may have more bytes.

    Raises:
        CheckpointError: it is not what the manifest says.
    """
    files = [found.read(path, shard_names(shard, found.shards)[1], most) for shard in range(found.shards)]
    return [torch.load(io.BytesIO(data), weights_only=True, map_location="cpu") for data in files]


def _shards(path: Path, found: Manifest, most: int) -> list[dict[str, Tensor]]:
    """Return what a checkpoint's shards hold of the model's state; no file may have more bytes.

    Raises:
        CheckpointError: it is not what the manifest says.
    """
    shards = []
    for shard in range(found.shards):
        data = found.read(path, shard_names(shard, found.shards)[0], most)
        wanted = {"schema": str(SCHEMA), "step": str(found.step), "run": found.run}
        if _header(data) != wanted:
            raise CheckpointError(f"the header of shard {shard + 1} is {_header(data)}, want {wanted}")
        shards.append(load(data))
    return shards


def _header(data: bytes) -> Mapping[str, str]:
    size = int.from_bytes(data[:8], "little")
    metadata: Mapping[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return metadata


def _most_bytes(model: nn.Module, group: Group) -> int:
    """Return more bytes than any file of a model's checkpoint has: two moments, a master, and room for names."""
    held: int = sum(value.numel() * max(4, value.element_size()) for value in model.state_dict().values())
    return 2**24 + 4 * held * group.placement.shards


def _held(parts: Sequence[Tensor], name: str, own: Tensor, group: Group) -> Tensor:
    """Return the rows of the experts that this process holds, from all shards; the value itself where it is none of
    theirs.

    Raises:
        CheckpointError: the shards do not hold all experts.
    """
    if not is_expert(name) or parts[0].dim() == 0:
        return parts[0]
    experts = len(own) * group.placement.shards
    if sum(map(len, parts)) != experts or any(part.shape[1:] != own.shape[1:] for part in parts):
        raise CheckpointError(f"{name} has shapes {[tuple(part.shape) for part in parts]}, want {experts} experts")
    held = group.placement.held(experts)
    return _whole(parts, name)[held.start : held.stop]
