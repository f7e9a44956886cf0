"""Reading the run store: every record is held to :mod:`rlroute.schema`, and to what its readers rely on between fields,
before anyone sees it. What does not fit is refused in one line that names file and field.

A run's folder and its files are no links: whoever may write a store may not make us read, or write, elsewhere.

Shape suffixes: L routed sites, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from rlroute.config import DENSE, SCHEMA, DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError, StoreError
from rlroute.foreign import Unfit, hold, parse_json, read_bytes, reading, shown, why
from rlroute.schema import (
    Configuration,
    Described,
    Environment,
    EvalRow,
    Failure,
    LoadRow,
    RunRecord,
    Seal,
    Stored,
    Summary,
    TrainRow,
)
from rlroute.sites import Site, sites
from rlroute.values import from_dict

Row = dict[str, Any]
READABLE = frozenset(range(1, SCHEMA + 1))
"""The versions of the schema that this code reads."""
LINE = 1 << 26
"""Bytes of the longest line."""
FILE = 1 << 32
"""Bytes of the largest file of lines."""
MOST_ASKED = 1_000_000
"""Runs that are trained together, each entry with each seed."""
_FILES = {"config": Described, "environment": Environment, "summary": Summary, "failed": Failure}
ROWS: dict[str, dict[Any, Any]] = {
    "metrics.jsonl": {"eval": EvalRow, "train": TrainRow},
    "loads.jsonl": {None: LoadRow},
}
"""What a row is, by its file and its ``kind``; rows of loads have none."""


# Runs


def read_runs(path: Path) -> list[RunRecord]:
    """Return the ended runs of a store folder or of a compact file, sorted by id.

    Raises:
        StoreError: there is nothing there, or a record is truncated, foreign or of another schema.
    """
    with _naming(path):
        file, folder = path.is_file(), path.is_dir()
    if file:
        records = [_record(line, where, Stored) for where, line in read_lines(path, follow=True)]
    elif folder:
        records = [read_run(summary.parent) for summary in path.glob("*/summary.json")]
    else:
        raise StoreError(f"no run store or compact file at {path}")
    return sorted(records, key=lambda record: record.id)


def read_run(folder: Path) -> RunRecord:
    """Return the record of an ended run.

    Raises:
        StoreError: it is truncated, foreign, of another schema or another run's.
    """
    refuse_link(folder)
    parts: Row = {n: read_json(folder / f"{n}.json", _FILES[n]) for n in ("config", "environment", "summary")}
    if (folder / "seal.json").exists():
        parts["seal"] = read_json(folder / "seal.json", Seal)
    metrics = read_rows(folder / "metrics.jsonl")
    parts["evals"] = [row for row in metrics if row.get("kind") == "eval"]
    parts["train"] = [row for row in metrics if row.get("kind") == "train"]
    record = _record(parts | {"loads": read_rows(folder / "loads.jsonl")}, folder)
    if record.id != folder.name:
        raise StoreError(f"{folder} holds the record of another run, {record.id}")
    return record


def refuse_link(folder: Path) -> None:
    """Refuse a run's folder that is a link.

    Raises:
        StoreError: it is one.
    """
    if folder.is_symlink():
        raise StoreError(f"{folder} is a link: a run's folder lies in its store")


def read_described(folder: Path) -> Described:
    """Return what config.json of a run's folder holds.

    Raises:
        StoreError: it cannot be read, or is none.
    """
    described = cast(Described, read_json(folder / "config.json", Described))
    with _naming(folder / "config.json"):
        hold_config(described["config"])
    return described


def read_part(folder: Path, name: str) -> Row | None:
    """Return what ``config``, ``environment``, ``summary`` or ``failed``.json of a run's folder holds, be the run ended
    or not; None where there is no such file.

    Raises:
        StoreError: it cannot be read, or is none.
    """
    refuse_link(folder)
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    return cast(Row, read_described(folder)) if name == "config" else read_json(path, _FILES[name])


def failure(folder: Path) -> str | None:
    """Return why the run of a folder was set aside, None if it was not.

    Raises:
        StoreError: the note cannot be read, or is none.
    """
    note = read_part(folder, "failed")
    return None if note is None else str(note["reason"])


def site_keys(model: Mapping[str, Any]) -> list[Site]:
    """Return the keys of a model's routed sites, in the order of a record's lists, from its recorded configuration,
    older or newer than this code.
    """
    return list(sites(_known(ModelConfig, model, "model")))


def worst_vio(row: Mapping[str, Any]) -> float | None:
    """Return the largest MaxVio of an evaluation; None where no site chose anything."""
    return max((vio for vio in row["max_vio_L"] if vio is not None), default=None)


# Files


def read_json(path: Path, kind: Any = Row) -> Row:
    """Return what a JSON file holds.

    Args:
        path: the file.
        kind: the type that it is held to; by default any object will do.

    Raises:
        StoreError: it cannot be read, or does not fit.
    """
    with _naming(path):
        value = parse_json(read_bytes(path))
        if isinstance(value, dict) and "schema" in getattr(kind, "__annotations__", {}):
            _refuse_schema(value.get("schema"))
        hold(value, kind)
    return cast(Row, value)


def read_rows(path: Path, torn_ok: bool = False) -> list[Row]:
    """Return the rows of metrics.jsonl or loads.jsonl; ``torn_ok`` leaves out a last line whose writing was cut off.

    Raises:
        StoreError: it cannot be read, or a line is no such row.
    """
    rows = []
    for where, row in read_lines(path, torn_ok):
        with _naming(where):
            hold_row(row, path)
        rows.append(row)
    return rows


def rows_so_far(folder: Path) -> list[Row]:
    """Return the complete rows of a run folder's metrics, be the run ended or not; none before the first.

    Raises:
        StoreError: a line is no such row.
    """
    path = folder / "metrics.jsonl"
    return read_rows(path, torn_ok=True) if path.exists() else []


def last_row(folder: Path) -> Row | None:
    """Return the last complete row of a run folder's metrics, None before the first.

    Raises:
        StoreError: it is no such row.
    """
    refuse_link(folder)
    file = folder / "metrics.jsonl"
    if not file.exists():
        return None
    with _naming(file):
        line = last_line(file)
        if line is None:
            return None
        row = parse_json(line)
        hold_row(row, file)
    return cast(Row, row)


def last_line(path: Path) -> bytes | None:
    """Return the last line that has an end; None where there is none."""
    window = 4096
    with reading(path, FILE) as file:
        size = file.seek(0, 2)
        while True:  # from the end, twice as far back until a whole line is in sight
            file.seek(max(0, size - window))
            lines = file.read(window).split(b"\n")[:-1]
            if len(lines) > 1 or window >= size:
                return lines[-1] if lines else None
            if window > LINE:
                raise Unfit(f"its last line has more than {LINE:,} bytes")
            window *= 2


def read_lines(path: Path, torn_ok: bool = False, *, follow: bool = False) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a file, one a line, each with what it is called.

    Raises:
        StoreError: the file cannot be read, or a line is no object or too long.
    """
    with _naming(path), reading(path, FILE, follow=follow) as file:
        number = 0
        while line := file.readline(LINE + 1):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) > LINE:
                    raise Unfit(f"line {number} has more than {LINE:,} bytes")
                if torn_ok:
                    return
                raise Unfit("it is truncated: its last line has no end")
            where = f"{path}, line {number}"
            with _naming(where):
                value = parse_json(line)
                if not isinstance(value, dict):
                    raise Unfit(f"it is {shown(value)}: want an object")
            yield where, value


