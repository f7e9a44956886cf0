"""The table says what the records say, is the same for the same records, and refuses what cannot be compared.

Longer than most: all of it is about changes to one set of made records.
"""

import csv
import hashlib
import io
import json
import math
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from rlroute.config import SCHEMA, TrainConfig
from rlroute.errors import ComparisonError
from rlroute.experiments.comparison.entries import CHOICES_IN_MODEL, SAME, SAME_IN_TRAIN
from rlroute.experiments.comparison.groups import largest_group
from rlroute.experiments.comparison.table import Table, TableRow, build_table
from rlroute.experiments.comparison.text import columns, to_csv, to_markdown
from rlroute.experiments.recipes import tuned
from rlroute.experiments.recipes.tuned import TUNING_SEEDS, tuned_settings
from rlroute.experiments.statistics import paired_difference, t_interval
from rlroute.schema import EvalRow, RunRecord

EXPERTS, LAYERS, STEPS = 16, 2, 400
EFFECT = {"switch": 0.0, "bias_balanced": -0.02, "hash": 0.15, "unbalanced": 0.06, "dense": 0.25}
LOPSIDED = {"switch": 0.2, "bias_balanced": 0.1, "hash": 0.3, "unbalanced": 4.0}


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_E(lopsided: float) -> list[float]:
    """Return loads whose MaxVio is ``lopsided`` at most, and with it dead experts."""
    weights = [max(1 + lopsided * (1 - 2 * e / (EXPERTS - 1)), 0.0) for e in range(EXPERTS)]
    return [weight / sum(weights) for weight in weights]


def eval_row(router: str, seed: int, step: int, noise: float) -> dict[str, Any]:
    layers = 0 if router == "dense" else LAYERS
    loads = [load_E(LOPSIDED.get(router, 0.5) * (1 + 0.1 * layer + 0.05 * seed)) for layer in range(layers)]
    bits = 2.4 + 4.0 / (1 + step / 40) + EFFECT.get(router, 0.05) * step / STEPS + noise
    sampled = {"loss": bits * 0.7, "bits_per_byte": bits + 0.03, "overlap_L": [0.8] * layers}
    return {
        "kind": "eval",
        "step": step,
        "tokens": step * 2048,
        "seconds": step / 10,
        "loss": bits * 0.693,
        "bits_per_byte": bits,
        "max_vio_L": [max(load) * EXPERTS - 1 for load in loads],
        "cv_L": [0.5] * layers,
        "load_entropy_L": [0.9] * layers,
        "router_entropy_L": [0.8] * layers,
        "drop_rate": 0.0,
        "dead_L": [sum(f < 0.05 / EXPERTS for f in load) for load in loads],
        "load_LE": loads,
        "sampled": sampled if router == "reinforce" else None,
        "chain": digest("chain", seed, step),
    }


def train_row(router: str, seed: int, step: int) -> dict[str, Any]:
    evaluated = eval_row(router, seed, step, 0.0)
    layers = len(evaluated["load_LE"])
    terms = {"balance": [1.1] * layers} if layers else {}
    return {
        "kind": "train",
        **{name: evaluated[name] for name in ("step", "tokens", "seconds", "loss", "max_vio_L")},
        "terms": terms,
        "weights": {name: [0.01] * layers for name in terms},
        "lr": 0.004,
        "grad_norm": 0.8,
        "router_grad_norm": 0.1,
    }


def make_run(router: str, seed: int = 0, fields: dict[str, Any] | None = None, **changes: Any) -> RunRecord:
    """Return a finished run; ``fields`` configure the router, ``changes`` set dotted paths of config ("model__k")
    afterwards.
    """
    config: dict[str, Any] = {
        "data": {"spec": "package:sympy", "tokenizer": None, "seq_len": 128, "eval_tokens": 49_152},
        "model": {"num_layers": LAYERS, "d_model": 96, "num_dense_layers": 0, "num_experts": EXPERTS, "k": 2}
        | {"gate_form": "own", "capacity_factor": None},
        "router": {"name": router} | (fields or {}),
        "train": {
            "steps": STEPS,
            "batch_size": 16,
            "lr": 4e-3,
            "dtype": "float32",
            "budget": "tokens",
            "budget_amount": None,
        },
    }
    for path, value in changes.items():
        part, name = path.split("__")
        config[part][name] = value
    config_hash = digest(json.dumps(config, sort_keys=True))[:12]
    identity: dict[str, Any] = {
        "id": f"{router}-{config_hash}-s{seed}",
        "router": router,
        "seed": seed,
        "config_hash": config_hash,
    }
    noise = random.Random(f"{router}{seed}").gauss(0.02 * seed, 0.005)
    evals: Any = [eval_row(router, seed, step, noise) for step in range(100, STEPS + 1, 100)]
    moe = router != "dense"
    load_rows: Any = [
        {"step": s, "load_LE": eval_row(router, seed, s, 0.0)["load_LE"]} for s in range(10, STEPS + 1, 10)
    ]
    summary: Any = {
        "schema": SCHEMA,
        **identity,
        "status": "finished",
        "diverged": None,
        "steps": STEPS,
        "tokens": STEPS * 2048,
        "final": evals[-1],
        "fingerprint": {"shared": digest("shared", seed, moe), "backbone": digest("backbone", seed)},
        "batches": {"chain": evals[-1]["chain"], "steps": STEPS},
        "eval_tokens_sha256": digest("eval"),
        "data": {"spec": "package:sympy", "sha256": digest("sympy"), "distribution": "sympy", "version": "1.14.0"}
        | {"vocab_size": 256, "train_tokens": 15_000_000, "valid_tokens": 1_600_000, "floor_bits_per_byte": None},
        "model": {"active_parameters": 210_000, "total_parameters": 731_000 if moe else 207_000}
        | {"router_parameters": 3_072, "flops_per_token": 431_000, "training_only_flops_per_token": 0},
        "gate": {"form": config["model"]["gate_form"], "meaning": "softmax probability" if moe else "none"},
        "causal": router != "expert_choice",
        "budget": {"kind": "tokens", "amount": STEPS * 2048},
        "seconds": {"train": 60.0 + seed, "eval": 4.0},
        "tokens_per_second": 12_345.6 + seed,
    }
    environment: Any = {
        "rlroute": "0.1.0",
        "commit": "c0ffee" * 6,
        "dirty": False,
        "python": "3.11.7",
        "torch": "2.13.0",
    }
    environment |= {
        "numpy": "2.4.6",
        "platform": "Linux",
        "device": "cpu",
        "device_name": "Xeon",
        "cpu_capability": "AVX512",
    }
    environment |= {"threads": 1, "kernel_backend": "cpu"}
    made: Any = {"core": digest("core"), "routers": {router: {"sha256": digest(router)}} if moe else {}, "reads": {}}
    streams = {"train_sha256": digest("train"), "valid_sha256": digest("valid")}
    made |= {"data": {"sha256": digest("sympy")} | streams, "tokenizer": None}
    config_json: Any = {"schema": SCHEMA, **identity, "command": "rlroute compare", "config": config, "made_from": made}
    train_rows: Any = [train_row(router, seed, step) for step in range(10, STEPS + 1, 10)]
    return RunRecord(identity["id"], config_json, environment, summary, deepcopy(evals), load_rows, train_rows)


