"""From plain dictionaries, as they come out of records, sweeps and command lines, to configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from rlroute.errors import ConfigError, RlrouteError
from rlroute.faults import explain
from rlroute.limits import checked, types_of_fields

C = TypeVar("C")
Keys = Callable[[str, list[Any]], Iterable[object]]
"""The names of a list's parts, from its path and itself."""


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
    hints = types_of_fields(cls)
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


def is_nested(value: Any) -> bool:
    """Whether a plain value has parts."""
    return isinstance(value, Mapping | list)


def by_number(path: str, values: list[Any]) -> Iterable[object]:
    """Name the parts of a list by their numbers."""
    return range(len(values))


def flatten(
    value: Any, path: str = "", *, joint: str = "/", nested: Callable[[Any], bool] = is_nested, keys: Keys = by_number
) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested value by their paths, as ``lr`` and ``load_LE/1/3``.

    Args:
        value: mappings and lists of what has no parts.
        path: the path to it.
        joint: what stands between the names of a path.
        nested: whether a value is taken apart; what is not is a leaf.
        keys: the names of a list's parts.
    """
    if not nested(value):
        yield path, value
        return
    named = value.items() if isinstance(value, Mapping) else zip(keys(path, value), value, strict=True)
    for name, part in named:
        yield from flatten(part, f"{path}{joint}{name}" if path else str(name), joint=joint, nested=nested, keys=keys)


def differing(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the paths of the leaves in which two values differ, with both; what one lacks is None."""
    left, right = dict(flatten(one)), dict(flatten(other))
    for path in left | right:
        if left.get(path) != right.get(path) or (path in left) != (path in right):
            yield path, left.get(path), right.get(path)
