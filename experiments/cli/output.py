"""Where the output of all commands goes: to a terminal of any width, a pipe that may close, a disk that may be full."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlroute.experiments.terminal import Grid
from rlroute.experiments.text import markdown
from rlroute.foreign import printable

if TYPE_CHECKING:  # and with it torch
    from rlroute.experiments.comparison.table import Table

WIDTHS = (40, 400)
"""The columns that are drawn for: with fewer than six tyro lays out help for ever."""
CLOSED = 141
"""The exit code of a command whose reader went away: that of one ended by SIGPIPE."""


@contextmanager
def surviving() -> Iterator[None]:
    """Let output be lost rather than the command: what its encoding lacks is replaced; a closed pipe ends it quietly, a
    full device with one line.
    """
    _fit_width()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _let_go()
        sys.exit(CLOSED)
    except OSError as error:
        if error.filename is not None:  # a file's fault, and no stream's
            raise
        _let_go()
        print(f"error: cannot write the output: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def show(text: str) -> None:
    """Print Markdown; on a terminal as rich draws it."""
    if not _on_terminal():
        print(printable(text))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(printable(text)))


def show_grid(grid: Grid) -> None:
    """Print a table: as Markdown, or as a terminal has room for it."""
    if not _on_terminal():
        print(markdown(grid.head, grid.lines, "".join("<" if grid.stands_left(title) else ">" for title in grid.head)))
        return
    from rich.console import Console

    console = Console()
    console.print(grid.draw(console.width))
    if gone := grid.left_out(console.width):
        console.print(f"left out for want of width: {', '.join(gone)}", style="dim", markup=False, highlight=False)


def show_table(table: Table, timings: bool = True) -> None:
    """Print the table of a comparison and what stands under it."""
    from rlroute.experiments.comparison.text import legend, to_grid, to_markdown

    if not _on_terminal():
        print(to_markdown(table, timings))
        return
    from rich.console import Console
    from rich.text import Text

    show_grid(to_grid(table, timings))
    console = Console()
    for title, text in (("Columns", legend(table)), *table.notes):
        if text:
            console.print(Text.assemble((f"{title}: ", "bold"), printable(text)))


def _on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _fit_width() -> None:
    """Keep the terminal's width within what can be drawn; everything that asks for it looks at ``COLUMNS`` first."""
    columns = shutil.get_terminal_size().columns
    fitting = min(max(columns, WIDTHS[0]), WIDTHS[1])
    if fitting != columns:
        os.environ["COLUMNS"] = str(fitting)


def _let_go() -> None:
    """Point streams that take nothing more at nothing: the interpreter flushes them once more at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nothing, stream.fileno())
