"""``rlroute verify``: every run of a store or of a compact file, and what should be there beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from rlroute.config import RunConfig
from rlroute.errors import ComparisonError, RlrouteError, StoreError
from rlroute.experiments.verify import made, record, replay
from rlroute.experiments.verify.findings import Finding, Ledger
from rlroute.experiments.verify.hand import AtHand
from rlroute.reading import read_run, read_runs
from rlroute.registry import run_config
from rlroute.schema import RunRecord


def verify(
    path: Path, *, reruns: int = 0, draw: int = 0, evaluate: bool = False, sources: Path | None = None
) -> list[Finding]:
    """Return what is wrong with stored runs.

    Args:
        path: a run store or a compact file.
        reruns: how many runs to train once more; ``draw`` is the seed by which they are chosen.
        evaluate: whether stored weights are evaluated once more.
        sources: the store of the runs that others start from; by default a store's own.

    Raises:
        StoreError: there is no such store or file, or nothing in it.
    """
    findings: list[Finding] = []
    runs = _read(path, findings)
    if not runs and not findings:
        raise StoreError(f"{path} holds no ended run")
    hand = AtHand(sources or (path if path.is_dir() else None))
    with own_threads():
        for run in runs:
            findings += _check(run, path, [other for other in runs if other is not run], hand, evaluate)
        for run in replay.chosen(runs, reruns, draw):
            ledger = Ledger(run.id)
            replay.rerun(run, hand.sources, ledger)
            findings += ledger.findings
    return findings + missing(path, runs)


@contextmanager
def own_threads() -> Iterator[None]:
    """Leave the number of threads as it was: runs set their own."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read(path: Path, findings: list[Finding]) -> list[RunRecord]:
    """Return the runs that can be read; those of a store that cannot are findings."""
    if not path.is_dir():
        return read_runs(path)
    runs = []
    for folder in sorted(summary.parent for summary in path.glob("*/summary.json")):
        try:
            run = read_run(folder)
        except StoreError as error:
            findings.append(Finding(folder.name, "record", "content", "damaged", "a run's", str(error)))
            continue
        runs.append(run)
        if run.id != folder.name:
            findings.append(Finding(run.id, "folder", "name", folder.name, run.id))
    return runs


def _check(run: RunRecord, path: Path, others: Sequence[RunRecord], hand: AtHand, evaluate: bool) -> list[Finding]:
    ledger = Ledger(run.id)
    with _buildable(ledger):
        _check_made(run, path, _check_record(run, others, ledger), hand, evaluate, ledger)
    return ledger.findings


def record_findings(run: RunRecord, others: Sequence[RunRecord]) -> list[Finding]:
    """Return what is wrong with a run's record by itself: names, seal, summary, rows.

    Args:
        run: the run.
        others: runs that may show what an edited field was.
    """
    ledger = Ledger(run.id)
    with _buildable(ledger):
        _check_record(run, [other for other in others if other is not run], ledger)
    return ledger.findings


def edited(runs: Sequence[RunRecord]) -> list[Finding]:
    """Return what of runs' records is not what it was when they ended, by their names and seals alone: nothing is
    built, so that the code of their routers need not be there.
    """
    ledgers = [(run, Ledger(run.id)) for run in runs]
    for run, ledger in ledgers:
        record.check_names(run, ledger)
        record.check_seal(run, [other for other in runs if other is not run], ledger)
    return [finding for _, ledger in ledgers for finding in ledger.findings]


def refuse_unsound(runs: Sequence[RunRecord], whose: str = "") -> None:
    """Refuse runs whose records are wrong by themselves: nothing is decided by them.

    Raises:
        ComparisonError: naming run, file and field, after ``whose`` runs they are.
    """
    for run in runs:
        for finding in record_findings(run, runs):
            raise ComparisonError(f"{whose}{finding}")


@contextmanager
def _buildable(ledger: Ledger) -> Iterator[None]:
    try:
        yield
    except RlrouteError as error:
        ledger.add("config.json", "config", "of a run", "one that can be built", str(error))


def _check_record(run: RunRecord, others: Sequence[RunRecord], ledger: Ledger) -> RunConfig:
    record.check_names(run, ledger)
    record.check_seal(run, others, ledger)
    config = run_config(run.config["config"])
    record.check_summary(run, config, ledger)
    record.check_rows(run, config, ledger)
    return config


def _check_made(run: RunRecord, path: Path, config: RunConfig, hand: AtHand, evaluate: bool, ledger: Ledger) -> None:
    made.check_made(run, config, hand, ledger)
    made.check_environment(run, config, ledger)
    if made.check_data(run, config, hand, ledger):  # of other data, everything below would be wrong as well
        made.check_batches(run, config, hand, ledger)
        made.check_bits(run, config, hand, ledger)
        try:
            model = hand.model(config, run.config["seed"])
        except RlrouteError as error:
            if config.start is None:
                raise
            ledger.add("config.json", "config/start", str(config.start), "that checkpoint", str(error))
            return
        made.check_model(run, config, model, ledger)
        if (path / run.id).is_dir():
            replay.check_weights(run, path / run.id, config, model, hand, evaluate, ledger)


def missing(path: Path, runs: Sequence[RunRecord]) -> list[Finding]:
    """Return the runs that were asked for together with those that are there, and that are gone.

    A run that has a folder in the store is not gone: it has not ended. Where records do not say what was asked for,
    every entry of a command has the same seeds.
    """
    seeds_of: dict[str | None, set[int]] = defaultdict(set)
    for run in runs:
        seeds_of[run.config["command"]].add(run.config["seed"])
    asked = {_asked(run, seeds_of): run.config["command"] for run in runs}
    wanted = {
        f"{entry}-s{seed}": command
        for (entries, seeds), command in asked.items()
        for entry in entries
        for seed in seeds
    }
    gone = sorted(wanted.keys() - {run.id for run in runs})
    return [
        Finding(run, "store", "run", "missing", "there", f"asked for by: {wanted[run] or 'no command'}")
        for run in gone
        if not (path / run).is_dir()
    ]


def _asked(run: RunRecord, seeds_of: Mapping[str | None, Iterable[int]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the entries and the seeds that were asked for with a run; ``seeds_of`` are those of every command."""
    if (said := run.config.get("asked")) is not None:
        return tuple(said["entries"]), tuple(said["seeds"])
    command = run.config["command"]
    return (run.id.rpartition("-s")[0],), tuple(sorted(seeds_of[command])) if command else ()
