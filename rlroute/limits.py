"""What a configuration's field may hold, said in its annotation and checked in one place.

``steps: Count`` or ``width: Annotated[float, Between(1, 4)]`` is all it takes for a value to be refused by name.
"""

import math
import types
import typing
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from rlroute.errors import ConfigError


@dataclass(frozen=True)
class Above:
    """All numbers above a bound."""

    bound: float

    def __contains__(self, value: float) -> bool:
        return value > self.bound

    def __str__(self) -> str:
        return f"numbers above {self.bound}"


@dataclass(frozen=True)
class AtLeast:
    """All numbers from a bound."""

    bound: float

    def __contains__(self, value: float) -> bool:
        return value >= self.bound

    def __str__(self) -> str:
        return f"numbers from {self.bound}"


@dataclass(frozen=True)
class Between:
    """All numbers from ``low`` to ``high``; ``below`` leaves ``high`` itself out."""

    low: float
    high: float
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high or (value == self.high and not self.below)

    def __str__(self) -> str:
        return f"numbers from {self.low} to {'below ' if self.below else ''}{self.high}"


Limit = Above | AtLeast | Between

Count = Annotated[int, AtLeast(1)]
Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, Between(0, 1)]
BelowOne = Annotated[float, Between(0, 1, below=True)]


def check_fields(config: Any, where: str) -> None:
    """Hold every field of a dataclass to its annotation.

    Raises:
        ConfigError: one is of another type, not among its literals, outside its limits or not a number; the message
            starts with ``where`` and the field's name.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        checked(getattr(config, field.name), hints[field.name], f"{where}.{field.name}")


def checked(value: Any, hint: Any, where: str) -> Any:
    """Return ``value`` as the annotated type, turning whole floats and lists that JSON made of ints and tuples back.

    Raises:
        ConfigError: the annotation does not allow it; the message starts with ``where``.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        for limit in arguments[1:]:
            if isinstance(limit, Limit) and isinstance(value, int | float) and value not in limit:
                raise ConfigError(f"{where} = {value!r}: legal are {limit}")
        return checked(value, arguments[0], where)
    if origin in (types.UnionType, typing.Union):
        return _optional(value, arguments, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: legal are {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(checked(item, arguments[0], where) for item in value)
    return _plain(value, hint, where)


def _optional(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if type(None) not in options:
        return checked(value, options[0], where)
    if value is None:
        return None
    try:
        return checked(value, next(option for option in options if option is not type(None)), where)
    except ConfigError as error:
        raise ConfigError(f"{error}, or none") from None


def _plain(value: Any, hint: type, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} = {value!r}: want {getattr(hint, '__name__', hint)}")
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{where} = {value!r}: legal are numbers")
    return value
