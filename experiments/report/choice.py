"""What a reader has chosen to see, and the query of the link that says so: all of a view's state is in its link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from urllib.parse import parse_qs, urlencode

from rlroute.experiments.report.board import Board, Group

AXES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training seconds"}
"""What a curve can be drawn against: FLOPs by the pairs that ran, and seconds, are means over seeds."""
KINDS = {"both": "evaluations and training", "eval": "evaluations", "train": "training"}
"""Which losses are drawn."""
ALL = "all"
LONGEST = 10_000
"""Characters of the longest query that is read."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is seen; a field that is empty stands for what a view shows at first.

    Attributes:
        page: the page.
        lot: which runs, where not all may be compared.
        entries: the hashes of the entries that are drawn, parted by commas, or ``all``.
        axis: what curves are drawn against, of :data:`AXES`.
        kinds: of :data:`KINDS`.
        entry: the hash of the entry whose loads are drawn.
        site: the key of the routed site whose loads are drawn.
        measure: what of the gradient instrument is drawn.
        run: the id of the run that is shown.
        sort: the title of the column that tables are sorted by; with ``-`` before it from high to low.
        filter: words that a row must have, all of them.
    """

    page: str = ""
    lot: str = ""
    entries: str = ""
    axis: str = "tokens"
    kinds: str = "both"
    entry: str = ""
    site: str = ""
    measure: str = ""
    run: str = ""
    sort: str = ""
    filter: str = ""

    @classmethod
    def of(cls, query: str | None) -> Choice:
        """Read a link's query; what is no choice is what is shown at first, so that an old link still shows a page."""
        found = parse_qs((query or "").lstrip("?#")[:LONGEST])
        said = {field.name: found[field.name][-1] for field in fields(cls) if field.name in found}
        legal: Mapping[str, Any] = {"axis": AXES, "kinds": KINDS}
        return cls(**{name: value for name, value in said.items() if value in legal.get(name, (value,))})

    def but(self, **changes: str) -> Choice:
        """Return the choice with other fields."""
        return replace(self, **changes)

    @property
    def link(self) -> str:
        """The query that says all that differs from what is shown at first."""
        plain = asdict(Choice())
        return "?" + urlencode({name: value for name, value in asdict(self).items() if value != plain[name]})

    def drawn(self, board: Board) -> list[Group]:
        """Return the entries that are drawn."""
        if self.entries == ALL:
            return board.groups
        wanted = set(self.entries.split(","))
        return [group for group in board.groups if group.hash in wanted] or [
            group for group in board.groups if group.label in board.first
        ]

    def toggled(self, group: Group, board: Board) -> Choice:
        """Return the choice with an entry more, or without it."""
        now = [one.hash for one in self.drawn(board)]
        now = [one for one in now if one != group.hash] if group.hash in now else [*now, group.hash]
        return self.but(entries=",".join(now))
