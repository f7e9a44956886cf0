"""Views of what was seen inside a run, as figures in the house's style; each stands alone.

Shape suffixes: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from rlroute.experiments.inspection.drops import Drops
from rlroute.experiments.inspection.history import History, means
from rlroute.experiments.inspection.inspection import Inspection, SiteView, as_one
from rlroute.experiments.inspection.measures import lifts
from rlroute.experiments.inspection.text import expert_name, factor_text
from rlroute.experiments.inspection.worth import Worth
from rlroute.experiments.report.loads import over_fair, share_figure
from rlroute.experiments.report.style import GREY, drawn, new_figure, style_of
from rlroute.experiments.statistics import Interval
from rlroute.foreign import printable
from rlroute.schema import Regret
from rlroute.sites import families

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TOP = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
"""A legend above its figure."""
MOST_SHOWN = 3
"""Sites all of whose curves are shown at first; of more the saturation alone."""


def loads_figure(found: Inspection) -> Figure:
    """Draw the load of each site's experts over the fair share; sites of fewer experts end earlier, and those that are
    shown as one stand in one row.
    """
    sites = [as_one(*family) for family in found.families.items()]
    rows, names = over_fair([of.load_E for of in sites]), [f"site {of.site}" for of in sites]
    hover = "%{y}, expert %{x}<br>%{z:.2f} × the fair share"
    return share_figure(rows, names, max(200, 110 + 34 * len(sites)), hover)


def domains_figure(site: SiteView, domains: Sequence[str]) -> Figure:
    """Draw which experts the pairs of each domain go to, over an even share."""
    rows = [[round(share * len(site.load_E), 3) for share in of_domain] for of_domain in site.by_domain_LE]
    hover = "%{y}, expert %{x}<br>%{z:.2f} × an even share"
    names = [escape(printable(name)) for name in domains]
    return share_figure(rows, names, 130 + 24 * len(names), hover, said="share over<br>even share")


def together_figure(site: SiteView) -> Figure:
    """Draw how often each two experts are chosen by the same token, over what their loads would have (lift); the
    diagonal is empty.
    """
    rows = [drawn(row) for row in lifts(torch.tensor(site.together_EE)).tolist()]
    names = [str(expert) for expert in range(len(rows))]
    side = min(max(260, 120 + 22 * len(names)), 900)
    return share_figure(rows, names, side, "%{y} with %{x}<br>lift %{z:.2f}", "expert", "lift")


def history_figure(history: History) -> Figure:
    """Draw how routes settle: saturation and the unsettled tokens of each site over checkpoints, and what recorded
    choices have in common with the final model's.
    """
    figure = new_figure("training step", "share", height=420)
    saturation = means({site: of.saturation for site, of in history.sites.items()})
    unsettled, agreed = means({site: of.unsettled for site, of in history.sites.items()}), means(history.agreed)
    beside = {"visible": True if len(saturation) <= MOST_SHOWN else "legendonly"}
    for index, site in enumerate(saturation):
        style = style_of(index)
        line = {"color": style.colour, "width": 2}
        figure.add_scatter(
            x=history.steps,
            y=drawn(saturation[site]),
            name=f"saturation, site {site}",
            mode="lines+markers",
            line=line,
            marker={"symbol": style.shape, "size": 8, "color": style.colour},
        )
        figure.add_scatter(
            x=history.steps,
            y=drawn(unsettled[site]),
            name=f"unsettled tokens, site {site}",
            mode="lines+markers",
            line=line | {"dash": "dash"},
            marker={"symbol": f"{style.shape}-open", "size": 7, "color": style.colour},
            **beside,
        )
        if agreed:
            figure.add_scatter(
                x=history.recorded,
                y=drawn(agreed[site]),
                name=f"recorded choices, site {site}",
                mode="markers",
                marker={"symbol": "x", "size": 7, "color": style.colour},
                **beside,
            )
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    figure.update_layout(hovermode="x unified", legend=TOP)
    return figure


def worth_figure(worth: Worth) -> Figure:
    """Draw what is lost without each expert of each site, with intervals over sequences."""
    figure = new_figure("expert", "loss added (nats)", height=400)
    keys = list(worth.experts)
    for index, (name, places) in enumerate(families(keys).items()):
        style, lost = style_of(index), [worth.experts[keys[place]] for place in places]
        figure.add_scatter(
            x=[expert_name(head, expert, len(lost)) for head, of in enumerate(lost) for expert in range(len(of))],
            **_with_ends([interval for of in lost for interval in of]),
            name=f"site {name}",
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 9},
        )
    figure.add_hline(0, line={"width": 1, "color": GREY})
    figure.update_xaxes(type="category")
    figure.update_layout(scattermode="group", legend=TOP)
    return figure


def best_figure(worth: Worth) -> Figure:
    """Draw what is lost without each token's best experts, by their number, and without the shared ones."""
    figure = new_figure("each token's best experts masked", "loss added (nats)", height=360)
    figure.add_scatter(
        x=[0, *worth.best],
        **_with_ends([Interval(0.0, None, None, 1), *worth.best.values()]),
        name="best experts",
        mode="lines+markers",
        line={"color": style_of(0).colour},
        marker={"size": 9},
    )
    if worth.shared is not None:
        label = {"text": "shared experts", "font": {"color": style_of(1).colour}}
        figure.add_hline(
            worth.shared.mean,
            line={"color": style_of(1).colour, "dash": "dash"},
            annotation=label,
            annotation_position="top left",
        )
    figure.update_xaxes(tickvals=[0, *worth.best])
    return figure


