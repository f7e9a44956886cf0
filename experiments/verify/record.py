"""A record held against itself: its names, its rows, its summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlroute import seal
from rlroute.config import DENSE, RunConfig, content_hash, run_id
from rlroute.experiments.verify.findings import Ledger
from rlroute.schema import EvalRow, RunRecord, TrainRow
from rlroute.sites import sites
from rlroute.training.evaluate import NATS_DIGITS
from rlroute.training.optimizer import learning_rate

DEAD = 0.05
"""Of the fair share: what is below counts as dead."""
DIGITS = 1e-6
"""Loads are recorded to so many."""
NATS = 10**-NATS_DIGITS


def check_names(run: RunRecord, ledger: Ledger) -> None:
    """Hold the hash, the routers' names and the id against the configuration, in both files."""
    described, values = run.config, run.config["config"]
    routers = [values["router"]["name"], *(other["name"] for other in values.get("others", ()))]
    names = "+".join(name for name in dict.fromkeys(routers) if name != DENSE) or DENSE
    wanted: dict[str, Any] = {"config_hash": content_hash(values, described["schema"]), "router": names}
    wanted["id"] = run_id(names, wanted["config_hash"], described["seed"])
    for file, named in (("config.json", described), ("summary.json", run.summary)):
        for field in wanted:
            ledger.same(file, field, named.get(field), wanted[field], "by the configuration")
    for field in ("schema", "seed"):
        ledger.same("summary.json", field, run.summary.get(field), described.get(field), "as config.json says")


def check_seal(run: RunRecord, others: Sequence[RunRecord], ledger: Ledger) -> None:
    """Find the parts that were edited after the run had ended; a field is named where other runs show what it was."""
    if run.config["schema"] < 2:
        return
    if run.seal is None:
        ledger.add("seal.json", "seal", None, "the record's", "a record of schema 2 has one")
        return
    steps, every = run.summary["steps"], run.config["config"]["train"]["log_every"]
    parts = {name: getattr(run, name) for name in seal.PARTS}
    for name in ("train", "loads"):
        if len(parts[name]) != steps // every:  # thinned in a compact file
            del parts[name]
    sealed: dict[str, Any] = {**run.seal}
    for name in seal.broken(parts, sealed):
        file = f"{name}.json" if isinstance(parts[name], Mapping) else _file(name)
        culprit = _culprit(parts[name], [getattr(other, name) for other in others], sealed[name])
        field, recorded, then = culprit or ("SHA-256", seal.of_part(parts[name]), sealed[name])
        ledger.add(file, field, recorded, then, "edited after the run ended")


def _file(rows: str) -> str:
    return "loads.jsonl" if rows == "loads" else "metrics.jsonl"


def _culprit(part: Any, others: Sequence[Any], sealed: str) -> tuple[str, Any, Any] | None:
    """Return the field that makes a part what was sealed once it has another run's value, and both values."""
    if not isinstance(part, Mapping):
        return None
    for field in part:
        for value in {repr(other.get(field)): other.get(field) for other in others}.values():
            if value != part[field] and seal.of_part({**part, field: value}) == sealed:
                return field, part[field], value
    return None


def check_summary(run: RunRecord, config: RunConfig, ledger: Ledger) -> None:
    """Hold the summary against the configuration and the rows."""
    summary, train = run.summary, config.train
    per_step = train.batch_size * config.data.seq_len
    steps, finished = summary["steps"], summary["status"] == "finished"
    if finished and train.budget == "tokens":
        ledger.same("summary.json", "steps", steps, train.steps, "of a finished run")
    amount = train.steps * per_step if train.budget == "tokens" else train.budget_amount
    ledger.same("summary.json", "budget", summary["budget"], {"kind": train.budget, "amount": amount})
    ledger.same("summary.json", "tokens", summary["tokens"], steps * per_step)
    ledger.same("summary.json", "batches/steps", summary["batches"]["steps"], steps)
    _check_status(run, math.inf if train.budget == "flops" else train.steps, ledger)
    final = summary["final"]
    if final is not None:
        ledger.same("summary.json", "seconds/train", summary["seconds"]["train"], final["seconds"], "as the last row")
    _check_speed(run, ledger)
    if run.config["schema"] > 1:
        _check_audit(run, config, ledger)


def _check_audit(run: RunRecord, config: RunConfig, ledger: Ledger) -> None:
    """A finished run was audited. Where all rows say that as many pairs ran of each token, the audit found as many."""
    measured, status = run.summary.get("measured"), run.summary["status"]
    wanted = status == "finished"
    ledger.same("summary.json", "measured", measured is not None, wanted, f"there, of a {status} run")
    if measured is None or config.model.capacity_factor is not None or config.model.round_to:
        return
    evals, train = ([row["pairs_L"] for row in rows if "pairs_L" in row] for rows in (run.evals, run.train))
    for mode, found_L, rows in (
        ("evaluation", measured["evaluation"]["pairs_L"], evals),
        ("training", measured["training"]["pairs_L"], train),
    ):
        for site, (found, *ran) in enumerate(zip(found_L, *rows, strict=False)):
            if len(set(ran)) == 1 and ran[0] % 1 == 0:
                ledger.same("summary.json", f"measured/{mode}/pairs_L/{site}", found, ran[0], "as all rows say")


