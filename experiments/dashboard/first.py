"""A page as plain HTML: what a browser shows of the store before the page's scripts have been read, or without them.

It is made of the same parts as the page itself, but for figures, whose places are left empty. Every text and attribute
is escaped, and nothing in it is a script.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from dash import dcc
from dash.development.base_component import Component

ENTRY = '<div id="react-entry-point">'
FIRST = "first"
"""The id of what is shown first; the page's script takes it away once the page itself is there (base.css hides that
until then).
"""
TAGS = {"Link": "a", "Input": "input"}
"""What is HTML beside what Dash calls so."""
NAMES = {"className": "class"} | {
    name: name for name in ("href", "src", "alt", "width", "height", "scope", "placeholder", "aria-sort")
}
VOID = frozenset({"img", "input"})


def put_first(page: str, part: Any) -> str:
    """Return the HTML that Dash makes, with a part of a page before the place where the scripts enter theirs."""
    head, entry, rest = page.partition(ENTRY)
    assert entry, "Dash enters the page elsewhere"
    return f'{head}<div id="{FIRST}">{to_html(part)}</div>{entry}{rest}'


def to_html(part: Any) -> str:
    """Return a part of a page as HTML, without ids: what is neither HTML nor a link is left out."""
    if part is None:
        return ""
    if isinstance(part, list | tuple):
        return "".join(map(to_html, part))
    if not isinstance(part, Component):
        return escape(str(part))
    tag = TAGS.get(part._type) if isinstance(part, dcc.Link | dcc.Input) else part._type.lower()
    if tag is None or (tag not in TAGS.values() and part._namespace != "dash_html_components"):
        return ""
    said = {name: getattr(part, prop) for prop, name in NAMES.items() if getattr(part, prop, None) is not None}
    if style := getattr(part, "style", None):
        said["style"] = ";".join(f"{_dashed(name)}:{_pixels(value)}" for name, value in style.items() if value)
    opening = f"<{tag}" + "".join(f' {name}="{escape(str(value))}"' for name, value in said.items()) + ">"
    return opening if tag in VOID else f"{opening}{to_html(getattr(part, 'children', None))}</{tag}>"


def _dashed(name: str) -> str:
    return re.sub("[A-Z]", lambda found: f"-{found[0].lower()}", name)


def _pixels(value: object) -> str:
    return f"{value}px" if isinstance(value, int | float) else str(value)
