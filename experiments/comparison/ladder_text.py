"""A ladder as a table, and what has to be said of it."""

from __future__ import annotations

from collections.abc import Iterable

from rlroute.experiments.comparison.ladder_file import Climb, Ladder
from rlroute.experiments.text import NOTHING, escape, markdown, of_interval, three_digits


def to_markdown(ladder: Ladder) -> str:
    """Return the table of a ladder and what has to be said of it."""
    said = "".join(f"- **{escape(title)}**: {escape(text)}.\n" for title, text in notes(ladder))
    return f"{markdown(*table(ladder))}\n\n{said}"


def table(ladder: Ladder) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the columns, and a line for each entry."""
    head = ["entry", *(f"bits/byte at {budget}" for budget in _budgets(ladder))]
    lines = [[entry.label, *_points(entry), *_multipliers(entry)] for entry in ladder.entries]
    return [*head, "compute multiplier", "time multiplier"], lines


def _budgets(ladder: Ladder) -> list[str]:
    return [f"{three_digits(compute / 1e9)} GFLOPs" for compute in ladder.rungs.compute_J]


def _points(entry: Climb) -> Iterable[str]:
    return (f"{of_interval(bits)} (width {w})" for bits, w in zip(entry.bits, entry.widths, strict=True))


def _multipliers(entry: Climb) -> Iterable[str]:
    return ("reference" if found is None else str(found) for found in (entry.compute, entry.time))


def notes(ladder: Ladder) -> Iterable[tuple[str, str]]:
    """Yield what has to be said beside the table, with its titles."""
    rungs, reference, budgets = ladder.rungs, ladder.rungs.labels[0], _budgets(ladder)
    yield (
        "Rungs",
        f"each entry at {len(budgets)} budgets of training FLOPs and widths {', '.join(map(str, rungs.widths))}, "
        f"{len(rungs.seeds)} seeds; at each budget the width of lowest mean loss",
    )
    yield (
        "Compute multiplier",
        f"how much more compute {reference} needs for the same loss, over the losses that both reach, with its 95% "
        f"interval by bootstrap over seeds; ≥ or ≤: beyond the range of the rungs",
    )
    yield "Time multiplier", "the same times the ratio of training FLOPs per second, as these runs went"
    for entry in ladder.entries:
        if entry.law is None:
            yield f"Law of {entry.label}", "none: its loss does not fall with compute"
        else:
            law, unit = entry.law, three_digits(entry.law["unit"] / 1e9)
            said = f"{law['floor']:.3f} + {law['scale']:.3f} (C / {unit} GFLOPs)^-{law['exponent']:.3f}"
            yield f"Law of {entry.label}", said
    edges = {min(rungs.widths), max(rungs.widths)} if len(rungs.widths) > 1 else set()
    if beyond := [entry.label for entry in ladder.entries if edges & set(entry.widths)]:
        yield "Widths", f"at the edge of those tried for {', '.join(beyond)}: a better one may lie beyond"
    for entry in ladder.entries[1:]:
        said = ", ".join(
            f"{of_interval(d, '+')} at {budget}" for d, budget in zip(entry.differences, budgets, strict=True)
        )
        yield f"Difference of {entry.label} to {reference}", said
    orders = "; ".join(f"at {budget} {', '.join(order)}" for budget, order in zip(budgets, ladder.order, strict=True))
    crossed = ", ".join(f"{one} and {other}" for one, other in ladder.crossings)
    held = "changes beyond the noise (" + crossed + ")" if crossed else "changes, by no more than noise,"
    yield "Order", f"{'holds' if ladder.order_holds else held} across budgets: {orders}"
    yield "Command", ladder.command or NOTHING
