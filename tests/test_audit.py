"""What a trained model's routers do is measured, and what they should not do is marked or refused by name.

Shape suffixes: T tokens, B sequences, S sequence length, L routed sites.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import DecisionError
from rlroute.experiments.comparison.marks import marks
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import to_markdown
from rlroute.experiments.recipes.entries import build_entry
from rlroute.model.accounting import costs
from rlroute.model.work import Counter, measure
from rlroute.parallel.local import run_ranks
from rlroute.parallel.mesh import Mesh
from rlroute.provenance import made_from
from rlroute.records import RunFolder
from rlroute.registry import router_class
from rlroute.schema import RunRecord
from rlroute.training import audit, loop
from rlroute.training.data import load_corpus
from rlroute.training.group import ALONE
from rlroute.training.prepare import build_model, expected_costs, flops_per_step, planned_steps
from tests.cheats import LABOUR, MALFORMED, CheatRouter
from tests.conftest import make_shape
from tests.policies import any_router_names, default_config
from tests.runs import figures
from tests.toys import ToyRouter, installed

DATA = DataConfig(spec="synth:vocab=32,documents=40", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=8, k=2, d_expert=16)
TRAIN = TrainConfig(steps=5, batch_size=4, warmup_steps=1, eval_every=3, log_every=1, checkpoint_every=5)


@pytest.fixture(autouse=True)
def at_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it; the other tests look at fewer places."""
    monkeypatch.setattr(audit, "PLACES", 32)


def run_of(router: Any, model: ModelConfig = MODEL, **train: Any) -> RunConfig:
    return RunConfig(data=DATA, model=model, router=router, train=replace(TRAIN, **train))


def trained(config: RunConfig, store: Path) -> RunRecord:
    loop.train(config, 0, store)
    return RunFolder(store, config, 0).read()


def cheat(store: Path, how: str, model: ModelConfig = MODEL, train: Any = None, **fields: Any) -> RunRecord:
    with installed(CheatRouter):
        return trained(run_of(CheatRouter.Config(how=how, **fields), model, **(train or {})), store)


def measured(record: RunRecord) -> Any:
    return record.summary["measured"]


# Whom a route depends on

LATER = "reads later tokens"
LEAKS = {
    "honest": set(),
    "next_token": {LATER},
    "last_token": {LATER},
    "next_hidden_state": {LATER},
    "next_at_second_site": {LATER},
    "gate_of_next_token": {LATER},
    "own_input_of_next_token": {LATER},
    "batch_mean": {LATER},
    "reversed_running_mean": {LATER},
    "next_in_training": {f"{LATER} in training"},
    "next_with_gradient": {f"{LATER} in training"},
    "next_in_evaluation": {LATER},
    "running_mean": set(),
    "next_at_first": {f"{LATER} as of step 0", f"{LATER} as of step 2"},
    "next_at_first_in_training": {f"{LATER} in training as of step 0", f"{LATER} in training as of step 2"},
    "batch_mean_at_first": {f"{LATER} as of step 0", f"{LATER} as of step 2"},
}
MIXES = {"batch_mean", "running_mean", "reversed_running_mean"}


@pytest.mark.parametrize("how", LEAKS)
def test_a_router_that_reads_later_tokens_is_marked(how: str, tmp_path: Path) -> None:
    record = cheat(tmp_path, how)
    found = marks([record])
    assert {mark for mark in found if LATER in mark} == LEAKS[how]
    if how in MIXES | {"honest"}:
        assert ("mixes sequences" in found) == (how in MIXES) and "mixes sequences in training" not in found
    table = build_table([record])
    assert all(mark in to_markdown(table).split("\n")[2] for mark in found), "at the label"
    (said,) = [text for title, text in table.notes if title == "Measured"]
    assert all(f"cheats {mark} (" in said for mark in found), "and in a note"


def test_the_site_that_leaks_is_told_from_the_others(tmp_path: Path) -> None:
    later = measured(cheat(tmp_path, "next_at_second_site"))["evaluation"]["later"]
    assert later["routes_L"][0] == 0 < later["routes_L"][1] and later["outputs"] > 0


