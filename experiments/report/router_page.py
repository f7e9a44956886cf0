"""docs/routers.md: every router with its paper, what it learns from and its fields, out of the routers themselves."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from textwrap import dedent

from rlroute.config import RouterConfig
from rlroute.experiments.report.listing import NO_PAIRS, REFUSED, default_instance, default_text, refusals, signals
from rlroute.experiments.text import markdown
from rlroute.registry import router_class, router_names
from rlroute.routing import Router
from rlroute.values import needed_fields

HEAD = """# Routers

Made by `rlroute routers --markdown` from the routers' own files. In an entry a router is named with its fields,
as in `reinforce:baseline=ema,balance_weight=2`; how to write one is in [CONTRIBUTING](../CONTRIBUTING.md).
"""


def routers_page() -> str:
    """Return the page."""
    names = [name for name in router_names() if router_class(name).__module__.startswith("rlroute.")]
    return "\n".join([HEAD, _index(names), *map(_section, names), _shared(), _refused()])


def _index(names: list[str]) -> str:
    routers = {name: router_class(name) for name in names}
    lines = [
        [f"[`{name}`](#{name})", _signals(router), _text(router).partition("\n\n")[0]]
        for name, router in routers.items()
    ]
    return markdown(["router", "learns from", "what it does"], lines, "<<<") + "\n"


def _section(name: str) -> str:
    router = router_class(name)
    return f"## {name}\n\n{_text(router)}\n\n{_facts(router)}\n{_fields_table(router.Config)}"


def _text(router: type[Router]) -> str:
    text = inspect.getdoc(sys.modules[router.__module__]) or ""
    return text.partition("\nShape suffixes:")[0].replace("``", "`").strip()


def _signals(router: type[Router]) -> str:
    needed = needed_fields(router.Config)
    return signals(router if needed else default_instance(router), needed)


def _facts(router: type[Router]) -> str:
    needed = needed_fields(router.Config)
    shown = router if needed else default_instance(router)
    facts = {
        "Learns from": signals(shown, needed),
        "Gate": shown.gate_meaning,
        "Sees later tokens": "" if shown.causal else "yes: its loss cannot be held against the others'",
        "Needs": ", ".join(f"`{field}`" for field in needed),
        "Refuses": "" if needed else "; ".join(refusals(router)),
    }
    return "".join(f"- {title}: {fact}\n" for title, fact in facts.items() if fact)


def _fields_table(config: type[RouterConfig]) -> str:
    shared = {f.name: f.default for f in fields(RouterConfig)}
    own = [f for f in fields(config) if f.name not in shared or f.default != shared[f.name]]
    return _table(config, [f.name for f in own]) if own else ""


def _shared() -> str:
    names = [f.name for f in fields(RouterConfig)]
    return f"## Fields of every router with scores\n\n{_table(RouterConfig, names)}"


def _refused() -> str:
    lines = [[name, paper, reason] for name, (paper, reason) in REFUSED.items()]
    return f"## What cannot be a router here\n\n{NO_PAIRS}\n\n{markdown(['refused', 'paper', 'why'], lines, '<<<')}\n"


def _table(config: type[RouterConfig], names: list[str]) -> str:
    said = dict(field_texts(config))
    by_name = {f.name: f for f in fields(config)}
    lines = [[f"`{name}`", f"`{default_text(by_name[name])}`", said.get(name, "")] for name in names]
    return markdown(["field", "default", "meaning"], lines, "<<<") + "\n"


def field_texts(config: type[RouterConfig]) -> Iterator[tuple[str, str]]:
    """Yield each field of a configuration with the text that stands beneath it in the source, base classes first."""
    for part in reversed(config.__mro__):
        if not issubclass(part, RouterConfig):
            continue
        (body,) = (
            node.body for node in ast.parse(dedent(inspect.getsource(part))).body if isinstance(node, ast.ClassDef)
        )
        for node, following in pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(following, ast.Expr)
            ):
                yield node.target.id, " ".join(str(ast.literal_eval(following.value)).replace("``", "`").split())
