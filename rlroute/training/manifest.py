"""What a checkpoint's folder holds, by its ``manifest.json``: whose it is, of which step, and each file's size and
SHA-256.

A folder is a run's own only under exactly the name that is written here. Copies under other names, links and files are
somebody else's: never loaded, never counted, never removed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlroute.config import SCHEMA
from rlroute.errors import CheckpointError
from rlroute.foreign import read_bytes, why

FILE = "manifest.json"
MOST_BYTES = 2**24
"""Of a manifest: one of 50,000 shards is smaller."""
_NAME = re.compile(r"checkpoint-([0-9]{8,})")

Entry = dict[str, Any]
"""``sha256``, 64 hex digits, and ``size``, bytes."""


def folder_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"checkpoint-{step:08d}"


def own_checkpoints(folder: Path) -> dict[int, Path]:
    """Return a run's checkpoints by their steps, the newest last."""
    found = {int(match[1]): path for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}
    own = ((step, path) for step, path in sorted(found.items()) if path.name == folder_name(step))
    return {step: path for step, path in own if path.is_dir() and not path.is_symlink()}


def shard_names(shard: int, shards: int) -> tuple[str, str]:
    """Return the names of a shard's two files: weights, and the trainer's state."""
    end = f"-{shard + 1}-of-{shards}" if shards > 1 else ""
    return f"model{end}.safetensors", f"trainer{end}.pt"


class HashedFile:
    """A new file, and the size and hash of what was handed to it, which is not what a failing disk may have kept."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle, self.size, self.digest = handle, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes, or whatever has them."""
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.handle.write(data)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self.handle.flush()

    @property
    def entry(self) -> Entry:
        """What the manifest says of it."""
        return {"sha256": self.digest.hexdigest(), "size": self.size}


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's manifest.

    Attributes:
        run, step: whose, and of which step.
        files: size and hash of each file.
    """

    run: str
    step: int
    files: Mapping[str, Entry]

    @property
    def shards(self) -> int:
        """Into how many shards the experts were cut."""
        return len(self.files) // 2

    def sha256(self, state: bool = False) -> str:
        """Return the SHA-256 of the model's weights, and of the optimizer's ``state``: that of their file, or over
        those of all files, one after the other.
        """
        names = [name for shard in range(self.shards) for name in shard_names(shard, self.shards)[: 2 if state else 1]]
        digests = [self.files[name]["sha256"] for name in names]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def to_text(self) -> str:
        """Return the one text that says this."""
        values = {"schema": SCHEMA, "run": self.run, "step": self.step, "files": dict(self.files)}
        return json.dumps(values, indent=1, sort_keys=True) + "\n"

    def read(self, folder: Path, name: str, most: int) -> bytes:
        """Return the bytes of a file, which are those that were written.

        Args:
            folder: the checkpoint's.
            name: the file's.
            most: no file of this model's has more bytes.

        Raises:
            CheckpointError: they are not, are too many, or cannot be read.
        """
        entry = self.files[name]
        data = _read(folder / name, min(most, entry["size"]))
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{name} is not what was written: its SHA-256 is not that of {FILE}")
        return data


def read_manifest(path: Path, run: str) -> Manifest:
    """Return the manifest of a run's checkpoint, which names all weights and trainer's states that are there.

    Raises:
        CheckpointError: there is none, it is not whole, or is not of this run, step or schema.
    """
    if not (path / FILE).exists():
        raise CheckpointError(f"it has no {FILE}: written before checkpoints had one, or not by rlroute")
    text = _read(path / FILE, MOST_BYTES)
    step = int(path.name.rpartition("-")[2])
    wanted = {"schema": SCHEMA, "run": run, "step": step}
    try:
        values = json.loads(text)
        for name, value in wanted.items():
            if values[name] != value:
                raise CheckpointError(f"it is of {name} {values[name]!r}, want {value!r}")
        found = Manifest(run, step, values["files"])
        names = {name for shard in range(found.shards) for name in shard_names(shard, found.shards)}
        whole = found.files.keys() == names != set() and text == found.to_text().encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        whole = False
    if not whole:
        raise CheckpointError(f"{FILE} is not as it was written")
    there = {file.name for pattern in ("model*.safetensors", "trainer*.pt") for file in path.glob(pattern)}
    if there - names:
        raise CheckpointError(f"{min(there - names)} is not in {FILE}")
    return found


def _read(path: Path, most: int) -> bytes:
    """Return what a file of a checkpoint holds; a link, a pipe or a device is not read.

    Raises:
        CheckpointError: it is none, cannot be read, or has more than ``most`` bytes.
    """
    try:
        return read_bytes(path, most)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {why(error)}") from error
