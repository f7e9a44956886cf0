"""From documents to tokens: by our own byte-level BPE, as bytes, or by a tokenizer file. The last id of each is BOS.

Shape suffixes: V vocabulary.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlroute.errors import DataError
from rlroute.extras import missing
from rlroute.training.documents import Document
from rlroute.training.encoded import remembered
from rlroute.training.tokenizer_file import TokenizerData, read_tokenizer

BPE_FILE = Path(__file__).with_name("bpe.json")
"""Our own tokenizer, made by :mod:`.train_tokenizer` from the training documents of the default corpus."""
_BATCH = 64  # documents that the library encodes at once


class Encoder(Protocol):
    """What turns documents into tokens.

    Attributes:
        vocab_size: number of ids, BOS (the last) included.
        token_bytes_V: bytes of text that each id stands for, float64.
        sha256: of the tokenizer's file, None for bytes.
        exact: whether it leaves every text as it is, which is otherwise found out by comparing.
    """

    vocab_size: int
    token_bytes_V: np.ndarray
    sha256: str | None
    exact: bool

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Return the ids of each document, without BOS."""
        ...

    def spelled(self, token: int) -> bytes:
        """Return the bytes that an id stands for; none for BOS."""
        ...


def open_encoder(tokenizer: str | None) -> Encoder:
    """Return the encoder that ``data.tokenizer`` names: ``bpe``, ``bytes`` (or None), or a file.

    Raises:
        DataError: the file is not what :func:`.tokenizer_file.read_tokenizer` takes.
    """
    if tokenizer in (None, "bytes"):
        return ByteEncoder()
    return TokenizerFile(str(BPE_FILE) if tokenizer == "bpe" else str(tokenizer))


class ByteEncoder:
    """Ids 0 to 255 are the bytes themselves, 256 is BOS."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.token_bytes_V = np.append(np.ones(256), 0.0)
        self.sha256: str | None = None
        self.exact = True

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Return each document's bytes."""
        return [np.frombuffer(document.data, np.uint8) for document in documents]

    def spelled(self, token: int) -> bytes:
        """Return the byte; none for BOS."""
        return bytes([token]) if token < 256 else b""


class TokenizerFile:
    """A Hugging Face ``tokenizers`` JSON file of byte-level BPE; BOS is an id added after its last.

    Special tokens stand for no text: they are never read out of one, whose own "<|endoftext|>" is encoded like any
    other characters.

    Raises:
        DataError: the file is not what :func:`.tokenizer_file.read_tokenizer` takes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._said, raw = read_tokenizer(path)
        self.vocab_size = len(self._said.bytes_V) + 1
        self.token_bytes_V = np.array([*map(len, self._said.bytes_V), 0], dtype=np.float64)
        self.sha256: str | None = hashlib.sha256(raw).hexdigest()
        self.exact = self._said.exact

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Return each document's ids. What was encoded before is remembered (:mod:`.encoded`).

        Raises:
            DataError: a document is not UTF-8, or the tokenizer changes its text, so that bits per byte would be those
                of another.
            MissingDependencyError: the package ``tokenizers`` is not installed.
        """
        library = _library(self.path)
        maker = f"{self.sha256} tokenizers {library.__version__}"
        dtype = np.min_scalar_type(self.vocab_size - 1)
        return remembered(maker, documents, dtype, lambda: list(self._encode(library, documents, dtype)))

    def spelled(self, token: int) -> bytes:
        """Return the bytes that an id stands for; none for BOS."""
        return self._said.bytes_V[token] if token < self.vocab_size - 1 else b""

    def _encode(self, library: Any, documents: Sequence[Document], dtype: np.dtype) -> Iterable[np.ndarray]:
        tokenizer = _load(library, self.path, self._said)
        remaining = iter(documents)
        while batch := list(islice(remaining, _BATCH)):
            encodings = tokenizer.encode_batch_fast([_text(document) for document in batch], add_special_tokens=False)
            for document, encoding in zip(batch, encodings, strict=True):
                self._compare(document, encoding.ids)
                yield np.array(encoding.ids, dtype=dtype)

    def _compare(self, document: Document, ids: Sequence[int]) -> None:
        """Refuse ids that stand for another text than the document's."""
        text = b"".join(map(self._said.bytes_V.__getitem__, ids))
        if text != document.data:
            at = next((i for i, (a, b) in enumerate(zip(text, document.data, strict=False)) if a != b), None)
            at = min(len(text), len(document.data)) if at is None else at
            raise DataError(
                f"tokenizer {self.path!r} changes the text of document {document.name!r}: "
                f"{document.data[at : at + 20]!r} became {text[at : at + 20]!r}; "
                "legal is one that keeps every text: no normalizer, no added prefix space, nothing removed"
            )


def _text(document: Document) -> str:
    try:
        return document.data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"document {document.name!r} is not UTF-8, which a tokenizer needs; --data.tokenizer bytes takes any"
        ) from error


def _library(path: str) -> Any:
    # Its own threads would take other runs' cores, and warn at every later fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError as error:
        raise missing(f"tokenizer {path!r}", "tokenizers", "--data.tokenizer bytes needs none") from error
    return tokenizers


def _load(library: Any, path: str, said: TokenizerData) -> Any:
    try:
        tokenizer = library.Tokenizer.from_str(said.text)
        others = [content for index, content in said.added.items() if tokenizer.token_to_id(content) != index]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and its panics are no Exception
        raise DataError(f"tokenizer {path!r} cannot be read: {error}; legal is a tokenizers JSON file") from error
    if others:
        raise DataError(f"tokenizer {path!r}: the id of {others[0]!r} is another token's; legal is an id of its own")
    tokenizer.encode_special_tokens = True
    return tokenizer