def regret_figure(regret: Regret) -> Figure:
    """Draw the regret of routes by the confidence of predictions."""
    figure = new_figure(
        "tenth of the tokens, from the least confident on (mean confidence)", "regret (nats)", height=340
    )
    figure.add_bar(
        x=[f"{tenth} ({confidence:.2f})" for tenth, confidence in enumerate(regret["confidence_C"], 1)],
        y=regret["nats_C"],
        customdata=["–" if share is None else f"{share:.2f}" for share in regret["better_C"]],
        marker={"color": style_of(0).colour},
        hovertemplate="%{y:.4f} nats; better sets %{customdata}<extra></extra>",
    )
    figure.update_xaxes(type="category")
    return figure


def drops_figure(found: Sequence[Drops], field: str = "by_position") -> Figure:
    """Draw the share of pairs that is dropped by place, for each capacity factor.

    Args:
        found: of one model.
        field: ``by_position``: by equal parts of the sequence; ``by_row``: by the sequence's place in its batch.
    """
    title = "part of the sequence" if field == "by_position" else "place in the batch"
    figure = new_figure(title, "pairs dropped", height=360)
    for index, of in enumerate(found):
        style, values = style_of(index), getattr(of, field)
        figure.add_scatter(
            x=list(range(1, len(values) + 1)),
            y=drawn(values),
            name=factor_text(of.factor),
            mode="lines+markers",
            line={"color": style.colour, "dash": style.dash},
            marker={"symbol": style.symbol, "size": 8, "color": style.colour},
        )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_xaxes(dtick=1)
    figure.update_layout(hovermode="x unified", legend=TOP)
    return figure


def changes_figure(found: Sequence[Drops]) -> Figure:
    """Draw which share of tokens changes with the others in the batch, for each capacity factor."""
    figure = new_figure("capacity factor", "share of tokens", height=360)
    names = {"changed": "a logit moves", "rerouted": "other experts chosen", "flipped": "another likeliest next token"}
    for index, (field, name) in enumerate(names.items()):
        figure.add_bar(
            x=[factor_text(of.factor) for of in found],
            y=[getattr(of, field) for of in found],
            name=name,
            marker={"color": style_of(index).colour},
            hovertemplate="%{y:.2%}",
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_layout(barmode="group", hovermode="x unified", legend=TOP)
    return figure


def _with_ends(intervals: Sequence[Interval]) -> dict[str, Any]:
    """Return means and the ends of their intervals, as a trace has them."""
    ends = [interval.half_width or 0.0 for interval in intervals]
    return {
        "y": [round(interval.mean, 6) for interval in intervals],
        "error_y": {"array": ends, "thickness": 1, "width": 3},
    }
