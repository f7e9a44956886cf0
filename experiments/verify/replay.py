"""Runs trained once more, and stored weights evaluated once more: what cannot be computed from a record alone."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlroute.config import RunConfig
from rlroute.errors import RlrouteError
from rlroute.experiments.verify.findings import Finding, Ledger
from rlroute.experiments.verify.hand import AtHand
from rlroute.model import Transformer
from rlroute.model.compiling import set_compiled
from rlroute.provenance import environment
from rlroute.reading import read_run
from rlroute.registry import run_config
from rlroute.schema import RunRecord, untimed
from rlroute.training.checkpoint import load_weights
from rlroute.training.determinism import deterministic
from rlroute.training.evaluate import evaluate
from rlroute.training.loop import DTYPES, train
from rlroute.training.prepare import build_model
from rlroute.training.step import Device
from rlroute.values import differing

BITS = ("torch", "numpy", "cpu_capability", "device_name")
"""What of the environment bits depend on."""
TOLERANCE = 0.01
"""Of the final bits per byte, relatively: how far a run may come out where the bits are not those of its record."""


def chosen(runs: Sequence[RunRecord], count: int, seed: int) -> list[RunRecord]:
    """Return the runs to train again: diverged ones first, since nothing else tells whether they did; then at random.

    Those that several processes trained, or whose budget is time, are left out: they cannot be repeated here.
    """
    able = [run for run in runs if run.environment.get("workers", 1) == 1 and run.summary["budget"]["kind"] != "time"]
    drawn = random.Random(seed).sample(able, len(able))
    return sorted(drawn, key=lambda run: run.summary["status"] != "diverged")[:count]


def rerun(run: RunRecord, sources: Path | None, ledger: Ledger) -> None:
    """Train a run once more in a store of its own, and hold every figure against the record, bit for bit; the run that
    it starts from, if it does, lies in ``sources``.
    """
    again = _again(run, sources, ledger)
    if again is None:
        return
    why = _elsewhere(run)
    pairs = {"summary.json": (run.summary, again.summary)}
    for name, file in (("evals", "metrics.jsonl"), ("train", "metrics.jsonl"), ("loads", "loads.jsonl")):
        new = {row["step"]: row for row in getattr(again, name)}
        pairs |= {f"{file}, {name} {r['step']}": (r, new.get(r["step"], {})) for r in getattr(run, name)}
    for where, (old, now) in pairs.items():
        different = list(differing(untimed(old), untimed(now)))
        for field, recorded, found in different[:1]:
            ledger.add(where, field, recorded, found, f"trained again; {len(different)} figures differ{why}")


def _again(run: RunRecord, sources: Path | None, ledger: Ledger) -> RunRecord | None:
    """Train a run once more in a store of its own; None, and a finding, where it is not to be trained."""
    config, seed = run_config(run.config["config"]), run.config["seed"]
    with tempfile.TemporaryDirectory(prefix="rlroute-verify-") as scratch:
        try:
            train(config, seed, Path(scratch), sources=sources)
        except RlrouteError as error:
            ledger.add("summary.json", "status", run.summary["status"], f"not to be trained: {error}", "trained again")
            return None
        return read_run(Path(scratch) / config.run_id(seed))


def repeat(run: RunRecord, sources: Path | None) -> list[Finding]:
    """Train a run once more from its record alone, and hold what a table reads of it against the record.

    On the same kind of CPU, with the same threads and versions, that is every figure of every evaluation that the
    record has, bit for bit. Elsewhere it is the final bits per byte within :data:`TOLERANCE`, and the status.
    """
    ledger = Ledger(run.id)
    again = _again(run, sources, ledger)
    if again is None:
        return ledger.findings
    cores = [record.config.get("made_from", {}).get("core") for record in (run, again)]
    why = "trained again" + ("; the record is of other sources" if cores[0] != cores[1] else "")
    ledger.same("summary.json", "status", run.summary["status"], again.summary["status"], why)
    elsewhere, final, now = _elsewhere(run), run.summary["final"], again.summary["final"]
    if not elsewhere:
        new = {row["step"]: dict(row) for row in again.evals}
        for row in run.evals:
            then = {name: new.get(row["step"], {}).get(name) for name in row}
            ledger.same("metrics.jsonl", f"evaluation of step {row['step']}", untimed(row), untimed(then), why)
    elif final is not None and now is not None:
        one, other = final["bits_per_byte"], now["bits_per_byte"]
        if abs(one - other) > TOLERANCE * one:
            ledger.add("summary.json", "final/bits_per_byte", one, other, f"{why}; over {TOLERANCE:.0%}{elsewhere}")
    return ledger.findings


def _elsewhere(run: RunRecord) -> str:
    train = run_config(run.config["config"]).train
    here: Mapping[str, Any] = environment(train.device, "", train.threads)
    said = [
        f"{name} {run.environment.get(name)}, here {here[name]}"
        for name in BITS
        if run.environment.get(name) != here[name]
    ]
    return f"; recorded with {', '.join(said)}" if said else ""


def check_weights(
    run: RunRecord, folder: Path, config: RunConfig, model: Transformer, hand: AtHand, again: bool, ledger: Ledger
) -> None:
    """Load a run's stored weights, where it has any, into its model; ``again``: evaluate them on the run's device."""
    corpus, seed, final = hand.corpus(config.data), run.config["seed"], run.summary["final"]
    model = build_model(config, corpus, seed) if again else model
    torch.set_num_threads(config.train.threads)
    try:
        if load_weights(folder, model, run.id) is None or final is None or not again:
            return
        set_compiled(model, config.train.compile)
    except RlrouteError as error:
        ledger.add("checkpoint", "weights", "damaged", "the run's", str(error))
        return
    with deterministic(config.train.deterministic, config.train.device):
        now = evaluate(
            model,
            hand.validation(config),
            corpus.token_bytes_V,
            Device(config.train.device, DTYPES[config.train.dtype]),
            seed=seed,
            step=run.summary["steps"],
            progress=1.0,
            final=True,
        )
    said = {name: value for name, value in final.items() if name in now}
    different = list(differing(said, {name: now[name] for name in said}))  # old records do not say everything
    for field, recorded, found in different[:1]:
        why = f"weights evaluated again; {len(different)} figures differ{_elsewhere(run)}"
        ledger.add("summary.json", f"final/{field}", recorded, found, why)
