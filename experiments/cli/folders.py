"""The files that a command writes, checked before its work; their folders, gone again where it is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rlroute.errors import ConfigError, RlrouteError

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


def make_way(file: Path) -> None:
    """Make the folder of a file that a command will write, before its work.

    Raises:
        ConfigError: what is there of that name is a folder, a device or the like.
        StoreError: the folder cannot be made.
    """
    if file.exists() and not file.is_file():
        raise ConfigError(f"{file} is {'a folder' if file.is_dir() else 'no regular file'}: want a file")
    make_folder(file.parent)


def check_ending(path: Path, legal: Sequence[str], option: str = "") -> None:
    """Refuse a file whose name does not end as those that can be written.

    Args:
        path: the file.
        legal: the ends of names; `.html` is a page.
        option: what stands before it on the command line, as `--out `.

    Raises:
        ConfigError: saying which ends are legal.
        MissingDependencyError: a page is wanted, and Plotly is not installed.
    """
    if path.suffix not in legal:
        raise ConfigError(f"{option}{path}: legal are names that end in {', '.join(legal)}")
    if path.suffix == ".html":
        from rlroute.experiments.report.style import new_figure

        new_figure("", "", 100)


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
