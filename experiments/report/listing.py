"""What ``rlroute routers`` and ``rlroute runs`` print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from rlroute.config import needed_fields
from rlroute.errors import StoreError
from rlroute.records import RunRecord, failure, last_row, read_runs
from rlroute.registry import router_class, router_names


def routers_text() -> str:
    """Describe every router: what it does, its paper, what it learns from, its fields and their defaults."""
    return "\n\n".join(_router_text(name) for name in router_names())


def _router_text(name: str) -> str:
    router = router_class(name)
    module = __import__(router.__module__, fromlist=["__doc__"])
    described = [line for line in (module.__doc__ or "").splitlines() if line.strip()][:2]
    marks = [] if router.causal else ["non-causal: a token's route depends on later tokens"]
    needed = needed_fields(router.Config)
    if needed:
        marks.append(f"needs {', '.join(needed)}: takes no part where no router is named")
    options = ", ".join(f"{f.name}={_default(f)}" for f in fields(router.Config))
    lines = [
        f"{name}  ({router.__module__})",
        *described,
        f"learns from: {', '.join(sorted(router.learns_from)) or 'nothing'}; gate: {router.gate_meaning}",
        *marks,
        f"fields: {options or 'none'}",
    ]
    return "\n    ".join(lines)


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return repr(field.default_factory())
    return "?" if field.default is MISSING else repr(field.default)


def runs_text(path: Path) -> str:
    """List the runs of a store, ended, unfinished and set aside, one a line."""
    lines = [records_text(read_runs(path))]
    if path.is_dir():
        for folder in sorted({f.parent for name in ("config", "failed") for f in path.glob(f"*/{name}.json")}):
            if not (folder / "summary.json").exists():
                row, reason = last_row(folder), failure(folder)
                status, why = ("set aside", f"  {reason}") if reason else ("unfinished", "")
                lines.append(f"{folder.name:48} {status:10} {row['step'] if row else 0:7} {'-':>9}{why}")
    return "\n".join(lines)


def records_text(records: Sequence[RunRecord]) -> str:
    """List ended runs, one a line."""
    lines = [f"{'run':48} {'status':10} {'steps':>7} {'bits/byte':>9}"]
    for record in records:
        final = record.summary["final"]
        score = f"{final['bits_per_byte']:9.4f}" if final else f"{'-':>9}"
        lines.append(f"{record.id:48} {record.summary['status']:10} {record.summary['steps']:7} {score}")
    return "\n".join(lines)


def run_text(path: Path, start: str) -> str:
    """Show one ended run: its summary and the table of its evaluations.

    Raises:
        StoreError: no run, or more than one, starts so.
    """
    found = [record for record in read_runs(path) if record.id.startswith(start)]
    if len(found) != 1:
        ids = ", ".join(record.id for record in found or read_runs(path)) or "none"
        raise StoreError(f"{len(found)} ended runs start with {start!r}: there are {ids}")
    return _record_text(found[0])


def _record_text(record: RunRecord) -> str:
    evals = "\n".join(
        f"{row['step']:7} {row['bits_per_byte']:9.4f} {max(row['max_vio_L'], default=0):8.3f} {sum(row['dead_L']):5}"
        for row in record.evals
    )
    header = f"{'step':>7} {'bits/byte':>9} {'MaxVio':>8} {'dead':>5}"
    parts = {"config": record.config, "environment": record.environment, "summary": record.summary}
    return f"{record.id}\n{header}\n{evals}\n{json.dumps(parts, indent=1)}"
