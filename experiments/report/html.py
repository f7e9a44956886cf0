"""Pages: one self-contained HTML file each, that opens from a disk, works offline and asks nobody for anything.

The templates escape every text that is put into them. A page runs two scripts, Plotly's and its own, and its policy
names both by their hashes: no other can run, whatever a text that was overlooked may hold.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rlroute.experiments.terminal import Grid
from rlroute.foreign import printable

if TYPE_CHECKING:
    from jinja2 import Environment
    from plotly.graph_objects import Figure


def render_page(template: str, script: str, figures: Mapping[str, Figure], **values: Any) -> str:
    """Return a page.

    Args:
        template: the name of its template, which extends ``base.html``.
        script: the name of a script of its own, which runs after the figures are drawn; empty for none.
        figures: by the ``id`` of the elements that the template has for them. Their texts are Plotly's markup: escape
            what comes from outside.
        values: what else the template shows.
    """
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), "\n".join(map(_read, ["colours.js", "base.js", *filter(None, [script])]))]
    data = "{" + ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in figures.items()) + "}"
    return (
        _environment()
        .get_template(template)
        .render(
            scripts=scripts,
            hashes=[_hash(text) for text in scripts],
            figures=data.replace("<", "\\u003c"),
            css=_read("base.css"),
            **values,
        )
    )


def cells(grid: Grid) -> tuple[Sequence[str], list[list[str]], Sequence[str]]:
    """Return what the macro ``table`` of parts.html takes: titles, cells, the titles of columns that stand left."""
    return grid.head, [[printable(cell) for cell in line] for line in grid.lines], grid.left


@cache
def _environment() -> Environment:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(__package__, folder) for folder in ("templates", "assets")])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _read(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
