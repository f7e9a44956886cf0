"""The comparison as data: which entries it has, what each was tuned to, and the grid that it was tuned on.

An entry is a router with its configuration, or the dense model. ``TUNED`` holds the best trial of ``GRID`` for each
entry, found by ``rlroute tune`` (400 steps, seeds that no table uses); every entry had the same number of trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from rlroute.config import DENSE, DataConfig, ModelConfig, RouterConfig, RunConfig, TrainConfig, from_dict
from rlroute.errors import ConfigError
from rlroute.registry import default_names, refusals, router_class
from rlroute.routing import RouterShape

Overrides = dict[str, dict[str, Any]]

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


def default_entries() -> list[str]:
    """Return the entries of the default comparison: routers that need no field, position hashing as a control, and the
    dense model.
    """
    return [DENSE, *default_names(), "hash:table=position"]


def routers_for(shapes: Sequence[RouterShape], say: Callable[[str], None]) -> list[str]:
    """Return the routers that need no field and take all of these shapes; tell in one line who is left out, and why."""
    refused = refusals(shapes)
    if refused:
        say(f"left out: {'; '.join(f'{name} ({reason})' for name, reason in refused.items())}")
    return [name for name in default_names() if name not in refused]


def parse_entry(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``name`` or ``name:field=value,...`` into the router's name and its configured fields.

    Raises:
        ConfigError: a field is unknown, or a value does not fit it.
    """
    name, _, rest = text.partition(":")
    values = {}
    for part in filter(None, rest.split(",")):
        field, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"entry {text!r}: want NAME or NAME:FIELD=VALUE,...")
        values[field] = _literal(value)
    return name, values


def _literal(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def build_entry(
    entry: str, data: DataConfig, model: ModelConfig, train: TrainConfig, overrides: Overrides | None = None
) -> RunConfig:
    """Return the configuration of an entry on top of the shared parts.

    Args:
        entry: as :func:`parse_entry` takes it; what it says wins over ``overrides``.
        data, model, train: the parts that all entries share.
        overrides: fields of ``train`` and ``router`` to change, as in ``GRID`` and ``TUNED``.

    Raises:
        ConfigError: an unknown router or field, or an illegal value.
    """
    name, fields = parse_entry(entry)
    overrides = overrides or {}
    train = replace(train, **overrides.get("train", {}))
    if name == DENSE:
        if fields:
            raise ConfigError(f"entry {entry!r}: the dense model has no fields")
        return RunConfig(data=data, model=model, train=train)
    config = router_class(name).Config
    router = from_dict(config, overrides.get("router", {}) | _choices(config, fields), f"router {name}")
    return RunConfig(data=data, model=model, router=router, train=train)


def _choices(config: type[RouterConfig], fields: dict[str, Any]) -> dict[str, Any]:
    """Take ``none`` for the word where a field has it among its choices, as ``reinforce:baseline=none``."""
    hints = get_type_hints(config)
    return {
        name: "none" if value is None and "none" in get_args(hints.get(name)) else value
        for name, value in fields.items()
    }


def build_comparison(
    entries: Iterable[str], data: DataConfig, model: ModelConfig, train: TrainConfig, *, tuned: bool
) -> list[RunConfig]:
    """Return the configurations of all entries, each with its tuned settings where ``tuned`` asks for them.

    Raises:
        ConfigError: an illegal entry; or ``tuned`` together with a learning rate of one's own, which it would
            overwrite.
    """
    if tuned and train.lr != TrainConfig().lr:
        raise ConfigError(
            f"train.lr = {train.lr}: the tuned recipe sets it for each entry; --no-tuned takes yours for all"
        )
    return [build_entry(entry, data, model, train, TUNED.get(entry) if tuned else None) for entry in entries]
