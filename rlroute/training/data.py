"""Corpora as token streams, and the batches cut out of them. Which window a row shows depends on (seed, sequence id)
alone.

A corpus is named by a spec string:

- ``package:NAME``, or ``package:NAME,NAME``: Python sources of installed distributions, without their tests. The
  default is ``package:sympy``, 16.5 MB that are the same on every machine and Python version.
- ``stdlib``: the sources of the interpreter's own library; they differ between Python versions.
- ``synth:``, or ``synth:domains=8,vocab=64,length=256,documents=4000,order=1,seed=0`` (any of them): see
  :mod:`.synthetic`.
- ``file:GLOB``: each matching file is a document. What is named like a part (``wiki.valid.txt``, ``train/``) is it:
  see :func:`.documents.split_documents`.
- ``parquet:GLOB``, or ``parquet:GLOB,column=text``: each row of each matching file is a document; files that are
  named like a part are it.
- ``bin:GLOB,vocab=50257,bytes_per_token=4.2``: shards of uint16 tokens, see :mod:`.shards`; with a tokenizer file,
  ``bin:GLOB``.

Shape suffixes: B sequences, S sequence length, V vocabulary.
"""

import hashlib
import itertools
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from rlroute.config import DataConfig, Order
from rlroute.errors import DataError
from rlroute.limits import MOST_SEQUENCES
from rlroute.seeding import derive_key
from rlroute.training.documents import (
    Document,
    cut,
    file_documents,
    package_documents,
    split_documents,
    stdlib_documents,
)
from rlroute.training.parquet import parquet_documents
from rlroute.training.shards import Stream, blocks, head, read_shards
from rlroute.training.synthetic import Mixture
from rlroute.training.tokenizer import Encoder, open_encoder

EVAL_SEQUENCES = MOST_SEQUENCES
"""Evaluation windows carry sequence ids from here on, apart from every training window's."""
_TOKENS = 2**17
"""Tokens of the steps whose windows a chain cuts at once."""
_Labelled = tuple[Stream, np.ndarray | None]
"""Tokens, and their domains."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokenised text, split by document.

    Attributes:
        train: integer tokens, shape (tokens,), each document opened by BOS; may lie on disk.
        valid: the same of the validation documents.
        vocab_size: 257 for bytes: 256 and BOS.
        token_bytes_V: bytes of text that each token stands for, float64; BOS: 0. For ``bin`` without a tokenizer a
            constant.
        provenance: spec, sha256 (of all documents' bytes in order; for ``bin`` of the tokens'), train_sha256 and
            valid_sha256 (of each stream, its domains included: how the documents are split and tokenised too),
            distribution and version (None where there is none), tokenizer_sha256, vocab_size, train_tokens,
            valid_tokens, floor_bits_per_byte (of the validation documents, ``synth`` only, see
            :meth:`.synthetic.Mixture.floor`).
        train_domains: hidden domain of each training token, BOS included; ``synth`` only.
        valid_domains: the same for validation.
        notes: what is to be said of documents that were left out, a line each.
    """

    train: Stream
    valid: Stream
    vocab_size: int
    token_bytes_V: np.ndarray
    provenance: dict[str, Any]
    train_domains: np.ndarray | None = None
    valid_domains: np.ndarray | None = None
    notes: Sequence[str] = ()

    @cached_property
    def token_counts_V(self) -> np.ndarray:
        """How often each token occurs in training, int64."""
        counts_V = np.zeros(self.vocab_size, dtype=np.int64)
        for block in blocks(self.train):  # the stream may be larger than memory
            counts_V += np.bincount(block, minlength=self.vocab_size)
        return counts_V


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


def corpus_of(data: DataConfig) -> Corpus:
    """Read the corpus of a configuration, as :func:`load_corpus` does."""
    return load_corpus(data.spec, data.tokenizer, data.train_tokens)


