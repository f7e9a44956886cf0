"""What was made apart, together: variants of the layer, routers' wishes, and what saves memory, in one run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import build_entry, split_sites
from rlroute.experiments.verify.store import verify
from rlroute.model.accounting import is_matrix
from rlroute.model.recompute import set_recompute
from rlroute.reading import read_run
from rlroute.training import loop
from rlroute.training.data import load_corpus
from rlroute.training.prepare import expected_costs, flops_per_step
from rlroute.training.step import backward_batch
from tests.runs import figures, interrupted
from tests.tiny import CPU64, DATA, MODEL, TRAIN, make_batch, make_model, shake, small_config

FREE: dict[str, Any] = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}
ATTENTION: dict[str, Any] = {"attention_experts": 4}
LATENT: dict[str, Any] = {"d_latent": 4, "num_shared_experts": 1, "shared_gate": "sigmoid"}
DEVICES: dict[str, Any] = {"devices": 2, "capacity_of": "device", "capacity_factor": 0.8}
DROPOUT: dict[str, Any] = {"expert_dropout": 0.4, "expert_bias": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "everything": ("switch", FREE | ATTENTION | LATENT | DEVICES | DROPOUT, {"target_max_vio": 0.1}),
    "outputs": ("default_moe", FREE | ATTENTION | DROPOUT | {"round_to": 2}, {}),
    "samples": ("reinforce", FREE | LATENT | DROPOUT | {"gate_at": "input", "moe_every": 2, "d_dense": 6}, {}),
    "weights": ("switch", DROPOUT | {"gate_at": "input"}, {"erc_weight": 0.5, "simbal_weight": 0.5}),
    "shared gates": ("joint_gates", FREE | ATTENTION | {"num_shared_experts": 2, "gate_form": "unit"}, {}),
    "state": ("rmoe", FREE | ATTENTION | LATENT, {}),
    "experts choose": ("expert_choice", FREE | ATTENTION | DROPOUT | DEVICES, {}),
    "variable k": ("remoe", FREE | ATTENTION | LATENT | {"round_to": 2, "rounding": "nearest"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_recomputing_and_chunks_change_no_gradient_of_packed_variants(case: str) -> None:
    router, model_fields, fields = CASES[case]
    model = shake(make_model(router, small_config(**model_fields), **fields), 0.1)
    model.packed = True
    found = []
    for recompute, chunk in ((False, None), (True, None), (True, 7)):
        set_recompute(model, recompute)
        model.loss_chunk = chunk
        model.zero_grad(set_to_none=True)
        result = backward_batch(model, make_batch(4), CPU64, seed=0, step=0, micro_batches=2)
        found.append([result.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, again, chunked in zip(*found, strict=True):
        assert torch.equal(again, plain)
        torch.testing.assert_close(chunked, plain, rtol=1e-10, atol=1e-12)


def test_a_run_with_everything_resumes_replays_and_is_verified(tmp_path: Path) -> None:
    """Its last step is logged nowhere: what training took is then held by what evaluations ran."""
    model = replace(MODEL, **FREE, **ATTENTION, **LATENT, **DROPOUT, devices=2)
    train = replace(TRAIN, steps=6, micro_batches=2, log_every=7, recompute=True, loss_chunk=9, prefetch=2)
    entry = "switch:target_max_vio=0.1+hash@attention"
    config = build_entry(entry, replace(DATA, packed=True), model, replace(train, record_choices=True))
    loop.train(config, 0, tmp_path / "runs")
    run = tmp_path / "runs" / config.run_id(0)
    resumed = interrupted(config, tmp_path / "resumed", 5)
    loop.train(config, 0, tmp_path / "resumed")
    assert figures(resumed) == figures(run)
    again = build_entry(f"replay:run={run}", config.data, model, train)
    loop.train(again, 0, tmp_path / "runs")
    one, other = ([row["loss"] for row in read_run(tmp_path / "runs" / c.run_id(0)).evals] for c in (config, again))
    assert one == other
    assert not [row for row in read_run(run).train if row["pairs_L"]]
    assert verify(tmp_path / "runs", evaluate=True) == []


def test_a_budget_buys_more_steps_where_experts_cost_nothing_and_verify_knows_it(tmp_path: Path) -> None:
    train = replace(TRAIN, steps=4, log_every=1)
    plain = build_entry("switch", DATA, MODEL, train)
    each = flops_per_step(plain, expected_costs(plain, load_corpus(DATA.spec)))
    bought = replace(train, budget="flops", budget_amount=6.0 * each)
    config = build_entry("topk", DATA, replace(MODEL, zero_experts=8), bought)
    assert loop.train(config, 0, tmp_path)["steps"] > train.steps
    assert verify(tmp_path) == []


def test_devices_of_shards_hold_no_free_experts() -> None:
    model = make_model("switch", small_config(**FREE, **ATTENTION, num_layers=1))
    demand_L = [torch.tensor([9, 9, 9, 9]), torch.tensor([1, 2, 3, 4, 50, 60, 70, 80])]
    (by_device,) = loop._by_device(model, demand_L, 2)
    assert by_device.tolist() == [3, 7]


def test_constants_of_free_experts_are_vectors_and_their_maps_matrices() -> None:
    model = make_model("switch", small_config(**FREE, **DROPOUT, num_layers=1))
    vectors = {
        name.rpartition("moe.")[2] for name, p in model.named_parameters() if ".moe." in name and not is_matrix(name, p)
    }
    assert vectors == {"experts.in_bias_EH", "experts.out_bias_ED", "free.vector_JD"}


def test_coupling_with_free_experts_is_refused_by_its_name() -> None:
    reason = "erc_weight = 0.5 wishes for weights of the experts, which site 0 does not hand out"
    with pytest.raises(ConfigError, match=reason):
        make_model("switch", small_config(**FREE), erc_weight=0.5)


def test_the_folder_of_a_run_of_several_routers_can_be_named_in_an_entry() -> None:
    run = f"replay:run=runs/a+b_c+hash-{'0a' * 6}-s0"
    assert split_sites(run) == (run, {})
    assert split_sites(f"switch+{run}@0-1+hash@2") == ("switch", {"0-1": run, "2": "hash"})
