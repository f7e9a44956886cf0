"""Which experts were chosen at every step of a run, on disk: what the router ``replay`` reads.

One file per site and micro-batch, in the run's folder: a row of fixed size for each step, written where it belongs, so
that a run that is resumed writes over what it had written before. The processes that train together each write their
own micro-batches.

Shape suffixes: N rows and K columns of a choice: (T, K) experts of tokens, or (E, C) tokens of experts.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlroute.errors import ConfigError, StoreError
from rlroute.routing import Site

FOLDER = "choices"
WRITTEN = 1
"""Stands before each step's row; a step that was never written has a 0 there."""


class ChoiceLog:
    """The choices of one run.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def write(self, step: int, micro_batch: int, choices: dict[Site, Tensor]) -> None:
        """Keep what each site chose for a micro-batch of a step.

        Raises:
            ConfigError: a choice has another shape than in the step before.
            StoreError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            for site, ids_NK in choices.items():
                path = self._path(site, micro_batch)
                if not path.with_suffix(".json").exists():
                    path.with_suffix(".json").write_text(json.dumps(list(ids_NK.shape)))
                    path.touch()
                if (shape := _shape(path)) != tuple(ids_NK.shape):
                    raise ConfigError(
                        f"site {site} chose {tuple(ids_NK.shape)} in step {step}, {shape} before: no log keeps both"
                    )
                row = np.concatenate([[WRITTEN], ids_NK.reshape(-1).cpu().numpy()]).astype(np.int32)
                with path.open("r+b") as file:
                    file.seek(step * row.nbytes)
                    file.write(row.tobytes())
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be written: {error.strerror}") from error

    def read(self, step: int, micro_batch: int, site: Site) -> Tensor:
        """Return what a site chose for a micro-batch of a step, int64 of shape (N, K).

        Raises:
            StoreError: it was not recorded.
        """
        path = self._path(site, micro_batch)
        try:
            shape = _shape(path)
            size = 1 + shape[0] * shape[1]
            row = np.fromfile(path, dtype=np.int32, count=size, offset=4 * step * size)
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{path} cannot be read: {error}") from error
        if len(row) < size or row[0] != WRITTEN:
            raise StoreError(f"{path} holds no step {step}: the run did not record it")
        return torch.from_numpy(row[1:].astype(np.int64)).view(shape)

    def sha256(self) -> str:
        """Return the SHA-256 over all files.

        Raises:
            StoreError: there is none.
        """
        digest, paths = hashlib.sha256(), sorted(self.folder.glob("*"))
        if not paths:
            raise StoreError(f"{self.folder} is not there: the run was not trained with --train.record-choices")
        for path in paths:
            digest.update(f"{path.name}:{path.stat().st_size};".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def _path(self, site: Site, micro_batch: int) -> Path:
        return self.folder / f"site-{site}-micro-{micro_batch}.int32"


def _shape(path: Path) -> tuple[int, int]:
    rows, columns = json.loads(path.with_suffix(".json").read_text())
    return rows, columns
