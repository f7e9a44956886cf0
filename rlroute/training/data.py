"""Corpora as token streams.

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

Shape suffixes: V vocabulary.
"""

import hashlib
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from rlroute.config import DataConfig
from rlroute.errors import DataError
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
