"""What comes from outside is read here: regular files of a bounded size, JSON, archives, and plain values of a bounded
depth, which pydantic holds to their types.

Every reader of a foreign file stands on these functions. They raise OSError or ValueError, whose text names the field;
the reader turns it into its own error and names the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import sys
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from rlroute.extras import missing

DEPTH = 32
"""Levels of brackets that a value may have."""
SMALL = 1 << 24
"""Bytes of the largest file, or line of a file, that is read whole where nothing else is said."""
WHOLE = 1 << 64
"""No whole number may reach this, or minus this."""
SHOWN = 60
"""Characters of a value that a refusal shows."""
OPEN = os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
"""A FIFO without a writer does not keep us waiting."""


class Unfit(ValueError):
    """A value that is not what it should be, and where it stands in what was read."""

    def __init__(self, reason: str, *path: str | int) -> None:
        super().__init__(reason, *path)
        self.reason, self.path = reason, path

    def __str__(self) -> str:
        return f"{'/'.join(printable(str(part)) for part in self.path)}{self.reason}".lstrip()


# Files


def open_regular(path: Path, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Open a regular file and return its descriptor; what it holds is left as it is.

    Args:
        path: the file.
        flags: of ``os.open``.
        follow: whether ``path`` may be a link. What users name may, a file inside of a run's folder may not.

    Raises:
        OSError: it cannot be opened, or is a link, a folder, a pipe or a device.
    """
    descriptor = os.open(path, flags | OPEN | (0 if follow else os.O_NOFOLLOW), 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def reading(path: Path, most: int, *, follow: bool = False) -> Iterator[BinaryIO]:
    """Read a regular file of at most so many bytes.

    Raises:
        OSError: it cannot be opened, is no regular file, or is larger.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(f"it has {size:,} bytes: legal are {most:,}")
        yield file


def read_bytes(path: Path, most: int = SMALL, *, follow: bool = False) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: it cannot be opened, is no regular file, or is larger than ``most`` bytes.
    """
    with reading(path, most, follow=follow) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it has grown meanwhile
        raise OSError(f"it has more than {most:,} bytes")
    return content


def read_members(archive: bytes, names: Iterable[str], most: int) -> dict[str, bytes]:
    """Return members of a zip archive, of at most so many bytes together whatever it says of them.

    Raises:
        Unfit: it is no archive that can be read, lacks one, or holds more.
    """
    found, room = {}, most
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            for name in names:
                with file.open(name) as member:
                    found[name] = member.read(room + 1)
                room -= len(found[name])
                if room < 0:
                    raise Unfit(f"{name} and what is before it hold more than {most:,} bytes")
    except Exception as error:  # a damaged archive makes its reader raise nearly anything
        raise error if isinstance(error, Unfit) else Unfit(str(error)) from error
    return found


# Values


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text, as :func:`plain` returns it.

    Raises:
        Unfit: it is not JSON, or not plain.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise Unfit(f"it is nested deeper than {DEPTH} levels") from None
    except ValueError as error:
        raise Unfit(f"it is not JSON: {error}") from error
    return plain(value)


def plain(value: Any, depth: int = DEPTH) -> Any:
    """Return a value that consists of dictionaries with printable text for keys, lists, texts, truth values, None, and
    finite numbers of 64 bits, as it is: what it says is hashed. Whoever shows a text makes it :func:`printable`.

    Args:
        value: what a parser returned.
        depth: levels that it may have.

    Raises:
        Unfit: it is something else; this names the field.
    """
    if not isinstance(value, dict | list):
        _refuse_leaf(value)
        return value
    if not depth:
        raise Unfit(f" is nested deeper than {DEPTH} levels")
    if isinstance(value, list) and _all_numbers(value):
        return value  # the fast way of nearly all of them
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        try:
            if isinstance(name, str) and not name.isprintable():
                raise Unfit(": a name cannot hold what controls a terminal")
            plain(part, depth - 1)
        except Unfit as error:
            raise Unfit(error.reason, name, *error.path) from None
    return value


def _all_numbers(values: list[Any]) -> bool:
    """Whether a list holds legal numbers of one type alone."""
    kinds = set(map(type, values))
    if kinds == {int}:
        return bool(min(values) > -WHOLE and max(values) < WHOLE)
    return kinds == {float} and all(map(math.isfinite, values))


def _refuse_leaf(value: Any) -> None:
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # in no encoding
            raise Unfit(f" = {shown(value)}: want Unicode text")
    elif isinstance(value, float) and not math.isfinite(value):
        raise Unfit(f" = {value}: want a finite number")
    elif isinstance(value, int) and not -WHOLE < value < WHOLE:
        raise Unfit(f" is a number of {value.bit_length()} bits: legal are 64")
    elif value is not None and not isinstance(value, int | float):
        raise Unfit(f" = {shown(value)}: want a number, a text, true or false")


def hold(value: Any, kind: Any, *path: str | int) -> None:
    """Hold a plain value to a type, strictly: a TypedDict, a list of them, with limits (:mod:`rlroute.limits`).

    Args:
        value: plain, see :func:`plain`.
        kind: the type.
        path: where the value stands in its file.

    Raises:
        Unfit: naming the first field that does not fit.
        MissingDependencyError: pydantic is not installed.
    """
    adapter, refused = _adapter(kind)
    try:
        adapter.validate_python(value, strict=True)
    except refused as error:
        first = error.errors(include_url=False)[0]
        where = (*path, *first["loc"])
        if first["type"] == "missing":
            raise Unfit(": this field is missing", *where) from None
        reason = first["msg"].replace("Input should", "it should").replace("Input", "it")
        raise Unfit(f" = {shown(first['input'])}: {reason}", *where) from None


@cache
def _adapter(kind: Any) -> tuple[Any, Any]:
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError as error:
        raise missing("reading stored files", "pydantic") from error
    return TypeAdapter(kind), ValidationError


# Text


def printable(text: str) -> str:
    """Return a text that a terminal prints and does not obey: what controls it, hides or turns around what follows, or
    cannot be encoded stands as its escape; line ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else _escape(letter)
        for letter in text
    )


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def shown(value: Any) -> str:
    """Return a value for an error's line: short, and printable."""
    limit = sys.get_int_max_str_digits()
    if isinstance(value, int) and limit and value.bit_length() > 3 * limit:
        return f"a number of {value.bit_length()} bits"
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else clipped(repr(value))


def clipped(text: str) -> str:
    """Return the start of a text, printable, that is short enough for a line."""
    text = printable(text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def why(error: BaseException) -> str:
    """Return an error's reason alone, without the file's name, which the reader says."""
    return printable(str(error.strerror or error) if isinstance(error, OSError) else str(error))