def test_a_leak_through_a_gate_or_the_own_input_is_one_of_outputs_too(tmp_path: Path) -> None:
    for how in ("gate_of_next_token", "own_input_of_next_token"):
        assert measured(cheat(tmp_path, how))["evaluation"]["later"]["outputs"] > 0


def test_what_says_that_it_is_not_causal_is_printed_as_such_with_its_leak(tmp_path: Path) -> None:
    with installed(ToyRouter):
        record = trained(run_of(ToyRouter.Config(rule="experts")), tmp_path)
    assert LATER in marks([record]), "it does not say so"
    said = cheat(tmp_path, "batch_mean", causal=False)
    assert not any(LATER in mark for mark in marks([said])) and "non-causal" in marks([said])
    assert "of routes and" in marks([said])["non-causal"]
    assert to_markdown(build_table([said])).split("\n")[2].count("non-causal,") == 1
    assert "measured causal" in marks([cheat(tmp_path, "honest", causal=False)])


def test_a_capacity_is_told_from_the_router(tmp_path: Path) -> None:
    """First choices come before second ones: which pairs of a token drop depends on the tokens behind it."""
    record = cheat(tmp_path, "honest", replace(MODEL, capacity_factor=0.7))
    later = measured(record)["evaluation"]["later"]
    assert not any(later["routes_L"]) and any(later["drops_L"]) and later["outputs"] > 0
    found = marks([record])
    assert "capacity not causal" in found and "mixes sequences" in found and not any(LATER in m for m in found)
    apart = cheat(tmp_path, "honest", replace(MODEL, capacity_factor=0.7, capacity_rows="sequence"))
    assert "mixes sequences" not in marks([apart]) and "capacity not causal" in marks([apart])


def test_a_router_that_keeps_count_is_said_not_to_repeat(tmp_path: Path) -> None:
    found = marks([cheat(tmp_path, "memory")])
    assert "not repeatable" in found and not any(LATER in mark for mark in found)
    assert set(marks([cheat(tmp_path, "memory_at_first")])) == {"not repeatable"}


def test_who_mixes_sequences_at_first_is_marked_with_the_step_and_declares_it_or_not(tmp_path: Path) -> None:
    steps = ("as of step 0", "as of step 2")
    for causal, reads in ((True, LATER), (False, "non-causal")):
        found = marks([cheat(tmp_path, "batch_mean_at_first", causal=causal)])
        assert set(found) == {f"{mark} {step}" for mark in (reads, "mixes sequences") for step in steps}


@pytest.mark.parametrize("train", [{"batch_size": 1}, {"micro_batches": 4}], ids=str)
def test_where_a_sequence_is_alone_nothing_is_said_of_others(train: dict[str, Any], tmp_path: Path) -> None:
    record = cheat(tmp_path, "next_token", train=train)
    assert measured(record)["training"]["others"] is None and LATER in marks([record])


# Pairs


def test_more_pairs_than_k_are_marked_in_the_mode_in_which_they_run(tmp_path: Path) -> None:
    always, training = cheat(tmp_path, "eight"), cheat(tmp_path, "eight_in_training")
    assert measured(always)["evaluation"]["pairs_L"] == measured(always)["training"]["pairs_L"] == [8, 8]
    assert measured(training)["evaluation"]["pairs_L"] == [2, 2] and measured(training)["training"]["pairs_L"] == [8, 8]
    mark = "runs 8.00 experts where k = 2"
    assert set(marks([always])) == {mark} and set(marks([training])) == {f"{mark} in training"}


def test_more_pairs_than_k_are_marked_though_they_ran_only_at_first(tmp_path: Path) -> None:
    record = cheat(tmp_path, "eight_at_first")
    assert measured(record)["training"]["pairs_L"] == [2, 2]
    ((mark, said),) = marks([record]).items()
    assert mark == "runs 8.00 experts where k = 2 in training" and "more than k in 3 of 5 rows of training" in said


