"""The proof that two runs differ in the router and in nothing else, and that a run is what its records say.

Longer than most: identity, the way of a batch, resuming and the budget are proven on one tiny model and corpus, set up
once.
"""

import json
import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from rlroute.config import DENSE
from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.learning import adapt
from rlroute.model.accounting import costs, fingerprints, is_router
from rlroute.reading import read_rows, read_runs
from rlroute.records import RunFolder, write_compact
from rlroute.registry import default_names, router_class, run_config
from rlroute.routing import Feedback, Router
from rlroute.training import loop, prepare
from rlroute.training.batches import next_link, sample_batch
from rlroute.training.data import load_corpus
from rlroute.training.optimizer import Optimizer, learning_rate
from rlroute.training.step import Device, backward_batch, forward, make_context
from tests import tiny
from tests.conftest import sums_of
from tests.runs import figures, interrupted
from tests.tiny import CPU64, DATA

MODEL = replace(tiny.MODEL, num_layers=2)
TRAIN = replace(tiny.TRAIN, steps=8)
CORPUS = load_corpus(DATA.spec)


def config_of(entry, **train):
    return build_entry(entry, DATA, MODEL, replace(TRAIN, **train))


def model_of(entry, seed=0, dtype="float64", model=MODEL):
    return prepare.build_model(build_entry(entry, DATA, model, replace(TRAIN, dtype=dtype)), CORPUS, seed)


def batch_of(step, seed=0):
    return sample_batch(CORPUS, seed=seed, step=step, batch_size=TRAIN.batch_size, seq_len=DATA.seq_len)


# --- identity
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", default_names())
def test_shared_parameters_are_bit_identical_for_every_router(name):
    reference = dict(model_of("uniform").named_parameters())
    shared = {n: p for n, p in model_of(name).named_parameters() if not is_router(n)}
    assert shared.keys() == reference.keys()
    assert all(torch.equal(p, reference[n]) for n, p in shared.items())
    assert fingerprints(model_of(name), MODEL) == fingerprints(model_of("uniform"), MODEL)


def test_dense_model_shares_the_backbone_and_only_that():
    dense, sparse = fingerprints(model_of(DENSE), MODEL), fingerprints(model_of("uniform"), MODEL)
    assert dense["backbone"] == sparse["backbone"]
    assert dense["shared"] != sparse["shared"]


def test_dense_model_shares_the_backbone_of_one_whose_attention_has_experts():
    model = replace(MODEL, attention_experts=4)
    dense, sparse = (fingerprints(model_of(entry, model=model), model) for entry in (DENSE, "uniform"))
    assert dense["backbone"] == sparse["backbone"] != fingerprints(model_of("uniform"), MODEL)["backbone"]


def test_fingerprint_sees_one_changed_weight_and_the_seed():
    model = model_of("uniform")
    before = fingerprints(model, MODEL)
    with torch.no_grad():
        model.layers[1].moe.experts.in_EHD[3, 0, 0] += 1e-9
    assert fingerprints(model, MODEL)["shared"] != before["shared"]
    assert fingerprints(model, MODEL)["backbone"] == before["backbone"]
    assert fingerprints(model_of("uniform", seed=1), MODEL) != before


