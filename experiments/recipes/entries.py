"""What an entry of a comparison says: a router with its configuration, several of them by sites, or the dense model.

``switch``, ``hash:table=position``, ``dense``; or ``switch+hash:table=position@0-1``, where what comes after a ``+``
decides at the sites after its ``@`` (:class:`rlroute.config.SitedRouter`), and the first router at all others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rlroute.config import DENSE, DataConfig, ModelConfig, RouterConfig, RunConfig, SitedRouter, TrainConfig
from rlroute.errors import ConfigError
from rlroute.registry import include, router_class
from rlroute.values import from_dict

Overrides = dict[str, dict[str, Any]]
"""Fields of ``train`` and ``router`` to change."""

_NEXT_ROUTER = re.compile(r"\+(?=[A-Za-z_])(?!(?:\w+\+)*\w+-[0-9a-f]{12}-s\d)")
# The + of 1e+3 parts nothing, nor does that of a run's folder.


def parse_entry(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``name`` or ``name:field=value,...`` into the router's name and its configured fields.

    Raises:
        ConfigError: a part is no field with a value.
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
    return {"true": True, "false": False}.get(text.lower(), text)


def bring_in(entry: str) -> str:
    """Return an entry whose router may be a file from anywhere, ``path/to/name.py`` or ``path/to/name.py:field=value``,
    which is brought in: ``name:field=value``.

    Raises:
        ConfigError: there is no such file, or its name cannot be a router's.
    """
    file, colon, fields = entry.partition(":")
    if not file.endswith(".py"):
        return entry
    include(file)
    return f"{Path(file).stem}{colon}{fields}"


def split_sites(entry: str) -> tuple[str, dict[str, str]]:
    """Split an entry into its first router, and the routers of some sites, by their sites.

    Raises:
        ConfigError: the first has sites, another has none, or two have the same.
    """
    first, *others = _NEXT_ROUTER.split(entry)
    if "@" in first.partition(":")[0]:
        raise ConfigError(
            f"entry {entry!r}: {first!r} comes first and decides wherever no other does: it takes no @SITES"
        )
    by_sites: dict[str, str] = {}
    for other in others:
        router, at, sites = other.rpartition("@")
        if not at:
            raise ConfigError(
                f"entry {entry!r}: {other!r} names no sites: want ROUTER+ROUTER@SITES, as switch+hash@0-1"
            )
        if sites in by_sites:
            raise ConfigError(f"entry {entry!r}: two routers at sites {sites!r}: want one")
        by_sites[sites] = router
    return first, by_sites


def router_of(entry: str, overrides: Mapping[str, Any] | None = None) -> RouterConfig | None:
    """Return the configuration of one router, ``name:field=value,...``; None for the dense model.

    Args:
        entry: of one router.
        overrides: its fields where the entry says nothing.

    Raises:
        ConfigError: an unknown router or field, or an illegal value.
    """
    name, fields = parse_entry(entry)
    if name == DENSE:
        if fields:
            raise ConfigError(f"entry {entry!r}: the dense model has no fields")
        return None
    config = router_class(name).Config
    return from_dict(config, dict(overrides or {}) | none_where_legal(config, fields), f"router {name}")


def build_entry(
    entry: str,
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    settings: Callable[[str], Overrides] = lambda router: {},
) -> RunConfig:
    """Return the configuration of an entry on top of the shared parts.

    Args:
        entry: as this file's head describes it; what it says wins over ``settings``.
        data, model, train: the parts that all entries share.
        settings: what to change for a router of the entry; of ``train``, what the first router's say.

    Raises:
        ConfigError: an unknown router or field, an illegal value, or sites that are malformed.
    """
    first, by_sites = split_sites(entry)
    train = replace(train, **settings(first).get("train", {}))
    others = tuple(
        SitedRouter(sites=sites, router=_at_sites(entry, router, settings)) for sites, router in by_sites.items()
    )
    router = router_of(first, settings(first).get("router"))
    return RunConfig(data=data, model=model, router=router, others=others, train=train)


def _at_sites(entry: str, router: str, settings: Callable[[str], Overrides]) -> RouterConfig:
    config = router_of(router, settings(router).get("router"))
    if config is None:
        raise ConfigError(f"entry {entry!r}: the dense model decides nothing at some sites; say model.num_dense_layers")
    return config


def none_where_legal(config: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with nothing in place of the word ``none``, where a field may be None and has no choice of that
    name, as ``reinforce:baseline=none`` has.
    """
    hints = get_type_hints(config)

    def of(name: str, value: Any) -> Any:
        legal = get_args(hints.get(name))
        if not isinstance(value, str) or value.lower() != "none":
            return value
        return "none" if "none" in legal else None if type(None) in legal else value

    return {name: of(name, value) for name, value in fields.items()}