def _check_status(run: RunRecord, planned: float, ledger: Ledger) -> None:
    """A finished run has a last evaluation. A diverged one has none, stopped where it says, and went no further."""
    summary, steps = run.summary, run.summary["steps"]
    finished = summary["status"] == "finished"
    ledger.same("summary.json", "final", summary["final"] is not None, finished, f"there, of a {summary['status']} run")
    stop = summary["diverged"]
    ledger.same("summary.json", "diverged", stop is not None, not finished, f"there, of a {summary['status']} run")
    if stop is not None:
        ledger.same("summary.json", "diverged/step", stop["step"], steps)
        if any(row["step"] >= planned for row in run.evals):
            ledger.add("summary.json", "status", summary["status"], "finished", "its last evaluation is finite")
    beyond = max((row["step"] for rows in (run.evals, run.train, run.loads) for row in rows), default=0)
    if beyond > steps:
        ledger.add("summary.json", "steps", steps, beyond, "rows go on after it")


def _check_speed(run: RunRecord, ledger: Ledger) -> None:
    """Tokens per second are tokens over seconds, which are recorded to a thousandth."""
    seconds, tokens, said = run.summary["seconds"]["train"], run.summary["tokens"], run.summary["tokens_per_second"]
    if said is None:
        return
    low, shortest = tokens / (seconds + 5e-4) - 0.051, seconds - 5e-4
    if said < low or (shortest > 0 and said > tokens / shortest + 0.051):
        recomputed = round(tokens / seconds, 1) if seconds else None
        ledger.add("summary.json", "tokens_per_second", said, recomputed, "tokens over seconds")


def check_rows(run: RunRecord, config: RunConfig, ledger: Ledger) -> None:
    """Hold each row against the configuration, and its balance against its loads."""
    steps, every = run.summary["steps"], config.train.eval_every
    per_step = config.train.batch_size * config.data.seq_len
    evaluated = [row["step"] for row in run.evals]
    wanted = sorted({*range(every, steps + 1, every), *([steps] if run.summary["status"] == "finished" else [])})
    if evaluated not in (wanted, wanted if run.summary["status"] == "finished" else [s for s in wanted if s < steps]):
        ledger.add("metrics.jsonl", "evaluations at steps", evaluated, wanted)
    last = 0.0
    for row in sorted([*run.evals, *run.train], key=lambda row: (row["step"], row["kind"] == "eval")):
        where = f"{row['kind']} row of step {row['step']}: "
        ledger.same("metrics.jsonl", f"{where}tokens", row["tokens"], row["step"] * per_step)
        if row["seconds"] < last:
            ledger.add("metrics.jsonl", f"{where}seconds", row["seconds"], last, "at least, as in the row before")
        last = row["seconds"]
    for row in run.evals:
        _check_balance(row, ledger)
        if "nats_W" in row:
            _check_windows(row, config.data.seq_len, ledger)
    before = len(ledger.findings)
    for step in run.train:
        if before != len(ledger.findings):
            break  # a setting that is wrong is wrong in every row
        _check_settings(step, config, run.config["schema"], ledger)


def _check_windows(row: EvalRow, seq_len: int, ledger: Ledger) -> None:
    """The windows' losses add up to the loss of all."""
    nats_W, field = row["nats_W"], f"eval row of step {row['step']}: nats_W sums"
    wanted = row["loss"] * len(nats_W) * seq_len
    ledger.near("metrics.jsonl", field, sum(nats_W), wanted, len(nats_W) * NATS + 1e-9 * wanted)


def _check_balance(row: EvalRow, ledger: Ledger) -> None:
    for site, load_E in enumerate(row["load_LE"]):
        where, experts = f"eval row of step {row['step']}: ", len(load_E)
        if not any(load_E):
            continue
        ledger.near("metrics.jsonl", f"{where}load_LE/{site} sums", sum(load_E), 1.0, experts * DIGITS)
        vio = experts * max(load_E) - 1
        ledger.near("metrics.jsonl", f"{where}max_vio_L/{site}", row["max_vio_L"][site], vio, experts * DIGITS)
        certain, possible = (sum(load < DEAD / experts + edge for load in load_E) for edge in (-DIGITS, DIGITS))
        if not certain <= row["dead_L"][site] <= possible:
            ledger.add("metrics.jsonl", f"{where}dead_L/{site}", row["dead_L"][site], certain, "by its loads")


def _check_settings(row: TrainRow, config: RunConfig, schema: int, ledger: Ledger) -> None:
    """A training step's learning rate and term weights are the configuration's."""
    where = f"train row of step {row['step']}: "
    if config.train.budget == "tokens":
        rate = learning_rate(config.train, row["step"] - 1, (row["step"] - 1) / config.train.steps)
        ledger.near("metrics.jsonl", f"{where}lr", row["lr"], rate, 1e-12 * rate)
    if schema < 2 or config.router is None:  # some weights had other names
        return
    for index, site in enumerate(sites(config.model)):
        router = config.router_at(site)
        for name, recorded in row["weights"].items():
            mine = recorded[index] if isinstance(recorded, list) else recorded
            if name == "balance" and router.target_max_vio is not None:
                continue  # it moves with the loads
            weight = router.term_weights.get(f"{name}_weight")
            if weight is None and type(router).__module__.startswith("rlroute.") and mine:
                weight = getattr(router, f"{name}_weight", None)  # ours weigh each term of their own by that field
            if weight is not None:
                ledger.same("metrics.jsonl", f"{where}weights/{name}/{index}", mine, weight, "by the configuration")
        for field in [field for field, weight in router.term_weights.items() if weight]:
            if field.removesuffix("_weight") not in row["weights"]:
                ledger.add("metrics.jsonl", f"{where}weights", sorted(row["weights"]), field, "in the configuration")
