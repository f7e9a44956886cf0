"""What a field may hold, said in its annotation and checked in one place: here for configurations, by pydantic for what
comes from outside (:mod:`rlroute.foreign`).

``steps: Count`` or ``width: Annotated[float, Between(1, 4)]`` is all it takes for a value to be refused by name.
"""

import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from rlroute.errors import ConfigError


class ForPydantic:
    """A limit that pydantic knows by ``rules`` of its own; nothing of it is imported for that."""

    @property
    def rules(self) -> dict[str, Any]:
        """What pydantic calls the limit."""
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {**handler(source), **self.rules}


@dataclass(frozen=True)
class Above(ForPydantic):
    """All numbers above a bound."""

    bound: float

    @property
    def rules(self) -> dict[str, Any]:
        return {"gt": self.bound}

    def __contains__(self, value: float) -> bool:
        return value > self.bound

    def __str__(self) -> str:
        return f"numbers above {self.bound}"


@dataclass(frozen=True)
class AtLeast(ForPydantic):
    """All numbers from a bound."""

    bound: float

    @property
    def rules(self) -> dict[str, Any]:
        return {"ge": self.bound}

    def __contains__(self, value: float) -> bool:
        return value >= self.bound

    def __str__(self) -> str:
        return f"numbers from {self.bound}"


@dataclass(frozen=True)
class Between(ForPydantic):
    """All numbers from ``low`` to ``high``; ``below`` leaves ``high`` itself out."""

    low: float
    high: float
    below: bool = False

    @property
    def rules(self) -> dict[str, Any]:
        return {"ge": self.low, "lt" if self.below else "le": self.high}

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high or (value == self.high and not self.below)

    def __str__(self) -> str:
        return f"numbers from {self.low} to {'below ' if self.below else ''}{self.high}"


@dataclass(frozen=True)
class Matches(ForPydantic):
    """All texts of so many characters at most that a regular expression matches from end to end."""

    pattern: str
    longest: int = 1 << 20

    @property
    def rules(self) -> dict[str, Any]:
        return {"pattern": rf"^(?:{self.pattern})$", "max_length": self.longest}


Limit = Above | AtLeast | Between

Count = Annotated[int, Between(1, 2**31 - 1)]
Whole = Annotated[int, Between(0, 2**31 - 1)]
Seed = Annotated[int, Between(0, 2**63 - 1)]
Size = Annotated[int, Between(1, 2**20)]
Layers = Annotated[int, Between(1, 2**10)]
Experts = Annotated[int, Between(1, 2**14)]
Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, Between(0, 1)]
BelowOne = Annotated[float, Between(0, 1, below=True)]
MOST_EXPERTS = 2**18
"""Of all layers together: each is initialised by itself."""
MOST_SITES = 10_000
"""Routed sites of a model: records have a number for each."""
MOST_TOKENS = 2**26
"""Of a step: its batch is held whole."""
MOST_SEQUENCES = 2**40
"""Of a run: from there on ids are those of validation windows."""


def refuse_product(sizes: Mapping[str, int], most: int, what: str) -> None:
    """Refuse sizes that together are too many of something.

    Raises:
        ConfigError: naming them, and what is legal.
    """
    if math.prod(sizes.values()) > most:
        named = " with ".join(f"{name} = {size}" for name, size in sizes.items())
        raise ConfigError(f"{named}: legal are up to {most} {what}")


def refuse_idle(config: Any, base: type, where: str, needed: Mapping[str, str]) -> None:
    """Refuse fields that say how, where the field that says whether at all is at its default.

    Args:
        config: a dataclass.
        base: the class whose defaults these are.
        where: what messages start with before a field's name.
        needed: of each field that says how, the one that says whether.

    Raises:
        ConfigError: naming the value and the legal one.
    """
    for name, switch in needed.items():
        value, plain = getattr(config, name), getattr(base, name)
        if value != plain and getattr(config, switch) == getattr(base, switch):
            raise ConfigError(f"{where}.{name} = {value!r} does nothing without {where}.{switch}: legal is {plain!r}")


def option(name: str) -> str:
    """Return how a field or an argument is written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_fields(config: Any, where: str | None) -> None:
    """Hold every field of a dataclass to its annotation, and turn each value into the annotated type: whatever it was
    given as, 1, 1.0 or a NumPy number, the same value is the same text in every process.

    Args:
        config: the dataclass.
        where: what messages start with before a field's name; None where the fields are options of the command line.

    Raises:
        ConfigError: one is of another type, not among its literals, outside its limits or not a finite number.
    """
    hints = types_of_fields(config.__class__)
    for field in fields(config):
        name = option(field.name) if where is None else f"{where}.{field.name}"
        value = checked(getattr(config, field.name), hints[field.name], name)
        object.__setattr__(config, field.name, value)  # of a frozen one too: equal, and of the type that it says


@cache
def types_of_fields(kind: type) -> Mapping[str, Any]:
    """Return the annotations of a dataclass; finding them out takes longer than all that is done with them."""
    return typing.get_type_hints(kind, include_extras=True)


def checked(value: Any, hint: Any, where: str) -> Any:
    """Return ``value`` as the annotated type: whole numbers where floats are wanted, numbers of NumPy and lists become
    Python's floats, ints and tuples.

    Raises:
        ConfigError: the annotation does not allow it; the message starts with ``where``.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        for limit in arguments[1:]:
            if isinstance(limit, Limit) and number and value not in limit:
                raise ConfigError(f"{where} = {_shown(value)}: legal are {limit}")
        return checked(value, arguments[0], where)
    if origin in (types.UnionType, typing.Union):
        return _optional(value, arguments, where)
    if origin is Literal:
        same = [argument for argument in arguments if isinstance(value, type(argument)) and value == argument]
        if not same:
            raise ConfigError(f"{where} = {_shown(value)}: legal are {', '.join(map(repr, arguments))}")
        return same[0]
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(checked(item, arguments[0], where) for item in value)
    return _plain(value, hint, where)


def checked_seed(seed: int) -> int:
    """Return a seed as Python's int.

    Raises:
        ConfigError: it is none, or beyond 64 bits.
    """
    return int(checked(seed, Seed, "seed"))


def _optional(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if type(None) not in options:
        return checked(value, options[0], where)
    if value is None:
        return None
    try:
        return checked(value, next(option for option in options if option is not type(None)), where)
    except ConfigError as error:
        raise ConfigError(f"{error}, or none") from None


def _plain(value: Any, hint: Any, where: str) -> Any:
    if hint in (int, float):
        wanted: Any = numbers.Integral if hint is int else numbers.Real  # NumPy's are registered there
        if isinstance(value, wanted) and not isinstance(value, bool):
            return _number(value, hint, where)
    elif hint is Any or isinstance(value, typing.get_origin(hint) or hint):
        if isinstance(value, Path):
            _look_for(value, where)
        return hint(value) if hint in (str, bool) else value
    raise ConfigError(f"{where} = {_shown(value)}: want {getattr(hint, '__name__', hint)}")


def _look_for(path: Path, where: str) -> None:
    """Refuse a path that cannot even be looked for: its name is too long, say, or lies where nobody may look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{where} = {_shown(str(path))}: {why}") from error


def _number(value: Any, hint: Any, where: str) -> Any:
    try:
        plain = hint(value) + 0  # of the two zeros of floats, one
    except OverflowError:
        plain = math.inf
    if not -math.inf < plain < math.inf:
        raise ConfigError(f"{where} = {_shown(value)}: legal are finite numbers")
    return plain


def _shown(value: Any) -> str:
    """Return a value as a message shows it, be it of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers that long
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."
