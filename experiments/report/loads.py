"""Loads as heatmaps: those of every expert over time, and whatever else is held against what is even."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlroute.experiments.report.board import Group
from rlroute.experiments.report.style import add_panels, new_figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LOAD_COLOURS = {
    "light": [[0, "#2b4c8c"], [0.125, "#93b5dc"], [0.25, "#f7f7f7"], [0.5, "#f2a57c"], [1, "#8c1c13"]],
    "dark": [[0, "#5b8def"], [0.125, "#34507f"], [0.25, "#232a35"], [0.5, "#b3552d"], [1, "#ffb38a"]],
}
"""Cold below the fair share, warm above it, and the fair share as pale as the page."""
LOAD_LIMIT = 4.0
"""The colour scale of expert loads ends at this multiple of the fair share, in all heatmaps."""
LOAD_COLUMNS = 100
"""Points in time that a heatmap shows at most."""
SEED_COLUMNS = 4
"""Heatmaps side by side."""
FAIR = "load over<br>fair share"
"""Above the scale of colours."""


def loads_figure(groups: Sequence[Group], site: str | None = None) -> Figure:
    """Draw the load of every expert over time: one heatmap for each seed, all of one entry and routed site at a time;
    those of sites that are shown as one stand one after the other.

    The figure shows the first. Of all, ``layout.meta["loads"][entry][site]`` holds, for each seed, what the page's
    script puts there: its number, the steps, and each expert's load over the fair share.

    Args:
        groups: entries with routed sites.
        site: the only one that is drawn, of those of the only group; all if None.
    """
    wanted = [list(group.sites.values()) if site is None else [group.sites[site]] for group in groups]
    loads = [[_loads(group, places) for places in sites] for group, sites in zip(groups, wanted, strict=True)]
    most = max(len(seeds) for sites in loads for seeds in sites)
    across = min(most, SEED_COLUMNS)
    down = -(-most // across)
    plain = new_figure("", "expert", height=110 + 230 * down)
    titles = [f"seed {drawn['seed']}" for drawn in loads[0][0]]
    spacing = {"horizontal_spacing": 0.02, "vertical_spacing": 0.2 / down}
    figure, places = add_panels(plain, titles, across, "training step", shared_yaxes=True, **spacing)
    for drawn, where in zip(loads[0][0], places, strict=True):
        figure.add_heatmap(
            x=drawn["steps"],
            z=drawn["share"],
            name=f"seed {drawn['seed']}",
            coloraxis="coloraxis",
            hovertemplate="step %{x}, expert %{y}<br>%{z:.2f} × the fair share",
            **where,
        )
    _colour(figure, FAIR, **({"loads": loads} if site is None else {}))
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(title={"text": "expert"}, col=1)
    return figure


def over_fair(loads: Sequence[Sequence[int]]) -> list[list[float | None]]:
    """Return pairs of experts over their fair share, a row for each layer; none where nothing was chosen, and behind
    the last expert of those that have fewer.
    """
    widest, found = max(map(len, loads)), list[list[float | None]]()
    for load_E in loads:
        fair = sum(load_E) / len(load_E)
        found.append([round(load / fair, 2) if fair else None for load in load_E] + [None] * (widest - len(load_E)))
    return found


def share_figure(
    rows: Sequence[Sequence[float | None]],
    names: Sequence[str],
    height: int,
    hover: str,
    title: str = "",
    said: str = FAIR,
) -> Figure:
    """Draw what experts have over what is even, a row for each name.

    Args:
        rows: the numbers, by name and expert.
        names: of the rows.
        height: in pixels.
        hover: what is said of a cell.
        title: of all names.
        said: what the colours are.
    """
    figure = new_figure("expert", title, height)
    figure.add_heatmap(z=rows, y=names, coloraxis="coloraxis", hovertemplate=f"{hover}<extra></extra>")
    _colour(figure, said)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, type="category", autorange="reversed", automargin=True)
    return figure


def _colour(figure: Figure, said: str, **meta: Any) -> None:
    """Colour a figure's heatmaps by what they have over what is even, which is as pale as the page."""
    bar: dict[str, Any] = {"tickvals": [0, 1, 2, 3, 4], "ticktext": ["0", "1 (even)", "2", "3", "≥ 4"]}
    bar |= {"thickness": 14, "outlinewidth": 0, "title": {"text": said}}
    figure.update_layout(
        coloraxis={"cmin": 0, "cmax": LOAD_LIMIT, "colorscale": LOAD_COLOURS["light"], "colorbar": bar},
        meta={"scales": LOAD_COLOURS, **meta},
    )


def _loads(group: Group, places: Sequence[int]) -> list[dict[str, Any]]:
    """Return what each seed's experts got at some sites, over the fair share; sites may have different numbers of
    experts.
    """
    found = []
    for run in group.runs:
        loads = run.loads
        rows = loads[:: -(-len(loads) // LOAD_COLUMNS) or 1]
        by_row = [[row["load_LE"][place] for place in places] for row in rows]
        share_SE = [[round(load * len(load_E), 2) for load_E in load_LE for load in load_E] for load_LE in by_row]
        share_ES = [list(share_S) for share_S in zip(*share_SE, strict=True)]
        found.append({"seed": run.seed, "steps": [row["step"] for row in rows], "share": share_ES})
    return found
