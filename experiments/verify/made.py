"""A record held against the code and the data at hand: what it was made from, its batches, weights and costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlroute.config import RunConfig
from rlroute.experiments.verify.findings import Ledger
from rlroute.experiments.verify.hand import AtHand
from rlroute.kernels import choose_backend
from rlroute.model import Transformer
from rlroute.model.accounting import Costs, costs, fingerprints
from rlroute.schema import RunRecord
from rlroute.training.audit import claims, per_row
from rlroute.training.batches import tokens_sha256
from rlroute.training.prepare import planned_steps
from rlroute.values import differing

ROUNDING = 1e-12
"""Relative: bits are nats of a float64 sum over two constants."""
LOGGED = 0.25
"""Relative: how far the pairs of the logged steps may be from those of all steps where they vary."""


def check_made(run: RunRecord, config: RunConfig, hand: AtHand, ledger: Ledger) -> None:
    """Hold what a run was made from against the code and data at hand, and its commit against its sources."""
    if run.config["schema"] < 2:
        return
    made = run.config.get("made_from")
    if made is None:
        ledger.add("config.json", "made_from", None, "the code and data", "a record of schema 2 says it")
        return
    for path, recorded, now in differing(made, hand.made_from(config)):
        ledger.add("config.json", f"made_from/{path}", recorded, now, "at hand")
    commit, dirty = run.environment["commit"], run.environment["dirty"]
    if isinstance(commit, str) and dirty is False and (core := hand.core_at(commit)) is not None:
        ledger.same("environment.json", f"commit {commit[:12]}, whose core", core, made["core"], "as made_from says")


def check_environment(run: RunRecord, config: RunConfig, ledger: Ledger) -> None:
    """Hold what the environment repeats of the configuration against it."""
    wanted = {
        "device": config.train.device,
        "threads": config.train.threads,
        "kernel_backend": choose_backend(config.train.kernel, config.train.device),
    }
    for field, value in wanted.items():
        ledger.same("environment.json", field, run.environment.get(field), value, "by the configuration")


def check_data(run: RunRecord, config: RunConfig, hand: AtHand, ledger: Ledger) -> bool:
    """Hold the corpus against the one at hand; return whether it is the same."""
    recorded: dict[str, Any] = dict(run.summary["data"])
    now = hand.corpus(config.data).provenance
    known = now if run.config["schema"] > 1 else {name: now[name] for name in now if name in recorded}
    before = len(ledger.findings)
    for field, value in known.items():
        ledger.same("summary.json", f"data/{field}", recorded.get(field), value, "at hand")
    return len(ledger.findings) == before


def check_batches(run: RunRecord, config: RunConfig, hand: AtHand, ledger: Ledger) -> None:
    """Hold the hash chains, at each evaluation and at the end, and the validation tokens against the corpus."""
    seed, batches = run.config["seed"], run.summary["batches"]
    for row in run.evals:
        chain = hand.chain(config, seed, row["step"])
        ledger.same("metrics.jsonl", f"eval row of step {row['step']}: chain", row["chain"], chain, "of the corpus")
    ledger.same("summary.json", "batches/chain", batches["chain"], hand.chain(config, seed, batches["steps"]))
    if run.config["schema"] < 2:  # in which this was the hash of each batch, for a while
        return
    tokens = tokens_sha256(hand.validation(config))
    ledger.same("summary.json", "eval_tokens_sha256", run.summary["eval_tokens_sha256"], tokens, "of the corpus")


def check_bits(run: RunRecord, config: RunConfig, hand: AtHand, ledger: Ledger) -> None:
    """Bits per byte are nats per token over ln 2 and over the bytes that the evaluated tokens stand for."""
    per_nat = hand.bits_per_nat(config, "valid")
    parts = {"": per_nat, "sampled/": per_nat, "training/": hand.bits_per_nat(config, "train")}
    final = [("summary.json", "final: ", run.summary["final"])] if run.summary["final"] else []
    rows: list[tuple[str, str, Any]] = [
        *(("metrics.jsonl", f"eval row of step {row['step']}: ", row) for row in run.evals),
        *final,
    ]
    for file, where, row in rows:
        if ("training" in row) != config.train.eval_train:
            ledger.add(file, f"{where}training", "training" in row, config.train.eval_train, "there")
        for part, per_nat in parts.items():
            loss = row.get(part[:-1]) if part else row
            if loss is not None:
                bits = loss["loss"] * per_nat
                ledger.near(file, f"{where}{part}bits_per_byte", loss["bits_per_byte"], bits, ROUNDING * abs(bits))


def check_model(run: RunRecord, config: RunConfig, model: Transformer, ledger: Ledger) -> None:
    """Hold initial weights, parameters, FLOPs, steps and the routers' claims against the model at hand."""
    counted = costs(model, config.model, config.data.seq_len)
    now = fingerprints(model, config.model)
    for name, value in now.items():
        recorded = run.summary["fingerprint"].get(name)
        ledger.same("summary.json", f"fingerprint/{name}", recorded, value, "of the configuration and the seed")
    said = claims(model.routers, config.model.gate_form) if run.config["schema"] > 1 else {}
    for field, value in said.items():
        ledger.same("summary.json", field, run.summary.get(field), value, "as the routers say")
    if (measured := run.summary.get("measured")) is not None:
        causal_L = [router.causal for router in model.routers]
        ledger.same("summary.json", "measured/causal_L", measured["causal_L"], causal_L, "as the routers say")
        ledger.same("summary.json", "measured/flops/booked_L", measured["flops"]["booked_L"], per_row(counted.work_L))
    _check_costs(run, config, counted, ledger)