def make_runs(routers: tuple[str, ...] = tuple(EFFECT), seeds: int = 3) -> list[RunRecord]:
    return [make_run(router, seed) for router in routers for seed in range(seeds)]


def changed(run: RunRecord, path: str, value: Any) -> RunRecord:
    """Return the run with one field set, the path as in ``summary.data.sha256``."""
    part, *names, last = path.split(".")
    copy = replace(run, **{part: deepcopy(getattr(run, part))})
    target = getattr(copy, part)
    for name in names:
        target = target[int(name) if isinstance(target, list) else name]
    target[int(last) if isinstance(target, list) else last] = value
    return copy


def diverged(run: RunRecord, step: int = 150) -> RunRecord:
    """Return the run as it would be had it stopped after ``step`` steps."""
    summary: Any = run.summary | {
        "status": "diverged",
        "diverged": {"step": step, "what": "the loss is not finite"},
        "final": None,
    }
    summary |= {
        "steps": step,
        "tokens": step * 2048,
        "batches": {"chain": digest("chain", run.config["seed"], step), "steps": step},
    }
    kept: dict[str, Any] = {
        name: [row for row in getattr(run, name) if row["step"] <= step] for name in ("evals", "loads", "train")
    }
    return replace(run, summary=summary, **kept)


def row_of(table: Table, label: str) -> TableRow:
    return next(row for row in table.rows if row.label == label)


def final_of(run: RunRecord) -> EvalRow:
    assert run.summary["final"]
    return run.summary["final"]


def bits(run: RunRecord) -> float:
    return final_of(run)["bits_per_byte"]


def test_rows_say_what_the_records_say() -> None:
    runs = make_runs()
    table = build_table(runs)
    assert table.reference == "switch"
    means = [row.bits_per_byte.mean for row in table.rows if row.bits_per_byte]
    assert means == sorted(means) and len(means) == len(EFFECT)
    by_router = {name: {r.config["seed"]: bits(r) for r in runs if r.config["router"] == name} for name in EFFECT}
    for row in table.rows:
        own = by_router[row.router]
        assert row.n == 3 and row.bits_per_byte == t_interval(list(own.values()))
        assert row.difference == (None if row.router == "switch" else paired_difference(own, by_router["switch"]))
    control = row_of(table, "unbalanced")
    finals = [final_of(run) for run in runs if run.config["router"] == "unbalanced"]
    assert control.max_vio == pytest.approx(sum(final["max_vio_L"][1] or 0.0 for final in finals) / 3)
    assert control.max_vio_site == "1" and control.experts == EXPERTS * LAYERS
    assert (
        control.dead_experts == pytest.approx(sum(sum(final["dead_L"]) for final in finals) / 3)
        and control.dead_experts
    )
    assert row_of(table, "dense").max_vio is None and row_of(table, "dense").dead_experts is None


def test_text_does_not_depend_on_the_order_of_the_records() -> None:
    runs = make_runs()
    shuffled = random.Random(0).sample(runs, len(runs))
    assert to_markdown(build_table(runs)) == to_markdown(build_table(shuffled))
    assert to_csv(build_table(runs)) == to_csv(build_table(shuffled))