def load_corpus(spec: str, tokenizer: str | None = None, train_tokens: int | None = None) -> Corpus:
    """Read the corpus that ``spec`` names (see the module), through the tokenizer that ``tokenizer`` names
    (:func:`.tokenizer.open_encoder`; None: bytes), and keep so many of its training tokens (None: all).

    A tokenizer takes seconds for 10 MB of text, the first time (:mod:`.encoded`).

    Raises:
        DataError: unknown scheme or option, no such package or file, fewer than two documents, a tokenizer that is
            damaged or changes text, or more training tokens than there are.
        MissingDependencyError: a tokenizer is given and the package ``tokenizers`` is not installed.
    """
    scheme, _, rest = spec.partition(":")
    encoder = open_encoder(tokenizer)
    if scheme == "bin":
        return _load_shards(spec, rest, None if encoder.sha256 is None else encoder, train_tokens)
    documents, version, mixture = _read(spec)
    train, valid, notes = split_documents(spec, documents, by_name=scheme in ("file", "parquet"))
    learnt, train_domains = _stream(spec, train, encoder, train_tokens)
    valid_tokens, valid_domains = _stream(spec, valid, encoder)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.data)
    return Corpus(
        train=learnt,
        valid=valid_tokens,
        vocab_size=encoder.vocab_size,
        token_bytes_V=encoder.token_bytes_V,
        provenance=_provenance(
            spec,
            digest.hexdigest(),
            (learnt, train_domains),
            (valid_tokens, valid_domains),
            vocab_size=encoder.vocab_size,
            tokenizer_sha256=encoder.sha256,
            floor_bits_per_byte=None if mixture is None else mixture.floor(valid),
            **version,
        ),
        train_domains=train_domains,
        valid_domains=valid_domains,
        notes=notes,
    )


def _provenance(spec: str, sha256: str, train: _Labelled, valid: _Labelled, **known: Any) -> dict[str, Any]:
    unknown = {"distribution": None, "version": None, "tokenizer_sha256": None, "floor_bits_per_byte": None}
    hashes = {"sha256": sha256, "train_sha256": _stream_sha256(*train), "valid_sha256": _stream_sha256(*valid)}
    counts = {"train_tokens": len(train[0]), "valid_tokens": len(valid[0])}
    return {"spec": spec} | hashes | unknown | counts | known


def _stream_sha256(tokens: Stream, domains: np.ndarray | None) -> str:
    """Return the SHA-256 of a stream's tokens and, where it has them, their domains; what lies on disk is read in
    parts.
    """
    digest = hashlib.sha256()
    for values in (tokens,) if domains is None else (tokens, domains):
        little = values.dtype.newbyteorder("<")
        digest.update(f"{little.str}:{len(values)};".encode())
        for block in blocks(values):
            digest.update(block.astype(little).data)
    return digest.hexdigest()


def read_documents(spec: str) -> list[Document]:
    """Return the documents that a spec names, but for shards, which hold none.

    Raises:
        DataError: unknown scheme or option, or no such package or file.
    """
    return _read(spec)[0]


def _read(spec: str) -> tuple[list[Document], dict[str, str], Mixture | None]:
    """Return a spec's documents, its distribution and version, and the mixture that it was drawn from."""
    scheme, colon, rest = spec.partition(":")
    if scheme == "package":
        documents, found = package_documents(rest)
        names, versions = [one.metadata["Name"] for one in found], [one.version for one in found]
        return documents, {"distribution": ", ".join(names), "version": ", ".join(versions)}, None
    if spec == "stdlib":
        version = {"distribution": platform.python_implementation(), "version": platform.python_version()}
        return stdlib_documents(), version, None
    if scheme == "file":
        return file_documents(rest), {}, None
    if scheme == "parquet":
        pattern, pairs = _cut_options(rest)
        return parquet_documents(pattern, **_options(spec, pairs, {"column": str})), {}, None
    if scheme == "synth" and colon:
        pairs = rest.split(",") if rest else []
        mixture = Mixture(**_options(spec, pairs, {field.name: int for field in fields(Mixture)}))
        return mixture.sample(), {}, mixture
    raise DataError(
        f"corpus {spec!r}: unknown, legal are package:NAME, stdlib, synth:OPTIONS, file:GLOB, parquet:GLOB and "
        "bin:GLOB,OPTIONS"
    )


