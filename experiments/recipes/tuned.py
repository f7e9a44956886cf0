"""What entries were tuned to, and the grids that they were tuned on: those of the default comparison, and two more.

``TUNED`` is read from the folder ``tuning`` beside this file, whose files ``rlroute tune`` writes: the best trial of
each entry, by the mean over seeds that no table uses, for runs of one length. A run takes those of the length nearest
to its own. A whole grid has as many trials for every entry. An entry is found by what it resolves to, however it is
written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from rlroute.baselines.replay import ReplayRouter
from rlroute.config import DENSE, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import Overrides, parse_entry, router_of
from rlroute.experiments.recipes.grid import Axis, Grid, best, key
from rlroute.registry import router_class

TUNING_SEEDS = (1000, 1001, 1002)
TUNABLE = ("lr", "router_lr_scale")
"""The fields of ``train`` that may be tuned for an entry."""
TUNING = Path(__file__).with_name("tuning")
AT = " at "
"""Stands in the settings of a run before the length for which they were found."""

_RATES = Axis(("train.lr",), (2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 1.2e-2, 1.6e-2, 2e-2, 2.4e-2, 3.2e-2, 4.8e-2))
_FEW_RATES = Axis(("train.lr",), (8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 3.2e-2, 4.8e-2))
_HIGH_RATES = Axis(("train.lr",), (1.2e-2, 1.6e-2, 2.4e-2, 3.2e-2, 4.8e-2))
_MORE_RATES = Axis(("train.lr",), (4e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 3.2e-2, 4.8e-2))
_BEYOND = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 6e-3, 8e-3, 6.4e-2, 9.6e-2)
"""Rates below and above those of whole grids, whose ends are as near as eleven trials have them."""


def _scales(*values: float) -> Axis:
    return Axis(("train.router_lr_scale",), values)


def _learned(router: dict[str, Any], *axes: Axis, scale: float = 1.0) -> Grid:
    return Grid({"train": {"lr": 1.6e-2, "router_lr_scale": scale}, "router": router}, axes)


GRID: dict[str, Grid] = {
    "dense": Grid({"train": {"lr": 1.2e-2}}, (_RATES,)),
    "hash": Grid({"train": {"lr": 1.2e-2}}, (_RATES,)),
    "frozen": Grid({"train": {"lr": 1.2e-2}}, (_RATES,)),
    "unbalanced": _learned({}, _MORE_RATES, _scales(0.1, 0.3, 1.0, 3.0, 10.0)),
    "switch": _learned(
        {"balance_weight": 0.03},
        _FEW_RATES,
        Axis(("router.balance_weight",), (0.003, 0.01, 0.03, 0.1)),
        _scales(0.3, 1.0, 3.0),
    ),
    "noisy_topk": _learned(
        {"importance_weight": 0.001, "load_weight": 0.001},
        _HIGH_RATES,
        Axis(("router.importance_weight", "router.load_weight"), (0.0, 0.0003, 0.001, 0.003, 0.01)),
        _scales(1.0, 3.0, 10.0),
        scale=3.0,
    ),
    "bias_balanced": _learned(
        {"update_rate": 0.01},
        _FEW_RATES,
        Axis(("router.update_rate",), (0.001, 0.003, 0.01, 0.03)),
        _scales(0.3, 1.0, 3.0),
    ),
    "quantile": _learned(
        {"ema_decay": 0.0},
        _HIGH_RATES,
        Axis(("router.ema_decay",), (0.0, 0.5, 0.9, 0.99)),
        _scales(0.3, 1.0, 3.0, 10.0),
    ),
    "reinforce": _learned(
        {"baseline": "batch", "balance_weight": 8.0, "policy_weight": 0.5},
        Axis(("train.lr",), (8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 3.2e-2)),
        Axis(("router.baseline",), ("batch", "ema")),
        Axis(("router.balance_weight",), (0.5, 2.0, 8.0, 32.0)),
        _scales(3.0, 10.0, 30.0),
        scale=10.0,
    ),
}


class Length(NamedTuple):
    """How much a run is trained."""

    steps: int
    batch_size: int

    @classmethod
    def of(cls, train: TrainConfig | Mapping[str, Any]) -> Length:
        """Return that of a training configuration, which may be plain."""
        plain = train if isinstance(train, Mapping) else vars(train)
        return cls(plain["steps"], plain.get("batch_size", TrainConfig.batch_size))

    def distance(self, other: Length) -> float:
        """Return how far apart two are, by the logarithms of their sequences, and then of their steps."""
        steps, others = (max(1, one.steps) for one in (self, other))  # a record may say 0
        sequences = math.log(steps * max(1, self.batch_size) / (others * max(1, other.batch_size)))
        return abs(sequences) + 1e-6 * abs(math.log(steps / others))

    def __str__(self) -> str:
        return f"{self.steps:,} steps of {self.batch_size}"


def read_tuning(folder: Path = TUNING) -> dict[Length, dict[str, dict[str, float | None]]]:
    """Return the scores of the trials that are stored, by length, entry and :func:`.grid.key`."""
    scores: dict[Length, dict[str, dict[str, float | None]]] = {}
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text())
        found = scores.setdefault(Length.of(stored["train"]), {})
        for row in stored["trials"]:
            found.setdefault(row["entry"], {})[key(row["overrides"])] = row["bits_per_byte"]
    return scores


TUNED: dict[Length, dict[str, Overrides]] = {
    length: {entry: best(GRID[entry], found) for entry, found in scores.items()}
    for length, scores in read_tuning().items()
}
"""Of the entries whose grid has been run for runs of that length."""


def around(entries: Collection[str], length: Length) -> Length:
    """Return the nearest other length at which all of some entries of ``GRID`` were tuned.

    Raises:
        ConfigError: there is none.
    """
    others = [other for other, tuned in TUNED.items() if other != length and tuned.keys() >= set(entries)]
    if not others:
        raise ConfigError(f"no length other than {length} for which {', '.join(entries)} were tuned")
    return min(others, key=length.distance)


def grid_around(entry: str, length: Length) -> Grid:
    """Return the learning rates of an entry's grid and those beyond, beside what else it was tuned to for a length."""
    rates, *_ = GRID[entry].axes
    beyond = (rate for rate in _BEYOND if not rates.values[0] <= rate <= rates.values[-1])
    return Grid(TUNED[length][entry], (Axis(rates.fields, tuple(sorted((*rates.values, *beyond)))),))


