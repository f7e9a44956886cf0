"""Routers from outside: ``--include FILE``, which every command takes, and those that cannot be loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from rlroute.errors import ConfigError

OPTION = "--include"


def without_includes(words: Sequence[str]) -> list[str]:
    """Return a command line without ``--include FILE`` (or ``--include=FILE``), and bring those routers in.

    It stands anywhere and as often as there are files. The processes that a command starts get them as well: through
    the environment on this machine, and with each job on others.

    Raises:
        ConfigError: there is no such file, or its name cannot be a router's.
    """
    files, rest, left = [], [], iter(words)
    for word in left:
        option, equals, file = word.partition("=")
        if option != OPTION:
            rest.append(word)
        elif file := file if equals else next(left, ""):
            files.append(file)
        else:
            raise ConfigError(f"{OPTION} wants a router's file: {OPTION} FILE")
    if files:
        from rlroute.registry import include  # and with it torch, which the command line's help does without

        include(*files)
    return rest


def name_broken(*wanted: str) -> None:
    """Name, one a line, the routers that cannot be loaded, but for those that are asked for: these end the command."""
    from rlroute.registry import broken

    words = {word for entry in wanted for word in re.findall(r"\w+", entry)}
    for name, reason in broken().items():
        if name not in words:
            print("left out:", " ".join(reason.split()), file=sys.stderr)
