"""From documents to tokens: bytes by default, a byte-level tokenizer file if one is given. The last id of each is BOS.

Shape suffixes: V vocabulary.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlroute.errors import DataError, MissingDependencyError
from rlroute.training.documents import Document


class Encoder(Protocol):
    """What turns documents into tokens.

    Attributes:
        vocab_size: number of ids, BOS (the last) included.
        token_bytes_V: bytes of text that each id stands for, float64.
        sha256: of the tokenizer's file, None for bytes.
    """

    vocab_size: int
    token_bytes_V: np.ndarray
    sha256: str | None

    def encode(self, document: Document) -> np.ndarray:
        """Return a document's ids, without BOS."""
        ...


class ByteEncoder:
    """Ids 0 to 255 are the bytes themselves, 256 is BOS."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.token_bytes_V = np.append(np.ones(256), 0.0)
        self.sha256: str | None = None

    def encode(self, document: Document) -> np.ndarray:
        """Return a document's bytes."""
        return np.frombuffer(document.data, np.uint8)


class TokenizerFile:
    """A Hugging Face ``tokenizers`` JSON file with byte-level tokens; BOS is an id added after its last.

    In a byte-level vocabulary every character of a token's name stands for one byte of text, hence ``token_bytes_V``.
    Special tokens stand for none: they are never read out of a text, whose own "<|endoftext|>" is encoded like any
    other characters.

    Raises:
        MissingDependencyError: the package ``tokenizers`` is not installed.
        DataError: the file cannot be read or is not byte-level.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._tokenizer = _load(path)
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 2
        self.token_bytes_V = np.zeros(self.vocab_size)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            self.token_bytes_V[index] = len(token)
        for index, token in self._tokenizer.get_added_tokens_decoder().items():
            self.token_bytes_V[index] = 0 if token.special else len(token.content.encode())
        self.sha256: str | None = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def encode(self, document: Document) -> np.ndarray:
        """Return a document's ids.

        Raises:
            DataError: the document is not UTF-8, or the tokenizer changes its text, so that bits per byte would be
                wrong.
        """
        try:
            text = document.data.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"document {document.name!r} is not UTF-8, which a tokenizer file needs; bytes (no tokenizer) take any"
            ) from error
        ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        covered = int(self.token_bytes_V[ids].sum())
        if covered != len(document.data):
            raise DataError(
                f"tokenizer {self.path!r} turns the {len(document.data)} bytes "
                f"of document {document.name!r} into tokens of {covered}; "
                "legal is one that loses and adds nothing: all 256 bytes, no normalizer, no added prefix space"
            )
        return ids


def _load(path: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            "a tokenizer file needs the package tokenizers: pip install 'rlroute[tokenizers]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the package raises nothing narrower
        raise DataError(f"tokenizer {path!r} cannot be read: {error}; legal is a tokenizers JSON file") from error
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    if "ByteLevel" not in {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", ()))}:
        raise DataError(
            f"tokenizer {path!r} has decoder {decoder.get('type')!r}; legal is a byte-level tokenizer ('ByteLevel')"
        )
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