def test_without_timings_a_rerun_at_another_speed_gives_the_same_text() -> None:
    runs = make_runs()
    slower = [changed(changed(r, "summary.tokens_per_second", 1.0), "summary.seconds.train", 9.0) for r in runs]
    before, after = build_table(runs), build_table(slower)
    assert to_markdown(before) != to_markdown(after) and to_csv(before) != to_csv(after)
    assert to_markdown(before, timings=False) == to_markdown(after, timings=False)
    assert to_csv(before, timings=False) == to_csv(after, timings=False)
    assert "tokens/s" not in to_markdown(before, timings=False)


def test_a_speed_has_no_more_digits_than_others_like_it_and_full_precision_in_the_csv() -> None:
    table = build_table(make_runs())
    assert "| 12.3 k |" in to_markdown(table) and "12,34" not in to_markdown(table)
    assert str(row_of(table, "hash").tokens_per_second) in to_csv(table)


def test_the_note_of_commits_has_each_once_and_says_what_was_not_committed() -> None:
    runs = make_runs()
    dirty = changed(changed(runs[0], "environment.commit", "beef" * 10), "environment.dirty", True)
    other = changed(runs[1], "environment.commit", "feed" * 10)
    mixed = [dirty, other, changed(runs[2], "environment.commit", None), *runs[3:]]
    release = f"none, release {runs[2].environment['rlroute']}"
    said = ["beef" * 10 + " with uncommitted changes", "c0ffee" * 6, "feed" * 10, release]
    assert dict(build_table(mixed).notes)["Commit"] == ", ".join(said)
    assert dict(build_table(runs).notes)["Commit"] == "c0ffee" * 6