def test_first_ten_batches_and_their_chain_are_the_same_for_every_entry(tmp_path):
    chains = set()
    for entry in (DENSE, *default_names()):
        folder = interrupted(config_of(entry, steps=12, eval_every=10), tmp_path, 11)
        chains |= {row["chain"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval"}
    assert len(chains) == 1
    expected = ""
    for step in range(10):
        expected = next_link(expected, batch_of(step))
    assert chains == {expected}


def test_costs_count_what_is_active():
    sparse, dense = (costs(model_of(e), MODEL, DATA.seq_len) for e in ("unbalanced", DENSE))
    router = MODEL.num_layers * MODEL.d_model * MODEL.num_experts
    active, yardstick = sparse.per_token([MODEL.k] * MODEL.num_layers), dense.per_token([])
    assert yardstick["active_parameters"] == dense.total_parameters == active["active_parameters"] - router
    assert active["flops_per_token"] - yardstick["flops_per_token"] == 2 * router
    experts = MODEL.num_layers * 3 * MODEL.d_model * MODEL.d_expert
    assert sparse.total_parameters - active["active_parameters"] == experts * (MODEL.num_experts - MODEL.k)


def test_value_head_is_counted_as_training_only():
    with_head, without = (costs(model_of(f"reinforce:baseline={b}"), MODEL, DATA.seq_len) for b in ("value", "ema"))
    assert with_head.per_token([2, 2]) == without.per_token([2, 2])
    assert with_head.training_flops > without.training_flops == 0


# --- the way of a batch
# ---------------------------------------------------------------------------------------------------------


def gradients(entry, micro_batches):
    model = model_of(entry)
    result = backward_batch(model, batch_of(3), CPU64, seed=0, step=3, micro_batches=micro_batches)
    return result, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def independent_entries():
    """Every router whose rule does not depend on the batch; those with a balance term, without it."""
    entries = []
    for name in default_names():
        weights = ",".join(f"{f}=0.0" for f in router_class(name).Config.__dataclass_fields__ if f in BATCH_TERMS)
        entry = f"{name}:{weights}" if weights else name
        if not model_of(entry).routers[0].batch_dependent:
            entries.append(entry)
    return entries


BY_BATCH = {"base", "expert_choice", "quantile", "remoe", "sinkhorn"}
BATCH_TERMS = ("balance_weight", "mixed_balance_weight", "importance_weight", "load_weight", "charge_weight")


@pytest.mark.parametrize("entry", independent_entries())
def test_two_micro_batches_equal_one_batch(entry):
    whole, whole_grads = gradients(entry, 1)
    halves, half_grads = gradients(entry, 2)
    assert float(whole.loss) == pytest.approx(float(halves.loss), rel=1e-12)
    assert whole_grads.keys() == half_grads.keys()
    for name, gradient in whole_grads.items():
        assert torch.allclose(gradient, half_grads[name], rtol=1e-9, atol=1e-14), name
    for a, b in zip(whole.sums_L, halves.sums_L, strict=True):
        assert all(torch.allclose(a[n].double(), b[n].double()) for n in a)


def test_the_test_above_would_notice_a_batch_dependent_rule():
    whole_grads, half_grads = gradients("switch:balance_weight=1.0", 1)[1], gradients("switch:balance_weight=1.0", 2)[1]
    assert any(not torch.allclose(g, half_grads[n], rtol=1e-9, atol=1e-14) for n, g in whole_grads.items())


def test_independence_covers_nearly_every_router():
    """A router that calls itself batch-dependent escapes the equality test; its balance terms may excuse it, or a rule
    that is over a micro-batch.
    """
    assert {entry.partition(":")[0] for entry in independent_entries()} == set(default_names()) - BY_BATCH


@pytest.mark.parametrize("entry", ["switch", "reinforce"])
def test_logged_loss_is_the_language_model_loss_alone(entry):
    model = model_of(entry)
    result = backward_batch(model, batch_of(0), CPU64, seed=0, step=0, micro_batches=1)
    context = make_context(batch_of(0), CPU64, seed=0, step=0, explore=True)
    loss_MT, _ = forward(model, batch_of(0), context, CPU64)
    assert float(result.loss) == pytest.approx(float(loss_MT.detach().mean()), rel=1e-12)
    assert result.terms["balance"].any()


def test_a_gate_gradient_is_there_after_backward():
    model = model_of("switch")
    seen = []

    def observe(decision, feedback):
        seen.append(decision.gates_R.grad)
        return Router.observe(model.routers[0], decision, feedback)

    model.routers[0].observe = observe
    backward_batch(model, batch_of(0), CPU64, seed=0, step=0, micro_batches=1)
    assert seen[0].shape == (TRAIN.batch_size * DATA.seq_len * MODEL.k,)
    assert float(seen[0].abs().min()) > 0


@pytest.mark.parametrize("form", ["own", "unit"])
def test_constant_gates_get_their_credit_by_asking_and_nothing_else_changes(form):
    quiet, asking = (model_of("hash", model=replace(MODEL, gate_form=form)) for _ in range(2))
    router, credits_R = asking.routers[0], []
    decide, observe = router.forward, router.observe

    def ask(x_TD, context):
        decision = decide(x_TD, context)
        decision.gates_R.requires_grad_()
        return decision

    def read(decision, feedback):
        credits_R.append(decision.gates_R.grad)
        return observe(decision, feedback)

    router.forward, router.observe = ask, read
    for model in (quiet, asking):
        backward_batch(model, batch_of(0), CPU64, seed=0, step=0, micro_batches=1)
    assert float(credits_R[0].abs().min()) > 0
    gradients = [[p.grad for p in model.parameters()] for model in (quiet, asking)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("form", ["own", "unit"])
def test_gate_form_changes_the_value_and_keeps_the_gradient_alive(form):
    model = model_of("switch", model=replace(MODEL, gate_form=form))
    context = make_context(batch_of(0), CPU64, seed=0, step=0, explore=True)
    loss_MT, decisions = forward(model, batch_of(0), context, CPU64)
    half = torch.full_like(decisions[0].gates_R, 0.5)
    assert torch.allclose(decisions[0].gates_R, half, atol=1e-12) == (form == "unit")
    loss_MT.sum().backward()
    assert float(model.routers[0].scores.weight.grad.abs().max()) > 0


def test_capacity_drops_pairs_but_not_demand():
    tight = model_of("unbalanced", model=replace(MODEL, capacity_factor=0.5))
    context = make_context(batch_of(0), CPU64, seed=0, step=0, explore=False)
    _, decisions = forward(tight, batch_of(0), context, CPU64)
    capacity = TRAIN.batch_size * DATA.seq_len * MODEL.k // MODEL.num_experts // 2
    assert int(decisions[0].load_E().max()) <= capacity < int(decisions[0].demand_E().max())
    assert int(decisions[0].demand_E().sum()) == TRAIN.batch_size * DATA.seq_len * MODEL.k


def test_future_tokens_do_not_change_the_past():
    """For causal routers that have one rule. With capacity, other tokens may drop a token: dropless is exact."""
    for name in default_names():
        if not router_class(name).causal or router_class(name).two_rules:
            continue
        model, batch = model_of(name), batch_of(0)
        changed = replace(
            batch, tokens_BS=np.concatenate([batch.tokens_BS[:, :8], (batch.tokens_BS[:, 8:] + 1) % 256], axis=1)
        )
        losses = [
            forward(model, b, make_context(b, CPU64, seed=0, step=0, explore=True), CPU64)[0].view(TRAIN.batch_size, -1)
            for b in (batch, replace(changed, targets_BS=batch.targets_BS))
        ]
        assert torch.allclose(losses[0][:, :8], losses[1][:, :8], atol=1e-10), name
        assert not torch.allclose(losses[0][:, 8:], losses[1][:, 8:], atol=1e-10), name


# --- the policy gradient is connected
# ---------------------------------------------------------------------------------------------


def train_steps(model, steps, seed=0, evaluate_between=False):
    optimizer = Optimizer(model, replace(TRAIN, lr=1e-2))
    for step in range(steps):
        result = backward_batch(model, batch_of(step, seed), CPU64, seed=seed, step=step, micro_batches=1)
        optimizer.step(step, step / steps)
        adapt(model.routers, result.sums_L, step / steps)
        if evaluate_between:
            with torch.no_grad():
                forward(
                    model, batch_of(1000), make_context(batch_of(1000), CPU64, seed=seed, step=0, explore=False), CPU64
                )
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_without_coefficients_the_reinforce_router_stays_at_its_initialisation():
    entry = "reinforce:policy_weight=0.0,entropy_weight=0.0,balance_weight=0.0,baseline=ema"
    before = {n: p.detach().clone() for n, p in model_of(entry).named_parameters() if is_router(n)}
    after = train_steps(model_of(entry), 200)
    assert before
    assert all(torch.equal(p, after[n]) for n, p in before.items())


@pytest.mark.parametrize("name", default_names())
def test_evaluation_in_between_changes_nothing(name):
    quiet, disturbed = (train_steps(model_of(name), 5, evaluate_between=e) for e in (False, True))
    assert all(torch.equal(quiet[n], disturbed[n]) for n in quiet)


def policy_alignment(seed, rewards):
    """Take 20 policy steps on one fixed probe batch with injected rewards; return the advantage-weighted mean change of
    the probe's log-probabilities, by the true rewards."""
    model = model_of("reinforce:balance_weight=0.0,baseline=ema,policy_weight=1.0", seed=seed)
    router, batch = model.routers[-1], batch_of(0, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, TRAIN.batch_size * DATA.seq_len)
    true_MT = torch.rand(shape, generator=generator, dtype=torch.float64) * 4
    shuffled_MT = true_MT[:, torch.randperm(shape[1], generator=generator)]
    used_MT = {"true": true_MT, "shuffled": shuffled_MT, "flipped": -true_MT}[rewards]
    context = make_context(batch, CPU64, seed=seed, step=0, explore=True)
    x_TD = torch.randn(shape[1], MODEL.d_model, generator=generator, dtype=torch.float64)
    first = router(x_TD, context).detach()
    feedback = Feedback(context=context, loss_MT=used_MT, num_valid=shape[1])
    router.adapt(sums_of(router, first, feedback), 0.0)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    for _ in range(20):
        terms = router.objective(replace(first, log_prob_R=log_prob(router, x_TD, first)), feedback)
        optimizer.zero_grad()
        (terms["policy"].weight * terms["policy"].value).backward()
        optimizer.step()
    advantage_T = -(true_MT - true_MT.mean()).flatten()
    change_T = first.token_sum(log_prob(router, x_TD, first).detach() - first.log_prob_R)
    return float((advantage_T * change_T).mean())


def log_prob(router, x_TD, decision):
    from rlroute.sampling import plackett_luce_log_prob

    return plackett_luce_log_prob(router.scores(x_TD), decision.expert_ids_R.view(-1, decision.k)).reshape(-1)


@pytest.mark.parametrize("seed", range(5))
def test_rewards_move_the_policy_where_they_point(seed):
    aligned = {rewards: policy_alignment(seed, rewards) for rewards in ("true", "shuffled", "flipped")}
    assert aligned["true"] > 0 > aligned["flipped"]
    assert aligned["true"] > aligned["shuffled"]


# --- runs and records
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["reinforce", "bias_balanced", DENSE])
def test_resumed_run_equals_undisturbed_one_bit_for_bit(entry, tmp_path):
    config = config_of(entry)
    loop.train(config, 0, tmp_path / "a")
    folder = interrupted(config, tmp_path / "b", 6)
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-00000004"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","step":7,"los')  # a line torn by the kill
    loop.train(config, 0, tmp_path / "b")
    assert figures(folder) == figures(tmp_path / "a" / folder.name)


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_is_not_evaluated_twice(tmp_path, monkeypatch):
    config = config_of("reinforce")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "finish", interrupt)
        loop.train(config, 0, tmp_path)
    summary = loop.train(config, 0, tmp_path)
    evals = read_runs(tmp_path)[0].evals
    assert [row["step"] for row in evals] == [4, 8]
    assert summary["final"] == evals[-1]


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_an_ended_run_is_never_repeated(tmp_path):
    config = config_of("hash")
    loop.train(config, 0, tmp_path)
    summary = tmp_path / config.run_id(0) / "summary.json"
    stamp = summary.stat().st_mtime_ns
    assert loop.train(config, 0, tmp_path) == json.loads(summary.read_text())
    assert summary.stat().st_mtime_ns == stamp


def test_two_processes_cannot_train_one_run(tmp_path):
    folder = RunFolder(tmp_path, config_of("hash"), 0)
    with (
        folder.lock(),
        pytest.raises(StoreError, match=f"by process {os.getpid()}"),
        RunFolder(tmp_path, config_of("hash"), 0).lock(patience=0),
    ):
        pass


def test_a_diverged_run_says_where(tmp_path):
    summary = loop.train(config_of("switch", lr=1e30, warmup_steps=0), 0, tmp_path)
    assert summary["status"] == "diverged"
    assert 0 < summary["diverged"]["step"] < TRAIN.steps
    assert "not finite" in summary["diverged"]["what"]
    assert read_runs(tmp_path)[0].summary == summary


def test_compact_file_says_what_the_store_says(tmp_path):
    loop.train(config_of("switch"), 0, tmp_path / "runs")
    records = read_runs(tmp_path / "runs")
    write_compact(records, tmp_path / "compact.jsonl")
    assert read_runs(tmp_path / "compact.jsonl") == records


def test_records_are_of_the_balance_over_the_whole_validation_set(tmp_path):
    final = loop.train(config_of("unbalanced"), 0, tmp_path)["final"]
    for load_E, vio in zip(final["load_LE"], final["max_vio_L"], strict=True):
        assert sum(load_E) == pytest.approx(1, abs=1e-5)
        assert max(load_E) * MODEL.num_experts - 1 == pytest.approx(vio, abs=1e-4)


def test_stochastic_routers_report_the_sampled_policy_too(tmp_path):
    final = loop.train(config_of("reinforce"), 0, tmp_path)["final"]
    assert final["sampled"]["loss"] != final["loss"]
    assert all(0 < share < 1 for share in final["sampled"]["overlap_L"])
    assert loop.train(config_of("switch"), 0, tmp_path)["final"]["sampled"] is None


# --- budget and schedule
# -----------------------------------------------------------------------------------------------------------


def test_flops_budget_counts_what_only_training_needs():
    amount = 40 * prepare.flops_per_step(config_of("hash"), costs(model_of("hash"), MODEL, DATA.seq_len))
    planned = {
        entry: prepare.planned_steps(
            config_of(entry, budget="flops", budget_amount=amount), costs(model_of(entry), MODEL, DATA.seq_len)
        )
        for entry in ("hash", "reinforce")
    }
    assert planned["hash"] == 40 > planned["reinforce"]
    each = prepare.flops_per_step(config_of("reinforce"), costs(model_of("reinforce"), MODEL, DATA.seq_len))
    assert planned["reinforce"] * each <= amount < (planned["reinforce"] + 1) * each  # all that it pays for


def test_flops_budget_that_pays_for_nothing_is_refused():
    with pytest.raises(ConfigError, match="budget_amount"):
        prepare.planned_steps(
            config_of("hash", budget="flops", budget_amount=1.0), costs(model_of("hash"), MODEL, DATA.seq_len)
        )


def test_time_budget_ends_by_the_clock(tmp_path):
    summary = loop.train(config_of("hash", steps=10**6, budget="time", budget_amount=0.2), 0, tmp_path)
    assert summary["status"] == "finished"
    assert summary["seconds"]["train"] >= 0.2
    assert 0 < summary["steps"] < 10**6


def test_time_budget_ends_with_a_full_evaluation(tmp_path):
    """Also where the clock ends the run on a step that is evaluated anyway."""
    config = config_of("reinforce", steps=10**6, budget="time", budget_amount=0.1, eval_every=1)
    summary = loop.train(config, 0, tmp_path)
    assert summary["final"]["step"] == summary["steps"]
    assert summary["final"]["sampled"] is not None


def test_schedule_warms_up_then_decays():
    config = replace(TRAIN, lr=1.0, warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(config, step, step / 100) for step in range(101)]
    assert rates[0] < rates[5] < rates[9]
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.1)