@contextmanager
def _naming(file: Path | str) -> Iterator[None]:
    """Turn what a reader refuses into a StoreError that names the file."""
    try:
        yield
    except StoreError:
        raise
    except (Unfit, ConfigError) as error:
        raise StoreError(f"{file}: {why(error)}") from error
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {why(error)}") from error


# What fits


def hold_row(row: Row, file: Path) -> None:
    kind, legal = row.get("kind"), ROWS[file.name]
    if not isinstance(kind, str | None) or kind not in legal:
        raise Unfit(f" = {shown(kind)}: legal in {file.name} is {' or '.join(map(repr, legal))}", "kind")
    hold(row, legal[kind])


def _refuse_schema(schema: Any, *path: str) -> None:
    if type(schema) is not int or schema not in READABLE:
        legal = " and ".join(map(str, sorted(READABLE)))
        raise Unfit(f" has schema {shown(schema)}, this version reads {legal}", *path)


def _record(parts: Row, file: Path | str, kind: Any = Row) -> RunRecord:
    """Return a record, once its parts are held to a type, unless they have been, and to one another."""
    with _naming(file):
        missing = [name for name in Stored.__required_keys__ if name not in parts]
        if missing:
            raise Unfit(f"it is not a run record: it lacks {', '.join(missing)}")
        for name in ("config", "summary"):
            _refuse_schema(parts[name].get("schema") if isinstance(parts[name], dict) else None, name)
        hold(parts, kind)
        kept: Row = {name: parts.get(name) for name in Stored.__annotations__}
        record = RunRecord(parts["summary"]["id"], **kept)
        refuse_inconsistent(record)
    return record