def test_markdown_is_one_table_with_marks_and_notes() -> None:
    text = to_markdown(build_table([*make_runs(), *(make_run("expert_choice", s) for s in range(3))]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(EFFECT) + 1 and len({line.count("|") for line in lines}) == 1
    assert "| dense, yardstick |" in text and "| expert_choice, non-causal |" in text and "| reference |" in text
    for said in (
        "rlroute compare",
        "c0ffee",
        "2.13.0",
        "AVX512",
        "package:sympy",
        digest("sympy"),
        digest("shared", 1, True)[:12],
    ):
        assert said in text


def test_csv_is_full_precision_and_rectangular() -> None:
    table = build_table(make_runs())
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["label"] for row in rows] == [row.label for row in table.rows]
    for text, row in zip(rows, table.rows, strict=True):
        assert row.bits_per_byte and float(text["bits_per_byte_mean"]) == row.bits_per_byte.mean
        assert None not in text and None not in text.values()
    assert next(row for row in rows if row["label"] == "switch")["difference_mean"] == ""


def shifted(effects: dict[int, float], runs: list[RunRecord]) -> list[RunRecord]:
    """Return the runs with hash as far from switch as is said by seed."""
    switch = {run.config["seed"]: bits(run) for run in runs if run.config["router"] == "switch"}
    return [
        changed(r, "summary.final.bits_per_byte", switch[r.config["seed"]] + effects[r.config["seed"]])
        if r.config["router"] == "hash"
        else r
        for r in runs
    ]


@pytest.mark.parametrize(
    ("effects", "said", "mark"),
    [
        ((0.15, 0.151, 0.149), "worse", ""),
        ((-0.15, -0.151, -0.149), "better", ""),
        ((0.001, -0.002, 0.001), "equivalent within 0.02", ""),
        ((0.005, 0.0051, 0.0049), "worse, by less than 0.02", ""),
        ((0.06, 0.11, 0.14), "worse", ", not after Holm"),
        ((0.0, 0.4, -0.4), "unresolved", ""),
    ],
)
def test_a_row_says_its_verdict(effects: tuple[float, ...], said: str, mark: str) -> None:
    table = build_table(shifted(dict(enumerate(effects)), make_runs()))
    row, cells = row_of(table, "hash"), columns(table)
    assert cells["verdict"](row) == said and cells["verdict"](row_of(table, "switch")) == "reference"
    difference = cells["difference to switch"](row)
    assert difference.endswith(mark) and ("Holm" in difference) == bool(mark)
    (line,) = [line for line in csv.DictReader(io.StringIO(to_csv(table))) if line["label"] == "hash"]
    assert line["verdict"] == said and "not separated" not in to_markdown(table)


def test_the_margin_is_said_and_decides() -> None:
    runs = shifted({0: 0.03, 1: 0.031, 2: 0.029}, make_runs())
    for margin, said in ((0.02, "worse"), (0.04, "worse, by less than 0.04")):
        table = build_table(runs, margin=margin)
        assert str(row_of(table, "hash").verdict) == said
        assert f"equivalent within {margin:g} bits per byte" in dict(table.notes)["Verdicts"]


def test_one_seed_has_no_interval() -> None:
    table = build_table(make_runs(seeds=1))
    for row in table.rows:
        assert row.n == 1 and row.bits_per_byte and row.bits_per_byte.low is None and row.smallest_resolvable is None
    text = to_markdown(table)
    assert not any("±" in line for line in text.splitlines() if line.startswith("|"))
    assert "Holm-adjusted" not in text and text.count("| unresolved |") == len(EFFECT) - 1


def test_reference_is_switch_or_the_first_by_name_or_what_is_asked() -> None:
    assert build_table(make_runs(("hash", "dense", "unbalanced"))).reference == "dense"
    table = build_table(make_runs(), "hash")
    assert row_of(table, "hash").difference is None and row_of(table, "switch").difference is not None
    with pytest.raises(ComparisonError, match=r"'nonesuch'.*bias_balanced, dense, hash, switch, unbalanced"):
        build_table(make_runs(), "nonesuch")


def test_several_configurations_of_one_router_are_told_apart() -> None:
    tables = {"random": 4e-3, "position": 8e-3}
    runs = [
        make_run("hash", s, {"table": name, "salt": 1}, train__lr=lr) for name, lr in tables.items() for s in range(2)
    ]
    runs += [make_run("switch", s, model__k=k) for k in (1, 2) for s in range(2)]
    table = build_table(runs)
    labels = ["hash (table=position)", "hash (table=random)", "switch (model.k=1)", "switch (model.k=2)"]
    assert sorted(row.label for row in table.rows) == labels and table.reference == labels[2]
    notes = dict(table.notes)["Deliberate differences"]
    assert (
        "train.lr: 0.004" in notes
        and "0.008 (hash (table=position))" in notes
        and "model.k: 1 (switch (model.k=1))" in notes
    )


def test_diverged_runs_are_named_and_left_out() -> None:
    runs = make_runs()
    broken = [diverged(run) if run.id.startswith("hash") and run.config["seed"] == 1 else run for run in runs]
    table = build_table(broken)
    row = row_of(table, "hash")
    left = {r.config["seed"]: bits(r) for r in runs if r.config["router"] == "hash" and r.config["seed"] != 1}
    base = {r.config["seed"]: bits(r) for r in runs if r.config["router"] == "switch" and r.config["seed"] != 1}
    assert (row.n, row.diverged) == (2, 1) and row.difference == paired_difference(left, base)
    text = to_markdown(table)
    assert "hash, 1 of 3 diverged" in text and "hash: seed 1 at step 150 (the loss is not finite)" in text


def test_an_entry_without_a_finished_run_stands_last() -> None:
    runs = [diverged(run, step=50) if run.config["router"] == "switch" else run for run in make_runs()]
    table = build_table(runs)
    assert table.rows[-1].label == "switch" and table.rows[-1].n == 0
    assert all(row.difference is None for row in table.rows) and "| diverged |" in to_markdown(table)


def with_windows(run: RunRecord, nats: Sequence[float]) -> RunRecord:
    """Return the run with the losses of its validation windows, of 100 bytes each."""
    final = final_of(run) | {"nats_W": list(nats), "bits_per_byte": math.fsum(nats) / math.log(2) / 100 / len(nats)}
    return changed(run, "summary.final", final)


@pytest.mark.parametrize("windows", [4, 24])
def test_another_sample_of_validation_tokens_would_move_a_difference_by_so_much(windows: int) -> None:
    """The same in both seeds where seeds differ in the whole: half a t interval over windows."""
    draw = random.Random(windows)
    shared = [draw.gauss(400, 50) for _ in range(windows)]
    moved = [draw.gauss(2, 1) for _ in range(windows)]
    runs = []
    for seed in range(2):
        runs.append(with_windows(make_run("switch", seed), [nats + seed for nats in shared]))
        own = [nats + more + seed for nats, more in zip(shared, moved, strict=True)]
        runs.append(with_windows(make_run("hash", seed), own))
    table = build_table(runs, "switch")
    row, half = row_of(table, "hash"), t_interval(moved).half_width
    assert half is not None and row.sample_noise == pytest.approx(half / math.log(2) / 100, rel=1e-9)
    assert row_of(table, "switch").sample_noise is None
    (note,) = [text for title, text in table.notes if title.startswith("Sample of validation tokens")]
    assert note == f"hash ± {row.sample_noise:.4f}"
    old = build_table([*runs[:2], make_run("switch", 1), *runs[3:]], "switch")
    assert row_of(old, "hash").sample_noise is None, "a record does not say"


def test_sampled_loss_of_a_stochastic_router_is_said() -> None:
    table = build_table([*make_runs(), *(make_run("reinforce", s) for s in range(3))])
    row = row_of(table, "reinforce")
    assert row.sampled_bits_per_byte and row.bits_per_byte
    assert row.sampled_bits_per_byte.mean == pytest.approx(row.bits_per_byte.mean + 0.03)
    assert "reinforce" in dict(table.notes)["Sampled"] and "80% of them the greedy ones" in dict(table.notes)["Sampled"]


ALL_SHARE = [
    "config.schema",
    "config.made_from.core",
    "config.made_from.data.sha256",
    "config.made_from.data.valid_sha256",
    "config.made_from.tokenizer",
    "summary.data.sha256",
    "summary.eval_tokens_sha256",
    "summary.budget.kind",
    "summary.budget.amount",
    "environment.kernel_backend",
    "environment.device",
    "environment.threads",
    "environment.workers",
    "environment.expert_parallel",
    "environment.torch",
    "environment.cpu_capability",
]
"""Written out other: a check that is taken out of the table must be taken out here too."""


def test_what_all_share_is_written_out_here() -> None:
    assert sorted(SAME) == sorted(ALL_SHARE)
    shared = [
        "batch_size",
        "budget",
        "budget_amount",
        "compile",
        "deterministic",
        "dtype",
        "loss_chunk",
        "param_dtype",
        "steps",
    ]
    assert sorted(SAME_IN_TRAIN) == shared
    free = ["constant_experts", "copy_experts", "zero_experts", "expert_dropout"]
    choices = ["capacity_factor", "gate_form", "k", "num_experts", "num_shared_experts", *free]
    assert sorted(CHOICES_IN_MODEL) == sorted(choices)


@pytest.mark.parametrize("path", ALL_SHARE)
def test_refuses_runs_that_differ_in_what_all_share(path: str) -> None:
    _refused(path, 77 if path.endswith(("schema", "threads")) else "other", path)


def on_fewer(tokens: int, seed: int = 0, router: str = "switch") -> RunRecord:
    """Return a run that was trained on so many of the training tokens, and so on other batches."""
    run = make_run(router, seed, data__train_tokens=tokens)
    run = changed(run, "config.made_from.data.train_sha256", digest("train", tokens))
    run = changed(run, "summary.data.train_tokens", tokens)
    for place, row in enumerate(run.evals):
        run = changed(run, f"evals.{place}.chain", digest("chain", tokens, seed, row["step"]))
    run = changed(run, "summary.final", run.evals[-1])
    return changed(run, "summary.batches.chain", run.evals[-1]["chain"])


def test_runs_on_fewer_training_tokens_stand_beside_the_others_and_are_held_to_their_own() -> None:
    runs = [*make_runs(("switch",), 2), *(on_fewer(tokens, seed) for tokens in (1000, 5000) for seed in range(2))]
    table = build_table(runs)
    notes = dict(table.notes)
    assert {row.label for row in table.rows} == {f"switch (data.train_tokens={n})" for n in (None, 1000, 5000)}
    assert "data.train_tokens: 1000 (switch (data.train_tokens=1000))" in notes["Deliberate differences"]
    assert {f"Same batches ({n:,} training tokens)" for n in (1000, 5000, 15_000_000)} <= notes.keys()
    assert "1,000 or 5,000 or 15,000,000 training and" in notes["Corpus"]
    assert len(largest_group(runs)[0]) == len(runs)
    twins = [on_fewer(5000, seed, "hash") for seed in range(2)]
    assert len(build_table([*runs, *twins]).rows) == 4
    for field, value in (("config.made_from.data.train_sha256", "other"), ("evals.0.chain", digest("other"))):
        others = [changed(twin, field, value) for twin in twins]
        with pytest.raises(ComparisonError, match=r"train_sha256 differs|chain at step 100 differs"):
            build_table([*runs, *others])
        assert len(largest_group([*runs, *others])[0]) == len(runs)


def test_what_over_fits_shows_under_the_table() -> None:
    def evaluated(run: RunRecord) -> RunRecord:
        for place, row in enumerate(run.evals):
            run = changed(run, f"evals.{place}.training", {"loss": 1.0, "bits_per_byte": row["bits_per_byte"] - 0.5})
        lower = changed(run, "evals.0.bits_per_byte", run.evals[-1]["bits_per_byte"] - 0.25)
        return changed(lower, "summary.final", lower.evals[-1])

    notes = dict(build_table([*map(evaluated, make_runs(("switch",))), *make_runs(("hash",))]).notes)
    said = notes["Training tokens"]
    assert said.startswith("switch ") and said.endswith(
        "validation is 0.5000 ± 0.0000 above, and 0.2500 ± 0.0000 above its lowest"
    )


SHARED_CONFIG = [f"data.{name}" for name in make_run("switch").config["config"]["data"]]
SHARED_CONFIG += [
    f"model.{name}" for name in make_run("switch").config["config"]["model"] if name not in CHOICES_IN_MODEL
]
SHARED_CONFIG += [f"train.{name}" for name in SAME_IN_TRAIN]


@pytest.mark.parametrize("path", SHARED_CONFIG)
def test_refuses_configurations_that_differ_in_data_or_model(path: str) -> None:
    _refused(f"config.config.{path}", 77, f"config.{path}")


@pytest.mark.parametrize("name", ["shared", "backbone"])
def test_refuses_one_changed_shared_weight(name: str) -> None:
    _refused(f"summary.fingerprint.{name}", digest("changed"), f"fingerprint.{name}")


def test_refuses_other_batches() -> None:
    _refused("summary.batches.chain", digest("changed"), "batches.chain at step 400")
    _refused("evals.0.chain", digest("changed"), "batches.chain at step 100")


def _refused(path: str, value: Any, said: str) -> None:
    """Change one field of one run, and expect a refusal that names the field, both runs and both values."""
    runs = make_runs()
    index = next(i for i, run in enumerate(runs) if run.id.startswith("switch") and run.config["seed"] == 1)
    runs[index] = changed(runs[index], path, value)
    with pytest.raises(ComparisonError) as refusal:
        build_table(runs)
    message = str(refusal.value)
    assert message.startswith(f"{said} differs") and runs[index].id in message and repr(value) in message
    assert sum(run.id in message for run in runs) == 2


def test_refuses_unequal_seeds_a_run_twice_and_nothing() -> None:
    runs = make_runs()
    with pytest.raises(ComparisonError, match=r"seeds differs: bias_balanced has \[0, 1, 2\], unbalanced has \[0, 1\]"):
        build_table([run for run in runs if not (run.config["router"] == "unbalanced" and run.config["seed"] == 2)])
    with pytest.raises(ComparisonError, match="is there twice"):
        build_table([*runs, runs[0]])
    with pytest.raises(ComparisonError, match="no ended runs"):
        build_table([])


def test_other_numbers_of_experts_are_a_deliberate_difference() -> None:
    few = [make_run("switch", seed, model__num_experts=8) for seed in range(2)]
    few = [changed(run, "summary.fingerprint.shared", digest("8 experts", run.config["seed"])) for run in few]
    table = build_table([*few, *make_runs(("switch", "hash"), seeds=2)])
    assert "model.num_experts: 16" in dict(table.notes)["Deliberate differences"]
    assert "Same initial weights (8 experts)" in dict(table.notes)


def test_under_another_budget_shorter_runs_must_be_prefixes() -> None:
    def shortened(run: RunRecord, steps: int) -> RunRecord:
        evals = [row for row in run.evals if row["step"] <= steps]
        batches = {"chain": digest("chain", run.config["seed"], steps), "steps": steps}
        summary: Any = run.summary | {"steps": steps, "batches": batches, "final": evals[-1] if evals else run.evals[0]}
        return replace(run, summary=summary, evals=evals)

    runs = [
        changed(r, "summary.budget", {"kind": "flops", "amount": 1e12}) for r in make_runs(("switch", "hash"), seeds=2)
    ]
    shorter = [shortened(run, 300) if run.config["router"] == "hash" else run for run in runs]
    assert "prefixes" in dict(build_table(shorter).notes)["Same batches"]
    with pytest.raises(ComparisonError, match=r"batches\.chain at step 300"):
        build_table([*shorter[:-1], changed(shorter[-1], "summary.batches.chain", digest("changed"))])
    with pytest.raises(ComparisonError, match=r"batches\.steps"):
        build_table([*shorter[:-1], shortened(runs[-1], 70)])


def test_values_from_records_cannot_break_the_table() -> None:
    runs = [make_run("hash", seed, {"table": table}) for table in ("a|b", "c\nd") for seed in range(2)]
    lines = [line for line in to_markdown(build_table(runs)).splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.replace("\\|", "").count("|") for line in lines}) == 1


