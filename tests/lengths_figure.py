"""docs/lengths.svg, drawn once there are two lengths, and the table beside it, out of experiments/results/lengths/:
``python -m tests.lengths_figure`` writes the one and prints the other.
"""

from collections.abc import Mapping
from pathlib import Path

from rlroute.experiments.comparison.entries import Entry, make_entries
from rlroute.experiments.comparison.table import paired
from rlroute.experiments.statistics import t_interval
from rlroute.experiments.text import of_interval
from rlroute.reading import read_runs
from tests import ROOT
from tests.drawing import BOTTOM, COLOURS, LEFT, Line, by_steps, drawing, panel_left

RESULTS = ROOT / "experiments" / "results" / "lengths"
FIGURE = ROOT / "docs" / "lengths.svg"
REFERENCE = "switch"
FIXED, LEARNED = ("dense", "frozen", "hash"), ("unbalanced", "noisy_topk", "bias_balanced", "quantile", "reinforce")
"""What learns no routes, and what does: the panels."""
OF = dict(zip((*FIXED, *LEARNED), COLOURS, strict=False))
"""The colours of lines."""


def lengths(folder: Path = RESULTS) -> dict[int, dict[str, Entry]]:
    """Return what was compared, by steps, shortest first, and by entry."""
    found = ({entry.label: entry for entry in make_entries(read_runs(file))} for file in folder.glob("*.jsonl"))
    return dict(sorted((entries[REFERENCE].runs[0].summary["steps"], entries) for entries in found))


def lines(found: Mapping[int, Mapping[str, Entry]]) -> dict[str, Line]:
    """Return the differences to the reference in bits per byte, paired by seed: by entry and steps."""
    return {
        name: {steps: t_interval(paired(entries[name], entries[REFERENCE])) for steps, entries in found.items()}
        for name in OF
    }


def table(found: Mapping[int, Mapping[str, Entry]]) -> str:
    """Return the figures as Markdown."""
    heads = [f"{steps:,} steps, {len(entries[REFERENCE].runs)} seeds" for steps, entries in found.items()]
    rows = [f"| minus {REFERENCE} | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    rows += [
        f"| {name} | {' | '.join(of_interval(i, '+') for i in line.values())} |" for name, line in lines(found).items()
    ]
    return "\n".join(rows)


def figure(found: Mapping[int, Mapping[str, Entry]]) -> str:
    """Return the drawing."""
    made, under = lines(found), "training steps of 2,048 tokens"
    parts = []
    for index, (names, said, grid) in enumerate(((FIXED, "learns no routes", 0.02), (LEARNED, "learns routes", 0.01))):
        shown = {name: made[name] for name in names}
        title = f"bits per byte minus {REFERENCE}: {said}"
        parts += by_steps(panel_left(index), title, under, shown, OF, grid, zero=True)
    return drawing(parts, panel_left(2) - LEFT, BOTTOM)


if __name__ == "__main__":
    if len(lengths()) > 1:
        FIGURE.write_text(figure(lengths()))
    print(table(lengths()))
