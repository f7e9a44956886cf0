"""What the gradient instrument found, as figures: how good each router's learning signal is, size by size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rlroute.experiments.report.style import new_figure, style_of
from rlroute.experiments.statistics import Interval, over_seeds

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SETTING_WIDTH = 120
"""Pixels that a size, step and layer takes at least in a figure, which is scrolled where it does not fit."""
SETTING = "experts E, of which k a token, and tokens T of a sequence; step of training"
MEASURES = {
    "cosine": "cosine of one micro-batch to the exact gradient",
    "bias": "relative bias (|mean - exact| / |exact|)",
    "snr": "signal-to-noise ratio of one micro-batch",
    "tokens_for_snr_1": "tokens to run for a signal-to-noise ratio of 1",
}
"""What of a record of the instrument is drawn, with its unit."""
LOGARITHMIC = frozenset({"snr", "tokens_for_snr_1"})


@dataclass(frozen=True)
class Signal:
    """A quantity of one entry in one setting."""

    entry: str
    setting: str
    value: Interval | None


def signals_of(record: Mapping[str, Any], measure: str) -> list[Signal]:
    """Return a quantity of a record of the instrument (gradients.json): of :data:`MEASURES`."""
    return [
        Signal(
            str(row["entry"]),
            setting(row["experts"], row["k"], row["tokens"], row["train_steps"], row["layers"], row["layer"]),
            _value(row, measure),
        )
        for row in record["rows"]
    ]


def _value(row: Mapping[str, Any], measure: str) -> Interval | None:
    if measure == "cosine":
        return over_seeds([Interval(**signal["cosine"]) for signal in row["signals"]])
    found = row[measure]
    return None if found is None or found["mean"] is None else Interval(**found)


def setting(experts: int, k: int, tokens: int, steps: int, layers: int, layer: int | str) -> str:
    """Return what a size, a step and a layer are called under a figure."""
    of = "" if layers == 1 else f"<br>{layers} layers, layer {escape(str(layer))}"
    return f"E {experts}, k {k}, T {tokens}<br>step {steps}{of}"


def signals_figure(signals: Sequence[Signal], title: str, *, log: bool = False, first: int | None = None) -> Figure:
    """Draw a quantity, one colour and marker for each entry, beside one another for each setting.

    Args:
        signals: what is drawn.
        title: of its axis, with the unit.
        log: whether the axis is logarithmic.
        first: so many entries are drawn at first, the others by a click on their names; all if None.
    """
    settings = list(dict.fromkeys(signal.setting for signal in signals))
    drawn = new_figure(SETTING, title, height=720)
    for index, entry in enumerate(dict.fromkeys(signal.entry for signal in signals)):
        found = [(signal.setting, signal.value) for signal in signals if signal.entry == entry]
        points = [(where, point) for where, point in found if point is not None and math.isfinite(point.mean)]
        ends = [(_distance(p.high, p.mean), _distance(p.low, p.mean)) for _, p in points]
        style = style_of(index)
        drawn.add_scatter(
            x=[where for where, _ in points],
            y=[point.mean for _, point in points],
            error_y={
                "array": [up for up, _ in ends],
                "arrayminus": [down for _, down in ends],
                "thickness": 1,
                "width": 3,
            },
            name=escape(entry),
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 8},
            visible=True if first is None or index < first else "legendonly",
        )
    drawn.update_layout(meta={"width": SETTING_WIDTH * len(settings)})
    drawn.update_layout(scattermode="group", legend={"y": -0.25, "yanchor": "top", "x": 0})
    drawn.update_xaxes(type="category", categoryorder="array", categoryarray=settings, tickangle=0)
    drawn.update_yaxes(**({"type": "log"} if log else {"zeroline": True, "zerolinecolor": "#9aa3b2"}))
    return drawn


def _distance(end: float | None, mean: float) -> float:
    return abs(end - mean) if end is not None and math.isfinite(end) else 0.0
