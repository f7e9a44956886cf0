"""docs/finetuning.svg, and the table beside it, out of experiments/results/finetuning.jsonl:
``python -m tests.finetuning_figure`` writes the one and prints the other.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rlroute.experiments.comparison.entries import Entry, make_entries
from rlroute.experiments.statistics import differences, t_interval
from rlroute.experiments.text import markdown, of_interval
from rlroute.reading import read_runs
from rlroute.schema import RunRecord
from tests import ROOT
from tests.drawing import COLOURS, Panel, drawing, element, multiples

RESULTS = ROOT / "experiments" / "results" / "finetuning.jsonl"
FIGURE = ROOT / "docs" / "finetuning.svg"
REFERENCE = "all"
WIDTH, HEIGHT, LEFT, TOP, GAP = 340, 260, 60, 40, 70
Measure = Callable[[RunRecord], float]


def final(run: RunRecord) -> float:
    """Return the last validation loss, bits per byte."""
    return run.evals[-1]["bits_per_byte"]


def lowest(run: RunRecord) -> float:
    """Return the lowest validation loss."""
    return min(row["bits_per_byte"] for row in run.evals)


def risen(run: RunRecord) -> float:
    """Return how far the last one is above the lowest."""
    return final(run) - lowest(run)


def learnt(run: RunRecord) -> float:
    """Return the last loss over training tokens."""
    return run.evals[-1]["training"]["bits_per_byte"]


def called(entry: Entry) -> str:
    """Return what sets an entry apart from the reference: all of the model, on the small set, without dropout."""
    config: Mapping[str, Any] = entry.runs[0].config["config"]
    words = [config["train"]["parts"]]
    words += [f"by reward ({config['router']['baseline']})"] if entry.router != "switch" else []
    words += ["expert dropout 0.4"] if config["model"]["expert_dropout"] else []
    words += ["4 times the data"] if config["data"]["train_tokens"] > 10_000 else []
    return ", ".join(words)


def entries() -> dict[str, Entry]:
    """Return the modes by name, the reference first."""
    found = {called(entry): entry for entry in make_entries(read_runs(RESULTS))}
    return dict(sorted(found.items(), key=lambda pair: (pair[0] != REFERENCE, pair[0])))


def against(entry: Entry, base: Entry, of: Measure) -> str:
    """Return the paired difference of a measure."""
    mine, theirs = ({run.config["seed"]: of(run) for run in each.runs} for each in (entry, base))
    return "reference" if entry is base else of_interval(t_interval(differences(mine, theirs)), "+")


def table() -> str:
    """Return the figures as Markdown."""
    found = entries()
    base = found[REFERENCE]
    head = [
        "trains",
        "validation",
        "difference",
        "above its lowest",
        "difference",
        "lowest",
        "difference",
        "training tokens",
    ]
    lines = [
        [
            name,
            *(
                cell
                for of in (final, risen, lowest)
                for cell in (of_interval(t_interval([of(run) for run in entry.runs])), against(entry, base, of))
            ),
            of_interval(t_interval([learnt(run) for run in entry.runs])),
        ]
        for name, entry in found.items()
    ]
    return markdown(head, lines)


def curve(entry: Entry, of: Callable[[Any], float]) -> dict[int, float]:
    """Return means over seeds by step."""
    rows = zip(*(run.evals for run in entry.runs), strict=True)
    return {each[0]["step"]: sum(map(of, each)) / len(each) for each in rows}


def panel(left: int, title: str, curves: Mapping[str, dict[int, float]], colours: Mapping[str, str]) -> list[str]:
    """Return one panel: validation losses over steps."""
    values = [value for line in curves.values() for value in line.values()]
    steps = sorted({step for line in curves.values() for step in line})
    low, high = min(values) - 0.02, max(values) + 0.02
    axes = Panel(left, TOP, WIDTH, HEIGHT, (0, steps[-1]), (low, high))
    marks = {step: str(step) for step in steps[1::2]}
    parts = axes.frame(title, "steps", marks, multiples(low, high, 0.05 if high - low < 0.5 else 0.5, ".2f"))
    for name, line in curves.items():
        dash = {"stroke_dasharray": "5 4"} if name.endswith("training tokens") else {}
        parts.append(axes.line(line, colours[name.removesuffix(", training tokens")], **dash))
    return parts


def figure() -> str:
    """Return the drawing: validation losses on the left, and training losses beside them on the right."""
    found = entries()
    colours = dict(zip(found, COLOURS, strict=False))
    valid = {name: curve(entry, lambda row: row["bits_per_byte"]) for name, entry in found.items()}
    both = {REFERENCE: valid[REFERENCE]}
    for name in (REFERENCE, "non-moe"):
        both[name] = valid[name]
        both[f"{name}, training tokens"] = curve(found[name], lambda row: row["training"]["bits_per_byte"])
    right = LEFT + WIDTH + GAP
    parts = panel(LEFT, "validation bits per byte", valid, colours)
    parts += panel(right, "validation, and training tokens (dashed)", both, colours)
    for place, (name, colour) in enumerate(colours.items()):
        x, y = LEFT + (place % 3) * 260, TOP + HEIGHT + 64 + 22 * (place // 3)
        parts.append(element("line", x1=x, x2=x + 22, y1=y - 4, y2=y - 4, stroke=colour, stroke_width=3))
        parts.append(element("text", name, x=x + 28, y=y))
    return drawing(parts, right + WIDTH + 20, TOP + HEIGHT + 130)


if __name__ == "__main__":
    FIGURE.write_text(figure())
    print(table())
