"""Tables that stand in Markdown pages, held against the runs that they are of: ``rlroute table PAGE --check``.

A table stands between lines ``<!-- table: RECORDS [option=value ...] -->`` and ``<!-- end of table -->``. RECORDS is a
compact file or a run store, by its path from the page's folder or one above; the options are :class:`Options`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rlroute.errors import ComparisonError, ConfigError, StoreError
from rlroute.experiments.comparison.ladder_file import read_ladder
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import to_markdown
from rlroute.experiments.verdicts import MARGIN
from rlroute.experiments.verify import replay
from rlroute.experiments.verify.findings import Finding
from rlroute.experiments.verify.store import missing, own_threads, record_findings
from rlroute.foreign import clipped
from rlroute.limits import Positive, check_fields
from rlroute.reading import read_runs
from rlroute.records import write_atomically
from rlroute.schema import RunRecord
from rlroute.values import from_dict

MARKED = re.compile(r"^(<!-- table: ([^\n]*?) -->\n)(.*?)^(<!-- end of table -->)", re.S | re.M)
OPENED = re.compile(r"^<!-- table: ", re.M)
ALL = "all"
"""In place of the titles of notes: the legend, and all that there are."""


@dataclass(frozen=True)
class Options:
    """How a table is made of its runs."""

    reference: str | None = None
    """The entry that differences are taken to."""
    margin: Positive = MARGIN
    """The margin of the verdicts, in bits per byte."""
    timings: bool = True
    """Whether the columns that differ from run to run are there."""
    notes: str = "Sampled"
    """Titles of notes that stand below it, as ``Sampled,Verdicts``; ``all`` of them, with the legend."""


@dataclass(frozen=True)
class Published:
    """A table in a page.

    Attributes:
        page: the file.
        line: of its marker, from 1 on.
        records: the store or compact file.
        options: how it is made.
        text: what stands there.
    """

    page: Path
    line: int
    records: Path
    options: Options
    text: str

    def made(self, runs: Sequence[RunRecord]) -> str:
        """Return what should stand there.

        Raises:
            ComparisonError: the runs are not comparable.
            StoreError: the store's ladder cannot be read.
        """
        table = build_table(runs, self.options.reference, (), self.options.margin, read_ladder(self.records))
        text = to_markdown(table, self.options.timings)
        if self.options.notes == ALL:
            return text
        rows = [line for line in text.splitlines() if line.startswith("|")]
        heads = tuple(f"- **{title.strip()}" for title in self.options.notes.split(","))
        notes = [line for line in text.splitlines() if line.startswith(heads)]
        return "\n".join([*rows, "", *notes, ""])


def tables_of(page: Path) -> list[Published]:
    """Return the tables of a page.

    Raises:
        StoreError: there is none, or the page cannot be read.
        ConfigError: a marker is illegal.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise StoreError(f"{page} cannot be read: {error}") from error
    found = [
        _published(page, text.count("\n", 0, match.start()) + 1, match[2], match[3]) for match in MARKED.finditer(text)
    ]
    if not found or len(OPENED.findall(text)) != len(found):
        raise StoreError(
            f"{page}: a table wants '<!-- table: RECORDS -->' before it and '<!-- end of table -->' behind"
        )
    return found


def _published(page: Path, line: int, marker: str, text: str) -> Published:
    where = f"{page}, line {line}"
    try:
        name, *words = shlex.split(marker)
        options: dict[str, Any] = dict(word.split("=", 1) for word in words)
    except ValueError as error:
        raise ConfigError(f"{where}: {marker!r}: want RECORDS option=value ...") from error
    for option, read in (("margin", float), ("timings", {"yes": True, "no": False}.get)):
        if option in options:
            options[option] = _read(read, options[option])
    made: Options = from_dict(Options, options, where)
    check_fields(made, where)
    above = (folder / name for folder in page.resolve().parents)
    records = next((path for path in above if path.exists()), page.parent / name)
    return Published(page, line, records, made, text)


def _read(read: Any, word: str) -> Any:
    """Return what a word stands for; the word itself where it is nothing of the kind, which is refused later."""
    try:
        value = read(word)
    except ValueError:
        return word
    return word if value is None else value


def check_page(page: Path, reruns: int = 0, draw: int = 0) -> list[str]:
    """Return what is wrong with a page's tables and with the runs that they are of.

    Args:
        page: a Markdown file.
        reruns: how many of each table's runs are trained once more; ``draw`` is the seed by which they are chosen.

    Raises:
        StoreError, ConfigError: as of :func:`tables_of`.
    """
    return [finding for table in tables_of(page) for finding in _check(table, reruns, draw)]


def _check(table: Published, reruns: int, draw: int) -> Iterator[str]:
    where = f"{table.page}, line {table.line}"
    try:
        runs = read_runs(table.records)
        yield from (str(finding) for run in runs for finding in record_findings(run, runs))
        yield from map(str, missing(table.records, runs))
        wanted = table.made(runs)
    except (StoreError, ComparisonError) as error:
        yield f"{where}: {error}"
        return
    pairs = zip_longest(table.text.splitlines(), wanted.splitlines(), fillvalue="")
    for number, (stands, line) in enumerate(pairs, start=table.line + 1):
        if stands != line:
            one, other = _apart(stands, line)
            yield f"{table.page}, line {number}: {one} stands there, its runs give {other}"
    yield from map(str, repeat(runs, table.records, reruns, draw))


def _apart(one: str, other: str) -> tuple[str, str]:
    """Return the first cell in which two lines differ, or the lines, for a reader."""
    cells = [(a.strip(), b.strip()) for a, b in zip(one.split("|"), other.split("|"), strict=False) if a != b]
    first = cells[0] if cells and one.count("|") == other.count("|") else (one, other)
    return clipped(repr(first[0])), clipped(repr(first[1]))


def repeat(runs: Sequence[RunRecord], records: Path, count: int, draw: int) -> list[Finding]:
    """Train a random sample of runs once more, from their records alone; return the figures that come out otherwise.

    Args:
        runs: to draw from.
        records: the store, in which the runs lie that others start from.
        count: how many.
        draw: the seed by which they are chosen.
    """
    with own_threads():
        sources = records if records.is_dir() else None
        return [f for run in replay.chosen(runs, count, draw) for f in replay.repeat(run, sources)]


def write_page(page: Path) -> int:
    """Write what their runs give into the tables of a page; return how many have changed.

    Raises:
        StoreError, ConfigError, ComparisonError: a table cannot be made; the page is as it was.
    """
    tables = tables_of(page)
    made = [table.made(read_runs(table.records)) for table in tables]
    new = iter(made)
    text = page.read_text(encoding="utf-8")
    write_atomically(page, MARKED.sub(lambda match: f"{match[1]}{next(new)}{match[4]}", text))
    return sum(table.text != text for table, text in zip(tables, made, strict=True))
