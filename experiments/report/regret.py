"""What routes cost against the best ones, by the confidence of tokens: see :mod:`rlroute.training.regret`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rlroute.experiments.report.board import Group
from rlroute.experiments.report.style import Style, new_figure
from rlroute.experiments.statistics import t_interval
from rlroute.experiments.text import NOTHING
from rlroute.schema import Regret

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PANELS = {
    "nats_C": "loss over that of the best route (nats per token)",
    "better_C": "share of other routes with a lower loss",
}
"""What is drawn of each tenth of the tokens, with its unit."""


def regrets(group: Group) -> list[Regret]:
    """Return the regrets of the runs that have one."""
    measured = [run.summary["measured"] for run in group.runs if run.summary and run.summary.get("measured")]
    found = [one.get("regret") for one in measured if one is not None]
    return [one for one in found if isinstance(one, dict)]  # a text says why there is none


def regret_figure(groups: Sequence[Group], styles: Mapping[str, Style]) -> Figure:
    """Draw regret and the share of better routes against the confidence of each tenth of the tokens: means over seeds
    with 95% Student-t intervals.

    Args:
        groups: entries that have regrets.
        styles: how they are drawn, by label.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(PANELS), figure=new_figure("", "", height=440), horizontal_spacing=0.09)
    for col, (name, title) in enumerate(PANELS.items(), start=1):
        figure.update_xaxes(title={"text": "highest probability of a next token"}, row=1, col=col)
        figure.update_yaxes(title={"text": title}, rangemode="tozero", row=1, col=col)
        for group in groups:
            _draw(figure, group, styles[group.label], regrets(group), name, col)
    figure.update_layout(hovermode="closest")
    return figure


def _draw(figure: Figure, group: Group, style: Style, found: Sequence[Mapping[str, Any]], name: str, col: int) -> None:
    tenths = list(zip(*(zip(one["confidence_C"], one[name], strict=True) for one in found), strict=True))
    points = [  # of each tenth that has a value in every seed
        (math.fsum(x for x, _ in seeds) / len(seeds), t_interval([y for _, y in seeds]))
        for seeds in tenths
        if all(y is not None for _, y in seeds)
    ]
    figure.add_scatter(
        x=[x for x, _ in points],
        y=[interval.mean for _, interval in points],
        error_y={"array": [interval.half_width or 0.0 for _, interval in points], "thickness": 1, "width": 3},
        name=escape(group.label),
        mode="lines+markers",
        line={"color": style.colour, "dash": style.dash, "width": 2},
        marker={"symbol": style.symbol, "size": 8, "color": style.colour},
        customdata=[NOTHING if i.half_width is None else f"{i.half_width:.4f}" for _, i in points],
        hovertemplate="confidence %{x:.3f}<br>%{y:.4f} ± %{customdata}",
        showlegend=False,
        meta={"entry": group.hash, "kind": "eval"},
        row=1,
        col=col,
    )
