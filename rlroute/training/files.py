"""Which files a corpus' glob names: each once, whatever links and names lead to it; and what their names say of the
part of the corpus that they are.
"""

import errno
import fnmatch
import glob
import heapq
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from rlroute.errors import DataError

Part = Literal["train", "valid", "test"]
_PARTS: dict[str, Part] = {"train": "train", "training": "train"}
_PARTS |= dict.fromkeys(("val", "valid", "validate", "validation", "dev", "development"), "valid")
_PARTS |= dict.fromkeys(("eval", "evaluation", "heldout", "holdout"), "valid")
_PARTS |= dict.fromkeys(("test", "tests", "testing"), "test")
_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_STRICTNESS: dict[Part | None, int] = {"test": 0, "valid": 1, "train": 2, None: 2}
"""Of a file that is in several parts by its names: it is in the first, for what one name holds out is held out."""
_MAGIC = re.compile(r"[*?\[]")
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
SHOWN = 5
"""Names that a message lists."""


class Found(NamedTuple):
    """A file, and its name: its path below the folder that all files of the corpus share."""

    name: str
    path: Path

    @property
    def part(self) -> Part | None:
        """What the first folder, or the file, says that is named like a part: a word among others, as in
        ``wiki.valid.tokens``, ``dev_0`` or ``wikiValid``, two in one (``held-out``), or one before "set" (``testset``).
        None where none is, or several at once.
        """
        return part_of(self.name)


def part_of(name: str) -> Part | None:
    """Return the part that a posix path is named after (:attr:`Found.part`)."""
    for piece in name.split("/"):
        words = [word.lower() for word in _WORD.findall(piece)]
        pairs = map("".join, pairwise(words))
        said = {_PARTS[word] for word in (word.removesuffix("set") for word in (*words, *pairs)) if word in _PARTS}
        if len(said) == 1:
            return said.pop()
    return None


def find_files(scheme: str, pattern: str) -> list[Found]:
    """Return the regular files that a glob (``**`` included) matches, sorted by name.

    What exists by a name is taken by it, though the name looks like a glob. Hidden files need a pattern with a dot, and
    links that lead nowhere are no files. Of several ways to one file (links, hard links) one that says test names it,
    then one that says validation, then the one with the fewest links, then the shortest.

    Raises:
        DataError: nothing matches, or something that is neither file nor folder; or a folder cannot be read.
    """
    what = f"corpus {f'{scheme}:{pattern}'!r}"
    ways = _expand(what, pattern) if _can_name_a_file(pattern) else []
    if not ways:
        raise DataError(f"{what}: no file matches {pattern!r}; legal is a glob that matches at least one")
    parts = {found.path: found.part for found in _named([path for paths in ways for path in paths])}
    return sorted(_named([min(paths, key=lambda path: _STRICTNESS[parts[path]]) for paths in ways]))


def _named(paths: Sequence[Path]) -> list[Found]:
    root = os.path.commonpath([path.parent for path in paths])
    return [Found(path.relative_to(root).as_posix(), path) for path in paths]


def listed(names: Sequence[str]) -> str:
    """Return some of the names, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def _can_name_a_file(pattern: str) -> bool:
    try:
        return b"\0" not in os.fsencode(pattern) and not pattern.endswith("/")
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _expand(what: str, pattern: str) -> list[list[Path]]:
    """Return the paths of each file, the cheapest ways first (Dijkstra's rule over folders and what is left to match).

    A folder is entered once for each rest of the pattern, so that links in a circle end; and for the parts that the
    names on the way say in turn, so that it has every part that a link to it says.
    """
    queue: list[tuple[int, int, str, tuple[str, ...], tuple[Part, ...]]]
    queue = [(0, 0, "/" if pattern.startswith("/") else "", _pieces(pattern), ())]
    entered, files = set(), defaultdict(list)
    while queue:
        links, depth, here, pieces, said = heapq.heappop(queue)
        status = _status(what, here)
        if status is None or (status.st_dev, status.st_ino, len(pieces), said) in entered:
            continue
        entered.add((status.st_dev, status.st_ino, len(pieces), said))
        if pieces and stat.S_ISDIR(status.st_mode):
            for child, rest in _children(what, here, pieces):
                down = child != here
                part = part_of(os.path.basename(child)) if down and _MAGIC.search(pieces[0]) else None
                then = said if part is None or part in said else (*said, part)
                heapq.heappush(queue, (links + (down and os.path.islink(child)), depth + down, child, rest, then))
        elif stat.S_ISREG(status.st_mode) and not pieces:
            files[status.st_dev, status.st_ino].append(Path(here))
        elif not pieces and not stat.S_ISDIR(status.st_mode):
            raise DataError(f"{what} matches {here!r}, which is no regular file; legal are files")
    return list(files.values())


def _pieces(pattern: str) -> tuple[str, ...]:
    """Split a pattern at its slashes; those that are there by their names stand for nothing else."""
    pieces, here = [], "/" if pattern.startswith("/") else ""
    for piece in filter(None, pattern.split("/")):
        here = os.path.join(here, piece)
        pieces.append(glob.escape(piece) if _MAGIC.search(piece) and os.path.lexists(here) else piece)
    return (*pieces, "*") if pieces[-1:] == ["**"] else tuple(pieces)


def _children(what: str, here: str, pieces: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Return the paths to look at from a folder, each with what is left to match there."""
    first, *others = pieces
    rest = tuple(others)
    if first == "**":
        yield here, rest
        names = _names(
            what, here, lambda entry: not (entry.name.startswith(".") or entry.is_file(follow_symlinks=False))
        )
        yield from ((os.path.join(here, name), pieces) for name in names)
    elif _MAGIC.search(first):
        names = _names(what, here, lambda entry: first.startswith(".") or not entry.name.startswith("."))
        yield from ((os.path.join(here, name), rest) for name in names if fnmatch.fnmatchcase(name, first))
    else:
        yield os.path.join(here, first), rest


def _names(what: str, folder: str, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return [entry.name for entry in entries if wanted(entry)]
    except OSError as error:
        raise DataError(f"{what}: folder {folder!r} cannot be read: {error.strerror}") from error


def _status(what: str, path: str) -> os.stat_result | None:
    try:
        return os.stat(path or ".")
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise DataError(f"{what}: {path!r} cannot be read: {error.strerror}; legal is a readable file") from error
