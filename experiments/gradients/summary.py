"""The headlines of a published gradient record, as Markdown: what each estimator's signal is worth, and what changes
it.

The record is one of ``rlroute gradients --one-at-a-time``: sizes are varied one at a time about the first of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlroute.experiments.gradients.page import brackets, mean_text
from rlroute.experiments.statistics import Interval, over_seeds
from rlroute.experiments.text import NOTHING, markdown

Row = Mapping[str, Any]


def summary(record: Mapping[str, Any]) -> str:
    """Return three tables, before and after training: direction, SNR and bias; tokens for SNR 1 by E and k; the same by
    depth.
    """
    sweep = record["sweep"]
    base = {name: sweep[name][0] for name in ("experts", "k", "layers")} | {"layer": 0}
    ends = sweep["train_steps"][0], sweep["train_steps"][-1]
    deep = base | {"layers": sweep["layers"][1]}
    quality = {
        f"{title}, {step} steps": (where | {"train_steps": step}, of)
        for title, where, of in (
            ("cosine", base, _cosine),
            ("SNR", base, _of("snr")),
            (f"relative bias, first of {deep['layers']} layers", deep, _of("bias")),
        )
        for step in ends
    }
    sizes = {f"E = {experts}": base | {"experts": experts} for experts in sorted(sweep["experts"])}
    sizes |= {f"k = {k}": base | {"k": k} for k in sweep["k"][1:]}
    by_size = {
        f"{size}, {step} steps": (at | {"train_steps": step}, _tokens) for step in ends for size, at in sizes.items()
    }
    by_depth = {
        f"layer {layer} of {layers}": (base | {"layers": layers, "layer": layer, "train_steps": ends[1]}, _tokens)
        for layers in sorted(sweep["layers"])
        for layer in range(layers)
    }
    titles = (
        f"One layer, E = {base['experts']}, k = {base['k']}:",
        "Tokens for SNR 1, one layer:",
        f"Tokens for SNR 1 by depth, after {ends[1]} steps (the first layer is layer 0; ∞: no signal found on one seed "
        "or more):",
    )
    tables = (_table(record, columns) for columns in (quality, by_size, by_depth))
    return "\n\n".join(f"{title}\n\n{table}" for title, table in zip(titles, tables, strict=True)) + "\n"


Column = tuple[Mapping[str, int], Callable[[Row], str]]


def _table(record: Mapping[str, Any], columns: Mapping[str, Column]) -> str:
    entries = list(dict.fromkeys(row["entry"] for row in record["rows"]))
    lines = []
    for entry in entries:
        cells = [of(_find(record, entry, where)) for where, of in columns.values()]
        if set(cells) != {NOTHING}:  # there is nothing to say of a signal without noise
            lines.append([f"`{entry}`", *cells])
    return markdown(["entry", *columns], lines, tight=True)


def _find(record: Mapping[str, Any], entry: str, where: Mapping[str, int]) -> Row:
    wanted = {"entry": entry, **where}
    (row,) = (row for row in record["rows"] if all(row[name] == value for name, value in wanted.items()))
    found: Row = row
    return found


def _cosine(row: Row) -> str:
    return mean_text(over_seeds([Interval(**signal["cosine"]) for signal in row["signals"]]))


def _of(name: str) -> Callable[[Row], str]:
    return lambda row: brackets(None if row[name] is None else Interval(**row[name]))


def _tokens(row: Row) -> str:
    found = row["tokens_for_snr_1"]
    return (
        NOTHING if found is None else "∞" if found["mean"] is None else brackets(Interval(**found)).partition(" [")[0]
    )