def _check_costs(run: RunRecord, config: RunConfig, counted: Costs, ledger: Ledger) -> None:
    final, tokens, recorded = run.summary["final"], run.summary["tokens"], dict[str, Any](run.summary["model"])
    pairs_L = final["pairs_L"] if final and "pairs_L" in final else [float(config.model.k)] * len(counted.pair_flops_L)
    spent, forward, off = _spent(run, config, counted, pairs_L)
    old = run.config["schema"] < 2  # when nothing said what training took in all
    rough = {"training_flops": off * spent, "training_only_flops_per_token": off * forward / (tokens or 1)}
    for field, value in counted.recorded(pairs_L, spent, forward, tokens).items():
        if field == "training_flops" and old:
            continue
        if field in rough and off:
            ledger.near("summary.json", f"model/{field}", recorded.get(field), value, rough[field])
        else:
            ledger.same("summary.json", f"model/{field}", recorded.get(field), value, "by the pairs that ran")
    if config.train.budget == "flops" and run.summary["status"] == "finished":
        steps = planned_steps(config, counted, spent, run.summary["steps"])
        ledger.near("summary.json", "steps", run.summary["steps"], steps, off and 1 + off * steps)


def _spent(run: RunRecord, config: RunConfig, counted: Costs, greedy_L: Sequence[float]) -> tuple[int, float, float]:
    """Return the training FLOPs by the pairs per token of the logged steps, in all and but for backwards, and how far
    off they may be, relatively: 0 where all tokens ran k pairs. Where no step is logged nothing says how many ran: the
    FLOPs are those of the record, at sites in the proportion of the greedy pairs, and what follows is held to it.
    """
    tokens, k, steps = run.summary["tokens"], float(config.model.k), run.summary["steps"]
    logged = [row["pairs_L"] for row in run.train if "pairs_L" in row]
    if not logged and "training_flops" in run.summary["model"]:
        none_L = [0] * len(greedy_L)
        each, alone = (
            math.fsum(n * flops for n, flops in zip(greedy_L, flops_L, strict=True))
            for flops_L in (counted.step.pair_flops_L, counted.pair_flops_L)
        )
        spent = run.summary["model"]["training_flops"]
        pairs = (spent - counted.of_training(tokens, none_L, steps)) / each if each else 0
        return spent, counted.forward_in_training(tokens, none_L, steps) + pairs * alone, 0.0
    ran = logged or [[k] * len(counted.pair_flops_L)]
    mean_L = [math.fsum(pairs) / len(ran) for pairs in zip(*ran, strict=True)]
    dropless = config.model.capacity_factor is None and not config.model.round_to
    exact = dropless and all(each == k for pairs in ran for each in pairs)
    pairs_L = [round(pairs * counted.samples * tokens) for pairs in mean_L]
    spent, forward = (book(tokens, pairs_L, steps) for book in (counted.of_training, counted.forward_in_training))
    return spent, forward, 0.0 if exact else LOGGED
