"""The comparison: train every entry on the same seeds, then print the table, or refuse to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlroute.config import Budget, RunConfig
from rlroute.errors import ComparisonError, ConfigError
from rlroute.experiments.launch import Job, Launcher, launch, watch
from rlroute.records import RunFolder, RunRecord


def run_jobs(jobs: Sequence[Job], store: Path, launcher: Launcher, concurrency: int) -> list[RunRecord]:
    """Train all jobs and return their records.

    Raises:
        ComparisonError: some failed; the finished ones stay in the store.
    """
    folders = [RunFolder(store, job.config, job.seed) for job in jobs]  # an unwritable store is found before any work
    failed = watch(jobs, store, lambda: launch(jobs, store, launcher, concurrency))
    for run, reason in failed.items():
        print(f"failed: {run}: {reason}", file=sys.stderr)
    if failed:
        raise ComparisonError(
            f"{len(failed)} of {len(jobs)} runs failed; the others are kept in {store}, run again to go on"
        )
    return [folder.read() for folder in folders]


def with_budget(configs: Sequence[RunConfig], budget: Budget, reference: str, seconds: float | None) -> list[RunConfig]:
    """Return the configurations under a budget: their tokens, the reference's training FLOPs, or so many seconds.

    Raises:
        ConfigError: seconds without budget time or the reverse, or a reference that is not among the configurations.
    """
    if (budget == "time") != (seconds is not None):
        raise ConfigError(f"--seconds {seconds} with --budget {budget}: time needs it, the others take none")
    if budget == "tokens":
        return list(configs)
    amount = seconds if seconds is not None else _reference_flops(configs, reference)
    return [replace(c, train=replace(c.train, budget=budget, budget_amount=amount)) for c in configs]


def _reference_flops(configs: Sequence[RunConfig], reference: str) -> float:
    """Return the training FLOPs that the reference spends in its steps."""
    from rlroute.model.accounting import costs
    from rlroute.training.data import load_corpus
    from rlroute.training.loop import build_model, training_flops_per_step

    found = [config for config in configs if config.router_name == reference]
    if not found:
        names = ", ".join(sorted({config.router_name for config in configs}))
        raise ConfigError(f"reference {reference!r} is not among the entries: {names}")
    corpus = load_corpus(found[0].data.spec, found[0].data.tokenizer)
    model = build_model(found[0], corpus, seed=0)
    return found[0].train.steps * training_flops_per_step(found[0], costs(model, found[0].model, found[0].data.seq_len))
