"""What ``rlroute runs`` prints: the runs of a store, ended or not, and all that is known of one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlroute.alarms import Alarm, alarms, alarms_of
from rlroute.errors import StoreError
from rlroute.experiments.comparison.entries import labels
from rlroute.experiments.terminal import Grid
from rlroute.experiments.text import NOTHING
from rlroute.reading import failure, read_part, read_run, read_runs, rows_so_far, worst_vio
from rlroute.records import ENDED, state
from rlroute.schema import EvalRow, RunRecord


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What is said of a run; ``config`` is None where it was not begun, the numbers where there are none yet."""

    id: str
    config: Mapping[str, Any] | None
    state: str
    step: int
    bits: float | None
    begun: str
    reason: str = ""
    alarms: tuple[Alarm, ...] = ()
    """Those that are over too."""

    @property
    def standing(self) -> str:
        """The kinds of the alarms that the last rows raise."""
        return ", ".join(dict.fromkeys(alarm.kind for alarm in self.alarms if alarm.until is None))


def list_runs(store: Path) -> list[Listed]:
    """List the runs of a store, or of a compact file: what each is, and what has become of it.

    Raises:
        StoreError: there is nothing there.
    """
    if not store.is_dir():
        return list_records(read_runs(store))
    return [_listed(folder) for folder in sorted(store.iterdir()) if folder.is_dir() and _is_run(folder)]


def list_records(records: Sequence[RunRecord]) -> list[Listed]:
    """List ended runs."""
    return [_of_record(record) for record in records]


def _is_run(folder: Path) -> bool:
    return state(folder) != "empty" or (folder / ".lock").exists()


def _of_record(record: RunRecord) -> Listed:
    final = record.summary["final"]
    return Listed(
        id=record.id,
        config=record.config["config"],
        state=record.summary["status"],
        step=record.summary["steps"],
        bits=final["bits_per_byte"] if final else None,
        begun=record.environment.get("begun", ""),
        alarms=tuple(alarms_of(record)),
    )


def _idle(folder: Path) -> float:
    """Return the seconds since a run's last row was written, or since it was begun."""
    files = [path for name in ("metrics.jsonl", "config.json", ".lock") if (path := folder / name).exists()]
    return max(0.0, time.time() - files[0].stat().st_mtime)


def _listed(folder: Path) -> Listed:
    """Read a run from its folder, as far as it has come; what cannot be read is damaged."""
    try:
        if (now := state(folder)) in ENDED:
            return _of_record(read_run(folder))
        described, begun = read_part(folder, "config"), (read_part(folder, "environment") or {}).get("begun", "")
        rows, idle = rows_so_far(folder), _idle(folder) if now == "running" else None
        evals = [row for row in rows if row["kind"] == "eval"]
        return Listed(
            id=folder.name,
            config=described and described["config"],
            state="not begun" if now == "empty" else now,
            step=rows[-1]["step"] if rows else 0,
            bits=evals[-1]["bits_per_byte"] if evals else None,
            begun=begun,
            reason=(failure(folder) or "") if now == "set aside" else "",
            alarms=tuple(alarms(folder.name, described["config"]["model"], rows, idle)) if described else (),
        )
    except (StoreError, LookupError, TypeError) as error:
        return Listed(id=folder.name, config=None, state="damaged", step=0, bits=None, begun="", reason=str(error))


def to_grid(runs: Sequence[Listed]) -> Grid:
    """Return runs as a table, those of one router together, with the fields in which they differ."""
    called, said = short_ids([run.id for run in runs]), {run.id: _parts(run.id)[0] or run.id for run in runs}
    said |= labels({run.id: run.config for run in runs if run.config}, whole=True)
    lines = []
    for run in sorted(runs, key=lambda run: (said[run.id], _parts(run.id)[2].zfill(20), run.id)):
        steps = f"{run.step:,}" + (f" of {run.config['train']['steps']:,}" if run.config else "")
        bits = NOTHING if run.bits is None else f"{run.bits:.4f}"
        begun = run.begun[:16].replace("T", " ") or NOTHING
        lines.append([said[run.id], _parts(run.id)[2], run.state, steps, bits, begun, run.standing, called[run.id]])
    head = ["run", "seed", "state", "steps", "bits/byte", "begun (UTC)", "alarms", "id"]
    if not any(run.standing for run in runs):
        for line in (head, *lines):
            del line[-2]
    left, spare = ("state", "begun (UTC)", "alarms", "id"), ("begun (UTC)", "seed", "steps", "alarms")
    return Grid(head, lines, left=left, spare=spare)


