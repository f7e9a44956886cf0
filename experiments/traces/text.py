"""What was measured of traces, as tables, as a heatmap of letters, and as JSON.

Shape suffixes: E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

from rlroute.experiments.terminal import Grid
from rlroute.experiments.text import NOTHING, decimals, rounded
from rlroute.experiments.traces.flips import Flips
from rlroute.experiments.traces.measure import PERCENTS, LayerLoads, Loads

WIDE = 96
"""Letters of a line of the heatmap at most; each stands for several experts where there are more."""
SHADES = ((0.05, "·"), (0.5, "░"), (1.5, "▒"), (3.0, "▓"), (math.inf, "█"))
"""Up to which load over the fair share a letter goes; below the first an expert is dead."""
SHADING = "· below 0.05 of the fair share (dead), ░ to 0.5, ▒ to 1.5, ▓ to 3, █ above"
LEGEND = (
    "Loads are the choices of each expert, in one layer, before any drop. MaxVio: the highest over the fair share, "
    "minus 1; p50 and p95 are over the steps, each by itself (few tokens make it larger). Gini: 0 is even, 1 - 1/E one "
    "expert alone. Min/max: the lowest load over the highest. Dead: experts below 0.05 of the fair share. Silent: "
    "tokens for which no expert is noted, those included whose row names an expert twice. Where every head is routed, "
    "the experts of all heads and the worst of each measure."
)
FLIPS_LEGEND = (
    "A token has flipped in a layer where its set of experts is another; lost choices are those that the other trace "
    "does not have. Tokens of which one trace notes nothing in a layer are not compared there. R3 (arXiv "
    "2510.11370) found about 10 % of choices lost between rollout and training, and 94 % of tokens flipped somewhere."
)

COLUMNS: dict[str, Callable[[LayerLoads], str]] = {
    "layer": lambda of: of.layer,
    "tokens": lambda of: f"{of.tokens:,}",
    "silent": lambda of: f"{of.silent:,}",
    "pairs": lambda of: f"{sum(of.load_E):,}",
    "E": lambda of: str(of.experts),
    "MaxVio": lambda of: decimals(of.max_vio),
    "p50": lambda of: decimals(of.step_max_vio[0]),
    "p95": lambda of: decimals(of.step_max_vio[PERCENTS.index(95)]),
    "Gini": lambda of: decimals(of.gini),
    "min/max": lambda of: decimals(of.min_over_max),
    "dead": lambda of: str(of.dead),
}


def percent(part: int, whole: int) -> str:
    """Return a share in percent, or a dash where there is no whole."""
    return f"{100 * part / whole:.2f} %" if whole else NOTHING


def headline(loads: Loads) -> str:
    """Return what a trace is, in a line."""
    tokens = max(of.tokens for of in loads.layers)
    experts = "" if loads.stated else "; experts are counted to the highest id, unless --experts says how many"
    repeated = sum(of.repeated for of in loads.layers)
    twice = f"; {repeated:,} rows name an expert twice and count as silent" if repeated else ""
    return f"{loads.name}: {loads.kind}, {loads.steps:,} steps, {tokens:,} tokens{experts}{twice}"


def layers_grid(loads: Loads) -> Grid:
    """Return a line for each layer."""
    lines = [[cell(of) for cell in COLUMNS.values()] for of in loads.shown]
    return Grid(list(COLUMNS), lines, spare=("pairs", "silent", "tokens", "p50"))


def spread_grid(loads: Loads) -> Grid:
    """Return percentiles over layers, and over layers and steps."""
    head = ["over all", *(f"p{share}" for share in PERCENTS), "highest"]
    return Grid(head, [[name, *map(decimals, values)] for name, values in loads.spread.items()])


def heatmap(loads: Loads) -> str:
    """Return the loads as letters: a line for each layer, a letter for each expert, or for several side by side."""
    width = max(len(of.layer) for of in loads.shown)
    return "\n".join(f"{of.layer:>{width}} {_shades(of.load_E)}" for of in loads.shown)


def _shades(load_E: Sequence[int]) -> str:
    each = -(-len(load_E) // WIDE)
    fair = sum(load_E) / len(load_E)
    if not fair:
        return NOTHING
    groups = [load_E[start : start + each] for start in range(0, len(load_E), each)]
    return "".join(next(shade for most, shade in SHADES if sum(g) / len(g) / fair < most) for g in groups)


def flips_grid(flips: Flips) -> Grid:
    """Return where two traces differ: a line for each layer."""
    columns = zip(flips.layers, flips.compared, flips.changed, flips.chosen, flips.lost, strict=True)
    lines = [
        [layer, f"{compared:,}", percent(changed, compared), percent(lost, chosen)]
        for layer, compared, changed, chosen, lost in columns
    ]
    return Grid(["layer", "tokens compared", "flipped", "lost choices"], lines)


def flips_text(flips: Flips) -> str:
    """Return what two traces differ in altogether."""
    return (
        f"{percent(sum(flips.lost), sum(flips.chosen))} of choices differ; {percent(flips.anywhere, flips.tokens)} of "
        f"{flips.tokens:,} tokens flip in at least one layer, a token in {decimals(flips.changed_layers)} of "
        f"{len(flips.layers)} layers on average."
    )


def to_json(measured: Sequence[Loads], flips: Flips | None, command: str) -> str:
    """Return everything as JSON; numbers have six digits, and what is not defined is null."""
    found = {
        "command": command,
        "percentiles": [*PERCENTS, 100],
        "traces": [asdict(loads) for loads in measured],
        "flips": flips and asdict(flips) | {"changed_layers": flips.changed_layers},
    }
    return json.dumps(rounded(found), separators=(",", ":")) + "\n"
