"""What ``rlroute routers`` and ``rlroute runs`` print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, replace
from glob import escape
from pathlib import Path
from typing import Any

import torch

from rlroute.config import ModelConfig, needed_fields
from rlroute.errors import StoreError
from rlroute.experiments.report.figures import worst
from rlroute.experiments.text import NOTHING
from rlroute.faults import explain
from rlroute.foreign import printable
from rlroute.model.transformer import ModelShape, router_shapes
from rlroute.records import ENDED, TRACEBACK, failure, last_row, read_runs, state
from rlroute.registry import broken, router_class, router_file, router_names
from rlroute.routing import Router, RouterShape
from rlroute.schema import EvalRow, RunRecord


def routers_text() -> str:
    """Describe every router that can be loaded: what it does, its paper, its fields and their defaults, and what holds
    for these: what it learns from, its gate, the shapes that it refuses.
    """
    left_out = broken()
    return printable("\n\n".join(_router_text(name) for name in router_names() if name not in left_out))


def _router_text(name: str) -> str:
    router = router_class(name)
    module = __import__(router.__module__, fromlist=["__doc__"])
    described = [line for line in (module.__doc__ or "").splitlines() if line.strip()][:2]
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
        f"learns from: {', '.join(sorted(shown.learns_from)) or 'nothing'}; gate: {gate}",
        *marks,
        f"fields: {options or 'none'}",
    ]
    return "\n    ".join(lines)


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


def runs_text(path: Path) -> str:
    """List the runs of a store and what has become of each, one a line: first those that have ended."""
    lines = [records_text(read_runs(path))]
    for folder in sorted(path.iterdir()) if path.is_dir() else ():
        now = state(folder)
        if now != "empty" and now not in ENDED:
            row, reason = last_row(folder), failure(folder)
            why = f"  {reason}" if now == "set aside" else ""
            lines.append(f"{printable(folder.name):48} {now:13} {row['step'] if row else 0:7} {'-':>9}{why}")
    return "\n".join(lines)


def records_text(records: Sequence[RunRecord]) -> str:
    """List ended runs, one a line."""
    lines = [f"{'run':48} {'status':13} {'steps':>7} {'bits/byte':>9}"]
    for record in records:
        final = record.summary["final"]
        score = f"{final['bits_per_byte']:9.4f}" if final else f"{'-':>9}"
        lines.append(f"{record.id:48} {record.summary['status']:13} {record.summary['steps']:7} {score}")
    return "\n".join(lines)


def run_text(path: Path, start: str) -> str:
    """Show one run: its summary and the table of its evaluations; of one that failed the reason, and its traceback's
    place.

    Raises:
        StoreError: no run, or more than one, starts so.
    """
    failed = [f for f in path.glob(f"{escape(start)}*") if state(f) == "set aside"] if path.is_dir() else []
    if len(failed) == 1:
        where = f"\ntraceback in {failed[0] / TRACEBACK}" if (failed[0] / TRACEBACK).exists() else ""
        return f"{failed[0].name}\nset aside: {failure(failed[0])}{where}"
    found = [record for record in read_runs(path) if record.id.startswith(start)]
    if len(found) != 1:
        ids = ", ".join(record.id for record in found or read_runs(path)) or "none"
        raise StoreError(f"{len(found)} ended runs start with {start!r}: there are {ids}")
    return _record_text(found[0])


def _record_text(record: RunRecord) -> str:
    evals = "\n".join(
        f"{row['step']:7} {row['bits_per_byte']:9.4f} {_vio(row):>8} {sum(row['dead_L']):5}" for row in record.evals
    )
    header = f"{'step':>7} {'bits/byte':>9} {'MaxVio':>8} {'dead':>5}"
    parts = {"config": record.config, "environment": record.environment, "summary": record.summary}
    return f"{record.id}\n{header}\n{evals}\n{json.dumps(parts, indent=1)}"


def _vio(row: EvalRow) -> str:
    vio = worst(row)
    return NOTHING if vio is None else f"{vio:.3f}"