# What ran, where, and at whose settings


def sited(run: RunRecord, **final: Any) -> RunRecord:
    """Return the run as it would be with experts in its attention too: four sites, of 4 and 16 experts in turn."""
    run = changed(run, "config.config.model.attention_experts", 4)
    few, many = [0.25] * 4, run.loads[0]["load_LE"][0]
    loads = {"load_LE": [few, many, few, many]}
    whole = {**final_of(run), **loads, "max_vio_L": [0.0, 0.1, None, 0.3], "dead_L": [0, 1, 0, 2], **final}
    rows: Any = [{**row, **loads} for row in run.loads]
    return changed(replace(run, loads=rows), "summary.final", whole)


def test_figures_are_named_by_their_sites_whose_experts_may_differ_in_number() -> None:
    row = row_of(build_table([sited(make_run("switch", seed)) for seed in range(2)]), "switch")
    assert (row.max_vio, row.max_vio_site, row.experts, row.dead_experts) == (0.3, "1", 4 + 16 + 4 + 16, 3)
    other = [sited(make_run("switch", seed), max_vio_L=[0.5, 0.1, 0.9, 0.3]) for seed in range(2)]
    assert row_of(build_table(other), "switch").max_vio_site == "1.attention"
    dense_first = [changed(make_run("switch", seed), "config.config.model.num_dense_layers", 1) for seed in range(2)]
    one_site = [changed(run, "summary.final.max_vio_L", [0.7]) for run in dense_first]
    one_site = [changed(run, "summary.final.load_LE", [load_E(0.7)]) for run in one_site]
    assert row_of(build_table(one_site), "switch").max_vio_site == "1"


