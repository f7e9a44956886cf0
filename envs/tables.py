"""Tokens and what each frozen expert would cost them: all that a bandit over experts needs, and a file format for it.

Shape suffixes: N tokens, D features, E experts.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlroute.errors import DataError
from rlroute.foreign import reading, why

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SHAPES = {"x_ND": "ND", "losses_NE": "NE", "skip_N": "N", "token_ids_N": "N", "labels_N": "N"}
DTYPES = {"x_ND": "float32", "losses_NE": "float32", "skip_N": "float32", "token_ids_N": "int64", "labels_N": "int64"}
LIMITS = {
    **dict.fromkeys(("x_ND", "losses_NE", "skip_N"), (-1e30, 1e30)),  # whose squares and sums are numbers too
    "token_ids_N": (0, 2**31 - 1),
    "labels_N": (-1, 2**31 - 1),
}
MOST = 1 << 34
"""Bytes of the largest file."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenTable:
    """Tokens, and the counterfactual loss of each under every expert.

    Attributes:
        x_ND: what the router sees of each token (its normalised hidden state), float32.
        losses_NE: the loss of each token when expert e alone serves it with gate 1, float32; exact only for the last
            MoE layer after the last attention, where a token's route changes no other token.
        skip_N: the loss of each token when no expert serves it, float32.
        token_ids_N: int64, what hash routers route by.
        labels_N: int64, the cluster or document domain of each token, -1 where unknown.

    The arrays become read-only, because environments share them.

    Raises:
        DataError: an array of another shape or dtype, or a number that is not finite or too large.
    """

    x_ND: Floats
    losses_NE: Floats
    skip_N: Floats
    token_ids_N: Ints
    labels_N: Ints

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name, letters in SHAPES.items():
            array = getattr(self, name)
            if array.ndim != len(letters) or array.dtype != DTYPES[name] or not array.size:
                want = f"{DTYPES[name]} of shape ({', '.join(letters)})"
                raise DataError(f"token table: {name} is {array.dtype} of shape {array.shape}, want {want}")
            for letter, size in zip(letters, array.shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    raise DataError(f"token table: {name} has {letter} = {size}, x_ND has {sizes[letter]}")
            if not np.isfinite(array).all():
                raise DataError(f"token table: {name} holds numbers that are not finite")
            low, high = LIMITS[name]
            if array.min() < low or array.max() > high:
                raise DataError(f"token table: {name} holds numbers outside of {low:g} to {high:g}")
            array.flags.writeable = False  # environments share it

    @property
    def bound(self) -> float:
        """The power of two that no feature passes: the bound of the observation space."""
        return float(2.0 ** np.ceil(np.log2(max(float(np.abs(self.x_ND).max()), 1.0))))

    @property
    def uniform(self) -> float:
        """The mean loss of experts drawn uniformly."""
        return float(self.losses_NE.mean(dtype=np.float64))

    @property
    def fixed(self) -> float:
        """The mean loss of the best single expert."""
        return float(self.losses_NE.mean(0, dtype=np.float64).min())

    @property
    def oracle(self) -> float:
        """The mean loss of each token's best expert."""
        return float(self.losses_NE.min(1).mean(dtype=np.float64))

    def save(self, path: Path) -> None:
        """Write the arrays as an uncompressed .npz, which holds no pickles."""
        np.savez(path, **{f.name: getattr(self, f.name) for f in fields(self)})


def load_table(path: str) -> TokenTable:
    """Read a table that :meth:`TokenTable.save` wrote; once per process and file, for its environments share the
    arrays.

    Raises:
        DataError: the file cannot be read, lacks an array, or holds one of another shape or dtype.
    """
    try:
        written = Path(path).stat().st_mtime_ns
    except (OSError, ValueError) as error:
        raise DataError(f"token table {path!r}: {why(error)}") from error
    return _load(path, written)


@lru_cache(maxsize=4)
def _load(path: str, written: int) -> TokenTable:
    try:
        with reading(Path(path), MOST, follow=True) as file, zipfile.ZipFile(file) as archive:
            arrays = _arrays(archive)
    except Exception as error:  # a damaged archive makes its readers raise nearly anything
        raise DataError(f"token table {path!r}: {why(error)}") from error
    return TokenTable(**arrays)


def _arrays(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Return an archive's arrays; what is packed is refused, for it may be a thousand times as large as its file.

    Raises:
        DataError: one is missing or packed.
    """
    members = {name: f"{name}.npy" for name in SHAPES}
    missing = sorted(name for name, member in members.items() if member not in archive.namelist())
    if missing:
        raise DataError(f"no array {', '.join(missing)}; want {', '.join(SHAPES)}")
    if packed := [name for name, member in members.items() if archive.getinfo(member).compress_type]:
        raise DataError(f"{packed[0]} is compressed: want a file as numpy.savez writes it")
    arrays = {}
    for name, member in members.items():
        with archive.open(member) as file:
            arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays
