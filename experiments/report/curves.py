"""What was seen while training, drawn against tokens, FLOPs or time: losses, and the health of the routing.

A trace says in ``meta`` which entry it is of, and what the page's script needs to show or hide it and to change its
axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

from rlroute.experiments.report.board import Group, Seen
from rlroute.experiments.report.choice import ALL, AXES
from rlroute.experiments.report.style import Style, add_panels, faint, new_figure
from rlroute.experiments.statistics import t_interval
from rlroute.experiments.text import NOTHING
from rlroute.reading import worst_vio
from rlroute.schema import EvalRow, TrainRow

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POINTS = 150
"""A curve has fewer than twice as many points: more than a screen tells apart."""

MARKS = 6
"""A thin line has about as many marks: enough to say whose it is."""

Row = EvalRow | TrainRow
Points = list[tuple[list[tuple[Seen, Any]], list[float]]]
"""At each step that all seeds have: their runs with their rows, and their values."""


# Losses


def curves_figure(groups: Sequence[Group], styles: Mapping[str, Style], axis: str = ALL, kinds: str = "both") -> Figure:
    """Draw the loss: evaluations as means over the seeds that finished, with t intervals as bands, and the mean
    training loss as a thin line; and of every run that goes on a thin line of its own.

    Args:
        groups: who is drawn.
        styles: how, by label.
        axis: of :data:`~rlroute.experiments.report.choice.AXES`; ``all``: tokens, and what the page's script needs to
            change it.
        kinds: of :data:`~rlroute.experiments.report.choice.KINDS`.
    """
    figure = new_figure(_title(axis), "loss (bits per byte)", height=460)
    seen: list[float] = []
    for group in groups:
        style, draw = styles[group.label], _Pen(figure, group, styles[group.label], axis, kinds)
        draw.line("train", _at_common_steps(group.settled, _training), faint(style.colour, 0.6))
        seen += draw.means("eval", _at_common_steps(group.settled, _evaluations))
        for run in group.going:
            draw.line("train", _at_common_steps([run], _training), faint(style.colour, 0.4))
            if group.settled != [run]:
                draw.line("eval", _at_common_steps([run], _evaluations), style.colour)
    figure.update_layout(hovermode="x unified")
    figure.update_xaxes(tickformat="~s")
    if seen:  # the first training steps lie far above all that is to be compared
        room = 0.06 * (max(seen) - min(seen)) or 0.1
        figure.update_yaxes(range=[min(seen) - room, max(seen) + room])
    return figure


class _Pen:
    """Draws the lines of one entry."""

    def __init__(self, figure: Figure, group: Group, style: Style, axis: str, kinds: str = "both") -> None:
        self.figure, self.name, self.hash, self.style = figure, escape(group.label), group.hash, style
        self.axes, self.kinds = [axis] if axis in _MEASURES else list(_MEASURES), kinds

    def line(self, kind: str, points: Points, colour: str) -> None:
        """Draw means as a thin line with few marks."""
        if not points:
            return
        self._add(
            kind,
            [(rows, math.fsum(values) / len(values)) for rows, values in points],
            mode="lines+markers",
            line={"color": colour, "width": 1, "dash": self.style.dash},
            marker={"symbol": self.style.symbol, "size": 6, "color": colour, "maxdisplayed": MARKS},
            hoverinfo="skip",
        )

    def means(self, kind: str, points: Points, form: str = ".4f", **place: Any) -> list[float]:
        """Draw means with marks and their intervals as a band; return them."""
        if not points:
            return []
        intervals = [(rows, t_interval(values)) for rows, values in points]
        band = [(rows, i.low, i.high) for rows, i in intervals if i.low is not None and i.high is not None]
        if band:
            outline = [(r, low) for r, low, _ in band] + [(r, high) for r, _, high in band][::-1]
            look = {"fill": "toself", "fillcolor": faint(self.style.colour, 0.13), "line": {"width": 0}}
            self._add(kind, outline, mode="lines", hoverinfo="skip", **look, **place)
        self._add(
            kind,
            [(rows, interval.mean) for rows, interval in intervals],
            mode="lines+markers",
            line={"color": self.style.colour, "dash": self.style.dash, "width": 2},
            marker={"symbol": self.style.symbol, "size": 8, "color": self.style.colour},
            hovertemplate=f"%{{y:{form}}} ± %{{customdata}}",
            customdata=[NOTHING if i.half_width is None else format(i.half_width, form) for _, i in intervals],
            **place,
        )
        return [interval.mean for _, interval in intervals]

    def _add(self, kind: str, points: Sequence[tuple[Sequence[Any], float | None]], **look: Any) -> None:
        if self.kinds not in ("both", kind):
            return
        along = {axis: [_mean_at(of, rows) for rows, _ in points] for axis in self.axes for of in [_MEASURES[axis]]}
        self.figure.add_scatter(
            x=along[self.axes[0]],
            y=[None if value is None else round(value, 5) for _, value in points],
            name=self.name,
            showlegend=False,
            meta={"entry": self.hash, "kind": kind} | ({"x": along} if len(along) > 1 else {}),
            **look,
        )


def _at_common_steps(runs: Sequence[Seen], values_of: Callable[[Seen], Iterable[tuple[Any, float]]]) -> Points:
    found: dict[int, list[tuple[Seen, Any, float]]] = {}
    for run in runs:
        for row, value in values_of(run):
            found.setdefault(row["step"], []).append((run, row, value))
    common = [points for _, points in sorted(found.items()) if len(points) == len(runs)]
    return [([(run, row) for run, row, _ in points], [value for *_, value in points]) for points in _thin(common)]


def _thin(points: Sequence[Any]) -> Sequence[Any]:
    """Return points evenly spread, the first and the last among them."""
    stride = max(len(points) // POINTS, 1)
    return points if stride == 1 else [*points[:-1:stride], points[-1]]


def _evaluations(run: Seen) -> Iterable[tuple[EvalRow, float]]:
    return ((row, row["bits_per_byte"]) for row in run.evals)


def _training(run: Seen) -> Iterable[tuple[Row, float]]:
    """Return training losses in bits per byte: those that were evaluated, or else those of steps, at as many bytes a
    token as the validation tokens have.
    """
    if run.evals and all("training" in row for row in run.evals):
        return ((row, row["training"]["bits_per_byte"]) for row in run.evals)
    last = run.evals[-1] if run.evals else None
    bits = last["bits_per_byte"] / last["loss"] if last and last["loss"] else 1 / math.log(2)
    return ((row, row["loss"] * bits) for row in run.train)


# What they are drawn against


def _flops(run: Seen, row: Row) -> float | None:
    """Return training FLOPs; None while the run goes on: what a token costs is counted at its end."""
    if run.summary is None:
        return None
    model, share = run.summary["model"], row["tokens"] / max(1, run.summary["tokens"])
    if "training_flops" in model:
        return share * model["training_flops"]
    return 3.0 * row["tokens"] * (model["flops_per_token"] + model["training_only_flops_per_token"])


_MEASURES: dict[str, Callable[[Seen, Row], float | None]] = {
    "tokens": lambda run, row: float(row["tokens"]),
    "flops": _flops,
    "seconds": lambda run, row: row["seconds"],
}


def _title(axis: str) -> str:
    return AXES.get(axis, AXES["tokens"])


def _mean_at(of: Callable[[Seen, Row], float | None], rows: Sequence[tuple[Seen, Row]]) -> float | None:
    values = [value for run, row in rows if (value := of(run, row)) is not None]
    return float(f"{math.fsum(values) / len(values):.6g}") if len(values) == len(rows) else None


# The health of the routing


def _mean_of(values: Iterable[float | None] | None) -> float | None:
    known = [value for value in values or () if value is not None]
    return math.fsum(known) / len(known) if known else None


HEALTH: dict[str, tuple[str, Callable[[EvalRow], float | None]]] = {
    "MaxVio, worst layer": ("load over fair share, minus 1", worst_vio),
    "Entropy of the loads": ("share of its largest value", lambda row: _mean_of(row["load_entropy_L"])),
    "Entropy of a token's probabilities": (
        "share of its largest value",
        lambda row: _mean_of(row["router_entropy_L"]),
    ),
    "Dead experts": ("experts, all layers", lambda row: float(sum(row["dead_L"]))),
    "Pairs dropped over capacity": ("share of the chosen pairs", lambda row: row["drop_rate"]),
    "Tokens without an expert": (
        "share of tokens, worst layer",
        lambda row: max(row.get("without_L", []), default=None),
    ),
}
"""What is drawn of the evaluations: its title, its unit, and what it is of a row; entropies are means over layers."""


def health_figure(groups: Sequence[Group], styles: Mapping[str, Style], axis: str = ALL) -> Figure:
    """Draw balance, entropies, dead experts and drops over training: means over seeds with t intervals as bands. What
    no run has recorded has no panel.
    """
    found = {
        title: (unit, {group.label: _at_common_steps(group.settled, partial(_known, of)) for group in groups})
        for title, (unit, of) in HEALTH.items()
    }
    panels = {title: panel for title, panel in found.items() if any(panel[1].values())}
    down = -(-len(panels) // 2)
    plain = new_figure("", "", height=60 + 230 * down)
    spacing = {"vertical_spacing": 0.22 / down, "horizontal_spacing": 0.09}
    figure, places = add_panels(plain, list(panels), 2, _title(axis), **spacing)
    figure.update_xaxes(tickformat="~s")
    for (unit, points), where in zip(panels.values(), places, strict=True):
        figure.update_yaxes(title={"text": unit}, rangemode="tozero", **where)
        for group in groups:
            _Pen(figure, group, styles[group.label], axis).means("eval", points[group.label], ".3f", **where)
    figure.update_layout(margin={"t": 40})
    return figure


def _known(of: Callable[[EvalRow], float | None], run: Seen) -> Iterable[tuple[EvalRow, float]]:
    return ((row, value) for row in run.evals if (value := of(row)) is not None)
