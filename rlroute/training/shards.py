"""Token shards: files of little-endian uint16 ids, raw or with the header of llm.c (github.com/karpathy/llm.c,
``data/``). They stay on disk, however many there are.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlroute.errors import DataError
from rlroute.training.documents import VALID_SHARE
from rlroute.training.files import Found, find_files, listed

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
BLOCK_TOKENS = 2**22
"""What is read at once of a stream that need not fit into memory."""


class Joined:
    """Token arrays one after another, as one stream that is cut out of them where it is asked for."""

    ndim = 1

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts, self.dtype = list(parts), parts[0].dtype
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, cut: slice) -> np.ndarray:
        start, stop, step = cut.indices(len(self))
        pieces = [
            part[max(0, start - end + len(part)) : max(0, stop - end + len(part))]
            for part, end in zip(self.parts, self._ends, strict=True)
            if end > start and end - len(part) < stop
        ]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate([self.parts[0][:0], *pieces])
        return whole[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


Stream = np.ndarray | Joined
"""Tokens, shape (tokens,)."""


def head(stream: Stream, tokens: int) -> Stream:
    """Return the first tokens of a stream, which stay where they are."""
    if isinstance(stream, np.ndarray):
        return stream[:tokens]
    starts = accumulate(map(len, stream.parts), initial=0)
    return Joined([part[: tokens - start] for part, start in zip(stream.parts, starts, strict=False) if start < tokens])


def blocks(stream: Stream) -> Iterator[np.ndarray]:
    """Return a stream piece by piece."""
    return (stream[start : start + BLOCK_TOKENS] for start in range(0, len(stream), BLOCK_TOKENS))


class Shards(NamedTuple):
    """Training and validation tokens, the SHA-256 of all token bytes, and what is to be said of shards left out."""

    train: Stream
    valid: Stream
    sha256: str
    notes: list[str]


def read_shards(pattern: str, vocab_size: int) -> Shards:
    """Return the tokens of all shards that a glob matches, memory-mapped, in the order of their names.

    What is named validation is validation (:attr:`.files.Found.part`), tests are left out, the rest is training; if
    none is named so the last one is validation, and one shard alone is cut at 1/16 from its end. A shard whose tokens
    are held out under another name is not trained on. Every token is read once, for the hash and to check the range.

    Raises:
        DataError: no shard matches, one is damaged or empty, an id is not below ``vocab_size``, or none is left for
            training.
    """
    found = find_files("bin", pattern)
    shards = {shard: open_shard(shard.path) for shard in found if shard.part != "test"}
    tests = [shard.name for shard in found if shard.part == "test"]
    digest = hashlib.sha256()
    own = {shard: _scan(shard.path, tokens, vocab_size, digest) for shard, tokens in shards.items()}
    notes = [f"corpus 'bin:{pattern}': {len(tests)} shards named test are left out: {listed(tests)}"] if tests else []
    if len(shards) == 1:
        (tokens,) = shards.values()
        cut = len(tokens) - len(tokens) // VALID_SHARE
        return Shards(tokens[:cut], tokens[cut:], digest.hexdigest(), notes)
    valid = [shard for shard in shards if shard.part == "valid"] or list(shards)[-1:]
    held = {own[shard] for shard in valid}
    twice = [shard.name for shard in shards if shard not in valid and own[shard] in held]
    train = [shard for shard in shards if own[shard] not in held]
    if not train:
        raise DataError(
            f"corpus 'bin:{pattern}': {len(tests)} shards are named test and {len(valid)} are for validation; "
            "legal is at least one that is neither, for training"
        )
    if twice:
        notes.append(
            f"corpus 'bin:{pattern}': {len(twice)} shards are held out too, and not trained on: {listed(twice)}"
        )
    return Shards(_join(shards, train), _join(shards, valid), digest.hexdigest(), notes)


def _join(shards: dict[Found, np.ndarray], chosen: Sequence[Found]) -> Stream:
    return shards[chosen[0]] if len(chosen) == 1 else Joined([shards[shard] for shard in chosen])


def open_shard(path: Path) -> np.ndarray:
    """Map a shard's tokens, uint16, shape (tokens,), without reading them.

    Raises:
        DataError: the header's version or length does not fit, the size is odd, or there is no token.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=256)
        hole = _first_hole(path)
    except OSError as error:
        raise DataError(f"shard {str(path)!r} cannot be read: {error.strerror}; legal is a readable file") from error
    if hole < size:
        raise DataError(
            f"shard {str(path)!r} was never written from byte {hole} on (of {size}): it was cut off, or its copy was"
        )
    has_header = len(header) == 256 and header[0] == MAGIC
    if has_header and (header[1] != VERSION or size != HEADER_BYTES + 2 * int(header[2])):
        raise DataError(
            f"shard {str(path)!r} is damaged: header version {header[1]} and {header[2]} tokens in {size} bytes; "
            f"legal is version {VERSION} and {HEADER_BYTES} + 2 x tokens bytes"
        )
    offset = HEADER_BYTES if has_header else 0
    if size % 2 or size == offset:
        raise DataError(
            f"shard {str(path)!r} has {size} bytes; legal is an even number of them and at least one token of two"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=offset)


def _first_hole(path: Path) -> int:
    """Return where a sparse file has its first hole, which reads as zeros; its size where it has none."""
    with path.open("rb") as file:
        return os.lseek(file.fileno(), 0, os.SEEK_HOLE) if os.fstat(file.fileno()).st_size else 0


def _scan(path: Path, shard: np.ndarray, vocab_size: int, digest: "hashlib._Hash") -> bytes:
    """Check a shard's ids, add its bytes to the digest of all, and return the digest of its own."""
    own = hashlib.sha256()
    for block in blocks(shard):
        digest.update(block.data)
        own.update(block.data)
        if block.max() >= vocab_size:
            raise DataError(
                f"shard {str(path)!r} holds token {block.max()}; "
                f"legal with a vocabulary of {vocab_size} are 0 to {vocab_size - 1}"
            )
    return own.digest()