def refuse_inconsistent(record: RunRecord) -> None:
    """Refuse a record whose parts, each of which fits, do not fit together.

    Raises:
        Unfit, ConfigError: naming the field.
    """
    config, summary = record.config, record.summary
    for name in ("id", "router", "seed", "config_hash", "schema"):
        _refuse_other(summary[name], config[name], "summary", name)
    experts_L, log_every = hold_config(config["config"])
    router = _router_name(config["config"])
    _refuse_other(config["router"], router, "config", "router")
    if (summary["status"] == "diverged") != (summary["diverged"] is not None):
        raise Unfit(f" = {shown(summary['diverged'])} in a run that {summary['status']}", "summary", "diverged")
    if summary["status"] == "finished" and summary["final"] is None:
        raise Unfit(" = None in a run that finished", "summary", "final")
    rows: Iterable[tuple[str, Sequence[Any]]] = (
        ("evals", record.evals),
        ("loads", record.loads),
        ("train", record.train),
    )
    for name, found in rows:
        _refuse_disorder(found, summary["steps"], name)
        for index, row in enumerate(found):
            refuse_other_sites(row, experts_L, name, index)
    _refuse_truncated(record, log_every)
    asked = config.get("asked", {"entries": (), "seeds": ()})
    if (count := len(asked["entries"]) * len(asked["seeds"])) > MOST_ASKED:
        raise Unfit(f" = {count} runs: legal are {MOST_ASKED}", "config", "asked")


def hold_config(config: Mapping[str, Any]) -> tuple[list[int], int]:
    """Hold a recorded configuration, older or newer than this code, to the fields that this code knows.

    Returns:
        The number of experts of each routed site, and after how many steps rows are written.

    Raises:
        Unfit, ConfigError: naming the field.
    """
    hold(config, Configuration, "config")
    model = _known(ModelConfig, config["model"], "config.model")
    model.check()
    _known(DataConfig, config["data"], "config.data")
    train = _known(TrainConfig, config["train"], "config.train")
    routed = config["router"]["name"] != DENSE or config.get("others")
    return list(sites(model).values()) if routed else [], train.log_every


def _known(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    names = {field.name for field in fields(cls)}
    return from_dict(cls, {name: value for name, value in values.items() if name in names}, where)


def _router_name(config: Mapping[str, Any]) -> str:
    names = [part["name"] for part in (config["router"], *config.get("others", ()))]
    return "+".join(dict.fromkeys(name for name in names if name != DENSE)) or DENSE


def _refuse_other(value: Any, wanted: Any, *path: str) -> None:
    if value != wanted:
        raise Unfit(f" = {shown(value)}, the configuration says {shown(wanted)}", *path)


def _refuse_disorder(rows: Sequence[Any], steps: int, name: str) -> None:
    """Refuse rows that do not come in the order of their steps, or after the run's end."""
    for one, other in pairwise(rows):
        if not one["step"] < other["step"]:
            raise Unfit(f" has step {other['step']} after step {one['step']}", name)
    if rows and rows[-1]["step"] > steps:
        raise Unfit(f" has step {rows[-1]['step']}, the run ended at step {steps}", name)


def refuse_other_sites(row: Mapping[str, Any], experts_L: Sequence[int], *path: str | int) -> None:
    """Refuse lists by site that are not of the model's sites, or loads that are not of their experts."""
    lists = {name: value for name, value in row.items() if name.endswith(("_L", "_LE")) and value is not None}
    for part in ("terms", "weights"):
        found = row.get(part, {})
        lists |= {f"{part}/{name}": values for name, values in found.items() if isinstance(values, list)}
    if row.get("sampled"):
        lists["sampled/overlap_L"] = row["sampled"]["overlap_L"]
    for name, values in lists.items():
        if isinstance(values, list) and len(values) != len(experts_L):
            raise Unfit(f" has {len(values)} sites, the model {len(experts_L)}", *path, name)
    for site, (load_E, experts) in enumerate(zip(row.get("load_LE", ()), experts_L, strict=False)):
        if len(load_E) != experts:
            raise Unfit(f" has {len(load_E)} experts, the model {experts}", *path, "load_LE", site)


def _refuse_truncated(record: RunRecord, every: int) -> None:
    """Hold the rows against the summary, which was written last."""
    final, steps = record.summary["final"], record.summary["steps"]
    if final is not None and record.evals[-1:] != [final]:
        raise Unfit("it is truncated: its evaluations do not end with the summary's")
    rows: Sequence[LoadRow | TrainRow]
    for name, rows in (("loads", record.loads), ("training rows", record.train)):
        last = rows[-1]["step"] if rows else 0
        if last != steps // every * every:
            raise Unfit(f"it is truncated: its {name} end at step {last}, the run at step {steps}")