# FLOPs


def test_a_claim_is_not_believed_and_a_false_one_is_marked(tmp_path: Path) -> None:
    right = 2 * MODEL.d_model * MODEL.num_experts
    records = {claim: cheat(tmp_path, "honest", claims=claim) for claim in (0, right, 3 * right)}
    assert len({r.summary["model"]["flops_per_token"] for r in records.values()}) == 1
    assert [set(marks([r])) for r in records.values()] == [{"understates its FLOPs"}, set(), {"overstates its FLOPs"}]


@pytest.mark.parametrize("how", ["elementwise", "vectors"])
def test_products_in_disguise_are_counted(how: str) -> None:
    plain, disguised = (
        measure(CheatRouter(CheatRouter.Config(how=h), make_shape(8, 2, d_model=16))) for h in ("honest", how)
    )
    assert disguised.greedy >= 2 * plain.greedy, "with those of the scores that it throws away"
    assert disguised.training >= plain.training
    assert disguised.elementwise == (how == "elementwise") and not plain.elementwise


def test_work_beside_the_forward_is_charged_once(tmp_path: Path) -> None:
    work = {
        how: measure(CheatRouter(CheatRouter.Config(how=how), make_shape()))
        for how in ("honest", "work_in_objective", "work_in_observe", "work_in_adapt")
    }
    honest = work["honest"]
    for how in ("work_in_objective", "work_in_observe"):
        assert work[how].training - honest.training == work[how].forward - honest.forward == 2 * LABOUR**2
    assert work["work_in_adapt"].adapt == 2048 * 2 * LABOUR**2 and honest.adapt == 0
    plain, extra = (cheat(tmp_path, how).summary["model"] for how in ("honest", "work_in_adapt"))
    sites, steps, tokens = MODEL.num_layers, TRAIN.steps, TRAIN.batch_size * DATA.seq_len
    assert extra["training_flops"] - plain["training_flops"] == sites * steps * 2048 * 2 * LABOUR**2
    assert extra["training_only_flops_per_token"] == sites * 2048 * 2 * LABOUR**2 // tokens


def test_a_router_that_works_more_later_is_marked(tmp_path: Path) -> None:
    assert set(marks([cheat(tmp_path, "late")])) == {"FLOPs not as booked"}


def test_the_counter_knows_what_pytorchs_own_does_not() -> None:
    a, b, square = torch.ones(5, 7), torch.ones(7), torch.eye(6)
    for operation, flops in (
        (lambda: a @ b, 2 * 35),
        (lambda: b @ b, 2 * 7),
        (lambda: torch.addmv(torch.ones(5), a, b), 2 * 35),
        (lambda: torch.cdist(a, a), 3 * 5 * 5 * 7),
        (lambda: torch.einsum("ij,kj->ik", a, a), 2 * 5 * 5 * 7),
        (lambda: torch.linalg.cholesky(square), 6 * 6 * 6),
        (lambda: a.norm(dim=1), 0),
        (lambda: a[torch.tensor([0, 1])], 0),
    ):
        with Counter() as counter:
            operation()
        assert counter.products == flops


