"""Where documents come from: an installed distribution, the interpreter's library, files. Bytes are read as they lie.

A document's name is the same on every machine, for the order of the documents and their split into training and
validation follow from the names alone.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rlroute.errors import DataError

VALID_SHARE = 16
"""One document in so many is held out for validation."""
_TEST_FOLDERS = {"tests", "test", "testing"}
_NOT_LIBRARY = {"idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"} | _TEST_FOLDERS


class Document(NamedTuple):
    """One text; ``domain`` is its hidden label where it was synthesised."""

    name: str
    data: bytes
    domain: int | None = None


def package_documents(name: str) -> tuple[list[Document], Distribution]:
    """Return the Python sources of an installed distribution, without its tests, in the order of their paths.

    Scripts that the installer put outside the package folder are left out, because it rewrites them.

    Raises:
        DataError: no such distribution is installed, or no source of it is there.
    """
    try:
        found = distribution(name)
    except (PackageNotFoundError, ValueError) as error:  # ValueError: an empty name
        raise DataError(
            f"corpus 'package:{name}': no distribution {name!r} is installed; legal is any that is"
        ) from error
    paths = sorted({path.as_posix() for path in found.files or () if path.suffix == ".py"})
    sources = [path for path in paths if ".." not in PurePosixPath(path).parts and not is_test(path)]
    return [Document(path, _read(Path(str(found.locate_file(path))))) for path in sources], found


def is_test(path: str) -> bool:
    """Say whether a source belongs to the tests of its package, by its posix path."""
    pure = PurePosixPath(path)
    return not _TEST_FOLDERS.isdisjoint(pure.parts) or pure.name.startswith("test_") or pure.name == "conftest.py"


def stdlib_documents() -> list[Document]:
    """Return the sources of the interpreter's own library without tests, IDLE, lib2to3, the codec tables and what the
    build generated.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        here = Path(folder).relative_to(root)
        names += [
            (here / name).as_posix() for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return [Document(name, _read(root / name)) for name in sorted(names) if not is_test(name)]


def match_files(scheme: str, pattern: str) -> list[Path]:
    """Return the files that a glob (``**`` included) matches, sorted by path.

    Raises:
        DataError: it matches none.
    """
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise DataError(
            f"corpus '{scheme}:{pattern}': no file matches {pattern!r}; legal is a glob that matches at least one"
        )
    return paths


def file_documents(pattern: str) -> list[Document]:
    """Return each matching file as a document, named by its path below the folder that all matches share.

    Raises:
        DataError: no file matches, or one cannot be read.
    """
    paths = match_files("file", pattern)
    root = os.path.commonpath([path.parent for path in paths])
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return [Document(name, _read(path)) for name, path in named]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"corpus file '{path}' cannot be read: {error.strerror}; legal is a readable file") from error


def split_documents(spec: str, documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Return (training, validation): one document in 16, at least one, is validation, those with the smallest SHA-256
    of the name.

    Empty documents are dropped. Both parts keep the order of ``documents``.

    Raises:
        DataError: fewer than two documents.
    """
    full = [document for document in documents if document.data]
    if len(full) < 2:
        raise DataError(
            f"corpus {spec!r} is too short: {len(full)} non-empty documents, "
            "at least 2 are needed, one of them for validation"
        )
    ranked = sorted(full, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    held = {document.name for document in ranked[: max(1, round(len(full) / VALID_SHARE))]}
    return [d for d in full if d.name not in held], [d for d in full if d.name in held]
