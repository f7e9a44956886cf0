"""The comparison: train every entry on the same seeds, then print the table, or refuse to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlroute.config import RunConfig
from rlroute.errors import ComparisonError
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


def equal_flops(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Give every configuration the training FLOPs that the first one spends in its steps."""
    from rlroute.model.accounting import costs
    from rlroute.training.data import load_corpus
    from rlroute.training.loop import build_model, training_flops_per_step

    first = configs[0]
    corpus = load_corpus(first.data.spec, first.data.tokenizer)
    cost = costs(build_model(first, corpus, seed=0), first.model, first.data.seq_len)
    amount = first.train.steps * training_flops_per_step(first, cost)
    return [replace(c, train=replace(c.train, budget="flops", budget_amount=amount)) for c in configs]
