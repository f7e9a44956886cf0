"""The table of a comparison: refuse what is not comparable, reduce the rest to rows and to the proof beneath them, print it.

Everything here is a pure function of run records. This file is longer than most because what is refused, what is computed and what
is printed have to agree, and are read together by whoever doubts a figure.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from rlroute.config import DENSE
from rlroute.errors import ComparisonError
from rlroute.experiments.statistics import (
    CONFIDENCE,
    Interval,
    differences,
    holm,
    paired_p_value,
    smallest_resolvable,
    t_interval,
)
from rlroute.records import RunRecord

SAME = {
    "config.schema": "records of another schema mean other things by the same names",
    "summary.data.sha256": "another corpus is another task",
    "summary.eval_tokens_sha256": "losses on other validation tokens cannot be subtracted",
    "summary.budget.kind": "the budget is what a comparison holds equal",
    "summary.budget.amount": "the budget is what a comparison holds equal",
    "environment.kernel_backend": "kernels differ in bits and speed",
    "environment.device": "devices differ in bits and speed",
    "environment.threads": "bits and speed change with the number of threads",
    "environment.workers": "bits and speed change with the number of processes",
    "environment.expert_parallel": "bits and speed change with the number of processes",
    "environment.torch": "bits and speed change with the version",
    "environment.cpu_capability": "bits and speed change with the instruction set",
}
"""What every run of a table shares, and why."""

SAME_IN_TRAIN = ("steps", "batch_size", "dtype", "budget", "budget_amount")
"""The fields of ``train`` that every run shares; the others are ways of training an entry well (tuning), printed where they differ."""

CHOICES_IN_MODEL = ("gate_form", "k", "num_experts", "num_shared_experts", "capacity_factor")
"""The fields of ``model`` in which entries may differ on purpose; these are printed, all others and all of ``data`` are shared."""

SAME_WEIGHTS = "with one seed every router starts from the same weights"
SAME_BATCHES = "with one seed every router sees the same batches in the same order"

COSTS = ("active_parameters", "total_parameters", "flops_per_token", "training_only_flops_per_token")

TIMINGS = ("tokens_per_second",)
"""The columns that differ when the same command runs again."""

SHOWN = 8
"""Fingerprints are printed seed by seed for up to this many seeds."""


@dataclass(frozen=True)
class Entry:
    """All runs of one configuration, in the order of their seeds."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def router(self) -> str:
        """The router's name, or ``dense``."""
        return str(self.runs[0].config["router"])

    @property
    def finished(self) -> list[RunRecord]:
        """The runs that did not diverge."""
        return [run for run in self.runs if run.summary["status"] == "finished"]

    @property
    def bits_by_seed(self) -> dict[int, float]:
        """Final validation bits per byte of the finished runs."""
        return {run.config["seed"]: run.summary["final"]["bits_per_byte"] for run in self.finished}


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """The figures of one entry; None where there is nothing to say. Bits per byte are greedy unless they say sampled."""

    label: str
    router: str
    gate_form: str
    causal: bool
    n: int
    diverged: int
    bits_per_byte: Interval | None
    difference: Interval | None
    p_holm: float | None
    smallest_resolvable: float | None
    max_vio: float | None
    max_vio_layer: int | None
    dead_experts: float | None
    experts: int
    sampled_bits_per_byte: Interval | None
    overlap: float | None
    """Share of a token's greedy experts that are drawn too."""
    tokens_per_second: float | None
    active_parameters: int
    total_parameters: int
    flops_per_token: int
    training_only_flops_per_token: int
    config_hash: str


@dataclass(frozen=True)
class Table:
    """Rows from best to worst, the label of the entry that differences are taken to, and titled notes to print underneath."""

    reference: str
    rows: tuple[TableRow, ...]
    notes: tuple[tuple[str, str], ...]


def build_table(records: Sequence[RunRecord], reference: str | None = None) -> Table:
    """Return the table of ``records``, whatever their order.

    Args:
        records: finished and diverged runs.
        reference: label of the entry to take differences to; by default ``switch``, or the first by name where it is missing.

    Raises:
        ComparisonError: the runs are not comparable (the message names field, runs and values), or there is no such reference.
    """
    entries = make_entries(records)
    check_comparable(entries)
    base = _reference(entries, reference)
    adjusted = holm(_p_values(entries, base))
    rows = sorted((_row(entry, base, adjusted) for entry in entries), key=_rank)
    return Table(base.label, tuple(rows), tuple(_notes(entries, base, rows, adjusted)))


