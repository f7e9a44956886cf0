"""The batches that are cut out of a corpus. Which window a row shows depends on (seed, sequence id) alone.

Shape suffixes: B sequences, S sequence length, W windows of an epoch.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from rlroute.config import Order
from rlroute.errors import DataError
from rlroute.limits import MOST_SEQUENCES
from rlroute.seeding import derive_key
from rlroute.training.data import Corpus
from rlroute.training.shards import Stream

EVAL_SEQUENCES = MOST_SEQUENCES
"""Evaluation windows carry sequence ids from here on, apart from every training window's."""
_TOKENS = 2**17
"""Tokens of the steps whose windows a chain cuts at once."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of the token stream.

    Attributes:
        tokens_BS: inputs, int64.
        targets_BS: each input's next token, int64.
        sequence_B: global sequence id of each row, int64: step * batch_size + row, from 2**40 on for evaluation.
        domains_BS: hidden domain of each input, where the corpus knows it.
    """

    tokens_BS: np.ndarray
    targets_BS: np.ndarray
    sequence_B: np.ndarray
    domains_BS: np.ndarray | None

    def digest(self) -> bytes:
        """Return the SHA-256 of tokens, targets and sequence ids as little-endian int64."""
        arrays = (self.tokens_BS, self.targets_BS, self.sequence_B)
        return hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in arrays)).digest()


def sample_batch(
    corpus: Corpus, *, seed: int, step: int, batch_size: int, seq_len: int, order: Order = "random"
) -> Batch:
    """Return the training batch of a step: a pure function of (corpus, seed, step) and of how it is cut.

    A row's offset depends on (seed, its global sequence id) alone, so a resumed run, a micro-batch and a data-parallel
    rank see the same rows, and there is no sampler state to save.

    Args:
        corpus: what is read.
        seed, step: of the run.
        batch_size, seq_len: the batch's shape.
        order: of the windows: see :class:`rlroute.config.DataConfig`.

    Raises:
        DataError: the training stream is shorter than ``seq_len + 1``; of epochs, than twice ``seq_len``.
    """
    need = seq_len + 1 if order == "random" else 2 * seq_len
    if len(corpus.train) < need:
        raise _too_short(corpus, f"{len(corpus.train)} training tokens, seq_len = {seq_len} needs {need}")
    starts, sequence_B = len(corpus.train) - seq_len, np.arange(step * batch_size, (step + 1) * batch_size)
    if order == "random":
        offset_B = _offsets(seed, sequence_B) % starts
    else:
        windows = starts // seq_len
        epochs = [_shuffled(seed, int(epoch), windows, seq_len) for epoch in sequence_B // windows]
        offset_B = np.array([offset_W[at] for offset_W, at in zip(epochs, sequence_B % windows, strict=True)])
    return _windows(corpus.train, corpus.train_domains, offset_B, sequence_B, seq_len)


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, windows: int, seq_len: int) -> np.ndarray:
    """Return the offsets of an epoch's windows, in their order: cut from one of ``seq_len`` places on."""
    words = np.asarray(np.random.Philox(key=derive_key("epoch", seed, epoch) % 2**64).random_raw(1 + windows))
    return words[1:].argsort(kind="stable") * seq_len + int(words[0]) % seq_len


def _offsets(seed: int, sequence_B: np.ndarray) -> np.ndarray:
    """Return one uniform 64-bit integer per sequence id, for a run of successive ids: the first of the four words that
    Philox makes of each counter value."""
    philox = np.random.Philox(key=derive_key("data", seed) % 2**64, counter=int(sequence_B[0]))
    return np.asarray(philox.random_raw(4 * len(sequence_B)))[::4]


def eval_batches(
    corpus: Corpus, *, num_tokens: int, batch_size: int, seq_len: int, part: Literal["valid", "train"] = "valid"
) -> list[Batch]:
    """Return at least ``num_tokens`` fixed validation tokens: windows that do not overlap, evenly spread, the same for
    every seed. Of training tokens as many in the same way, or all windows that there are.

    The number of windows is ``num_tokens / seq_len`` rounded up; the last batch may be smaller than ``batch_size``.

    Raises:
        DataError: the validation stream is too short for them.
    """
    stream, domains = (corpus.valid, corpus.valid_domains) if part == "valid" else (corpus.train, corpus.train_domains)
    windows, there = -(-num_tokens // seq_len), (len(stream) - 1) // seq_len
    if part == "train":
        windows = min(windows, there)
    elif there < windows:
        needed = windows * seq_len + 1
        raise _too_short(
            corpus, f"{len(stream)} validation tokens, eval_tokens = {num_tokens} at seq_len = {seq_len} needs {needed}"
        )
    ids = np.arange(windows)
    offsets = ids * (len(stream) - 1) // windows
    return [
        _windows(
            stream,
            domains,
            offsets[i : i + batch_size],
            EVAL_SEQUENCES + ids[i : i + batch_size],
            seq_len,
        )
        for i in range(0, windows, batch_size)
    ]


def next_link(chain: str, batch: Batch) -> str:
    """Return the hash chain over batches, hex, with one more batch."""
    return hashlib.sha256(bytes.fromhex(chain) + batch.digest()).hexdigest()


def batch_chain(corpus: Corpus, seed: int, batch_size: int, seq_len: int, order: Order = "random") -> Iterator[str]:
    """Yield the hash chain of training after each step, without end; windows are cut for many steps at once."""
    chain, steps = "", max(1, _TOKENS // (batch_size * seq_len))
    for block in itertools.count():
        many = sample_batch(corpus, seed=seed, step=block, batch_size=steps * batch_size, seq_len=seq_len, order=order)
        for start in range(0, steps * batch_size, batch_size):
            rows = slice(start, start + batch_size)
            batch = Batch(many.tokens_BS[rows], many.targets_BS[rows], many.sequence_B[rows], None)
            chain = next_link(chain, batch)
            yield chain


def tokens_sha256(batches: Sequence[Batch]) -> str:
    """Return the SHA-256 of the tokens and targets of batches, however they are cut."""
    digest = hashlib.sha256()
    for part in ("tokens_BS", "targets_BS"):
        digest.update(b"".join(getattr(batch, part).tobytes() for batch in batches))
    return digest.hexdigest()


def _too_short(corpus: Corpus, found: str) -> DataError:
    return DataError(f"corpus {corpus.provenance['spec']!r} is too short: {found}")


def _windows(
    stream: Stream, domains: np.ndarray | None, offset_B: np.ndarray, sequence_B: np.ndarray, seq_len: int
) -> Batch:
    starts = [int(offset) for offset in offset_B]
    windows = np.stack([stream[start : start + seq_len + 1] for start in starts]).astype(np.int64)
    domains_BS = (
        None if domains is None else np.stack([domains[start : start + seq_len] for start in starts]).astype(np.int64)
    )
    return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), sequence_B, domains_BS)
