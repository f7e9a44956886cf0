"""From plain dictionaries, as they come out of records, sweeps and command lines, to configurations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from rlroute.errors import ConfigError, RlrouteError
from rlroute.faults import explain
from rlroute.limits import checked

C = TypeVar("C")


def from_dict(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Build the dataclass ``cls`` from a plain dictionary; missing fields take their defaults.

    Raises:
        ConfigError: an unknown field, a value of another type than the field's, or none for a field that needs one; the
            message starts with ``where``.
    """
    if not is_dataclass(cls):
        raise TypeError(f"{cls} is not a dataclass")
    refuse_unknown(where, values, [f.name for f in fields(cls)])
    missing = [name for name in needed_fields(cls) if name not in values]
    if missing:
        raise ConfigError(f"{where} needs {' and '.join(missing)}: say {missing[0]}=VALUE")
    hints = get_type_hints(cls, include_extras=True)
    made = {name: checked(value, hints[name], f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**made)
    except RlrouteError:
        raise
    except Exception as error:  # a check of the router's own
        raise ConfigError(f"{where}: {explain(error)}") from error


def needed_fields(cls: type) -> list[str]:
    """Return the names of a dataclass's fields without a default."""
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def refuse_unknown(where: str, values: Mapping[str, Any], legal: Iterable[str]) -> None:
    """Refuse names that are not legal, or what is no mapping at all.

    Raises:
        ConfigError: the message starts with ``where``.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} = {values!r}: want a mapping of fields")
    unknown = sorted(set(values) - set(legal))
    if unknown:
        raise ConfigError(f"{where} has no field {unknown[0]!r}: legal are {', '.join(sorted(legal)) or 'none'}")
