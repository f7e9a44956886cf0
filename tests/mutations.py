"""Damage and malice for the readers of foreign files: texts, bytes and JSON values changed at random by a seed."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any

DEEP, LONG, HUGE = "@deep@", "@long@", "@huge@"
RAW = {
    json.dumps(DEEP): "[" * 4000 + "]" * 4000,
    json.dumps(LONG): "9" * 5000,
    json.dumps(HUGE): "1" + "0" * 400 + ".5",
}
"""What stands for a value that Python cannot write, and its text."""
TEXTS = (
    "",
    " ",
    "0",
    "dense",
    "none",
    "\x1b[31m\x1b]0;title\x07",
    "\u202e\u0085",
    "\ud800",
    "=1+1",
    "@SUM(A1)",
    "../../elsewhere",
    "/dev/zero",
    "</script><script>alert(1)</script>",
    "a" * 3000,
    "1, then 2",
    "e" * 64,
)
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 2**31, 2**53 + 1, -(2**63), 2**63, 2**64, 10**30, 1e-320, 1e150, -1e308)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": {"b": []}}, DEEP, LONG, HUGE)
HOSTILE: tuple[Any, ...] = (*TEXTS, *NUMBERS, *NOT_FINITE, *OTHERS)
"""Values that do not belong where they are put."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of a value's parts, itself left out; of a long list the ends alone."""
    if isinstance(value, dict):
        parts: list[Any] = list(value.items())
    elif isinstance(value, list):
        parts = [(i, value[i]) for i in sorted({0, 1, len(value) - 1}) if 0 <= i < len(value)]
    else:
        return []
    return [place for name, part in parts for place in [(*path, name), *places(part, (*path, name))]]


def change_value(value: Any, random: Random) -> Any:
    """Return a plain value with one part replaced, removed, doubled, wrapped, renamed or swapped with another."""
    value, found = deepcopy(value), places(value)
    if not found:
        return random.choice(HOSTILE)
    *above, name = random.choice(found)
    holder = value
    for step in above:
        holder = holder[step]
    kind = random.choice(("replace", "replace", "replace", "remove", "wrap", "swap", "double", "rename", "scale"))
    if kind == "replace":
        holder[name] = random.choice(HOSTILE)
    elif kind == "remove":
        del holder[name]
    elif kind == "wrap":
        holder[name] = random.choice(([holder[name]], {"a": holder[name]}))
    elif kind == "swap":
        other = value
        for step in random.choice(found):
            other = other[step]
        holder[name] = deepcopy(other)
    elif kind == "scale" and isinstance(holder[name], int | float):
        holder[name] *= random.choice((-1, 2, 10, 1e-9, 1e9))
    elif isinstance(holder, list):
        holder.insert(random.randrange(len(holder) + 1), deepcopy(holder[name]))
    else:
        holder[random.choice(TEXTS)] = holder.pop(name)
    return value


def to_json(value: Any) -> bytes:
    """Return a value's JSON, with what Python cannot write in it."""
    text = json.dumps(value)
    for placeholder, raw in RAW.items():
        text = text.replace(placeholder, raw)
    return text.encode()


def change_json(text: bytes, random: Random) -> bytes:
    """Return the text of a changed value; of lines of values, with one line changed, removed, doubled or moved."""
    lines = text.splitlines(keepends=True)
    if len(lines) < 2 or not lines[1].startswith(b"{"):
        return to_json(change_value(json.loads(text), random)) + b"\n"
    place = random.choice((0, len(lines) - 1, random.randrange(len(lines))))
    kind = random.choice(("change", "change", "change", "remove", "double", "move"))
    line = lines.pop(place)
    if kind == "change":
        lines.insert(place, to_json(change_value(json.loads(line), random)) + b"\n")
    elif kind == "double":
        lines[place:place] = [line, line]
    elif kind == "move":
        lines.insert(random.randrange(len(lines) + 1), line)
    return b"".join(lines)


def change_bytes(data: bytes, random: Random) -> bytes:
    """Return bytes with a bit flipped, a stretch cut, doubled, zeroed or drawn at random."""
    if not data:
        return bytes(random.randrange(256) for _ in range(random.randrange(1, 20)))
    start = random.randrange(len(data))
    end = min(len(data), start + random.choice((1, 2, 8, 100, len(data))))
    kind = random.choice(("flip", "flip", "cut", "double", "zero", "draw", "begin with a mark"))
    if kind == "flip":
        return data[:start] + bytes([data[start] ^ 1 << random.randrange(8)]) + data[start + 1 :]
    if kind == "begin with a mark":
        return b"\xef\xbb\xbf" + data
    between = {
        "cut": b"",
        "double": data[start:end] * 2,
        "zero": bytes(end - start),
        "draw": random.randbytes(min(end - start, 100)),
    }
    return data[:start] + between[kind] + data[end:]


def change_words(text: str, words: Sequence[str], random: Random) -> str:
    """Return a text with one of its words replaced, removed, doubled or put elsewhere; ``words`` may be put in."""
    parts = [part for part in __import__("re").split(r"([\w.+-]+)", text) if part]
    if not parts:
        return random.choice(words)
    place = random.randrange(len(parts))
    kind = random.choice(("replace", "replace", "remove", "double", "swap", "insert"))
    if kind == "replace":
        parts[place] = random.choice(words)
    elif kind == "remove":
        del parts[place]
    elif kind == "double":
        parts.insert(place, parts[place])
    elif kind == "insert":
        parts.insert(place, random.choice(words))
    else:
        other = random.randrange(len(parts))
        parts[place], parts[other] = parts[other], parts[place]
    return "".join(parts)


def several(change: Callable[[Any], Any], value: Any, random: Random) -> Any:
    """Return a value changed once to three times."""
    for _ in range(random.choice((1, 1, 2, 3))):
        value = change(value)
    return value
