"""``rlroute verify``: every run of a store or of a compact file, and what should be there beside them."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product, takewhile
from pathlib import Path
from typing import Any

import torch

from rlroute.config import RunConfig
from rlroute.errors import RlrouteError, StoreError
from rlroute.experiments.comparison.entries import router_label
from rlroute.experiments.recipes.entries import parse_entry, split_sites
from rlroute.experiments.verify import made, record, replay
from rlroute.experiments.verify.findings import Finding, Ledger
from rlroute.experiments.verify.hand import AtHand
from rlroute.reading import read_run, read_runs
from rlroute.registry import run_config
from rlroute.schema import RunRecord


def verify(path: Path, *, seeds: int, reruns: int = 0, draw: int = 0, evaluate: bool = False) -> list[Finding]:
    """Return what is wrong with stored runs.

    Args:
        path: a run store or a compact file.
        seeds: how many ``rlroute compare`` trains where its command does not say.
        reruns: how many runs to train once more; ``draw`` is the seed by which they are chosen.
        evaluate: whether stored weights are evaluated once more.

    Raises:
        StoreError: there is no such store or file, or nothing in it.
    """
    findings: list[Finding] = []
    runs = _read(path, findings)
    if not runs and not findings:
        raise StoreError(f"{path} holds no ended run")
    hand = AtHand()
    with _own_threads():
        for run in runs:
            findings += _check(run, path, [other for other in runs if other is not run], hand, evaluate)
        for run in replay.chosen(runs, reruns, draw):
            ledger = Ledger(run.id)
            replay.rerun(run, ledger)
            findings += ledger.findings
    return findings + missing(path, runs, seeds)


@contextmanager
def _own_threads() -> Iterator[None]:
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
    record.check_names(run, ledger)
    record.check_seal(run, others, ledger)
    try:
        config = run_config(run.config["config"])
        record.check_summary(run, config, ledger)
        record.check_rows(run, config, ledger)
        _check_made(run, path, config, hand, evaluate, ledger)
    except RlrouteError as error:
        ledger.add("config.json", "config", "of a run", "one that can be built", str(error))
    return ledger.findings


def _check_made(run: RunRecord, path: Path, config: RunConfig, hand: AtHand, evaluate: bool, ledger: Ledger) -> None:
    made.check_made(run, config, hand, ledger)
    made.check_environment(run, config, ledger)
    if made.check_data(run, config, hand, ledger):  # of other data, everything below would be wrong as well
        made.check_batches(run, config, hand, ledger)
        made.check_bits(run, config, hand, ledger)
        model = hand.model(config, run.config["seed"])
        made.check_model(run, config, model, ledger)
        if (path / run.id).is_dir():
            replay.check_weights(run, path / run.id, config, model, hand, evaluate, ledger)


def missing(path: Path, runs: Sequence[RunRecord], seeds: int) -> list[Finding]:
    """Return the runs that commands asked for and that are gone: seeds of an entry, and entries of a comparison.

    A run that has a folder in the store is not gone: it has not ended.
    """
    commands: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        if run.config["command"]:
            commands[run.config["command"]].append(run)
    gone = {}
    for command, group in commands.items():
        asked = _seeds(command, seeds) or {run.config["seed"] for run in group}
        for of_entry, seed in product({run.config["config_hash"]: run for run in group}.values(), sorted(asked)):
            run_id = f"{of_entry.id.rpartition('-s')[0]}-s{seed}"
            if run_id not in {run.id for run in runs} and not (path / run_id).is_dir():
                gone[run_id] = Finding(run_id, "store", "run", "missing", "there", f"asked for by: {command}")
        there = Counter(router_label(config) for config in _configs(runs).values())
        for label, count in Counter(map(_label, _entries(command))).items():
            if there[label] < count:
                why = f"asked for by: {command}"
                gone[label] = Finding(label, "store", "entries", there[label], count, why)
    return list(gone.values())


def _configs(runs: Sequence[RunRecord]) -> dict[str, dict[str, Any]]:
    return {run.config["config_hash"]: run.config["config"] for run in runs}


def _words(command: str) -> list[str] | None:
    """Return what follows ``rlroute compare`` in a command; None where it is another."""
    try:
        first, *words = shlex.split(command)[1:]
    except ValueError:  # no command line
        return None
    return words if first == "compare" else None


def _seeds(command: str, default: int) -> set[int]:
    """Return the seeds that a comparison's command asks for; none where the command is another."""
    words = _words(command)
    if words is None:
        return set()
    said = [after for word, after in pairwise(words) if word == "--seeds"]
    said += [word.partition("=")[2] for word in words if word.startswith("--seeds=")]
    return set(range(int(said[-1]) if said and said[-1].isdigit() else default))


def _entries(command: str) -> list[str]:
    """Return the entries that a comparison's command names, which come before its options."""
    return list(takewhile(lambda word: not word.startswith("-"), _words(command) or ()))


def _label(entry: str) -> str:
    """Return the table's name of an entry's routers: their names, and the sites of all but the first."""
    first, by_sites = split_sites(entry)
    return "+".join([parse_entry(first)[0], *(f"{parse_entry(other)[0]}@{at}" for at, other in by_sites.items())])
