"""What stands under a table about its runs: what was held equal and the proof of it, what differs on purpose, where it
comes from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from rlroute.config import DENSE, SCHEMA
from rlroute.experiments.comparison.entries import (
    Entry,
    by_shape,
    flat_config,
    grouped,
    of_router,
    source,
    train_tokens,
    varying,
)
from rlroute.experiments.comparison.marks import marks
from rlroute.experiments.recipes.tuned import AT, TUNING_SEEDS
from rlroute.experiments.statistics import t_interval
from rlroute.experiments.text import of_interval
from rlroute.experiments.verdicts import LEVEL
from rlroute.schema import Environment, RunRecord

SHOWN = 8
"""Fingerprints are printed seed by seed for up to this many seeds."""


def diverged(entry: Entry) -> str:
    stops = [(run.config["seed"], stop) for run in entry.runs if (stop := run.summary["diverged"])]
    said = ", ".join(f"seed {seed} at step {stop['step']} ({stop['what']})" for seed, stop in stops)
    return f"{entry.label}: {said}, left out of all figures"


def measured(entries: Sequence[Entry]) -> list[str]:
    """Return what the audit marked in each entry, and the figures behind it."""
    return [f"{entry.label} {mark} ({said})" for entry in entries for mark, said in marks(entry.runs).items()]


ORIGIN = ("start.run", "start.step", "start.sha256")
"""What :func:`starts` says."""


def deliberate(entries: Sequence[Entry]) -> list[str]:
    flats = {entry.label: flat_config(entry.runs[0].config["config"]) for entry in entries}
    said = (
        ["dense has one MLP as wide as k experts in place of the experts"]
        if DENSE in {e.router for e in entries}
        else []
    )
    for name in varying(list(flats.values())):
        if not of_router(name) and name not in ORIGIN:
            labels: dict[str, list[str]] = {}
            for label, flat in flats.items():
                labels.setdefault(json.dumps(flat.get(name)), []).append(label)
            said.append(f"{name}: " + ", ".join(f"{value} ({', '.join(who)})" for value, who in sorted(labels.items())))
    return said or ["none"]


def training_set(entries: Sequence[Entry]) -> list[str]:
    """Say what entries reach on training tokens, evaluated as validation tokens are, and whether they over-fit."""
    said = []
    for entry in entries:
        runs = [[row for row in run.evals if "training" in row] for run in entry.finished]
        if runs and all(runs):
            learnt = [rows[-1]["training"]["bits_per_byte"] for rows in runs]
            above = [rows[-1]["bits_per_byte"] - bits for rows, bits in zip(runs, learnt, strict=True)]
            risen = [rows[-1]["bits_per_byte"] - min(row["bits_per_byte"] for row in rows) for rows in runs]
            on, gap, rise = (of_interval(t_interval(values)) for values in (learnt, above, risen))
            said.append(f"{entry.label} {on} bits/byte; validation is {gap} above, and {rise} above its lowest")
    return said


def gates(entries: Sequence[Entry]) -> list[str]:
    """Say what a published gate is, once for each meaning."""
    labels: dict[str, list[str]] = {}
    for entry in entries:
        gate = entry.runs[0].summary["gate"]
        if gate["form"] == "own" and entry.router != DENSE:
            labels.setdefault(gate["meaning"], []).append(entry.label)
    return [f"{meaning} ({', '.join(who)})" for meaning, who in labels.items()]


def verdicts(reference: str, margin: float) -> str:
    """Say what a verdict is."""
    return (
        f"against {reference}, by t-tests of the differences paired by seed, each wrong in at most {LEVEL:.0%}: better "
        f"or worse than it, equivalent within {margin:g} bits per byte (two one-sided tests), both (by less than "
        f"{margin:g}), or unresolved"
    )


MEANINGS = {
    "tuned": "the best trial of the committed grid, as many trials for each, on seeds that no table uses",
    "tuned for": "those of the entry of which it is a variant",
    "grid start": "where the committed grid of the entry, or of the one of which it is a variant, starts: not run yet",
    "default": "never tuned: the router's defaults, and the default learning rate",
    "other": "neither what the committed grid found nor the defaults: set by hand, or tuned by another release",
    "unknown": "no such router is here, so that its defaults are not known",
}
"""What the settings of a row mean."""


def settings(labels: Mapping[str, str]) -> str:
    """Say what settings the entries have, by their labels, and how these were found."""
    said = []
    kinds = {label: found.partition(AT)[0] for label, found in labels.items()}
    for kind, meaning in MEANINGS.items():
        who = [label for label, found in kinds.items() if ("tuned for" if " for " in found else found) == kind]
        if who:
            said.append(f"{kind}: {', '.join(who)} ({meaning})")
    if elsewhere := [label for label, found in labels.items() if AT in found]:
        meaning = "the nearest for which the grid was run: so many steps of so many sequences"
        said.append(f"found for runs of another length: {', '.join(elsewhere)} ({meaning})")
    return "; ".join(said)


def tuning_trials(runs: Sequence[RunRecord]) -> str:
    """Say so where all runs are on the seeds that tuning has for itself."""
    if {run.config["seed"] for run in runs} <= set(TUNING_SEEDS):
        return f"trials of rlroute tune, on seeds that no comparison uses ({', '.join(map(str, TUNING_SEEDS))})"
    return ""


def budget(runs: Sequence[RunRecord]) -> str:
    budget, config = runs[0].summary["budget"], runs[0].config["config"]
    unit = {"tokens": "training tokens", "flops": "training FLOPs", "time": "seconds of training"}[budget["kind"]]
    steps = sorted({run.summary["steps"] for run in runs if run.summary["status"] == "finished"})
    counts = " to ".join(f"{count:,}" for count in dict.fromkeys((steps[0], steps[-1]))) if steps else "no"
    batch = f"{config['train']['batch_size']} sequences of {config['data']['seq_len']} tokens"
    return f"{budget['amount']:,.10g} {unit} a run; {counts} steps of {batch}"


def identity(runs: Sequence[RunRecord]) -> Iterable[tuple[str, str]]:
    shapes = by_shape(runs)
    for (experts, *_), alike in shapes.items():
        title = "Same initial weights" + (f" ({experts} experts)" if len(shapes) > 1 else "")
        said = f"all but the routers' own, equal over {_count(alike)} with experts{_from(alike)}: "
        yield title, said + _per_seed(alike, lambda run: run.summary["fingerprint"]["shared"])
    for alike in grouped(runs, source).values():
        said = f"outside the layers that have experts, equal over {_count(alike)}{_from(alike)}: "
        yield "Same initial backbone", said + _per_seed(alike, lambda run: run.summary["fingerprint"]["backbone"])
    sets = grouped(runs, train_tokens)
    for alike in sets.values():
        some = f" ({alike[0].summary['data']['train_tokens']:,} training tokens)" if len(sets) > 1 else ""
        yield f"Same batches{some}", _same_batches(alike)


def _same_batches(runs: Sequence[RunRecord]) -> str:
    finished = [run for run in runs if run.summary["status"] == "finished"] or list(runs)
    if len({run.summary["steps"] for run in finished}) == 1:
        said = f"hash chain over {finished[0].summary['steps']:,} steps, equal over {_count(finished)}: "
        return said + _per_seed(finished, lambda run: run.summary["batches"]["chain"])
    return "hash chains of the shorter runs are prefixes of the longest's, compared at all common evaluation steps"


def _from(runs: Sequence[RunRecord]) -> str:
    return f" from {name}" if (name := source(runs[0])) else ""


def starts(entries: Sequence[Entry]) -> list[str]:
    """Say which checkpoint entries start from, where any starts from one."""
    labels: dict[str, list[str]] = {}
    for entry in entries:
        labels.setdefault(source(entry.runs[0]) or "the weights of their seeds", []).append(entry.label)
    said = [f"{name} ({', '.join(who)})" for name, who in labels.items()]
    return said if any(source(entry.runs[0]) for entry in entries) else []


def _count(runs: Sequence[RunRecord]) -> str:
    count = len({run.config["config_hash"] for run in runs})
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _per_seed(runs: Sequence[RunRecord], value: Callable[[RunRecord], str]) -> str:
    by_seed = {run.config["seed"]: value(run)[:12] for run in runs}
    if len(by_seed) > SHOWN:
        return f"{len(by_seed)} seeds, all equal"
    return ", ".join(f"seed {seed} {digest}" for seed, digest in sorted(by_seed.items()))


def provenance(runs: Sequence[RunRecord]) -> Iterable[tuple[str, str]]:
    data = runs[0].summary["data"]
    version = f" ({data['distribution']} {data['version']})" if data["distribution"] else ""
    learnt = " or ".join(f"{size:,}" for size in sorted({run.summary["data"]["train_tokens"] for run in runs}))
    sizes = f"{learnt} training and {data['valid_tokens']:,} validation tokens"
    yield "Corpus", f"{data['spec']}{version}, {sizes}, sha256 {data['sha256']}"
    floor = data["floor_bits_per_byte"]
    yield "Entropy floor", "" if floor is None else f"{floor:.4f} bits/byte"
    yield "Validation tokens", f"sha256 {runs[0].summary['eval_tokens_sha256']}"
    yield "Seeds", ", ".join(map(str, sorted({run.config["seed"] for run in runs})))
    yield "Command", "; ".join(sorted({command for run in runs if (command := run.config.get("command"))}))
    yield "Commit", ", ".join(sorted({_commit(run.environment) for run in runs}))
    yield "Made from", _made_from(runs)
    versions = [f"{name} {_all(runs, name)}" for name in ("rlroute", "python", "torch", "numpy")]
    yield "Versions", ", ".join(versions)
    device = f"{_all(runs, 'device')} ({_all(runs, 'device_name')}), CPU capability {_all(runs, 'cpu_capability')}"
    processes = f"{_all(runs, 'workers')} worker(s) a run, {_all(runs, 'threads')} thread(s) each"
    yield "Machine", f"{device}, {processes}, kernel {_all(runs, 'kernel_backend')}, {_all(runs, 'platform')}"


def _commit(environment: Environment) -> str:
    commit = environment["commit"] or f"none, release {environment['rlroute']}"
    return f"{commit}{' with uncommitted changes' if environment['dirty'] else ''}"


def _made_from(runs: Sequence[RunRecord]) -> str:
    """Say which sources, equal over all runs; or that records are too old to say."""
    made = runs[0].config.get("made_from")
    if made is None:
        return f"recorded before schema {SCHEMA}: whether all runs had the same sources and data cannot be told"
    tokenizer = f", tokenizer sha256 {made['tokenizer']}" if made["tokenizer"] else ""
    return f"rlroute's core sha256 {made['core']}, equal over all runs{tokenizer}"


def _all(runs: Sequence[RunRecord], name: str) -> str:
    return " and ".join(sorted({str(run.environment.get(name, 1)) for run in runs}))
