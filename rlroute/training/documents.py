"""Where documents come from: an installed distribution, the interpreter's library, files. Bytes are read as they lie.

A document's name is the same on every machine, for the order of the documents and their split into training and
validation follow from the names alone.
"""

import csv
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rlroute.errors import DataError
from rlroute.training.files import find_files, listed, part_of

VALID_SHARE = 16
"""One document in so many is held out for validation."""
_TEST_FOLDERS = {"tests", "test", "testing"}
_NOT_LIBRARY = {"idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"} | _TEST_FOLDERS


class Document(NamedTuple):
    """One text; ``domain`` is its hidden label where it was synthesised."""

    name: str
    data: bytes
    domain: int | None = None


def package_documents(names: str) -> tuple[list[Document], list[Distribution]]:
    """Return the Python sources of installed distributions, whose names a comma parts, without their tests: one
    distribution after the other, each in the order of its paths.

    Scripts that the installer put outside the package folder are left out, because it rewrites them.

    Raises:
        DataError: no such distribution is installed, one is named twice, or a source of it is not there.
    """
    found: dict[str, Distribution] = {}
    for name in names.split(","):
        try:
            one = distribution(name)
        except (PackageNotFoundError, ValueError) as error:  # ValueError: an empty name
            raise DataError(
                f"corpus 'package:{names}': no distribution {name!r} is installed; legal is any that is"
            ) from error
        if found.setdefault(one.metadata["Name"].lower(), one) is not one:
            raise DataError(f"corpus 'package:{names}': {name!r} is named twice; legal is once")
    return [document for one in found.values() for document in _sources(one)], list(found.values())


def _sources(found: Distribution) -> list[Document]:
    paths = sorted({path for path in _recorded(found) if path.endswith(".py")})
    sources = [path for path in paths if ".." not in PurePosixPath(path).parts and not is_test(path)]
    return [Document(path, _read(Path(str(found.locate_file(path))))) for path in sources]


def _recorded(found: Distribution) -> list[str]:
    """Return the paths of all files that a distribution says it has; its ``files`` leave out, from Python 3.12 on, what
    is not there, and a corpus with holes would be another.
    """
    record = found.read_text("RECORD")
    if record is None:
        return [path.as_posix() for path in found.files or ()]
    return [row[0] for row in csv.reader(record.splitlines()) if row]


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


def file_documents(pattern: str) -> list[Document]:
    """Return each matching file as a document, named by its path below the folder that all matches share.

    Raises:
        DataError: no file matches, or one cannot be read.
    """
    return [Document(found.name, _read(found.path)) for found in find_files("file", pattern)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"corpus file {str(path)!r} cannot be read: {error.strerror}; legal is a readable file"
        ) from error


class Split(NamedTuple):
    """Documents for training and for validation, and what is to be said of those left out."""

    train: list[Document]
    valid: list[Document]
    notes: list[str]


def split_documents(spec: str, documents: Sequence[Document], by_name: bool = False) -> Split:
    """Split documents into training and validation. Both keep their order.

    One document in 16, at least one, is validation: those with the smallest SHA-256 of the name. Empty ones are
    dropped, and of training those whose text is held out under another name.

    Args:
        spec: of the corpus, for messages.
        documents: all of them.
        by_name: what is named like a part (:attr:`.files.Found.part`) is that part: validation is what is named so,
            where anything is, and tests are left out.

    Raises:
        DataError: fewer than two documents, or none is left for training.
    """
    full = [document for document in documents if document.data]
    parts = [part_of(document.name) if by_name else None for document in full]
    tests = [document.name for document, part in zip(full, parts, strict=True) if part == "test"]
    kept = [document for document, part in zip(full, parts, strict=True) if part != "test"]
    held = {document.name for document, part in zip(full, parts, strict=True) if part == "valid"}
    if len(kept) < 2:
        raise DataError(
            f"corpus {spec!r} is too short: {len(kept)} non-empty documents{_left_out(tests)}, "
            "at least 2 are needed, one of them for validation"
        )
    held = held or _drawn(kept)
    valid = [document for document in kept if document.name in held]
    texts = {document.data for document in valid}
    twice = [document.name for document in kept if document.name not in held and document.data in texts]
    train = [document for document in kept if document.data not in texts]
    if not train:
        raise DataError(f"corpus {spec!r}: every document is held out for validation{_left_out(tests)}")
    notes = [f"{len(tests)} named test are left out: {listed(tests)}"] if tests else []
    notes += [f"{len(twice)} are held out too, and not trained on: {listed(twice)}"] if twice else []
    return Split(train, valid, [f"corpus {spec!r}: of its documents {note}" for note in notes])


def _drawn(documents: Sequence[Document]) -> set[str]:
    return {documents[index].name for index in _ranked(documents)[: max(1, round(len(documents) / VALID_SHARE))]}


def _ranked(documents: Sequence[Document]) -> list[int]:
    """Return the places of documents in the order of the SHA-256 of their names."""
    keys = [hashlib.sha256(os.fsencode(document.name)).digest() for document in documents]
    return sorted(range(len(documents)), key=keys.__getitem__)


def cut(documents: Sequence[Document], sizes: Sequence[int], most: int) -> list[int]:
    """Return how much to take of each document, from its beginning, for so much in all: whole ones in an order that
    follows from the names alone, the last one cut. Less in all is less, or as much, of each.

    Args:
        documents: of training.
        sizes: of each, in tokens.
        most: how many to take.
    """
    taken, left = [0] * len(sizes), most
    for index in _ranked(documents):
        taken[index] = min(sizes[index], left)
        left -= taken[index]
    return taken


def _left_out(tests: Sequence[str]) -> str:
    return f" beside {len(tests)} named test" if tests else ""
