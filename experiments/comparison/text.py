"""A table as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from rlroute.config import DENSE
from rlroute.experiments.comparison.pairs import Pair
from rlroute.experiments.comparison.table import Table, TableRow
from rlroute.experiments.statistics import CONFIDENCE
from rlroute.experiments.terminal import Grid
from rlroute.experiments.text import NOTHING, escape, markdown, of_interval, short, si
from rlroute.foreign import printable

FORMULA = ("=", "+", "-", "@", "|")
SPARE = (
    "training-only FLOPs/token",
    "FLOPs/token",
    "parameters active / total",
    "gate",
    "resolvable",
    "tokens/s",
    "pairs/token",
    "dead experts",
    "n",
    "better routes",
    "regret",
    "compute multiplier",
    "MaxVio",
    "settings",
)
"""What a terminal that is too narrow does without, in this order."""
BALANCE = ("Gini", "min/max load", "without expert")
"""The measures of balance beside MaxVio, in the page alone and in the CSV."""
REGRET = ("regret", "better routes")
INTERVALS = ("bits_per_byte", "difference", "sampled_bits_per_byte", "regret")
SPLIT = dict.fromkeys(INTERVALS, ("mean", "low", "high", "n")) | {"compute_multiplier": ("value", "low", "high")}
"""The fields that take several columns."""
TIMINGS = ("tokens_per_second",)
"""The columns that differ when the same command runs again."""


def columns(table: Table, timings: bool = True, balance: bool = False) -> dict[str, Callable[[TableRow], str]]:
    """Return the title of each column and how a row fills it; pairs per token where some entry does not run k, regret
    where some record says it, and all measures of balance where they are asked for.
    """
    shown: dict[str, Callable[[TableRow], str]] = {
        "router": lambda row: _name(row, table),
        "settings": lambda row: row.settings,
        "gate": lambda row: row.gate_form,
        "validation bits/byte": lambda row: of_interval(row.bits_per_byte) if row.n else "diverged",
        f"difference to {table.reference}": lambda row: _difference(row, table),
        "verdict": lambda row: "reference" if row.verdict is None else str(row.verdict),
        "MaxVio": lambda row: NOTHING if row.max_vio is None else f"{row.max_vio:.2f}",
        "Gini": lambda row: NOTHING if row.gini is None else f"{row.gini:.3f}",
        "min/max load": lambda row: NOTHING if row.min_over_max is None else f"{row.min_over_max:.3f}",
        "without expert": lambda row: NOTHING if row.without_expert is None else f"{row.without_expert:.2%}",
        "dead experts": lambda row: (
            NOTHING if row.dead_experts is None else f"{short(row.dead_experts)} of {row.experts}"
        ),
        "compute multiplier": lambda row: NOTHING if row.compute_multiplier is None else str(row.compute_multiplier),
        "regret": lambda row: of_interval(row.regret),
        "better routes": lambda row: NOTHING if row.better_routes is None else f"{row.better_routes:.0%}",
        "pairs/token": lambda row: NOTHING if row.pairs_per_token is None else f"{row.pairs_per_token:.2f}",
        "tokens/s": lambda row: NOTHING if row.tokens_per_second is None else si(row.tokens_per_second),
        "parameters active / total": lambda row: f"{si(row.active_parameters)} / {si(row.total_parameters)}",
        "FLOPs/token": lambda row: si(row.flops_per_token),
        "training-only FLOPs/token": lambda row: si(row.training_only_flops_per_token),
        "n": lambda row: str(row.n),
        "resolvable": lambda row: NOTHING if row.smallest_resolvable is None else f"{row.smallest_resolvable:.4f}",
    }
    hidden = {"tokens/s": not timings, "pairs/token": not any(row.pairs_differ for row in table.rows)}
    hidden |= dict.fromkeys(BALANCE, not balance)
    hidden["compute multiplier"] = not any(row.compute_multiplier for row in table.rows)
    hidden |= dict.fromkeys(REGRET, not any(row.regret for row in table.rows))
    return {title: cell for title, cell in shown.items() if not hidden.get(title)}


def legend(table: Table) -> str:
    """Return how to read the columns."""
    ladder = (
        f"Compute multiplier: how much more compute {table.reference} needs for the same loss, on the ladder of this "
        "store, with its 95% interval by bootstrap over seeds. "
    )
    regret = (
        "Regret: how many bits per byte the best routes of as many experts through the last layer would save, on a "
        "sample of the validation tokens; better routes: the share of all such routes that have a lower loss than the "
        "one taken, 50% where it is as good as any. "
    )
    return (
        f"Bits per byte: greedy routing, mean over n seeds ± half the {CONFIDENCE:.0%} Student-t interval; lower is "
        f"better. Difference to {table.reference}: paired by seed, with the interval of the paired differences; not "
        "after Holm where only the test that is corrected for all comparisons (5%) finds nothing. Verdict: what these "
        "differences say, each by itself; equivalent where they are less than the margin. MaxVio: highest load of an "
        "expert over the fair share, minus 1, counted over the whole validation set before drops; mean over seeds, "
        "then the worst layer. Dead experts: below 5% of the fair share over the whole validation set; mean over "
        "seeds, summed over layers. "
        f"{ladder if any(row.compute_multiplier for row in table.rows) else ''}"
        f"{regret if any(row.regret for row in table.rows) else ''}FLOPs: forward. Resolvable: the smallest "
        "true difference that a paired t-test at 5% finds with power 80% given n and the spread seen, itself uncertain "
        "at small n."
    )


def to_grid(table: Table, timings: bool = True) -> Grid:
    """Return the rows as a terminal shows them."""
    shown = columns(table, timings)
    lines = [[cell(row) for cell in shown.values()] for row in table.rows]
    return Grid(list(shown), lines, left=("settings", "gate"), spare=[*SPARE, f"difference to {table.reference}"])


def to_markdown(table: Table, timings: bool = True) -> str:
    """Return the table and its notes as Markdown; without ``timings`` it is the same, bit for bit, when the same
    command runs again.
    """
    shown = columns(table, timings)
    body = markdown(list(shown), [[cell(row) for cell in shown.values()] for row in table.rows])
    notes = "".join(f"- **{escape(title)}**: {escape(text)}.\n" for title, text in table.notes if text)
    return f"{body}\n\n{escape(legend(table))}\n\n{notes}"


def to_csv(table: Table, timings: bool = True) -> str:
    """Return the rows as CSV at full precision, an interval in four columns; nothing stands for None."""
    return _csv(_columns(TableRow, timings), plain_rows(table, timings))


def pairs_to_csv(pairs: Sequence[Pair]) -> str:
    """Return pairs of entries as CSV, likewise."""
    return _csv(_columns(Pair), plain_pairs(pairs))


def _csv(columns: Iterable[tuple[str, str]], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("_".join(filter(None, column)) for column in columns)
    writer.writerows(map(no_formula, row.values()) for row in rows)
    return text.getvalue()


def plain_rows(table: Table, timings: bool = True) -> list[dict[str, Any]]:
    """Return each row's figures by their columns' names, an interval in four, a multiplier in three."""
    return [_plain(row, _columns(TableRow, timings)) for row in table.rows]


def plain_pairs(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Return what is said of each pair by its columns' names, the interval of the difference in four."""
    return [_plain(pair, _columns(Pair)) for pair in pairs]


