"""The run that others start from: found by its folder or its id, and brought into their store."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rlroute.config import StartConfig
from rlroute.errors import ConfigError, StoreError


def find_start(folder: Path, store: Path, step: int | None = None, **choices: Any) -> StartConfig:
    """Return the start from a run's checkpoint. Its run lies in the store of those that start from it, so that they can
    be taken up and verified there: one from elsewhere is copied, its record and that checkpoint.

    Args:
        folder: the run's.
        store: of the runs that start from it.
        step: of the checkpoint; the newest by default.
        choices: the other fields of the start.

    Raises:
        ConfigError: there is no such checkpoint, or the folder is not called as its run.
        CheckpointError: the checkpoint has no sound manifest.
        StoreError: the run cannot be read, or not be copied.
    """
    from rlroute.reading import read_described
    from rlroute.training.start import start_of

    folder = folder.absolute()
    if (described := read_described(folder))["id"] != folder.name:
        raise ConfigError(f"--from {folder}: it holds run {described['id']}, and a run's folder is called as the run")
    start = start_of(folder, step, **choices)
    if folder.resolve().parent != store.resolve():
        _bring(folder, store, start)
    return start


def _bring(folder: Path, store: Path, start: StartConfig) -> None:
    """Copy a run into a store: its files, and the checkpoint that is meant.

    Raises:
        ConfigError: a run of that id is there, and has not that checkpoint.
        StoreError: it cannot be copied.
    """
    from rlroute.records import storing
    from rlroute.training.manifest import folder_name
    from rlroute.training.start import start_of

    target, temporary = store / folder.name, store / f".{folder.name}.{os.getpid()}.tmp"
    if target.exists():
        if start_of(target, start.step).sha256 != start.sha256:
            raise ConfigError(f"--from {folder}: {target} is the same run with other weights; use another store")
        return
    with storing(target):
        try:
            store.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            for path in [*folder.glob("*.json"), *folder.glob("*.jsonl"), folder / folder_name(start.step)]:
                if path.is_symlink():
                    raise StoreError(f"{path} is a link: a run's files lie in its folder")
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, temporary / path.name)
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