class Tuning(NamedTuple):
    """At whose tuned settings a run is trained.

    Attributes:
        entry: the entry of ``GRID``; None where the run is untuned.
        own: whether the run is that entry, and no variant of it.
        length: for which its grid was run; None where it was not, and these are its start.
    """

    entry: str | None
    own: bool = False
    length: Length | None = None


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


def tuned_settings(entry: str, train: TrainConfig) -> Overrides:
    """Return what an entry of one router, or the entry that it is a variant of, was tuned to for runs of about that
    length; of a replay the learning rates of the recorded run.

    Raises:
        ConfigError: a value of ``train``, or of the entry, that cannot be.
    """
    train.check()
    router = router_of(entry)
    if isinstance(router, ReplayRouter.Config):
        recorded, _ = router.recorded()
        return {"train": {name: getattr(recorded.train, name) for name in TUNABLE}}
    nearest = _nearest(_plain(entry))
    return {} if nearest is None else _found(nearest, Length.of(train))[1]


def tuning_of(config: Mapping[str, Any]) -> Tuning:
    """Return at whose tuned settings a run's plain configuration stands."""
    nearest = _nearest(config["router"])
    if nearest is None:
        return Tuning(None)
    length, settings = _found(nearest, Length.of(config["train"]))
    if not all(values.items() <= config[part].items() for part, values in settings.items()):
        return Tuning(None)
    plain = _plain(nearest) | settings.get("router", {})
    own = plain | config["router"] == plain and not config.get("others") and not config.get("start")
    return Tuning(nearest, own, length)


def settings_of(config: Mapping[str, Any]) -> str:
    """Return at what settings a run's plain configuration stands: ``tuned``, or ``tuned for ENTRY``, of which it is a
    variant, each followed by ``at STEPS steps of BATCH`` where that is not its own length; ``grid start``, where that
    entry's grid has not been run; ``default``; ``other``, which is anything else; or ``unknown``, where a router is not
    here.
    """
    tuning = tuning_of(config)
    if tuning.entry is not None and tuning.length is None:
        return "grid start"
    if tuning.entry is not None:
        at = "" if tuning.length == Length.of(config["train"]) else f"{AT}{tuning.length}"
        return ("tuned" if tuning.own else f"tuned for {tuning.entry}") + at
    try:
        defaults = [(router, _defaults(router["name"])) for router in (config["router"], *config.get("others", ()))]
    except ConfigError:
        return "unknown"
    defaults.append((config["train"], {name: getattr(TrainConfig(), name) for name in TUNABLE}))
    alike = all(own[name] == plain[name] for own, plain in defaults for name in own.keys() & plain.keys())
    return "default" if alike else "other"


def _defaults(router: str) -> dict[str, Any]:
    """Return the defaults of a router's fields, of those that have one.

    Raises:
        ConfigError: the router is not here.
    """
    known = () if router == DENSE else fields(router_class(router).Config)
    return {field.name: field.default for field in known if field.default is not MISSING}


def _plain(entry: str) -> dict[str, Any]:
    router = router_of(entry)
    return {"name": DENSE} if router is None else {"name": router.name} | asdict(router)


def _nearest(router: Mapping[str, Any]) -> str | None:
    """Return the entry of the grids that a router is a variant of: of those whose every word holds for it, the
    longest.
    """
    said = {entry: parse_entry(entry) for entry in GRID}
    fitting = [e for e, (name, fields) in said.items() if name == router["name"] and fields.items() <= router.items()]
    return max(fitting, key=lambda entry: len(said[entry][1]), default=None)


def _found(entry: str, length: Length) -> tuple[Length | None, Overrides]:
    """Return for which length an entry was tuned, the nearest to one, and what was found; its grid's start where
    for none.
    """
    lengths = [known for known, tuned in TUNED.items() if entry in tuned]
    nearest = min(lengths, key=length.distance, default=None)
    return nearest, GRID[entry].start if nearest is None else TUNED[nearest][entry]
