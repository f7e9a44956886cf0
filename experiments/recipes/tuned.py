"""What entries were tuned to, and the grid that they were tuned on.

``TUNED`` holds the best trial of ``GRID`` for each entry, found by ``rlroute tune`` (400 steps, seeds that no table
uses); every entry had the same number of trials. An entry is found by what it resolves to, however it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from rlroute.config import DENSE
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import Overrides, parse_entry, router_of

TUNING_SEEDS = (1000,)
RATES = (4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2)
NEAR_RATES = (4e-3, 6e-3, 8e-3)


def _rates_only() -> list[Overrides]:
    return [{"train": {"lr": rate}} for rate in RATES]


def _rates_and(*choices: dict[str, Any]) -> list[Overrides]:
    return [{"train": {"lr": rate}, "router": choice} for rate in NEAR_RATES for choice in choices]


GRID: dict[str, list[Overrides]] = {
    "dense": _rates_only(),
    "hash": _rates_only(),
    "hash:table=position": _rates_only(),
    "uniform": _rates_only(),
    "unbalanced": _rates_only(),
    "switch": _rates_and({"balance_weight": 0.01}, {"balance_weight": 0.03}),
    "noisy_topk": _rates_and(
        {"importance_weight": 0.1, "load_weight": 0.1}, {"importance_weight": 0.01, "load_weight": 0.01}
    ),
    "bias_balanced": _rates_and({"update_rate": 0.003}, {"update_rate": 0.01}),
    "reinforce": _rates_and({"balance_weight": 0.01}, {"balance_weight": 0.1}),
}

TUNED: dict[str, Overrides] = {
    "dense": {"train": {"lr": 0.006}},
    "hash": {"train": {"lr": 0.006}},
    "hash:table=position": {"train": {"lr": 0.008}},
    "uniform": {"train": {"lr": 0.008}},
    "unbalanced": {"train": {"lr": 0.006}},
    "switch": {"train": {"lr": 0.008}, "router": {"balance_weight": 0.03}},
    "noisy_topk": {"train": {"lr": 0.008}, "router": {"importance_weight": 0.01, "load_weight": 0.01}},
    "bias_balanced": {"train": {"lr": 0.008}, "router": {"update_rate": 0.01}},
    "reinforce": {"train": {"lr": 0.008}, "router": {"balance_weight": 0.1}},
}


class Tuning(NamedTuple):
    """At whose tuned settings a run is trained.

    Attributes:
        entry: the entry of ``TUNED``; None where the run is untuned.
        own: whether the run is that entry, and no variant of it.
    """

    entry: str | None
    own: bool


def grid_entry(entry: str) -> str:
    """Return the entry of ``GRID`` that an entry resolves to.

    Raises:
        ConfigError: there is none.
    """
    wanted = router_of(entry)
    for name in GRID:
        if router_of(name) == wanted:
            return name
    raise ConfigError(f"no tuning grid for {entry!r}: legal are {', '.join(GRID)}")


def tuned_settings(entry: str) -> Overrides:
    """Return what an entry of one router, or the entry that it is a variant of, was tuned to."""
    nearest = _nearest(_plain(entry))
    return {} if nearest is None else TUNED[nearest]


def tuning_of(config: Mapping[str, Any]) -> Tuning:
    """Return at whose tuned settings a run's plain configuration stands."""
    nearest = _nearest(config["router"])
    if nearest is None or not all(values.items() <= config[part].items() for part, values in TUNED[nearest].items()):
        return Tuning(None, False)
    tuned = _plain(nearest) | TUNED[nearest].get("router", {})
    return Tuning(nearest, tuned | config["router"] == tuned and not config.get("others"))


def _plain(entry: str) -> dict[str, Any]:
    router = router_of(entry)
    return {"name": DENSE} if router is None else {"name": router.name} | asdict(router)


def _nearest(router: Mapping[str, Any]) -> str | None:
    """Return the tuned entry that a router is a variant of: of those whose every word holds for it, the longest."""
    said = {entry: parse_entry(entry) for entry in TUNED}
    fitting = [e for e, (name, fields) in said.items() if name == router["name"] and fields.items() <= router.items()]
    return max(fitting, key=lambda entry: len(said[entry][1]), default=None)