def _parts(run: str) -> tuple[str, str, str]:
    """Return the router, the hash and the seed that a run's id is made of; nothing of any other name."""
    match = re.fullmatch(r"(.+)-([0-9a-f]+)-s(\d+)", run)
    return (match[1], match[2], match[3]) if match else ("", "", "")


def short_ids(runs: Sequence[str]) -> dict[str, str]:
    """Return each id without its router, and with as much of its hash as tells all of them apart: ``3f2a-s0``."""
    digests = {_parts(run)[1] for run in runs}
    length = next((n for n in range(4, 12) if len({digest[:n] for digest in digests}) == len(digests)), 12)
    return {run: f"{digest[:length]}-s{seed}" if digest else run for run in runs for _, digest, seed in [_parts(run)]}


def find(runs: Iterable[str], word: str) -> list[str]:
    """Return the ids that a word stands for: itself, if it is one; else those that begin with it, and those of which
    :func:`short_ids` makes it, or could.
    """
    runs = list(runs)
    return [word] if word in runs else [run for run in runs if _is_called(run, word)]


def _is_called(run: str, word: str) -> bool:
    if all(_parts(word)):  # the seed of a whole id is not the start of another
        return run == word
    digest, dash, seed = word.rpartition("-s")
    return run.startswith(word) or bool(
        dash and _parts(run)[2] == seed and digest and _parts(run)[1].startswith(digest)
    )


def run_text(store: Path, word: str) -> str:
    """Show one run, ended or not: its state, its evaluations, where it stands, and what it was begun with.

    Raises:
        StoreError: no run, or more than one, is called so.
    """
    folders = {f.name: f for f in store.iterdir() if f.is_dir() and _is_run(f)} if store.is_dir() else {}
    records = {} if store.is_dir() else {record.id: record for record in read_runs(store)}
    ids = sorted((*folders, *records))
    found = find(ids, word)
    if len(found) != 1:
        raise StoreError(f"{len(found)} runs are called {word!r}: there are {', '.join(found or ids) or 'none'}")
    return _folder_text(folders[found[0]]) if folders else _record_text(records[found[0]])


def _record_text(record: RunRecord) -> str:
    parts = {"config": record.config, "environment": record.environment, "summary": record.summary}
    lines = [record.summary["status"], *map(_said, _of_record(record).alarms)]
    return _text(record.id, lines, record.evals, parts)


def _folder_text(folder: Path) -> str:
    if state(folder) in ("finished", "diverged"):
        return _record_text(read_run(folder))
    listed, rows = _listed(folder), rows_so_far(folder)
    lines = [f"{listed.state}: {listed.reason}" if listed.reason else listed.state, *map(_said, listed.alarms)]
    if rows:
        lines.append(f"last row: {json.dumps(rows[-1])}")
    files = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    lines.append(f"in {folder}: {', '.join(sorted(files)) or 'nothing yet'}")
    parts = {name: part for name in ("config", "environment") if (part := read_part(folder, name))}
    return _text(folder.name, lines, [row for row in rows if row["kind"] == "eval"], parts)


def _said(alarm: Alarm) -> str:
    return f"alarm: {alarm}"


def _text(run: str, lines: Sequence[str], evals: Sequence[Any], parts: Mapping[str, Any]) -> str:
    table = [f"{'step':>7} {'bits/byte':>9} {'MaxVio':>8} {'dead':>5}"]
    table += [f"{row['step']:7} {row['bits_per_byte']:9.4f} {_vio(row):>8} {sum(row['dead_L']):5}" for row in evals]
    return "\n".join([run, *lines, *table, json.dumps(parts, indent=1)])


def _vio(row: EvalRow) -> str:
    vio = worst_vio(row)
    return NOTHING if vio is None else f"{vio:.3f}"
