"""Text as shards that ``bin:`` reads, made once: training and validation apart by document, as training on the text
itself has them, token for token.

The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from rlroute.errors import DataError, StoreError
from rlroute.records import storing, sync_folder
from rlroute.training.data import Corpus, load_corpus
from rlroute.training.shards import MAGIC, VERSION, Stream
from rlroute.training.tokenizer import open_encoder

SHARD_TOKENS = 100_000_000
"""Tokens of a shard: 200 MB."""
SAID = "prepared.json"
"""What a folder of shards says of itself; its name is no shard's."""
MOST_IDS = 2**16
"""A shard's ids have 16 bits."""


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        spec, tokenizer: how the shards are read: ``--data.spec``, and ``--data.tokenizer`` where one is to be named.
        shards: how many.
        provenance: of the corpus.
        notes: what is to be said of documents that were left out.
    """

    spec: str
    tokenizer: str | None
    shards: int
    provenance: dict[str, Any]
    notes: list[str]


def write_shards(out: Path, spec: str, tokenizer: str | None, shard_tokens: int = SHARD_TOKENS) -> Prepared:
    """Write a corpus of text as shards, ``train-00000.bin`` and so on and ``valid-00000.bin``, with llm.c's header.

    The text must fit into memory. The same text and tokenizer give the same bytes.

    Args:
        out: the folder to make.
        spec, tokenizer: of the corpus.
        shard_tokens: of one shard, at most.

    Raises:
        DataError: the corpus cannot be read, is no text, or its ids need more than 16 bits.
        StoreError: the folder is there, or cannot be made; nothing is left then.
    """
    if spec.partition(":")[0] in ("bin", "synth"):
        raise DataError(f"corpus {spec!r} is no text: legal are file:GLOB, parquet:GLOB, package:NAME and stdlib")
    if os.path.lexists(out):
        raise StoreError(f"{out} is there already: legal is a folder that is not")
    corpus = load_corpus(spec, tokenizer)
    if corpus.vocab_size > MOST_IDS:
        raise DataError(f"tokenizer {tokenizer!r} has {corpus.vocab_size} ids with BOS: shards take up to {MOST_IDS}")
    temporary = out.with_name(f".{out.name}.tmp")
    with storing(out):
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        try:
            shards = sum(
                _write(temporary, part, stream, shard_tokens)
                for part, stream in (("train", corpus.train), ("valid", corpus.valid))
            )
            prepared = Prepared(*_as_read(out, corpus, tokenizer), shards, corpus.provenance, list(corpus.notes))
            said = {"spec": prepared.spec, "tokenizer": prepared.tokenizer, "made_from": corpus.provenance}
            _put(temporary / SAID, [json.dumps(said, indent=1).encode() + b"\n"])
            sync_folder(temporary)
            temporary.rename(out)  # onto nothing, or an empty folder that has appeared since
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return prepared


def _as_read(out: Path, corpus: Corpus, tokenizer: str | None) -> tuple[str, str | None]:
    """Return spec and tokenizer that read the shards again: with bytes per token of its own where no tokenizer can say
    how much text a token stands for.
    """
    encoder, glob = open_encoder(tokenizer), f"bin:{out}/*.bin"
    if encoder.sha256 is not None and encoder.exact:
        return glob, tokenizer
    per_token = float(corpus.token_bytes_V[np.asarray(corpus.valid)].mean())
    return f"{glob},vocab={corpus.vocab_size},bytes_per_token={per_token!r}", None


def _write(folder: Path, part: str, stream: Stream, shard_tokens: int) -> int:
    """Write a stream as shards of a part; return how many they are."""
    starts = range(0, len(stream), shard_tokens)
    for number, start in zip(count(), starts, strict=False):
        tokens = stream[start : start + shard_tokens].astype("<u2")
        _put(folder / f"{part}-{number:05}.bin", _shard(tokens))
    return len(starts)


def _shard(tokens: np.ndarray) -> Iterator[Any]:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    yield header.data
    yield tokens.data


def _put(path: Path, pieces: Any) -> None:
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