def make_entries(records: Iterable[RunRecord]) -> list[Entry]:
    """Group runs by configuration, in the order of their labels: the router's name, and in brackets what sets apart several
    configurations of one router.

    Raises:
        ComparisonError: there are no runs, or one run is there twice.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: (record.config["config_hash"], record.config["seed"])):
        groups.setdefault(record.config["config_hash"], []).append(record)
    if not groups:
        raise ComparisonError("there are no ended runs to compare")
    for runs in groups.values():
        for one, other in pairwise(runs):
            if one.config["seed"] == other.config["seed"]:
                raise ComparisonError(f"run {one.id} is there twice")
    labels = _labels({name: runs[0] for name, runs in groups.items()})
    return sorted((Entry(labels[name], tuple(runs)) for name, runs in groups.items()), key=lambda entry: entry.label)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _labels(configs: Mapping[str, RunRecord]) -> dict[str, str]:
    labels = {}
    for name, record in configs.items():
        same_router = [other for other in configs.values() if other.config["router"] == record.config["router"]]
        flats = [flatten(other.config["config"]) for other in same_router]
        varying = _varying(flats)
        of_router = [field for field in varying if field.startswith("router.")]
        enough = len({json.dumps([flat.get(field) for field in of_router]) for flat in flats}) == len(flats)
        own = flatten(record.config["config"])
        said = [f"{f.removeprefix('router.')}={own.get(f)}" for f in (of_router if enough else varying)]
        labels[name] = record.config["router"] + (f" ({', '.join(said)})" if said else "")
    return labels


def _varying(flats: Sequence[Mapping[str, Any]]) -> list[str]:
    names = sorted(set().union(*flats))
    return [name for name in names if len({json.dumps(flat.get(name), sort_keys=True) for flat in flats}) > 1]


def _reference(entries: Sequence[Entry], name: str | None) -> Entry:
    if name is None:
        return next((entry for entry in entries if entry.router == "switch"), entries[0])
    for entry in entries:
        if entry.label == name:
            return entry
    raise ComparisonError(
        f"reference {name!r} is not in the table: legal are {', '.join(entry.label for entry in entries)}"
    )


# What is refused


def check_comparable(entries: Sequence[Entry]) -> None:
    """Refuse runs that differ in more than their router, but for what is printed as a deliberate difference.

    Raises:
        ComparisonError: naming the field, the two runs and the two values.
    """
    runs = [run for entry in entries for run in entry.runs]
    for path, reason in SAME.items():
        _require_equal(path, [(run.id, _at(run, path)) for run in runs], reason)
    flats = [(run.id, flatten(run.config["config"])) for run in runs]
    for name in filter(_shared_in_config, sorted(set().union(*(flat for _, flat in flats)))):
        values = [(run_id, flat.get(name)) for run_id, flat in flats]
        _require_equal(
            f"config.{name}", values, "one comparison trains every router on the same data in the same model"
        )
    # Diverged runs count here: their seeds were trained too.
    seeds = [(entry.label, [run.config["seed"] for run in entry.runs]) for entry in entries]
    _require_equal("seeds", seeds, "differences are taken seed by seed")
    for seed in seeds[0][1]:
        _check_identity([run for run in runs if run.config["seed"] == seed])


def _at(record: RunRecord, path: str) -> Any:
    head, *rest = path.split(".")
    value = getattr(record, head)
    for name in rest:
        value = value.get(name)  # of a record older than the field, None
    return value


def _shared_in_config(name: str) -> bool:
    part, _, field = name.partition(".")
    return (
        part == "data"
        or (part == "model" and field not in CHOICES_IN_MODEL)
        or (part == "train" and field in SAME_IN_TRAIN)
    )


def _require_equal(field: str, values: Sequence[tuple[str, Any]], reason: str) -> None:
    """Refuse the first of the named values that is not equal to the first of all."""
    (one, wanted), *others = values
    for other, value in others:
        if value != wanted:
            raise ComparisonError(f"{field} differs: {one} has {wanted!r}, {other} has {value!r}; {reason}")


def _check_identity(runs: Sequence[RunRecord]) -> None:
    """Check the runs of one seed: the same initial weights, the same batches in the same order."""
    backbones = [(run.id, run.summary["fingerprint"]["backbone"]) for run in runs]
    _require_equal("fingerprint.backbone", backbones, SAME_WEIGHTS)
    for alike in _by_shape(runs).values():
        shared = [(run.id, run.summary["fingerprint"]["shared"]) for run in alike]
        _require_equal("fingerprint.shared", shared, SAME_WEIGHTS)
    for step in sorted(set().union(*map(_chains, runs))):
        chains = [(run.id, _chains(run)[step]) for run in runs if step in _chains(run)]
        _require_equal(f"batches.chain at step {step}", chains, SAME_BATCHES)
    _check_overlap(runs)


def _check_overlap(runs: Sequence[RunRecord]) -> None:
    """A finished run of another length than the longest proves its batches only where both were hashed at the same step."""
    longest = max(runs, key=lambda run: run.summary["batches"]["steps"])
    for run in runs:
        if run.summary["status"] == "finished" and not _chains(run).keys() & _chains(longest).keys():
            values = [(r.id, sorted(_chains(r))) for r in (longest, run)]
            _require_equal("batches.steps", values, "without a common step their batches cannot be compared")


def _by_shape(runs: Iterable[RunRecord]) -> dict[tuple[int, int, int | None], list[RunRecord]]:
    """Group the MoE runs whose shared parameters have the same shapes; leading dense layers are as wide as what a token runs."""
    groups: dict[tuple[int, int, int | None], list[RunRecord]] = {}
    for run in runs:
        model = run.config["config"]["model"]
        if run.config["router"] != DENSE:
            shared = model.get("num_shared_experts", 0)
            width = model["k"] + shared if model["num_dense_layers"] else None
            groups.setdefault((model["num_experts"], shared, width), []).append(run)
    return groups


def _chains(run: RunRecord) -> dict[int, str]:
    batches = run.summary["batches"]
    return {row["step"]: row["chain"] for row in run.evals} | {batches["steps"]: batches["chain"]}


# What is computed


def _row(entry: Entry, base: Entry, adjusted: Mapping[str, float]) -> TableRow:
    runs, model = entry.finished, entry.runs[0].summary["model"]
    finals = [run.summary["final"] for run in runs]
    bits = list(entry.bits_by_seed.values())
    diffs = [] if entry is base else _paired(entry, base)
    vio_L = [math.fsum(vio) / len(vio) for vio in zip(*(final["max_vio_L"] for final in finals), strict=True)]
    speeds = [run.summary["tokens_per_second"] for run in runs]
    sampled = [final["sampled"]["bits_per_byte"] for final in finals if final["sampled"]]
    overlaps = [share for f in finals if f["sampled"] for share in f["sampled"]["overlap_L"] if share is not None]
    first_moe = entry.runs[0].config["config"]["model"]["num_dense_layers"]
    return TableRow(
        label=entry.label,
        router=entry.router,
        gate_form="none" if entry.router == DENSE else entry.runs[0].summary["gate"]["form"],
        causal=entry.runs[0].summary["causal"],
        n=len(runs),
        diverged=len(entry.runs) - len(runs),
        bits_per_byte=t_interval(bits) if bits else None,
        difference=t_interval(diffs) if diffs else None,
        p_holm=adjusted.get(entry.label),
        smallest_resolvable=smallest_resolvable(diffs),
        max_vio=max(vio_L, default=None),
        max_vio_layer=first_moe + vio_L.index(max(vio_L)) if vio_L else None,
        dead_experts=math.fsum(sum(final["dead_L"]) for final in finals) / len(finals) if vio_L else None,
        experts=sum(len(load_E) for load_E in finals[0]["load_LE"]) if finals else 0,
        sampled_bits_per_byte=t_interval(sampled) if sampled else None,
        overlap=math.fsum(overlaps) / len(overlaps) if overlaps else None,
        tokens_per_second=math.fsum(speeds) / len(speeds) if speeds else None,
        config_hash=entry.runs[0].config["config_hash"],
        **{name: model[name] for name in COSTS},
    )


def _paired(entry: Entry, base: Entry) -> list[float]:
    """Return the differences over the seeds that both finished."""
    both = entry.bits_by_seed.keys() & base.bits_by_seed.keys()
    return differences(*({seed: e.bits_by_seed[seed] for seed in both} for e in (entry, base)))


def _p_values(entries: Sequence[Entry], base: Entry) -> dict[str, float]:
    found = {entry.label: paired_p_value(_paired(entry, base)) for entry in entries if entry is not base}
    return {label: p for label, p in found.items() if p is not None}


def _rank(row: TableRow) -> tuple[float, str]:
    return (math.inf if row.bits_per_byte is None else row.bits_per_byte.mean, row.label)


# What stands under the table


def _notes(
    entries: Sequence[Entry], base: Entry, rows: Sequence[TableRow], adjusted: Mapping[str, float]
) -> Iterable[tuple[str, str]]:
    runs = [run for entry in entries for run in entry.runs]
    yield "Diverged", "; ".join(_diverged(entry) for entry in entries if len(entry.finished) < len(entry.runs))
    yield (
        "Sampled",
        "; ".join(
            f"{row.label} {_plus_minus(row.sampled_bits_per_byte)} bits/byte when its experts are drawn as in training"
            + (f" ({row.overlap:.0%} of them the greedy ones)" if row.overlap is not None else "")
            for row in rows
            if row.sampled_bits_per_byte
        ),
    )
    holm_p = ", ".join(f"{row.label} {adjusted[row.label]:.3g}" for row in rows if row.label in adjusted)
    yield f"Holm-adjusted p (secondary; paired t-tests against {base.label})", holm_p
    yield "Deliberate differences", "; ".join(_deliberate(entries))
    yield "Gate form own", "; ".join(_gates(entries))
    yield (
        "Gate unit",
        "value 1/k, gradient of the router's own gate" if any(row.gate_form == "unit" for row in rows) else "",
    )
    yield "Budget", _budget(runs)
    yield from _identity(runs)
    yield from _provenance(runs)


def _diverged(entry: Entry) -> str:
    stops = [(run.config["seed"], run.summary["diverged"]) for run in entry.runs if run.summary["diverged"]]
    said = ", ".join(f"seed {seed} at step {stop['step']} ({stop['what']})" for seed, stop in stops)
    return f"{entry.label}: {said}, left out of all figures"


def _deliberate(entries: Sequence[Entry]) -> list[str]:
    flats = {entry.label: flatten(entry.runs[0].config["config"]) for entry in entries}
    said = (
        ["dense has one MLP as wide as k experts in place of the experts"]
        if DENSE in {e.router for e in entries}
        else []
    )
    for name in _varying(list(flats.values())):
        if not name.startswith("router."):
            labels: dict[str, list[str]] = {}
            for label, flat in flats.items():
                labels.setdefault(json.dumps(flat.get(name)), []).append(label)
            said.append(f"{name}: " + ", ".join(f"{value} ({', '.join(who)})" for value, who in sorted(labels.items())))
    return said or ["none"]


def _gates(entries: Sequence[Entry]) -> list[str]:
    """Say what a published gate is, once for each meaning."""
    labels: dict[str, list[str]] = {}
    for entry in entries:
        gate = entry.runs[0].summary["gate"]
        if gate["form"] == "own" and entry.router != DENSE:
            labels.setdefault(gate["meaning"], []).append(entry.label)
    return [f"{meaning} ({', '.join(who)})" for meaning, who in labels.items()]


def _budget(runs: Sequence[RunRecord]) -> str:
    budget, config = runs[0].summary["budget"], runs[0].config["config"]
    unit = {"tokens": "training tokens", "flops": "training FLOPs", "time": "seconds of training"}[budget["kind"]]
    steps = sorted({run.summary["steps"] for run in runs if run.summary["status"] == "finished"})
    counts = " to ".join(f"{count:,}" for count in dict.fromkeys((steps[0], steps[-1]))) if steps else "no"
    batch = f"{config['train']['batch_size']} sequences of {config['data']['seq_len']} tokens"
    return f"{budget['amount']:,.10g} {unit} a run; {counts} steps of {batch}"


def _identity(runs: Sequence[RunRecord]) -> Iterable[tuple[str, str]]:
    shapes = _by_shape(runs)
    for (experts, *_), alike in shapes.items():
        title = "Same initial weights" + (f" ({experts} experts)" if len(shapes) > 1 else "")
        said = f"all but the routers' own, equal over {_count(alike)} with experts: "
        yield title, said + _per_seed(alike, lambda run: run.summary["fingerprint"]["shared"])
    said = f"outside the feed-forward layers, equal over {_count(runs)}: "
    yield "Same initial backbone", said + _per_seed(runs, lambda run: run.summary["fingerprint"]["backbone"])
    finished = [run for run in runs if run.summary["status"] == "finished"] or list(runs)
    if len({run.summary["steps"] for run in finished}) == 1:
        said = f"hash chain over {finished[0].summary['steps']:,} steps, equal over {_count(finished)}: "
        yield "Same batches", said + _per_seed(finished, lambda run: run.summary["batches"]["chain"])
    else:
        yield (
            "Same batches",
            "hash chains of the shorter runs are prefixes of the longest's, compared at all common evaluation steps",
        )


def _count(runs: Sequence[RunRecord]) -> str:
    count = len({run.config["config_hash"] for run in runs})
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _per_seed(runs: Sequence[RunRecord], value: Callable[[RunRecord], str]) -> str:
    by_seed = {run.config["seed"]: value(run)[:12] for run in runs}
    if len(by_seed) > SHOWN:
        return f"{len(by_seed)} seeds, all equal"
    return ", ".join(f"seed {seed} {digest}" for seed, digest in sorted(by_seed.items()))


def _provenance(runs: Sequence[RunRecord]) -> Iterable[tuple[str, str]]:
    data = runs[0].summary["data"]
    version = f" ({data['distribution']} {data['version']})" if data["distribution"] else ""
    sizes = f"{data['train_tokens']:,} training and {data['valid_tokens']:,} validation tokens"
    yield "Corpus", f"{data['spec']}{version}, {sizes}, sha256 {data['sha256']}"
    floor = data["floor_bits_per_byte"]
    yield "Entropy floor", "" if floor is None else f"{floor:.4f} bits/byte"
    yield "Validation tokens", f"sha256 {runs[0].summary['eval_tokens_sha256']}"
    yield "Seeds", ", ".join(map(str, sorted({run.config["seed"] for run in runs})))
    yield "Command", "; ".join(sorted({run.config["command"] for run in runs if run.config.get("command")}))
    yield "Commit", ", ".join(sorted({_commit(run.environment) for run in runs}))
    versions = [f"{name} {_all(runs, name)}" for name in ("rlroute", "python", "torch", "numpy")]
    yield "Versions", ", ".join(versions)
    device = f"{_all(runs, 'device')} ({_all(runs, 'device_name')}), CPU capability {_all(runs, 'cpu_capability')}"
    kernel = f"{_all(runs, 'workers')} worker(s) a run, {_all(runs, 'threads')} thread(s) each, kernel {_all(runs, 'kernel_backend')}"
    yield "Machine", f"{device}, {kernel}, {_all(runs, 'platform')}"


def _commit(environment: Mapping[str, Any]) -> str:
    return f"{environment['commit'] or 'unknown'}{' with uncommitted changes' if environment['dirty'] else ''}"


def _all(runs: Sequence[RunRecord], name: str) -> str:
    return " and ".join(sorted({str(run.environment.get(name, 1)) for run in runs}))


# How it is printed


def columns(table: Table, timings: bool = True) -> dict[str, Callable[[TableRow], str]]:
    """Return the title of each column and how a row fills it."""
    shown: dict[str, Callable[[TableRow], str]] = {
        "router": lambda row: _name(row, table),
        "gate": lambda row: row.gate_form,
        "validation bits/byte": lambda row: _plus_minus(row.bits_per_byte) if row.n else "diverged",
        f"difference to {table.reference}": lambda row: _difference(row, table),
        "MaxVio": lambda row: "–" if row.max_vio is None else f"{row.max_vio:.2f}",
        "dead experts": lambda row: "–" if row.dead_experts is None else f"{short(row.dead_experts)} of {row.experts}",
        "tokens/s": lambda row: "–" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "parameters active / total": lambda row: f"{_si(row.active_parameters)} / {_si(row.total_parameters)}",
        "FLOPs/token": lambda row: _si(row.flops_per_token),
        "training-only FLOPs/token": lambda row: _si(row.training_only_flops_per_token),
        "n": lambda row: str(row.n),
        "resolvable": lambda row: "–" if row.smallest_resolvable is None else f"{row.smallest_resolvable:.4f}",
    }
    return shown if timings else {title: cell for title, cell in shown.items() if title != "tokens/s"}


def legend(table: Table) -> str:
    """Return how to read the columns."""
    return (
        f"Bits per byte: greedy routing, mean over n seeds ± half the {CONFIDENCE:.0%} Student-t interval; lower is better. "
        f"Difference to {table.reference}: paired by seed, with the interval of the paired differences; not separated where it holds "
        "zero; the intervals are not corrected for the number of comparisons. MaxVio: highest load of an expert over the fair share, "
        "minus 1, counted over the whole validation set before drops; mean over seeds, then the worst layer. Dead experts: below 5% of "
        "the fair share over the whole validation set; mean over seeds, summed over layers. FLOPs: forward. Resolvable: the smallest "
        "true difference that a paired t-test at 5% finds with power 80% given n and the spread seen, itself uncertain at small n."
    )


def to_markdown(table: Table, timings: bool = True) -> str:
    """Return the table and its notes as Markdown; without ``timings`` it is the same, bit for bit, when the same command runs again."""
    shown = columns(table, timings)
    lines = [list(shown), ["---"] + ["---:"] * (len(shown) - 1)]
    lines += [[cell(row) for cell in shown.values()] for row in table.rows]
    body = "".join("| " + " | ".join(_escape(cell) for cell in line) + " |\n" for line in lines)
    notes = "".join(f"- **{_escape(title)}**: {_escape(text)}.\n" for title, text in table.notes if text)
    return f"{body}\n{_escape(legend(table))}\n\n{notes}"


def to_csv(table: Table, timings: bool = True) -> str:
    """Return the rows as CSV at full precision, an interval in four columns; nothing stands for None."""
    intervals = ("bits_per_byte", "difference", "sampled_bits_per_byte")
    names = [field.name for field in fields(TableRow) if timings or field.name not in TIMINGS]
    parts = [(name, part) for name in names for part in (("mean", "low", "high", "n") if name in intervals else ("",))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f"{name}_{part}" if part else name for name, part in parts])
    for row in table.rows:
        writer.writerow(
            [getattr(getattr(row, name), part, None) if part else getattr(row, name) for name, part in parts]
        )
    return text.getvalue()


def _name(row: TableRow, table: Table) -> str:
    marks = {
        "yardstick": row.router == DENSE,
        "non-causal": not row.causal,
        f"{row.diverged} of {row.n + row.diverged} diverged": row.diverged > 0,
    }
    return ", ".join([row.label, *(mark for mark, holds in marks.items() if holds)])


def _plus_minus(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "–"
    return f"{interval.mean:{sign}.4f}" + ("" if interval.half_width is None else f" ± {interval.half_width:.4f}")


def _difference(row: TableRow, table: Table) -> str:
    if row.difference is None:
        return "reference" if row.label == table.reference else "–"
    pairs = f" (n = {row.difference.n})" if row.difference.n != row.n else ""
    return _plus_minus(row.difference, "+") + pairs + ("" if row.difference.separated else ", not separated")


def short(value: float) -> str:
    """Return a mean count with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _si(value: float) -> str:
    """Return three digits and a unit prefix."""
    power = min(max(int(math.log10(value)) // 3, 0), 4) if value else 0
    return f"{value / 1000**power:.3g}{' ' * (power > 0)}{'kMGT'[power - 1] if power else ''}"


def _escape(text: str) -> str:
    """Keep a value from ending its cell or its line."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