def test_an_operator_that_nobody_can_count_is_named(tmp_path: Path) -> None:
    @torch.library.custom_op("strange::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    with Counter() as counter:
        double(torch.ones(3))
    assert counter.foreign == {"strange.double"}


EXITS = {"numpy": "numpy", "array": "__array__", "dlpack": "__dlpack__", "list": "tolist", "items": "item"}


@pytest.mark.parametrize("how", EXITS)
def test_who_hands_out_numbers_of_all_rows_is_said_to_do_what_nobody_can_count(how: str) -> None:
    work = measure(CheatRouter(CheatRouter.Config(how=how), make_shape(8, 2)))
    assert f"Tensor.{EXITS[how]}" in work.foreign
    few = measure(CheatRouter(CheatRouter.Config(how="few_items"), make_shape(8, 2)))
    assert few.foreign == ()


@pytest.mark.parametrize("how", ["numpy", "numpy_at_first"])
def test_who_multiplies_outside_pytorch_is_marked(how: str, tmp_path: Path) -> None:
    ((mark, said),) = marks([cheat(tmp_path, how)]).items()
    assert mark == "FLOPs not countable" and "Tensor.numpy" in said


def test_the_bandit_and_the_value_head_get_the_steps_that_they_are_owed() -> None:
    """At the README's size: gradients run through neither the bandit nor the input of the head."""
    model = ModelConfig(num_layers=2, d_model=96, d_expert=96)
    data, train = DataConfig(spec="stdlib"), TrainConfig(steps=400, batch_size=16)
    corpus = load_corpus("synth:vocab=256,documents=40", None)

    def entry(name: str) -> RunConfig:
        return build_entry(name, data, model, train, lambda router: {})

    budget = 400.0 * flops_per_step(entry("switch"), expected_costs(entry("switch"), corpus))
    steps = {}
    for name in ("switch", "bandit", "reinforce:baseline=value", "reinforce:baseline=batch"):
        config = entry(name)
        config = replace(config, train=replace(config.train, budget="flops", budget_amount=budget))
        steps[name] = planned_steps(config, expected_costs(config, corpus))
    assert list(steps.values()) == [400, 379, 332, 401]


def test_a_bandits_numbers_are_counted_once_in_all_and_in_active_parameters() -> None:
    corpus = load_corpus(DATA.spec, None)
    bandit, hashed = (
        costs(build_model(run_of(router_class(n).Config()), corpus, 0), MODEL, 16) for n in ("bandit", "hash")
    )
    active = [c.per_token([MODEL.k] * MODEL.num_layers)["active_parameters"] for c in (bandit, hashed)]
    own = MODEL.num_layers * (MODEL.d_model * 32 + MODEL.num_experts * 33)
    assert active[0] - active[1] == bandit.total_parameters - hashed.total_parameters == bandit.router_parameters == own


# Malformed decisions


@pytest.mark.parametrize("how", MALFORMED)
def test_a_malformed_decision_is_refused_by_name(how: str, tmp_path: Path) -> None:
    with pytest.raises(DecisionError, match=f"^router cheats at site 0: .*{MALFORMED[how]}"):
        cheat(tmp_path, how)


# Honest routers, and runs that stay what they are

BOTH = ("training", "evaluation")
MATCH = {"base": ("training",), "expert_choice": BOTH, "seq_top_k": BOTH, "sinkhorn": ("training",)}
"""Where tokens compete for experts: there a route hangs on all others."""
WITHIN = ("seq_top_k",)
"""Where only those of a sequence do."""
IN_TRAINING = {"non-causal in training", "mixes sequences in training"}
MARKS = {
    "base": IN_TRAINING,
    "expert_choice": {"non-causal", "mixes sequences"},
    "seq_top_k": {"non-causal"},
    "sinkhorn": IN_TRAINING,
}
VARY_K = ("dense_mixer", "remoe", "soft", "threshold", "top_p")
ELEMENTWISE = ("rmoe", "zaya")
"""Whose elementwise work counts; some of it is a batch's, whatever its rows, of which there are not always as many."""
MARKS |= {name: {"elementwise router"} for name in ELEMENTWISE}
"""Where more pairs run than k for a token."""


FEWER_PAIRS = {("gshard", "training")}
"""Where a router runs a number of pairs that varies."""


@pytest.mark.parametrize("name", any_router_names())
def test_our_routers_are_as_they_say(name: str, tmp_path: Path) -> None:
    config = default_config(name, MODEL.d_model, MODEL.num_experts)
    record = trained(run_of(config), tmp_path)
    more = {mark for mark in marks([record]) if mark.startswith("runs ")}
    assert marks([record]).keys() - more == MARKS.get(name, set()) and bool(more) == (name in VARY_K)
    found = measured(record)
    for mode in ("training", "evaluation"):
        assert found[mode]["repeats"]
        assert found[mode]["pairs_L"] == [2, 2] or (name, mode) in FEWER_PAIRS or name in VARY_K
        for part in ("later", "others"):
            still = {"routes_L": [0, 0], "routes_ML": [[0, 0], [0, 0]], "drops_L": [0, 0], "outputs": 0}
            same = found[mode][part] == still
            assert same == (mode not in MATCH.get(name, ()) or (part == "others" and name in WITHIN))
    for booked, seen in zip(found["flops"]["booked_L"], found["flops"]["measured_L"], strict=True):
        assert booked == pytest.approx(seen, rel=0, abs=1 if name in ELEMENTWISE else 0)


def test_the_dense_model_and_experts_of_attention_are_measured_too(tmp_path: Path) -> None:
    dense = measured(trained(run_of(None), tmp_path))
    assert dense["causal_L"] == [] and dense["evaluation"]["later"]["outputs"] == 0
    model = replace(MODEL, attention_experts=4)
    with installed(CheatRouter):
        records = [trained(run_of(CheatRouter.Config(how=how), model), tmp_path) for how in ("honest", "next_token")]
    assert marks(records[:1]) == {} and all(measured(records[1])["evaluation"]["later"]["routes_L"])


def test_a_run_is_bit_for_bit_what_it_was_without_the_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(router_class("noisy_topk").Config())
    one = trained(config, tmp_path / "one")
    monkeypatch.setattr(loop._Run, "_audit", lambda run: None)
    two = trained(config, tmp_path / "two")
    with_it, without = (figures(tmp_path / name / record.id) for name, record in (("one", one), ("two", two)))
    assert with_it["summary"].pop("measured") and without["summary"].pop("measured") is None
    assert with_it == without


def test_the_audit_leaves_the_model_and_every_generator_alone(tmp_path: Path) -> None:
    with installed(CheatRouter):
        config = run_of(CheatRouter.Config())
        corpus = load_corpus(DATA.spec, None)
        made = made_from(config, corpus.provenance)
        run = loop._Run(config, 0, RunFolder(tmp_path, config, 0), corpus, made)
        run._audit()
        state = {name: value.clone() for name, value in run.model.state_dict().items()}
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        first = run._audit()
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
        assert before[2] == str(np.random.get_state())
        assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())
        assert all(p.grad is None for p in run.model.parameters()) and first == run._audit()
        assert not run.model.routers[0]._forward_hooks


