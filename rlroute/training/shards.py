"""Token shards: files of little-endian uint16 ids, raw or with the header of llm.c (github.com/karpathy/llm.c,
``data/``).
"""

import hashlib
from pathlib import Path

import numpy as np

from rlroute.errors import DataError
from rlroute.training.documents import VALID_SHARE, match_files

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
MAX_COPIED_TOKENS = 2**31
"""Several training shards are copied into one array in memory; more than 4 GiB of them are refused."""
_CHUNK_TOKENS = 2**24


def read_shards(pattern: str, vocab_size: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Return training tokens, validation tokens and the SHA-256 of all token bytes, shards sorted by path.

    Shards with "val" in their file name are validation, the rest training; if none is named so the last one is
    validation, and one shard alone is cut at 1/16 from its end. A single shard stays on disk (memory-mapped); several
    of one part are joined in memory. Every token is read once, for the hash and to check the range.

    Raises:
        DataError: no shard matches, one is damaged or empty, an id is not below ``vocab_size``, or there is too much to
            join.
    """
    paths = match_files("bin", pattern)
    shards = [open_shard(path) for path in paths]
    digest = hashlib.sha256()
    for path, shard in zip(paths, shards, strict=True):
        _scan(path, shard, vocab_size, digest)
    if len(shards) == 1:
        cut = len(shards[0]) - len(shards[0]) // VALID_SHARE
        return shards[0][:cut], shards[0][cut:], digest.hexdigest()
    valid = [i for i, path in enumerate(paths) if "val" in path.name] or [len(paths) - 1]
    train = [i for i in range(len(paths)) if i not in valid]
    if not train:
        raise DataError(
            f"corpus 'bin:{pattern}': every shard is named *val*; legal is at least one that is not, for training"
        )
    return _join(pattern, [shards[i] for i in train]), _join(pattern, [shards[i] for i in valid]), digest.hexdigest()


def open_shard(path: Path) -> np.ndarray:
    """Map a shard's tokens, uint16, shape (tokens,), without reading them.

    Raises:
        DataError: the header's version or length does not fit, the size is odd, or there is no token.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=256)
    except OSError as error:
        raise DataError(f"shard '{path}' cannot be read: {error.strerror}; legal is a readable file") from error
    has_header = len(header) == 256 and header[0] == MAGIC
    if has_header and (header[1] != VERSION or size != HEADER_BYTES + 2 * int(header[2])):
        raise DataError(
            f"shard '{path}' is damaged: header version {header[1]} and {header[2]} tokens in {size} bytes; "
            f"legal is version {VERSION} and {HEADER_BYTES} + 2 x tokens bytes"
        )
    offset = HEADER_BYTES if has_header else 0
    if size % 2 or size == offset:
        raise DataError(
            f"shard '{path}' has {size} bytes; legal is an even number of them and at least one token of two"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=offset)


def _scan(path: Path, shard: np.ndarray, vocab_size: int, digest: "hashlib._Hash") -> None:
    for start in range(0, len(shard), _CHUNK_TOKENS):
        chunk = shard[start : start + _CHUNK_TOKENS]
        digest.update(chunk.data)
        if chunk.max() >= vocab_size:
            raise DataError(
                f"shard '{path}' holds token {chunk.max()}; "
                f"legal with a vocabulary of {vocab_size} are 0 to {vocab_size - 1}"
            )


def _join(pattern: str, shards: list[np.ndarray]) -> np.ndarray:
    if len(shards) == 1:
        return shards[0]
    total = sum(map(len, shards))
    if total > MAX_COPIED_TOKENS:
        raise DataError(
            f"corpus 'bin:{pattern}': {total} tokens in {len(shards)} shards; "
            f"legal are {MAX_COPIED_TOKENS}, or one shard of any size"
        )
    return np.concatenate(shards)