def test_a_run_that_chose_nothing_has_no_max_vio() -> None:
    runs = [changed(make_run("hash", seed), "summary.final.max_vio_L", [None, None]) for seed in range(2)]
    table = build_table([*runs, *make_runs(("switch",), seeds=2)])
    row = row_of(table, "hash")
    assert row.max_vio is None and row.max_vio_site is None and row.dead_experts is not None
    assert "| – | " in to_markdown(table)


def test_pairs_per_token_have_a_column_where_someone_does_not_run_k() -> None:
    def ran(router: str, pairs: list[float], without: list[float]) -> list[RunRecord]:
        runs = [changed(make_run(router, seed), "summary.final.pairs_L", pairs) for seed in range(2)]
        return [changed(run, "summary.final.without_L", without) for run in runs]

    old, plain = make_runs(("switch", "dense"), seeds=2), ran("hash", [2.0, 2.0], [0.0, 0.0])
    table = build_table([*old, *plain])
    assert "pairs/token" not in columns(table) and not dict(table.notes)["Tokens without an expert"]
    assert row_of(table, "switch").pairs_per_token is None and row_of(table, "hash").pairs_per_token == 2.0
    table = build_table([*old, *plain, *ran("relu", [1.5, 2.5], [0.25, 0.0])])
    cells = {row.label: columns(table)["pairs/token"](row) for row in table.rows}
    assert cells == {"switch": "–", "dense": "–", "hash": "2.00", "relu": "2.00"}
    assert dict(table.notes)["Tokens without an expert"] == "relu 25.00%"


