"""What tokenizers made of documents, remembered in the user's cache folder: every process of a comparison reads the
same corpus, which takes seconds to encode.

One file per tokenizer and corpus, named by the SHA-256 of both. It starts with the SHA-256 of the rest: a damaged one
is made anew. Where the folder cannot be written (a read-only home, a full disk) nothing is remembered.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from rlroute.training.documents import Document

SMALLEST = 2**20
"""Bytes of text; fewer are encoded before a file is found."""
_DIGEST = 32


def folder() -> Path:
    """Return the folder that holds them: ``rlroute`` in ``XDG_CACHE_HOME``, or in ``~/.cache``.

    Raises:
        RuntimeError: the user has no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "rlroute"


def remembered(
    maker: str, documents: Sequence[Document], dtype: np.dtype, encode: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
    """Return the ids of each document, as ``encode`` makes them, or as it once made them.

    Args:
        maker: all that the ids depend on besides the documents.
        documents: what is encoded.
        dtype: of the ids.
        encode: returns each document's ids; may raise.
    """
    if sum(len(document.data) for document in documents) < SMALLEST:
        return encode()
    try:
        path = folder() / f"{_key(maker, documents)}.ids"
    except RuntimeError:
        return encode()
    with suppress(OSError, ValueError):
        return _read(path, len(documents), dtype)
    ids = encode()
    with suppress(OSError):
        _write(path, ids)
    return ids


def _key(maker: str, documents: Sequence[Document]) -> str:
    digest = hashlib.sha256(maker.encode())
    for document in documents:
        digest.update(b"\0" + hashlib.sha256(document.data).digest())
    return digest.hexdigest()


def _read(path: Path, count: int, dtype: np.dtype) -> list[np.ndarray]:
    """Read a file of :func:`_write`.

    Raises:
        OSError: it is not there.
        ValueError: it is damaged.
    """
    data = path.read_bytes()
    if hashlib.sha256(memoryview(data)[_DIGEST:]).digest() != data[:_DIGEST]:
        raise ValueError(f"{path} is damaged")
    lengths = np.frombuffer(data, "<i8", count, _DIGEST)
    ids = np.frombuffer(data, dtype.newbyteorder("<"), offset=_DIGEST + 8 * count)
    return np.split(ids.astype(dtype, copy=False), np.cumsum(lengths)[:-1])


def _write(path: Path, ids: Sequence[np.ndarray]) -> None:
    """Write a file at once, so that others see all of it or none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lengths = np.array([len(each) for each in ids], "<i8")
    body = lengths.tobytes() + b"".join(each.astype(each.dtype.newbyteorder("<")).tobytes() for each in ids)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(hashlib.sha256(body).digest() + body)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
