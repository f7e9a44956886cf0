"""Which experts were chosen, as other programs write it down: whole numbers of shape (tokens, layers, k) in .npy, .npz
or .safetensors, as vLLM returns them (``--enable-return-routed-experts``), read a few rows at a time.

-1 stands where no expert is noted: vLLM writes it for tokens whose prefix was cached, we for unused slots.

Shape suffixes: T tokens, L layers, K experts per token.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import numpy as np
from typing_extensions import TypedDict

from rlroute.errors import StoreError
from rlroute.foreign import SMALL, Unfit, clipped, hold, parse_json, reading, shown, why
from rlroute.limits import Between

ENDS = (".npy", ".npz", ".safetensors")
"""Of the names of files that are read here."""
EXPERTS = 1 << 14
"""Ids are below this."""
SIZES = (1 << 31, 1 << 10, 1 << 10)
"""The most tokens, layers and experts of a token."""
MOST = 1 << 40
"""Bytes of the largest file."""
AT_ONCE = 1 << 22
"""Numbers that are held at a time, about."""
KINDS = {f"{sign}{8 * size}": np.dtype(f"<{sign.lower()}{size}") for sign in "IU" for size in (1, 2, 4, 8)}
"""What safetensors calls types of whole numbers."""


class Opened(NamedTuple):
    """A file at the first number of an array."""

    file: BinaryIO
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _Tensor(TypedDict):
    dtype: str
    shape: list[Annotated[int, Between(0, MOST)]]
    data_offsets: list[Annotated[int, Between(0, MOST)]]


@dataclass(frozen=True)
class Array:
    """One array of a file; nothing of it is held.

    Attributes:
        path: the file.
        name: of the array in it.
        opening: opens it.
    """

    path: Path
    name: str
    opening: Callable[[], AbstractContextManager[Opened]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, L, K).

        Raises:
            StoreError: it cannot be read, or is no array of whole numbers of such a shape.
        """
        with naming(self.path), self.opening() as opened:
            return self._shape(opened)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield the rows of tokens ``start`` to ``stop`` (by default all), some at a time, int16 of shape (n, L, K).

        Raises:
            StoreError: as for the shape; it ends too early, or holds an id that cannot be.
        """
        with naming(self.path), self.opening() as opened:
            tokens, *row = self._shape(opened)
            size = row[0] * row[1] * opened.dtype.itemsize
            opened.file.seek(start * size, 1)
            stop = tokens if stop is None else min(stop, tokens)
            step = max(1, AT_ONCE // (row[0] * row[1]))
            for first in range(start, stop, step):
                count = min(step, stop - first)
                data = opened.file.read(count * size)
                if len(data) < count * size:
                    raise Unfit(f"array {clipped(self.name)} ends before token {first + count} of {tokens}")
                yield self._ids(np.frombuffer(data, opened.dtype).reshape(count, *row), first)

    def _shape(self, opened: Opened) -> tuple[int, int, int]:
        shape, kind = opened.shape, opened.dtype.kind
        if kind not in "iu" or len(shape) != 3 or not all(0 <= n <= most for n, most in zip(shape, SIZES, strict=True)):
            raise Unfit(
                f"array {clipped(self.name)} is {opened.dtype} of shape {clipped(str(shape))}: want whole numbers of "
                f"shape (tokens, layers, k), at most {SIZES}"
            )
        if 0 in shape[1:]:
            raise Unfit(f"array {clipped(self.name)} has shape {shape}: want at least one layer and one expert")
        return shape[0], shape[1], shape[2]

    def _ids(self, values_TLK: np.ndarray, first: int) -> np.ndarray:
        wrong_TLK = (values_TLK < -1) | (values_TLK >= EXPERTS)
        if wrong_TLK.any():
            token, layer, slot = (int(found[0]) for found in wrong_TLK.nonzero())
            value = values_TLK[token, layer, slot]
            raise Unfit(
                f"array {clipped(self.name)}, token {first + token}, layer {layer}: expert {value}, legal are -1 "
                f"(none) to {EXPERTS - 1}"
            )
        return values_TLK.astype(np.int16)


def arrays(path: Path) -> list[Array]:
    """Return the arrays of a file: of .npz in the order in which they lie there, of .safetensors by the numbers in
    their names.

    Raises:
        StoreError: it cannot be read, or has none.
    """
    with naming(path):
        if path.suffix == ".npy":
            found = [Array(path, path.stem, partial(_npy, path))]
        elif path.suffix == ".npz":
            found = [Array(path, name.removesuffix(".npy"), partial(_member, path, name)) for name in _members(path)]
        elif path.suffix == ".safetensors":
            found = _tensors(path)
        else:
            raise Unfit(f"its name ends in none of {', '.join(ENDS)}")
        if not found:
            raise Unfit("it holds no array")
    return found


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Turn whatever a reader of a damaged archive raises into a StoreError that names the file."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, Unfit) as error:
        raise StoreError(f"{path}: {why(error)}") from error
    except Exception as error:  # zipfile, zlib, lzma and NumPy raise nearly anything, of any length
        raise StoreError(f"{path}: {clipped(str(error) or type(error).__name__)}") from error


@contextmanager
def _npy(path: Path) -> Iterator[Opened]:
    with reading(path, MOST, follow=True) as file:
        yield _with_header(file)


@contextmanager
def _member(path: Path, name: str) -> Iterator[Opened]:
    """Open a member; it is unpacked as it is read, so that no small file makes a large one."""
    with reading(path, MOST, follow=True) as file, zipfile.ZipFile(file) as archive, archive.open(name) as member:
        yield _with_header(member)  # type: ignore[arg-type]  # it reads and seeks as a file does


@contextmanager
def _part(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Opened]:
    with reading(path, MOST, follow=True) as file:
        file.seek(start)
        yield Opened(file, shape, dtype)


def _members(path: Path) -> list[str]:
    with reading(path, MOST, follow=True) as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if wrong := [name for name in names if not name.endswith(".npy")]:
        raise Unfit(f"it holds {shown(wrong[0])}: want a file as numpy.savez writes it")
    return names


def _with_header(file: BinaryIO) -> Opened:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise Unfit(f"it is .npy of version {version}: legal are 1 and 2")
    shape, by_columns, dtype = readers[version](file)
    if by_columns and len(shape) > 1:
        raise Unfit("its array lies by columns: save numpy.ascontiguousarray of it")
    return Opened(file, shape, dtype)


def _tensors(path: Path) -> list[Array]:
    with reading(path, MOST, follow=True) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > SMALL:
            raise Unfit(f"its header has {size:,} bytes: legal are {SMALL:,}")
        header, room = parse_json(file.read(size)), file.seek(0, 2) - 8 - size
    if not isinstance(header, dict):
        raise Unfit(f"its header is {shown(header)}: want an object")
    found = {name: _tensor(name, value, room) for name, value in header.items() if name != "__metadata__"}
    return [
        Array(path, name, partial(_part, path, 8 + size + start, shape, dtype))
        for name, (start, shape, dtype) in sorted(found.items(), key=lambda item: _by_numbers(item[0]))
    ]


def _tensor(name: str, value: Any, room: int) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Return where a tensor begins, its shape and its type, as a header says."""
    hold(value, _Tensor, name)
    dtype, shape, place = KINDS.get(value["dtype"]), tuple(value["shape"]), value["data_offsets"]
    if dtype is None:
        raise Unfit(f" = {shown(value['dtype'])}: want whole numbers, {', '.join(KINDS)}", name, "dtype")
    if len(place) != 2 or place[1] - place[0] != math.prod((dtype.itemsize, *shape)) or place[1] > room:
        raise Unfit(f" = {clipped(str(place))}: want those of its shape, of {room:,} bytes", name, "data_offsets")
    return place[0], shape, dtype


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Return a key by which ``step-10`` comes after ``step-9``."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)]
