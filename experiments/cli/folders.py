"""The folders that a command writes into: made before its work, gone again where it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlroute.errors import RlrouteError

_made: list[Path] = []


def make_folder(path: Path) -> None:
    """Make the folder that a command will write into, before its work.

    Raises:
        StoreError: it cannot be made.
    """
    from rlroute.records import storing

    _made.extend(folder for folder in reversed([path, *path.parents]) if not folder.exists())
    with storing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Remove what was made inside by :func:`make_folder`, and is empty, where bad input ends the block."""
    _made.clear()
    try:
        yield
    except RlrouteError:
        for folder in reversed(_made):
            with suppress(OSError):  # there is something in it
                folder.rmdir()
        raise