def test_routers_have_their_own_clip_and_no_weight_decay():
    model = model_of("switch")
    optimizer = Optimizer(model, replace(TRAIN, clip=1.0, router_clip=0.5))
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 100.0 if is_router(name) else 1e-6)
    shared_before = [p.grad.clone() for p in optimizer.shared]
    norms = optimizer_norms_only(optimizer)
    assert norms["router_grad_norm"] > 0.5 > norms["grad_norm"]
    assert all(torch.equal(a, b.grad) for a, b in zip(shared_before, optimizer.shared, strict=True))
    decays = {id(p): g["weight_decay"] for g in optimizer.adamw.param_groups for p in g["params"]}
    assert {decays[id(p)] for p in optimizer.router} == {0.0}


def optimizer_norms_only(optimizer):
    """Run the clips without the update, so that the gradients can be looked at."""
    optimizer.adamw.step = lambda: None
    optimizer.adamw.zero_grad = lambda set_to_none: None
    return optimizer.step(0, 0.0)


def test_run_config_round_trip_and_identity():
    config = config_of("switch:balance_weight=0.5")
    assert run_config(json.loads(json.dumps(config.to_dict()))) == config
    assert config.content_hash() != config_of("switch").content_hash()
    assert config.run_id(3) == f"switch-{config.content_hash()}-s3"


@pytest.mark.parametrize("entry", ["switch", "reinforce", "hash", DENSE])
def test_bfloat16_runs_with_a_router_in_float32(entry):
    """A bf16 router diverges (Switch, table 2), so it must not follow the rest of the model into that precision."""
    model, device = model_of(entry, dtype="bfloat16"), Device("cpu", torch.bfloat16)
    result = backward_batch(model, batch_of(0), device, seed=0, step=0, micro_batches=1)
    assert np.isfinite(float(result.loss))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    context = make_context(batch_of(0), device, seed=0, step=0, explore=True)
    _, decisions = forward(model, batch_of(0), context, device)
    for decision in decisions:
        assert decision.gates_R.dtype == torch.float32
        assert decision.logits_TE is None or decision.logits_TE.dtype == torch.float32
