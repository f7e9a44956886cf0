"""Stored runs as a DataFrame of polars or pandas, whichever is there: a row for each run, evaluation, training step, or
expert.

Shape suffixes: L routed sites, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from rlroute.alarms import alarms_of
from rlroute.experiments.comparison.entries import flat_config, labels
from rlroute.experiments.recipes.tuned import settings_of
from rlroute.extras import missing
from rlroute.limits import checked
from rlroute.reading import read_runs, site_keys, worst_vio
from rlroute.schema import RunRecord
from rlroute.upload import leaves

Library = Literal["polars", "pandas"]
What = Literal["runs", "evals", "train", "loads"]
Row = dict[str, Any]


def load_runs(store: Path | str = "runs", what: What = "runs", library: Library | None = None) -> Any:
    """Return the ended runs of a store or of a compact file as a DataFrame, in the order of their ids.

    Figures by site have a column each, named by the site's key (``max_vio_L/0``, ``dead_L/1.attention``); nothing
    stands for what is not defined, or what an older record does not say. Names and units: docs/python.md.

    Args:
        store: a run store's folder, or a compact file.
        what: a row for each run with its configuration, costs and last evaluation (``runs``); for each evaluation
            (``evals``) or logged training step (``train``); for each expert at each logged step (``loads``).
        library: polars or pandas; whichever is installed, polars first, if nothing is said.

    Raises:
        StoreError: there is nothing there, or a record cannot be read.
        ConfigError: an illegal value.
        MissingDependencyError: the library is not installed.
    """
    what = checked(what, What, "what")
    library = _library(library)
    runs = read_runs(Path(store))
    called = labels({run.id: run.config["config"] for run in runs})
    rows_of = {"runs": _of_run, "evals": _of_evals, "train": _of_train, "loads": _of_loads}[what]
    named = ({"id": run.id, "entry": called[run.id], "seed": run.config["seed"]} for run in runs)
    return to_frame([name | row for name, run in zip(named, runs, strict=True) for row in rows_of(run)], library)


def to_frame(rows: Sequence[Mapping[str, Any]], library: Library | None = None) -> Any:
    """Return rows as a DataFrame, with the columns of all of them in the order in which they first appear.

    Raises:
        MissingDependencyError: the library is not installed.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _alike([_plain(row.get(name)) for row in rows]) for name in names}
    return import_module(_library(library)).DataFrame(columns)


def _library(wanted: str | None) -> Library:
    """Return the library that is wanted, or the first that is installed."""
    among: tuple[Library, ...] = get_args(Library) if wanted is None else (checked(wanted, Library, "library"),)
    for name in among:
        if find_spec(name) is not None:
            return name
    raise missing("a DataFrame", among[0])


def _plain(value: Any) -> Any:
    """Return a value as a cell holds it: what is nested as JSON, and an object as its text."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _alike(values: list[Any]) -> list[Any]:
    """Return a column of one type: floats where some are, and texts where there is anything else beside them."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) < 2:
        return values
    of_all = float if kinds == {int, float} else str
    return [None if value is None else of_all(value) for value in values]


# Rows


def _of_run(run: RunRecord) -> Iterator[Row]:
    summary, final, config = run.summary, run.summary["final"], run.config["config"]
    standing = dict.fromkeys(alarm.kind for alarm in alarms_of(run) if alarm.until is None)
    yield {
        "router": run.config["router"],
        "status": summary["status"],
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "train_seconds": summary["seconds"].get("train"),
        "eval_seconds": summary["seconds"].get("eval"),
        "tokens_per_second": summary["tokens_per_second"],
        "max_vio": worst_vio(final) if final else None,
        "dead_experts": sum(final["dead_L"]) if final else None,
        **(_figures(final, run) if final else {}),
        "alarms": ", ".join(standing),
        **summary["model"],
        "settings": settings_of(config),
        "begun": run.environment.get("begun"),
        "ended": summary.get("ended"),
        "command": run.config["command"],
        "config_hash": run.config["config_hash"],
        **flat_config(config),
    }


def _of_evals(run: RunRecord) -> Iterator[Row]:
    yield from (_stepped(row, run) for row in run.evals)


def _of_train(run: RunRecord) -> Iterator[Row]:
    yield from (_stepped(row, run) for row in run.train)


def _of_loads(run: RunRecord) -> Iterator[Row]:
    sites = _sites(run)
    for row in run.loads:
        for site, load_E in zip(sites, row["load_LE"], strict=bool(row["load_LE"])):
            for expert, share in enumerate(load_E):
                yield {"step": row["step"], "site": str(site), "expert": expert, "share": share}


def _stepped(row: Mapping[str, Any], run: RunRecord) -> Row:
    return {name: row[name] for name in ("step", "tokens", "seconds")} | _figures(row, run)


def _figures(row: Mapping[str, Any], run: RunRecord) -> Row:
    """Return what was measured at a step; loads have rows of their own."""
    left_out = ("kind", "step", "tokens", "seconds", "load_LE", "chain")
    measured = {name: value for name, value in row.items() if name not in left_out and value is not None}
    return dict(leaves(measured, "", _sites(run)))


def _sites(run: RunRecord) -> list[int | str]:
    return site_keys(run.config["config"]["model"])