def _columns(kind: type[TableRow | Pair], timings: bool = True) -> list[tuple[str, str]]:
    """Return the columns of rows of a kind: a field and the part of it, or "" for the whole."""
    names = [field.name for field in fields(kind) if timings or field.name not in TIMINGS]
    return [(name, part) for name in names for part in SPLIT.get(name, ("",))]


def _plain(row: TableRow | Pair, columns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    return {
        f"{name}_{part}" if part else name: getattr(getattr(row, name), part, None) if part else getattr(row, name)
        for name, part in columns
    }


def no_formula(cell: object) -> object:
    """Return a cell that no spreadsheet computes: an apostrophe stands before a text that begins as a formula does."""
    if not isinstance(cell, str):
        return cell
    begins = unicodedata.normalize("NFKC", cell).lstrip()[:1]
    mark = "'" if begins in FORMULA or cell[:1] in ("\t", "\r", "\n") else ""
    return mark + printable(cell)


def _name(row: TableRow, table: Table) -> str:
    marks = {
        "yardstick": row.router == DENSE,
        "non-causal": not row.causal,
        f"{row.diverged} of {row.n + row.diverged} diverged": row.diverged > 0,
    }
    holding = [mark for mark, holds in marks.items() if holds]
    return ", ".join(dict.fromkeys([row.label, *holding, *filter(None, row.marks.split(", "))]))


def _difference(row: TableRow, table: Table) -> str:
    if row.difference is None:
        return "reference" if row.label == table.reference else NOTHING
    pairs = f" (n = {row.difference.n})" if row.difference.n != row.n else ""
    lacking = ", not after Holm" if row.difference.separated and not row.found else ""
    return of_interval(row.difference, "+") + pairs + lacking
