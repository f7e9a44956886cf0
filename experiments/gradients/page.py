"""What the gradient instrument found, as a Markdown table, as JSON, and as one self-contained HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from rlroute.experiments.gradients.instrument import Row, Sweep, Unmeasured
from rlroute.experiments.gradients.signal import over_seeds_by_factor, relative_bias
from rlroute.experiments.report.html import render_page
from rlroute.experiments.report.signals import SETTING_WIDTH, Signal, setting, signals_figure
from rlroute.experiments.statistics import Interval, over_seeds
from rlroute.experiments.text import NOTHING, markdown, plus_minus, rounded, two_digits
from rlroute.kernels import resolve_backend
from rlroute.provenance import environment

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROUNDING = 1e-9
"""What is smaller, in relative terms, is printed as 0."""

LEGEND = (
    "Per entry and layer (the first is layer 0), against the gradient of the expected loss at the router's logits "
    "(exact: all joint choices enumerated; "
    "conditional: one token and layer at a time, the others held at sampled choices, ± its sampling error). Cosine: of "
    "one training micro-batch's gradient, and of the mean of all draws. Relative bias: |mean - exact| / |exact| with "
    "the draws' own noise taken out. Variance: trace of the covariance over |exact|². SNR: power of the mean along the "
    "exact gradient over the variance, per micro-batch; tokens: how many to run for SNR 1. Choice part: cosine of the "
    "mean to the gradient through the choices alone, gates held. Brackets and ± are 95% intervals, over seeds where "
    "there are several, else over draws; variance, SNR and tokens are geometric means over seeds: an SNR of 0, and ∞ "
    "tokens, where one seed shows no signal. Where the estimates of all joint choices are enumerated too, a seed's "
    "figures are exact."
)


def bias(row: Row) -> Interval:
    """Return the relative bias."""
    return relative_bias(over_seeds([signal.squared_bias for signal in row.signals]))


def snr(row: Row) -> Interval | None:
    """Return the signal-to-noise ratio of one micro-batch; None without noise."""
    found = [signal.snr for signal in row.signals if signal.snr is not None]
    return over_seeds_by_factor(found) if len(found) == len(row.signals) else None


def tokens_for_snr_1(row: Row) -> Interval | None:
    """Return how many tokens have to be run for a signal-to-noise ratio of 1; infinite where no signal was found."""
    ratio = snr(row)
    if ratio is None:
        return None

    def tokens(value: float | None) -> float | None:
        return None if value is None else row.rows_per_estimate / value if value > 0 else math.inf

    return Interval(tokens(ratio.mean) or math.inf, tokens(ratio.high), tokens(ratio.low), ratio.n)


def _cosine(row: Row) -> Interval:
    return over_seeds([signal.cosine for signal in row.signals])


def _target(row: Row) -> str:
    return row.target + (f" ± {row.target_error:.0%}" if row.target_error else "")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "entry": lambda row: f"`{row.entry}`",
    "E": lambda row: str(row.experts),
    "k": lambda row: str(row.k),
    "layers": lambda row: str(row.layers),
    "layer": lambda row: str(row.layer),
    "T": lambda row: str(row.tokens),
    "step": lambda row: str(row.train_steps),
    "gradient": _target,
    "cosine, one micro-batch": lambda row: mean_text(_cosine(row)),
    "cosine, mean": lambda row: mean_text(over_seeds([signal.mean_cosine for signal in row.signals])),
    "relative bias": lambda row: brackets(bias(row)),
    "variance": lambda row: _figure(over_seeds_by_factor([signal.variance for signal in row.signals]).mean),
    "SNR": lambda row: brackets(snr(row)),
    "tokens for SNR 1": lambda row: brackets(tokens_for_snr_1(row)),
    "cosine to choice part": lambda row: mean_text(over_seeds([signal.mean_cosine for signal in row.choices])),
}


def to_markdown(rows: Sequence[Row], unmeasured: Sequence[Unmeasured]) -> str:
    """Return the table, what its columns mean, and what was not measured."""
    table = markdown(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in rows])
    missing = (f"No figures for `{item.entry}`{item.place}: {item.reason}." for item in unmeasured)
    return "\n".join([table, "", LEGEND, *missing])


def to_json(
    sweep: Sweep, rows: Sequence[Row], unmeasured: Sequence[Unmeasured], command: str, provenance: Mapping[str, Any]
) -> str:
    """Return everything as JSON: the command, the sweep and the configurations behind it, versions, and the figures by
    seed.

    Numbers have six digits; infinite ones are null. Of the comparison with the choice part it holds what the table
    shows.
    """
    derived = {"bias": bias, "snr": snr, "tokens_for_snr_1": tokens_for_snr_1}
    figures = {
        "command": command,
        "environment": environment("cpu", resolve_backend("auto", "cpu"), torch.get_num_threads()),
        "corpus": dict(provenance),
        "sweep": asdict(sweep),
        "seeds": list(range(sweep.seeds)),
        "configs": [{"entry": case.entry, "config": case.config.to_dict()} for case in sweep.cases()],
        "legend": LEGEND,
        "rows": [_row_data(row) | {name: _plain(of(row)) for name, of in derived.items()} for row in rows],
        "unmeasured": [asdict(item) for item in unmeasured],
    }
    return json.dumps(rounded(figures), separators=(",", ":")) + "\n"


def render(rows: Sequence[Row], unmeasured: Sequence[Unmeasured], sweep: Sweep, command: str) -> str:
    """Return the page.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    return render_page(
        "gradients.html",
        "",
        {
            "cosine": figure(rows, _cosine, "cosine, one micro-batch"),
            "bias": figure(rows, bias, "relative bias"),
            "tokens": figure(rows, tokens_for_snr_1, "tokens for SNR 1", log=True),
        },
        legend=LEGEND,
        width=SETTING_WIDTH * len({_setting(row) for row in rows}),
        columns=list(COLUMNS),
        rows=[[cell(row).strip("`") for cell in COLUMNS.values()] for row in rows],
        unmeasured=[f"{item.entry}{item.place}: {item.reason}" for item in unmeasured],
        notes=asdict(sweep) | {"command": command},
    )


def figure(rows: Sequence[Row], of: Callable[[Row], Interval | None], title: str, *, log: bool = False) -> Figure:
    """Draw a quantity of all rows."""
    return signals_figure([Signal(row.entry, _setting(row), of(row)) for row in rows], title, log=log)


def _setting(row: Row) -> str:
    return setting(row.experts, row.k, row.tokens, row.train_steps, row.layers, row.layer)


def _figure(value: float) -> str:
    return "0" if abs(value) < ROUNDING else two_digits(value)


def mean_text(interval: Interval) -> str:
    """Return the mean, and half the interval's length unless that is rounding."""
    half = interval.half_width
    return plus_minus(interval.mean, half if half and half > ROUNDING else None, 2)


def brackets(interval: Interval | None) -> str:
    """Return the mean, and the interval's ends unless they are both 0, or equal."""
    if interval is None:
        return NOTHING
    if interval.low is None or interval.high is None or interval.low == interval.high:
        return _figure(interval.mean)
    ends = _figure(max(interval.low, 0.0)), _figure(interval.high)
    return _figure(interval.mean) + ("" if ends == ("0", "0") else f" [{', '.join(ends)}]")


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else asdict(interval)


def _row_data(row: Row) -> dict[str, Any]:
    return asdict(row) | {"choices": [{"mean_cosine": asdict(signal.mean_cosine)} for signal in row.choices]}
