"""What ran is counted, booked and paid for: pairs, tokens without any, FLOPs; also where nothing ran at all.

Shape suffixes: B sequences, S sequence length, L routed sites, E experts.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.model.accounting import costs
from rlroute.records import RunFolder
from rlroute.training.data import load_corpus
from rlroute.training.evaluate import evaluate
from rlroute.training.loop import train
from rlroute.training.prepare import expected_costs, flops_per_step
from rlroute.training.step import backward_batch
from rlroute.transfer import numbers
from tests.runs import figures, interrupted
from tests.tiny import CPU64, V, make_batch, run_batch, small_config
from tests.toys import ToyRouter, installed, toy_model

RULES = ["top", "threshold", "experts", "soft", "nothing", "double"]
FIELDS: list[dict[str, Any]] = [
    {},
    {"num_shared_experts": 1, "num_experts": 6},
    {"capacity_factor": 0.5},
    {"num_layers": 3, "num_dense_layers": 1, "d_expert": 9},
]


# Pairs


def pairs_by_hand(decisions: list[Any]) -> tuple[list[float], list[float]]:
    """Pairs per token, and the share of tokens without any, by site, counted one by one."""
    pairs_L, without_L = [], []
    for decision in decisions:
        ran = [
            int(token)
            for token, expert, kept in zip(decision.token_ids_R, decision.expert_ids_R, decision.kept_R, strict=True)
            if kept and expert < decision.num_experts
        ]
        pairs_L.append(len(ran) / decision.num_tokens)
        without_L.append(1 - len(set(ran)) / decision.num_tokens)
    return pairs_L, without_L


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_pairs_and_tokens_without_any_are_those_of_the_decisions(rule: str, fields: dict[str, Any]) -> None:
    model, batch = toy_model(small_config(**fields), rule=rule), make_batch()
    row = evaluate(model, [batch], torch.ones(V).numpy(), CPU64, seed=0, step=0, final=False)
    result = backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=1)
    trained = numbers(result.per_token())
    for explore, found in ((False, row), (True, trained)):
        pairs_L, without_L = pairs_by_hand(run_batch(model, batch, explore=explore)[1])
        assert found["pairs_L"] == pytest.approx(pairs_L) and found["without_L"] == pytest.approx(without_L)
    if rule == "double":
        assert sum(trained["pairs_L"]) > sum(row["pairs_L"])
    else:
        assert trained["pairs_L"] == row["pairs_L"], "extra pairs are training's alone"


def test_micro_batches_and_samples_are_counted_whole() -> None:
    model = toy_model(small_config(), rule="threshold")
    whole, halves = (
        backward_batch(model, make_batch(4), CPU64, seed=0, step=0, micro_batches=parts) for parts in (1, 2)
    )
    assert numbers(whole.per_token()) == numbers(halves.per_token()) and whole.pairs_L.equal(halves.pairs_L)


# FLOPs


@torch.no_grad()
def counted(config: ModelConfig, **router: Any) -> float:
    """Return a greedy forward's FLOPs per token, as PyTorch counts them, less those of keys that the mask hides."""
    model, batch = toy_model(config, backend="reference", **router), make_batch(3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_batch(model, batch)
    queries = config.k if router.get("rule", "top") != "soft" else config.attention_experts
    width = config.d_model * queries // config.k if config.attention_experts else config.d_model
    dense = min(config.num_dense_layers, config.num_layers) if config.attention_experts else 0
    masked = 2 * (8 - 1) * (width * (config.num_layers - dense) + config.d_model * dense)
    return counter.get_total_flops() / batch.tokens_BS.size - masked


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_booked_flops_are_those_that_run(rule: str, fields: dict[str, Any]) -> None:
    config = small_config(**fields)
    model = toy_model(config, rule=rule)
    row = evaluate(model, [make_batch(3)], torch.ones(V).numpy(), CPU64, seed=0, step=0, final=False)
    booked = costs(model, config, 8).per_token(row["pairs_L"])["flops_per_token"]
    assert booked == pytest.approx(counted(config, rule=rule), abs=1)


@pytest.mark.parametrize("rule", ["top", "soft"])
@pytest.mark.parametrize("fields", [{}, {"num_layers": 3, "num_dense_layers": 1}, {"k": 1}], ids=str)
def test_booked_flops_of_attention_experts_are_those_that_run(rule: str, fields: dict[str, Any]) -> None:
    """Where every slot is used: an unused one is not booked, though its zeros go through the attention."""
    config = small_config(attention_experts=3, **fields)
    model = toy_model(config, rule=rule)
    row = evaluate(model, [make_batch(3)], torch.ones(V).numpy(), CPU64, seed=0, step=0, final=False)
    booked = costs(model, config, 8).per_token(row["pairs_L"])["flops_per_token"]
    assert booked == pytest.approx(counted(config, rule=rule), abs=1)


def test_training_books_three_forwards_of_what_ran() -> None:
    config = small_config()
    model = toy_model(config, rule="double")
    booked, tokens = costs(model, config, 8), 16
    result = backward_batch(model, make_batch(), CPU64, seed=0, step=0, micro_batches=1)
    pairs_L = result.pairs_L.tolist()
    assert pairs_L == [4 * tokens] * 2
    forward = booked.per_token([4, 4])["flops_per_token"]
    assert booked.of_training(tokens, pairs_L) == 3 * tokens * forward


# Budgets and records

DATA = DataConfig(spec="synth:vocab=32,documents=40", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=8, k=2, d_expert=256)
TRAIN = TrainConfig(steps=40, batch_size=4, warmup_steps=1, eval_every=5, log_every=1, checkpoint_every=4)


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with installed():
        yield


def config_of(steps: float | None = None, model: ModelConfig = MODEL, **router: Any) -> RunConfig:
    """Return a run; under a budget of so many steps in which every token runs k experts, where they are given."""
    config = RunConfig(data=DATA, model=model, router=ToyRouter.Config(**router), train=TRAIN)
    if steps is None:
        return replace(config, train=replace(TRAIN, steps=6))
    amount = steps * flops_per_step(config, expected_costs(config, load_corpus(DATA.spec)))
    return replace(config, train=replace(TRAIN, budget="flops", budget_amount=amount))


def rows_of(config: RunConfig, store: Path) -> list[dict[str, Any]]:
    """Return the training rows, read as strict JSON has it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in a record")

    folder = RunFolder(store, config, 0).path
    for file in [*folder.glob("*.jsonl"), *folder.glob("*.json")]:
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=refuse)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def spent(config: RunConfig, store: Path) -> list[int]:
    """Return the FLOPs of each step, from what its row says that it ran."""
    each, tokens = expected_costs(config, load_corpus(DATA.spec)), TRAIN.batch_size * DATA.seq_len
    return [each.of_training(tokens, [round(p * tokens) for p in row["pairs_L"]]) for row in rows_of(config, store)]


@pytest.mark.parametrize("rule", ["top", "threshold", "experts", "double", "nothing"])
def test_a_budget_of_flops_is_spent_by_what_ran(rule: str, tmp_path: Path) -> None:
    config = config_of(20, rule=rule)
    summary = train(config, 0, tmp_path)
    steps, amount = spent(config, tmp_path), config.train.budget_amount
    assert amount is not None and len(steps) == summary["steps"]
    assert sum(steps) <= amount + max(steps), "never more than a step over"
    assert sum(steps) + max(steps) > amount, "and no step that it pays for is left out"
    tokens = summary["tokens"]
    booked = summary["model"]["flops_per_token"] + summary["model"]["training_only_flops_per_token"]
    assert booked == round(sum(steps) / (3 * tokens))


def test_twice_the_pairs_buy_about_half_the_steps(tmp_path: Path) -> None:
    steps = {rule: train(config_of(20, rule=rule), 0, tmp_path)["steps"] for rule in ("top", "double")}
    assert steps["top"] == 20 and 10 <= steps["double"] <= 11


def test_extra_pairs_are_booked_to_training_alone(tmp_path: Path) -> None:
    plain, extra = (train(config_of(rule=rule), 0, tmp_path)["model"] for rule in ("top", "double"))
    for name in ("flops_per_token", "active_parameters", "total_parameters"):
        assert plain[name] == extra[name]
    pairs = 2 * 2 * 2 * 3 * MODEL.d_model * MODEL.d_expert  # two sites, two more pairs
    assert (plain["training_only_flops_per_token"], extra["training_only_flops_per_token"]) == (0, pairs)


@pytest.mark.parametrize("rule", ["threshold", "double"])
def test_a_killed_run_spends_the_same_budget(rule: str, tmp_path: Path) -> None:
    config = config_of(12, rule=rule)
    train(config, 0, tmp_path / "whole")
    folder = interrupted(config, tmp_path / "cut", 6)
    train(config, 0, tmp_path / "cut")
    assert spent(config, tmp_path / "whole") == spent(config, tmp_path / "cut")
    assert figures(folder)["summary"]["final"] and figures(folder) == figures(tmp_path / "whole" / folder.name)


def test_where_no_pair_is_chosen_every_record_is_a_number_or_none(tmp_path: Path) -> None:
    """No expert ever runs: all are dead, nothing was dropped, and balance is not defined."""
    config = config_of(
        model=replace(MODEL, capacity_factor=1.0), rule="nothing", balance_weight=0.1, sequence_balance_weight=0.1
    )
    summary = train(config, 0, tmp_path)
    rows, final = rows_of(config, tmp_path), summary["final"]
    assert final
    assert summary["status"] == "finished" and len(rows) == 6
    assert final["dead_L"] == [8, 8] and final["drop_rate"] == 0 and final["without_L"] == [1, 1]
    assert final["max_vio_L"] == final["cv_L"] == final["load_entropy_L"] == [None, None]
    assert final["load_LE"] == [[0] * 8] * 2 and final["pairs_L"] == [0, 0]
    assert all(row["max_vio_L"] == [None, None] and row["terms"]["balance"] == [0, 0] for row in rows)
    assert rows[0]["loss"] > rows[-1]["loss"], "the rest of the model learns"


def test_what_drops_did_not_run_is_not_booked(tmp_path: Path) -> None:
    tight = config_of(model=replace(MODEL, capacity_factor=0.5))
    summary = train(tight, 0, tmp_path)
    final = summary["final"]
    assert final
    assert 0 < final["drop_rate"] < 1 and sum(final["pairs_L"]) == pytest.approx(4 * (1 - final["drop_rate"]))
    free = train(config_of(), 0, tmp_path)
    assert summary["model"]["flops_per_token"] < free["model"]["flops_per_token"]
