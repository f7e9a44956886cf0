"""What :mod:`.scale` calculates, as JSON and as Markdown tables: a pure function of the recorded runs and of a measured
result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlroute.experiments.bench.results import read_result, refusing
from rlroute.experiments.bench.scale import H100, MODELS, bench_scale, breaks_at, hold_against, recorded_loads
from rlroute.experiments.text import markdown, three_digits, with_ends
from rlroute.reading import read_runs
from rlroute.records import storing, write_atomically, write_json

WAYS = ("apart", "overlapped")


def write(path: Path, measured: Path, out: Path, command: str) -> str:
    """Calculate from the runs in ``path``, write JSON and Markdown, and return the latter.

    Args:
        path: a run store or a compact file.
        measured: a result of ``bench parallel``; without one nothing is held against it.
        out: the JSON file.
        command: the command line behind it.

    Raises:
        StoreError: a file cannot be read or written, or holds something else.
        ConfigError: the recorded experts cannot stand for those of the models.
    """
    result = calculate(path, measured) | {"command": command}
    with storing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    text = to_markdown(result)
    write_json(out, result)
    write_atomically(out.with_suffix(".md"), text)
    return text


def calculate(path: Path, measured: Path) -> dict[str, Any]:
    """Return all figures; the arguments and errors are those of :func:`write`."""
    records = read_runs(path)
    loads = recorded_loads(records)
    return {
        "bench": "scale",
        "recorded": {
            "runs": sum(map(len, loads.values())),
            "seeds": sorted({record.config["seed"] for record in records}),
            "commits": sorted({str(record.environment["commit"]) for record in records}),
        },
        "device": asdict(H100),
        "models": [asdict(model) for model in MODELS],
        "rows": bench_scale(loads),
        "check": _check(measured) if measured.exists() else None,
    }


def _check(path: Path) -> dict[str, Any]:
    what = "a result of bench parallel"
    result = read_result(path, what)
    with refusing(path, what):
        return {"command": result["command"], "commit": result["environment"]["commit"], "rows": hold_against(result)}


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return a result as tables."""
    recorded, device = result["recorded"], result["device"]
    models = [model["name"] for model in result["models"]]
    rows = {name: [row for row in result["rows"] if row["model"] == name] for name in models}
    parts = [
        f"`{result['command']}`; loads of {recorded['runs']} runs, seeds {', '.join(map(str, recorded['seeds']))}, "
        f"commit {', '.join(recorded['commits'])}; {device['name']}, "
        f"expert products at {device['gemm_efficiency']:g} of its peak: {device['source']}.",
        "One layer's step, per device, with balanced routing (memory: the experts of all layers):",
        _plans(result),
        *(part for model in result["models"] for part in _routers(model, rows[model["name"]])),
        "The fewest devices of those tried at which the efficiency is under one half, and what costs most there; "
        "exchange and compute apart / overlapped:",
        _breaks(rows, device["memory"]),
        *_checks(result["check"]),
    ]
    return "\n\n".join(parts) + "\n"


def _plans(result: Mapping[str, Any]) -> str:
    head = ["model", "devices", "shards × replicas", "MB on it", "MB within the node", "MB between nodes"]
    head += ["compute, ms", "NVLink, ms", "InfiniBand, ms", "GB of parameters and optimizer"]
    lines = []
    for row in result["rows"]:
        megabytes = [three_digits(row[part] / 1e6) for part in ("local_bytes", "within_bytes", "between_bytes")]
        times = [three_digits(1e3 * row[part]) for part in ("compute", "within", "between")]
        memory = three_digits(row["memory"] / 1e9) + (
            ", too much" if row["memory"] > result["device"]["memory"] else ""
        )
        lines.append([row["model"], row["devices"], f"{row['shards']} × {row['replicas']}", *megabytes, *times, memory])
    return _table(head, lines)


def _routers(model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    sizes = ", ".join(f"{letter} = {model[letter]}" for letter in "TDFEK")
    how = "drawn from the recorded loads" if rows[0]["drawn"] else "of the recorded loads"
    title = (
        f"{model['name']} ({sizes}; {model['source']}): imbalance, {how}, with its 95 % interval over runs; efficiency "
        "with exchange and compute apart / overlapped:"
    )

    def cell(values: Mapping[str, Any]) -> str:
        value = values["imbalance"]
        shown = with_ends(value["mean"], value["low"], value["high"])
        return f"{shown}: " + " / ".join(f"{values[way]['efficiency']:.2f}" for way in WAYS)

    head = ["", *(f"{row['devices']} devices" for row in rows)]
    return title, _table(head, [[name, *(cell(row["routers"][name]) for row in rows)] for name in rows[0]["routers"]])


def _breaks(rows: Mapping[str, Sequence[Mapping[str, Any]]], memory: float) -> str:
    def cell(found: tuple[int, str] | None) -> str:
        return "none" if found is None else f"{found[0]} ({found[1]})"

    routers = next(iter(rows.values()))[0]["routers"]
    lines = [
        [router, *(" / ".join(cell(breaks_at(part, router, way)) for way in WAYS) for part in rows.values())]
        for router in routers
    ]
    fitting = [[row["devices"] for row in part if row["memory"] <= memory] for part in rows.values()]
    lines.append(["their memory, any router", *(f"fits from {min(fit)}" if fit else "does not fit" for fit in fitting)])
    return _table(["", *rows], lines)


def _checks(check: Mapping[str, Any] | None) -> Iterable[str]:
    if check is None:
        return ["No result of `rlroute bench parallel` was there to hold the times against."]
    head = ["rates of", "GFLOP/s", "MB/s", "predicted for", "share of the exchange: predicted", "measured"]
    lines = [
        [row["from"], three_digits(row["flops"] / 1e9), three_digits(row["bandwidth"] / 1e6), row["of"]]
        + [f"{row['share'][what]:.1%}" for what in ("predicted", "measured")]
        + [
            f"{row['slowdown']['predicted']:.2f}",
            with_ends(**row["slowdown"]["measured"]),
        ]
        for row in check["rows"]
    ]
    return [
        f"Two workers on two CPU cores, held against `{check['command']}` at commit {check['commit']}:",
        _table([*head, "slowdown: predicted", "measured"], lines),
    ]


def _table(head: Sequence[object], lines: Iterable[Sequence[object]]) -> str:
    return markdown(head, lines, "<" * len(head))