def test_all_measures_of_balance_are_in_the_csv_and_where_they_are_asked_for() -> None:
    runs = make_runs(("switch", "unbalanced", "dense"), seeds=2)
    runs = [
        changed(run, "summary.final.load_LE.0", [1.0] + 15 * [0.0]) if run.config["router"] == "unbalanced" else run
        for run in runs
    ]
    table = build_table(runs)
    worst, even = row_of(table, "unbalanced"), row_of(table, "switch")
    assert worst.gini == pytest.approx(15 / 16) and worst.min_over_max == 0
    assert even.gini is not None and 0 < even.gini < 0.2 and even.min_over_max is not None and even.min_over_max > 0.5
    assert row_of(table, "dense").gini is None and row_of(table, "dense").min_over_max is None
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert {line["router"]: line["gini"] for line in lines}["unbalanced"] == str(worst.gini)
    assert {"max_vio", "gini", "min_over_max", "without_expert"} <= set(lines[0])
    assert {"Gini", "min/max load", "without expert"} <= set(columns(table, balance=True))
    assert not {"Gini", "min/max load", "without expert"} & set(columns(table))


REGRET = {"layer": 1, "tokens": 128, "exact": 1.0, "sets": 119, "nats": 0.2, "better": 0.25}


def with_regret(run: RunRecord, regret: Any) -> RunRecord:
    """Return the run with a regret, and nothing else that its audit found."""
    still = {"routes_L": [0.0] * LAYERS, "drops_L": [0.0] * LAYERS, "outputs": 0.0}
    mode = {"pairs_L": [2.0] * LAYERS, "repeats": True, "later": still, "others": None}
    flops: dict[str, list[int]] = {
        f"{name}_L": [] for name in ("booked", "measured", "declared", "elementwise", "foreign")
    }
    measured = {"tokens": 64, "causal_L": [True] * LAYERS, "training": mode, "evaluation": mode, "flops": flops}
    return changed(run, "summary.measured", measured | {"regret": regret})


def test_regret_has_columns_where_some_record_says_it() -> None:
    old = make_runs(("hash", "dense"), seeds=2)
    assert not any("regret" in title.lower() for title in columns(build_table(old)))
    nats = [with_regret(make_run("switch", seed), REGRET | {"nats": 0.2 + 0.1 * seed}) for seed in range(2)]
    deaf = [with_regret(make_run("bandit", seed), "it is deaf") for seed in range(2)]
    table = build_table([*old, *nats, *deaf])
    rows, shown = {row.label: row for row in table.rows}, columns(table)
    bits = [final["bits_per_byte"] / final["loss"] for run in nats if (final := run.summary["final"])]
    assert rows["switch"].regret is not None and rows["switch"].better_routes == 0.25
    assert rows["switch"].regret.mean == pytest.approx((0.2 * bits[0] + 0.3 * bits[1]) / 2)
    assert [rows[name].regret for name in ("hash", "dense", "bandit")] == [None] * 3
    assert shown["better routes"](rows["switch"]) == "25%" and shown["regret"](rows["hash"]) == "–"
    said = dict(table.notes)["Regret"]
    assert "128 validation tokens in layer 1" in said and "bandit none: it is deaf" in said and "at least" not in said
    few = [with_regret(make_run("topk", seed), REGRET | {"exact": 0.75, "better": None}) for seed in range(2)]
    table = build_table([*old, *few])
    assert "topk at least, the best found by exchanges for 25% of tokens" in dict(table.notes)["Regret"]
    assert columns(table)["better routes"](row_of(table, "topk")) == "–" and "regret_mean" in to_csv(table)


def test_routers_of_sites_are_in_the_label() -> None:
    def run(sites: str, seed: int, **fields: Any) -> RunRecord:
        others = [{"sites": sites, "name": "hash"} | fields]
        config_hash = digest(others)[:12]
        found = changed(make_run("switch", seed), "config.config.others", others)
        found = changed(found, "config.config_hash", config_hash)
        return replace(found, id=f"switch+hash-{config_hash}-s{seed}")

    def labels(runs: list[RunRecord]) -> set[str]:
        return {row.label for row in build_table(runs).rows}

    plain = [make_run("switch", seed) for seed in range(2)]
    one, other = ([run(sites, seed) for seed in range(2)] for sites in ("0", "attention1"))
    assert labels([*plain, *one, *other]) == {"switch", "switch+hash@0", "switch+hash@attention1"}
    fields = [run("0", seed, table=table) for table in ("random", "position") for seed in range(2)]
    assert labels(fields) == {"switch+hash@0 (@0.table=random)", "switch+hash@0 (@0.table=position)"}
    assert dict(build_table([*plain, *one]).notes)["Deliberate differences"] == "none"


def test_rows_say_at_what_settings_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    default = TrainConfig().lr
    found = tuned_settings("switch", TrainConfig())
    length: dict[str, Any] = {"train__steps": TrainConfig().steps, "train__batch_size": TrainConfig().batch_size}
    router, rates = found["router"], length | {f"train__{n}": v for n, v in found["train"].items()}
    runs = [make_run("switch", s, router, **rates) for s in range(2)]
    runs += [make_run("switch", s, router | {"z_weight": 0.1}, **rates) for s in range(2)]
    runs += [make_run("bandit", s, train__lr=default, **length) for s in range(2)]
    runs += [make_run("credit", s, {"balance_weight": 9.0}, train__lr=default, **length) for s in range(2)]
    runs += [make_run(router, s, train__lr=0.5, **length) for s in range(2) for router in ("actor_critic", "nobodys")]
    table = build_table(runs)
    settings = {row.label: row.settings for row in table.rows}
    assert settings == {
        "switch (z_weight=None)": "tuned",
        "switch (z_weight=0.1)": "tuned for switch",
        "bandit": "default",
        "credit": "other",
        "actor_critic": "other",
        "nobodys": "unknown",
    }
    assert {row.label for row in table.rows if row.tuned} == {"switch (z_weight=None)", "switch (z_weight=0.1)"}
    said = dict(table.notes)["Settings"]
    assert "tuned: switch (z_weight=None) (" in said and "tuned for: switch (z_weight=0.1) (" in said
    start = tuned.GRID["switch"].start
    begun = length | {f"train__{n}": v for n, v in start["train"].items()}
    monkeypatch.setattr(tuned, "TUNED", {})
    (row,) = build_table([make_run("switch", s, start["router"], **begun) for s in range(2)]).rows
    assert row.settings == "grid start"
    assert "default: bandit (never tuned" in said and "| tuned for switch |" in to_markdown(table)


