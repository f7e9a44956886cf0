"""From the words of a command line to what is to be done, or to one line that says what is wrong with them."""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from typing import Any

from rlroute.errors import ConfigError

Command = Callable[..., None]
WIDE = "1000"
"""Columns at which no message is wrapped."""


def parse(words: Sequence[str], commands: Sequence[Command], description: str) -> Callable[[], None]:
    """Return what ``words`` ask for, to be called; where they ask for help or completion this is printed.

    Raises:
        ConfigError: they are no command of ours; the message names the word, and what comes nearest.
        SystemExit: help or completion was printed.
    """
    by_name = {name_of(command): command for command in commands}
    _refuse_foreign(words)
    if words and not words[0].startswith("-"):
        name = words[0].replace("_", "-")
        if name not in by_name:
            raise ConfigError(f"unknown command {words[0]!r}: {_nearest(words[0], list(by_name))}")
        commands = [by_name[name]]  # where a word is wrong, tyro goes through the options of all that it knows
    ask = _asker(commands, description)
    try:
        with redirect_stderr(io.StringIO()):
            found: Callable[[], None] = ask(words or ["--help"])
    except SystemExit as end:
        if end.code:
            raise ConfigError(_what_is_wrong(ask, words)) from None
        raise
    except AssertionError as error:  # of --tyro-print-completion, about the shell
        raise ConfigError(str(error)) from None
    return found


def name_of(command: Command) -> str:
    """Return what a command is called on the command line."""
    return command.__name__.replace("_", "-")


def _refuse_foreign(words: Sequence[str]) -> None:
    """Refuse bytes that are no text: tables and reports quote the command, and are UTF-8."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{os.fsencode(word)!r} is not UTF-8: want names that are") from None


def _asker(commands: Sequence[Command], description: str) -> Callable[[Sequence[str]], Any]:
    import tyro

    app = tyro.extras.SubcommandApp()
    for command in commands:
        app.command(_later(command))
    return lambda words: app.cli(prog="rlroute", description=description, args=words)


def _later(command: Command) -> Callable[..., Callable[[], None]]:
    """Return the command so that a call only notes it: parsing, whose output is caught, ends before work begins."""

    @functools.wraps(command)
    def noted(*values: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(command, *values, **named)

    return noted


def _choices_in_order(said: str) -> str:
    """Return argparse's message with the choices of a set, whose order is not the same in every process, sorted; None
    is said by leaving the option out.
    """

    def ordered(found: re.Match[str]) -> str:
        choices = set(re.findall("'(.*?)'", found.group(1))) - {"None"}
        return f"Legal are {', '.join(sorted(choices))}"

    return re.sub(r"Expected one of \((.*?)\)", ordered, said)


def _what_is_wrong(ask: Callable[[Sequence[str]], Any], words: Sequence[str]) -> str:
    """Return tyro's message as one line, or for an unknown option which one comes nearest."""
    rows = (row.strip("│╭╮╰╯ ") for row in _answer(ask, words).splitlines())
    _, said, *others = re.split(r"\s*[─-]{3,}\s*", " ".join(filter(None, rows)))  # a box: parts between rules
    unknown = re.match(r"Unrecognized options: (\S+?)(?:,|$)", said)
    if unknown is None:
        return _choices_in_order(said)
    word = unknown.group(1)
    path = [name for name in words[: words.index(word)] if not name.startswith("-")] if word in words else words[:1]
    if word.startswith("-"):
        legal = re.findall(r"(?<![\w-])--[a-z][\w.-]*", _answer(ask, [*path, "--help"]))
        near = get_close_matches(word.partition("=")[0], legal, n=1)
        help_of = " ".join(["rlroute", *path[:1], "--help"])
        rest = f"did you mean {near[0]!r}?" if near else f"{help_of} lists what there is"
        return f"unknown option {word!r}: {rest}"
    available = [part.partition(": ")[2].split(", ") for part in others if part.startswith("Available")]
    return f"unexpected {word!r}" + (f": {_nearest(word, available[0])}" if available else "")


def _answer(ask: Callable[[Sequence[str]], Any], words: Sequence[str]) -> str:
    """Return all that parsing these words prints."""
    text = io.StringIO()
    with _columns(WIDE), redirect_stdout(text), redirect_stderr(text):
        try:
            ask(words)
        except SystemExit:
            return text.getvalue()
    return ""


@contextmanager
def _columns(number: str) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = number
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        os.environ.update({} if before is None else {"COLUMNS": before})


def _nearest(word: str, legal: Sequence[str]) -> str:
    near = get_close_matches(word, legal, n=1)
    return f"did you mean {near[0]!r}?" if near else f"legal are {', '.join(legal)}"