def _stream(
    spec: str, documents: Sequence[Document], encoder: Encoder, most: int | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the documents' tokens, each document after a BOS, and each token's domain where the documents have one;
    so many of them at most.
    """
    ids = encoder.encode(documents)
    bos = np.array([encoder.vocab_size - 1])
    dtype = np.min_scalar_type(encoder.vocab_size - 1)
    sizes = [1 + len(each) for each in ids]
    if most is not None:
        _refuse_more(spec, sum(sizes), most)
        sizes = cut(documents, sizes, most)
    pieces = [piece for each, size in zip(ids, sizes, strict=True) for piece in (bos[:size], each[: max(0, size - 1)])]
    tokens = np.concatenate(pieces, dtype=dtype, casting="unsafe")
    if documents[0].domain is None:
        return tokens, None
    return tokens, np.repeat([document.domain for document in documents], sizes)


def _refuse_more(spec: str, there: int, wanted: int) -> None:
    if wanted > there:
        raise DataError(
            f"data.train_tokens = {wanted}: corpus {spec!r} has {there} training tokens, legal are 1 to {there}"
        )


def _load_shards(spec: str, rest: str, encoder: Encoder | None, train_tokens: int | None) -> Corpus:
    pattern, pairs = _cut_options(rest)
    options = _options(spec, pairs, {"vocab": int, "bytes_per_token": float} if encoder is None else {})
    if encoder is not None and not encoder.exact:
        raise DataError(
            f"corpus {spec!r}: its tokenizer may change text, and shards hold none to compare; say vocab=..."
        )
    if encoder is None:
        if len(options) < 2:
            raise DataError(f"corpus {spec!r}: needs vocab=... and bytes_per_token=..., or a tokenizer file")
        vocab_size, token_bytes = options["vocab"], options["bytes_per_token"]
        if not 1 <= vocab_size <= 2**16 or not 0 < token_bytes < math.inf:
            raise DataError(f"corpus {spec!r}: legal are a vocab of 1 to {2**16} and bytes_per_token above 0")
        token_bytes_V = np.full(vocab_size, token_bytes)
    else:
        vocab_size, token_bytes_V = encoder.vocab_size, encoder.token_bytes_V
    train, valid, sha256, notes = read_shards(pattern, vocab_size)
    if train_tokens is not None:
        _refuse_more(spec, len(train), train_tokens)
        train = head(train, train_tokens)
    tokenizer_sha256 = encoder.sha256 if encoder else None
    return Corpus(
        train=train,
        valid=valid,
        vocab_size=vocab_size,
        token_bytes_V=token_bytes_V,
        provenance=_provenance(
            spec, sha256, (train, None), (valid, None), vocab_size=vocab_size, tokenizer_sha256=tokenizer_sha256
        ),
        notes=notes,
    )


def _cut_options(rest: str) -> tuple[str, list[str]]:
    """Cut ``GLOB,name=value,...``; a glob may hold commas, and what is there by its name has no options."""
    pairs: list[str] = []
    while (match := re.fullmatch(r"(.*),([a-z_]+=[^,/]*)", rest, re.DOTALL)) and not os.path.lexists(rest):
        rest, pairs = match[1], [match[2], *pairs]
    return rest, pairs


def _options(spec: str, pairs: Sequence[str], legal: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Parse ``name=value`` pairs by the type of each name."""
    values = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in legal:
            raise DataError(f"corpus {spec!r}: unknown option {name!r}, legal are {', '.join(legal) or 'none'}")
        try:
            values[name] = legal[name](text)
        except ValueError as error:
            raise DataError(f"corpus {spec!r}: {name} = {text!r}, legal is {legal[name].__name__}") from error
    return values


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