def test_a_table_of_tuning_trials_says_what_it_is() -> None:
    trials = [make_run("switch", seed, train__lr=lr) for lr in (4e-3, 8e-3) for seed in TUNING_SEEDS]
    assert "trials of rlroute tune" in dict(build_table(trials).notes)["No comparison"]
    assert not dict(build_table(make_runs()).notes)["No comparison"]


# Which of many runs make the table


def elsewhere(run: RunRecord) -> RunRecord:
    """Return the run as it would be under another budget: shorter, and under an id of its own."""
    other = changed(run, "summary.budget.amount", 7)
    return replace(other, id=f"other-{run.id}", summary={**other.summary, "id": f"other-{run.id}"})


def test_the_largest_comparable_group_makes_the_table_and_the_others_are_named() -> None:
    runs = make_runs()
    for count in (1, 2):  # of five entries
        others = [elsewhere(run) for run in make_runs(tuple(EFFECT)[:count])]
        kept, lines = largest_group(random.Random(count).sample([*runs, *others], len(runs) + len(others)))
        assert sorted(run.id for run in kept) == sorted(run.id for run in runs)
        (line,) = lines
        assert f"{3 * count} of " in line and sum(run.id in line for run in others) == 3
        assert f"summary.budget.amount is 7, in the table {STEPS * 2048}" in line
        table = build_table(kept, left_out=lines)
        assert dict(table.notes)["Left out"] == line and line.split(":")[0] in to_markdown(table)


@pytest.mark.parametrize("path", [*ALL_SHARE, "config.config.data.spec", "config.config.train.steps"])
def test_whatever_all_share_parts_groups_and_is_named(path: str) -> None:
    runs = make_runs(("switch", "hash"))
    odd = changed(make_run("dense"), path, "other")
    kept, (line,) = largest_group([*runs, odd])
    assert {run.id for run in kept} == {run.id for run in runs} and odd.id in line and "'other'" in line
    assert path.replace("config.config", "config") in line
    build_table(kept)


def test_an_entry_alone_is_no_comparison_and_equal_groups_go_by_their_date() -> None:
    alone = [elsewhere(make_run("switch", seed)) for seed in range(9)]
    pair = make_runs(("switch", "hash"), seeds=2)
    assert {run.id for run in largest_group([*alone, *pair])[0]} == {run.id for run in pair}
    other = [elsewhere(run) for run in pair]
    for newer, older in ((pair, other), (other, pair)):
        dated = [changed(run, "environment.begun", "2026-02-01T00:00:00+00:00") for run in newer]
        dated += [changed(run, "environment.begun", "2026-01-01T00:00:00+00:00") for run in older]
        assert {run.id for run in largest_group(dated)[0]} == {run.id for run in newer}
    assert largest_group([]) == ([], [])


def test_of_entries_and_seeds_the_most_runs_that_are_whole() -> None:
    more, fewer = make_runs(("switch", "hash"), seeds=4), make_runs(("dense",), seeds=3)
    kept, (line,) = largest_group([*more, *fewer])
    assert len(kept) == 9 and "other entries have no seed 3" in line and "2 of hash, switch" in line
    kept, (line,) = largest_group([*more, make_run("dense", 1)])
    assert len(kept) == 8 and "1 of dense" in line and "no seed 0, 2, 3" in line
    apart = [make_run("switch", seed) for seed in (0, 1, 7)] + [make_run("hash", seed) for seed in (0, 1, 8)]
    kept, lines = largest_group(apart)
    assert {run.config["seed"] for run in kept} == {0, 1} and len(kept) == 4 and len(lines) == 2
    build_table(kept)


@pytest.mark.parametrize("path", ["summary.fingerprint.backbone", "summary.fingerprint.shared", "evals.0.chain"])
def test_a_run_of_other_weights_or_batches_is_left_out_by_name(path: str) -> None:
    runs = make_runs(("switch", "hash", "unbalanced"), seeds=2)
    odd = changed(runs[0], path, digest("other"))
    kept, lines = largest_group([odd, *runs[1:]])
    assert any(odd.id in line and digest("other")[:12] in line for line in lines)
    assert odd.id not in {run.id for run in kept}
    build_table(kept)


def test_one_entry_is_one_routers_code_in_a_group_too() -> None:
    path = "config.made_from.routers"
    runs = [changed(run, path, {"switch": {"sha256": "a"}}) for run in make_runs(seeds=3)]
    odd = changed(runs[0], path, {"switch": {"sha256": "b"}})
    kept, lines = largest_group([odd, *runs[1:]])
    assert any(odd.id in line and f"{path}.switch.sha256" in line for line in lines)
    build_table(kept)
