"""A table that a reader sorts and filters: what a view is that is no figure."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Cell:
    """What stands in a place of a table.

    Attributes:
        text: as it is read.
        key: the number that it is sorted by; its text where there is none.
        entry: the hash of the entry that it is about.
        run: the id of the run that it leads to.
        tone: ``better``, ``worse``, ``equivalent`` or ``alarm``: said by a colour as well.
    """

    text: str
    key: float | None = None
    entry: str = ""
    run: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        head: the titles of its columns.
        rows: its cells, as many in each row.
        head_entries: the hashes of the entries that columns are about, where they are about any.
        left: the titles of columns of text, which stand left; the first always does.
        kind: a class of its look: ``facts`` for long texts.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    head_entries: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    kind: str = ""

    def arranged(self, sort: str = "", words: str = "") -> Sheet:
        """Return it with the rows that have all of the words, sorted by a column.

        Args:
            sort: its title, with ``-`` before it from high to low; another title than those here sorts nothing. What
                has no number comes after what has, either way.
            words: parted by spaces, in any case.
        """
        wanted = words.casefold().split()
        rows = [row for row in self.rows if all(word in _text(row) for word in wanted)]
        down, title = sort not in self.head and sort.startswith("-"), sort
        title = sort[1:] if down else sort
        if sort and title in self.head:
            place = self.head.index(title)
            numbers = [row for row in rows if row[place].key is not None]
            texts = [row for row in rows if row[place].key is None]
            numbers.sort(key=lambda row: row[place].key or 0.0, reverse=down)
            texts.sort(key=lambda row: row[place].text.casefold(), reverse=down)
            rows = numbers + texts
        return replace(self, rows=tuple(rows))


def _text(row: tuple[Cell, ...]) -> str:
    return " ".join(cell.text for cell in row).casefold()
