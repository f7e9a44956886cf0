"""Documents out of Parquet files, one a row, through the package ``pyarrow``, which nothing else needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlroute.errors import DataError
from rlroute.extras import missing
from rlroute.training.documents import Document
from rlroute.training.files import Found, find_files

COLUMN = "text"
"""The column that holds the text where none is named."""
_ROWS = 1024
"""Rows that are decoded at once."""


def parquet_documents(pattern: str, column: str = COLUMN) -> list[Document]:
    """Return each row's text as a document, named by its file and its number; rows without text are empty.

    Args:
        pattern: a glob of files.
        column: of strings, or of bytes.

    Raises:
        DataError: no file matches, one is damaged, or has no such column of texts.
        MissingDependencyError: the package ``pyarrow`` is not installed.
    """
    what = f"corpus {f'parquet:{pattern}'!r}"
    found = find_files("parquet", pattern)
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise missing(what, "pyarrow") from error
    return [document for file in found for document in _rows(pyarrow, what, file, column)]


def _rows(pyarrow: Any, what: str, found: Found, column: str) -> Iterator[Document]:
    try:
        with pyarrow.parquet.ParquetFile(found.path) as file:
            names = file.schema_arrow.names
            if column not in names:
                legal = ", ".join(map(repr, names))
                raise DataError(f"{what}: {found.name!r} has no column {column!r}, legal are {legal}")
            batches = file.iter_batches(_ROWS, columns=[column])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for row, text in enumerate(texts):
                yield Document(f"{found.name}/{row}", _encoded(what, found, column, text))
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # some of pyarrow's are of its own base alone
        if isinstance(error, DataError):
            raise
        raise DataError(f"{what}: {str(found.path)!r} cannot be read: {' '.join(str(error).split())}") from error


def _encoded(what: str, found: Found, column: str, text: object) -> bytes:
    if text is None:
        return b""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise DataError(f"{what}: column {column!r} of {found.name!r} holds {text!r:.40}, legal are texts")
    return text.encode()
