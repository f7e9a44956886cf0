"""Numbers and Markdown: how a figure becomes text, for every table and page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlroute.foreign import printable

if TYPE_CHECKING:  # SciPy, which statistics.py loads, is not there on every machine
    from rlroute.experiments.statistics import Interval

NOTHING = "–"
"""Stands where there is nothing to say."""


def plus_minus(mean: float, half_width: float | None, digits: int = 4, sign: str = "") -> str:
    """Return a mean, and half the length of its interval where there is one; with sign ``+`` also for positive
    means.
    """
    return f"{mean:{sign}.{digits}f}" + ("" if half_width is None else f" ± {half_width:.{digits}f}")


def of_interval(interval: Interval | None, sign: str = "") -> str:
    """Return mean ± half width of an interval."""
    return NOTHING if interval is None else plus_minus(interval.mean, interval.half_width, sign=sign)


def with_ends(mean: float, low: float | None, high: float | None) -> str:
    """Return a ratio with the ends of its interval where there are any."""
    return f"{mean:.2f}" + ("" if low is None or high is None else f" {between(low, high)}")


def between(low: float, high: float) -> str:
    """Return the ends of an interval in brackets."""
    return f"({low:.2f} to {high:.2f})"


def decimals(value: float | None, digits: int = 3) -> str:
    """Return a number, or a dash where it is not defined."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def short(value: float) -> str:
    """Return a mean count with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def three_digits(value: float) -> str:
    """Return three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def two_digits(value: float) -> str:
    """Return two digits, or all before the point; what is infinite or unknown is ∞."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.0e}"


def si(value: float) -> str:
    """Return three digits and a unit prefix."""
    value = float(f"{value:.3g}")  # 999.9 is 1 k
    power = min(max(int(math.log10(abs(value))) // 3, 0), 5) if value else 0
    return f"{value / 1000**power:.3g}{' ' * (power > 0)}{'kMGTP'[power - 1] if power else ''}"


def rounded(value: Any) -> Any:
    """Return plain data with numbers of six digits; what is infinite or unknown, which JSON does not know, is None."""
    if isinstance(value, Mapping):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def listed(names: Sequence[str]) -> str:
    """Return names in one line."""
    return ", ".join(names) or "none"


def escape(text: str) -> str:
    """Keep a value from ending its cell or its line, and from giving a terminal orders."""
    return " ".join(printable(text).replace("\\", "\\\\").replace("|", "\\|").split())


def markdown(
    head: Sequence[object], lines: Iterable[Sequence[object]], sides: str | None = None, *, tight: bool = False
) -> str:
    """Return a Markdown table, without a line end after its last line.

    Args:
        head: the titles.
        lines: their cells; these and the titles are escaped.
        sides: ``<`` or ``>`` for each column; by default all but the first stand right.
        tight: no spaces in the second line, and one in an empty cell.
    """
    marks = [{"<": "---", ">": "---:"}[side] for side in sides or "<".ljust(len(head), ">")]
    rule = f"|{'|'.join(marks)}|" if tight else f"| {' | '.join(marks)} |"
    first, *others = (_line(cells, tight) for cells in (head, *lines))
    return "\n".join([first, rule, *others])


def _line(cells: Sequence[object], tight: bool) -> str:
    texts = [escape(str(cell)) for cell in cells]
    return "|" + "".join(" |" if tight and not text else f" {text} |" for text in texts)