def test_a_diverged_run_says_that_nothing_was_measured(tmp_path: Path) -> None:
    config = run_of(router_class("switch").Config(), lr=1e30, clip=1e30, router_clip=1e30, steps=20)
    record = trained(config, tmp_path)
    assert record.summary["status"] == "diverged" and record.summary["measured"] is None
    assert marks([record]) == {}


def test_a_record_from_before_is_not_marked(tmp_path: Path) -> None:
    record = cheat(tmp_path, "next_token")
    summary: Any = {name: value for name, value in record.summary.items() if name != "measured"}
    assert marks([replace(record, summary=summary)]) == {}


def of_rank(store: Path, shards: int, how: str) -> Any:
    group = Mesh(shards) if shards else ALONE
    audit.PLACES = 32  # a rank reads conftest.py, and no fixture
    with installed(CheatRouter):
        config = run_of(CheatRouter.Config(how=how), micro_batches=2, dtype="float64")
        return loop.train(config, 0, store, group=group)["measured"]


@pytest.mark.slow
@pytest.mark.processes
def test_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    for how in ("next_token", "running_mean"):
        alone = of_rank(tmp_path / f"{how}-1", 0, how)
        lost = alone.pop("regret")
        for found in run_ranks(of_rank, 2, tmp_path / f"{how}-2", 2, how):
            theirs = found.pop("regret")
            assert found == alone and theirs["better_C"] == lost["better_C"]
            assert theirs["nats_C"] == pytest.approx(lost["nats_C"], rel=1e-9)  # sums of shards, in another order
