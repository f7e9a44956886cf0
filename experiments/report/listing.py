"""What ``rlroute routers`` prints."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, replace
from typing import Any

import torch

from rlroute.config import ModelConfig
from rlroute.faults import explain
from rlroute.foreign import printable
from rlroute.model.transformer import ModelShape, router_shapes
from rlroute.registry import broken, router_class, router_file, router_names
from rlroute.routing import Router, RouterShape
from rlroute.values import needed_fields

REFUSED = {
    "Soft MoE": (
        "Puigcerver et al. 2023 (arXiv 2308.00951)",
        "each slot of an expert holds a weighted mean of all tokens, and each token gets a weighted sum of all slots",
    ),
    "SMEAR": (
        "Muqeeth et al. 2023 (arXiv 2306.03745)",
        "the weights of all experts are averaged into one by each example's routing distribution, and that one runs",
    ),
    "Lory": (
        "Zhong et al. 2024 (arXiv 2405.03133)",
        "the weights of all experts are averaged into one for each segment, by what the segment before it holds",
    ),
}
"""What is called a router elsewhere and cannot be one here: its paper, and what it does instead of choosing."""
NO_PAIRS = (
    "A router here answers with (token, expert) pairs and a gate for each. What mixes tokens or weights has no pairs: "
    "neither loads, capacity nor the sparse kernel would mean anything."
)


def routers_text() -> str:
    """Describe every router that can be loaded: what it does, its paper, its fields and their defaults, and what holds
    for these: what it learns from, its gate, the shapes that it refuses. Then what cannot be a router, and why.
    """
    left_out = broken()
    texts = [_router_text(name) for name in router_names() if name not in left_out]
    refused = [f"{name}, {paper}: {reason}" for name, (paper, reason) in REFUSED.items()]
    return printable("\n\n".join([*texts, "\n    ".join([f"Refused: {NO_PAIRS}", *refused])]))


def _router_text(name: str) -> str:
    router = router_class(name)
    described = [line for line in _docstring(router).splitlines() if line.strip()][:2]
    needed = needed_fields(router.Config)
    try:
        shown = router if needed else default_instance(router)
        refused = [] if needed else refusals(router)
    except Exception as error:  # one router of many
        return f"{name}  ({router.__module__})\n    cannot be made: {explain(error, {router_file(name) or ''})}"
    marks = [] if shown.causal else ["non-causal: a token's route depends on later tokens"]
    if needed:
        marks.append(f"needs {', '.join(needed)}: takes no part where no router is named")
    else:
        marks += [f"refuses {reason}" for reason in refused]
    gate = getattr(shown, "gate_meaning", "unknown")
    options = ", ".join(f"{f.name}={default_text(f)}" for f in fields(router.Config))
    lines = [
        f"{name}  ({router.__module__})",
        *described,
        f"learns from: {signals(shown, needed) or 'what its fields say'}; gate: {gate}",
        *marks,
        f"fields: {options or 'none'}",
    ]
    return "\n    ".join(lines)


def signals(shown: Router | type[Router], needed: Sequence[str]) -> str:
    """Return what a router learns from; "" where fields are needed, without which its class cannot say."""
    return ", ".join(sorted(shown.learns_from)) or ("" if needed else "nothing")


def _docstring(router: type[Router]) -> str:
    """Return the docstring of a router's module: from its source, since ``python -OO`` drops it; "" without one."""
    module = inspect.getmodule(router)
    try:
        return ast.get_docstring(ast.parse(inspect.getsource(module))) or "" if module else ""
    except (OSError, SyntaxError):
        return getattr(module, "__doc__", None) or ""


def default_instance(router: type[Router]) -> Router | type[Router]:
    """Return the router of the default configuration, without weights, in the first shape it takes; or its class."""
    for shape in _shapes():
        if router.refuses(router.Config(), shape) is None:
            with torch.device("meta"):
                return router(router.Config(), shape)
    return router


def refusals(router: type[Router]) -> list[str]:
    """Return why the router's default configuration refuses some of the shapes that are tried."""
    return list(dict.fromkeys(filter(None, (router.refuses(router.Config(), shape) for shape in _shapes()))))


def _shapes() -> list[RouterShape]:
    """Return the shapes that routers are asked about: the default model's; one expert a token; all; an odd number."""
    default = ModelConfig()
    models = [default, replace(default, k=1), replace(default, k=default.num_experts), replace(default, num_experts=15)]
    size = ModelShape(vocab_size=256, seq_len=1, seed=0, backend="cpu")
    return [shape for model in models for shape in router_shapes(model, size)]


def default_text(field: Field[Any]) -> str:
    """Return a field's default as Python writes it; ``?`` where there is none."""
    if field.default_factory is not MISSING:
        return repr(field.default_factory())
    return "?" if field.default is MISSING else repr(field.default)
