"""Tables on a terminal, drawn by rich so that no row wraps: columns that do not fit are left out in a given order."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rlroute.foreign import printable

if TYPE_CHECKING:
    from rich.table import Table

GAP = 2
"""Columns of a terminal between two of a table; one where there is little room."""
LEAST = 12
"""The first column keeps as much, or what it needs; what does not fit ends in an ellipsis."""


@dataclass
class Grid:
    """A table as titles and cells.

    Attributes:
        head: the titles.
        lines: the cells of each row.
        left: the titles of columns that stand left, as the first does; numbers stand right.
        spare: the titles of columns that may be left out, the first to go first.
        short: shorter titles, where there is little room.
    """

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    spare: Sequence[str] = ()
    short: Mapping[str, str] = field(default_factory=dict)

    def stands_left(self, title: str) -> bool:
        """Whether a column stands left."""
        return title == self.head[0] or title in self.left

    def draw(self, width: int) -> Table:
        """Return the table as rich draws it in so many columns of a terminal."""
        from rich.table import Table
        from rich.text import Text

        columns, gap = self._fitting(width)
        first, *others = columns
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
        for title, texts in columns.items():
            side: Literal["left", "right"] = "left" if self.stands_left(title) else "right"
            room = width - _taken([columns[other] for other in others], gap) - gap if title == first else None
            table.add_column(Text(texts[0]), justify=side, no_wrap=True, overflow="ellipsis", max_width=room)
        for cells in list(zip(*columns.values(), strict=True))[1:]:
            table.add_row(*map(Text, cells))
        return table

    def text(self, width: int = 100) -> str:
        """Return the table as so many columns of a terminal show it."""
        from rich.console import Console

        file = io.StringIO()
        Console(file=file, width=width, color_system=None).print(self.draw(width))
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def left_out(self, width: int) -> list[str]:
        """Return the titles that do not fit into so many columns of a terminal."""
        shown, _ = self._fitting(width)
        return [title for title in self.head if title not in shown]

    def _fitting(self, width: int) -> tuple[dict[str, list[str]], int]:
        """Return the columns that fit, each its texts by its title, and what is left free between two."""
        columns = {title: [title, *(printable(line[i]) for line in self.lines)] for i, title in enumerate(self.head)}
        if _least(columns, GAP) <= width:
            return columns, GAP
        columns = {title: [self.short.get(title, title), *texts[1:]] for title, texts in columns.items()}
        for title in self.spare:
            if _least(columns, 1) <= width:
                break
            columns.pop(title, None)
        return columns, 1


def _least(columns: Mapping[str, Sequence[str]], gap: int) -> int:
    """Return the width of a table whose first column may be cut."""
    first, *others = columns.values()
    return min(_width(*first), LEAST) + gap + _taken(others, gap)


def _taken(columns: Sequence[Sequence[str]], gap: int) -> int:
    return sum(_width(*texts) for texts in columns) + gap * (len(columns) - 1)


def _width(*texts: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, texts))
