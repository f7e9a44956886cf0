"""Which experts were chosen at every step of a run, on disk: what the router ``replay`` reads.

One file per site and micro-batch, in the run's folder: a row of fixed size for each step, written where it belongs, so
that a run that is resumed writes over what it had written before. The processes that train together each write their
own micro-batches.

Shape suffixes: N rows and K columns of a choice: (T, K) experts of tokens, or (E, C) tokens of experts; L sites.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlroute.arrays import Array, arrays
from rlroute.errors import ConfigError, StoreError
from rlroute.foreign import Unfit, open_regular, parse_json, read_bytes, reading, shown, why
from rlroute.records import write_atomically
from rlroute.routing import Site

FOLDER = "choices"
WRITTEN = 1
"""Stands before each step's row; a step that was never written has a 0 there."""
MOST = 1 << 40
"""Bytes of the largest file."""


class ChoiceLog:
    """The choices of one run.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER
        self.shapes: dict[Path, tuple[int, int]] = {}  # as they are on disk

    def write(self, step: int, micro_batch: int, choices: dict[Site, Tensor]) -> None:
        """Keep what each site chose for a micro-batch of a step.

        Raises:
            ConfigError: a choice has another shape than in the step before.
            StoreError: the folder cannot be written.
        """
        try:
            self._refuse_link()
            self.folder.mkdir(exist_ok=True)
            for site, ids_NK in choices.items():
                path = self._path(site, micro_batch)
                if (shape := self._shape(path, ids_NK)) != tuple(ids_NK.shape):
                    raise ConfigError(
                        f"site {site} chose {tuple(ids_NK.shape)} in step {step}, {shape} before: no log keeps both"
                    )
                row = np.concatenate([[WRITTEN], ids_NK.reshape(-1).cpu().numpy()]).astype(np.int32)
                with os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
                    file.seek(step * row.nbytes)
                    file.write(row.tobytes())
        except (OSError, Unfit) as error:
            raise StoreError(f"{self.folder} cannot be written: {why(error)}") from error

    def read(self, step: int, micro_batch: int, site: Site) -> Tensor:
        """Return what a site chose for a micro-batch of a step, int64 of shape (N, K).

        Raises:
            StoreError: it was not recorded.
        """
        path = self._path(site, micro_batch)
        try:
            self._refuse_link()
            shape = _shape(path)
            size = 1 + shape[0] * shape[1]
            with reading(path, MOST) as file:
                file.seek(4 * step * size)
                row = np.frombuffer(file.read(4 * size), dtype=np.int32)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {why(error)}") from error
        if len(row) < size or row[0] != WRITTEN:
            raise StoreError(f"{path} holds no step {step}: the run did not record it")
        return torch.from_numpy(row[1:].astype(np.int64)).view(shape)

    def steps(self, micro_batch: int, site: Site) -> int:
        """Return how many steps, from the first on, the file of a site and micro-batch has room for.

        Raises:
            StoreError: it cannot be read.
        """
        path = self._path(site, micro_batch)
        try:
            self._refuse_link()
            shape = _shape(path)
            with reading(path, MOST) as file:
                return file.seek(0, os.SEEK_END) // (4 * (1 + shape[0] * shape[1]))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {why(error)}") from error

    def sha256(self) -> str:
        """Return the SHA-256 over all files.

        Raises:
            StoreError: there is none.
        """
        self._refuse_link()
        paths = sorted(self.folder.glob("*"))
        if not paths:
            raise StoreError(f"{self.folder} is not there: the run was not trained with --train.record-choices")
        return _sha256(paths)

    def _shape(self, path: Path, ids_NK: Tensor) -> tuple[int, int]:
        """Return the shape that a file's choices have, which is that of the first."""
        if path not in self.shapes:
            described = path.with_suffix(".json")
            if not described.exists():
                write_atomically(described, json.dumps(list(ids_NK.shape)))
            self.shapes[path] = _shape(path)
        return self.shapes[path]

    def _refuse_link(self) -> None:
        if self.folder.is_symlink():
            raise StoreError(f"{self.folder} is a link: a run's choices lie in its folder")

    def _path(self, site: Site, micro_batch: int) -> Path:
        return self.folder / f"site-{site}-micro-{micro_batch}.int32"


class ChoiceArrays:
    """The choices of a run as ``rlroute trace RUN --out FILE.npz`` writes them: an array for each step, of all its
    micro-batches' tokens and the sites in their order.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def sites(self) -> int:
        """How many sites there are.

        Raises:
            StoreError: the file cannot be read.
        """
        return self._arrays()[0].shape[1]

    def read(self, step: int, rows: slice, tokens: int, site: int, unused: int) -> Tensor:
        """Return what a site chose for some tokens of a step, int64 of shape (T, K).

        Args:
            step: the step.
            rows: which of its tokens.
            tokens: how many it must have.
            site: which of the sites.
            unused: stands where there is no expert.

        Raises:
            StoreError: there is no such step, or it has another number of tokens.
        """
        if step >= len(found := self._arrays()):
            raise StoreError(f"{self.path} holds no step {step}: it has {len(found)}")
        if (there := found[step].shape[0]) != tokens:
            raise StoreError(f"{self.path} holds {there} tokens for step {step}: want {tokens}")
        ids_TK = np.concatenate([ids_TLK[:, site] for ids_TLK in found[step].rows(rows.start, rows.stop)])
        return torch.from_numpy(np.where(ids_TK < 0, unused, ids_TK).astype(np.int64))

    def sha256(self) -> str:
        """Return the SHA-256 over the file, its name and size.

        Raises:
            StoreError: it cannot be read.
        """
        return _sha256([self.path], follow=True)

    def _arrays(self) -> list[Array]:
        try:
            return _arrays(self.path, os.stat(self.path).st_mtime_ns)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {why(error)}") from error


@lru_cache(maxsize=4)
def _arrays(path: Path, written: int) -> list[Array]:
    return arrays(path)


def _sha256(paths: Sequence[Path], *, follow: bool = False) -> str:
    """Return the SHA-256 over files, their names and sizes.

    Raises:
        StoreError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with reading(path, MOST, follow=follow) as file:
                digest.update(f"{path.name}:{file.seek(0, os.SEEK_END)};".encode(errors="surrogateescape"))
                file.seek(0)
                while part := file.read(1 << 20):
                    digest.update(part)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {why(error)}") from error
    return digest.hexdigest()


def _shape(path: Path) -> tuple[int, int]:
    shape = parse_json(read_bytes(path.with_suffix(".json")))
    sizes = [size for size in shape if type(size) is int and 0 <= size < 2**31] if isinstance(shape, list) else []
    if len(sizes) != 2 or sizes != shape or math.prod(sizes) >= 2**31:
        raise Unfit(f"its shape is {shown(shape)}: want two sizes")
    return sizes[0], sizes[1]
