"""The calculation behind docs/scale.md: laws, a case by hand, and the bytes and loads of a real run of two ranks."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.bench import run as benches
from rlroute.experiments.bench import scale, scale_page
from rlroute.experiments.bench.scale import H100, MODELS, Device, Model, imbalance, plan, split_pairs
from rlroute.experiments.recipes.entries import build_entry
from rlroute.parallel.local import run_ranks
from rlroute.parallel.mesh import Mesh
from rlroute.reading import read_runs
from rlroute.records import write_compact
from rlroute.routing import Router
from rlroute.training import loop
from tests import ROOT

RESULTS = ROOT / "experiments" / "results"
MODEL = Model("by hand", T=100, D=10, F=20, E=16, K=2, layers=3, number_bytes=2, source="")
DEVICE = Device("by hand", flops=1e6, gemm_efficiency=0.5, within=1e4, between=1e3, per_node=4, memory=1e9, source="")
STEPS = 8


def test_a_case_by_hand():
    """8 devices, 4 a node: of 200 pairs a device 25 stay, 75 travel within the node, 100 between nodes; 80 bytes a
    pair.
    """
    found = plan(MODEL, DEVICE, 8)
    assert (found.shards, found.replicas) == (8, 1)
    assert (found.local_bytes, found.within_bytes, found.between_bytes) == (2000, 6000, 8000)
    assert found.compute == pytest.approx(18 * 200 * 10 * 20 / 5e5)  # 1.44 s
    assert (found.within, found.between) == (0.6, 8)
    assert found.memory == 3 * 10 * 20 * 2 * 3 * 16
    assert found.efficiency(2, overlap=False) == pytest.approx(1.44 / (2 * 9.44))
    assert found.efficiency(2, overlap=True) == pytest.approx(1.44 / 16)
    assert found.limit(2, overlap=True) == "InfiniBand" and found.limit(9, overlap=True) == "imbalance"


@pytest.mark.parametrize("model", [MODEL, *MODELS], ids=lambda model: model.name)
@pytest.mark.parametrize("devices", [1, 2, 8, 64, 512])
def test_every_pair_stays_or_travels(model, devices):
    found = plan(model, H100, devices)
    total = 4 * model.T * model.K * model.D * model.number_bytes
    assert found.local_bytes + found.within_bytes + found.between_bytes == pytest.approx(total)
    assert found.shards * found.replicas == devices
    if devices == 1:
        assert found.local_bytes == total
        assert found.efficiency(1, overlap=False) == found.efficiency(1, overlap=True) == 1


def test_uneven_pairs_are_conserved_too():
    pairs_PP = np.arange(36).reshape(6, 6)
    local, within, between = split_pairs(pairs_PP, 2)
    assert (local, within) == (sum(range(0, 36, 7)), 1 + 6 + 15 + 20 + 29 + 34)
    assert local + within + between == pairs_PP.sum()


@pytest.mark.parametrize("overlap", [False, True])
def test_efficiency_falls_with_imbalance_and_rises_with_bandwidth(overlap):
    values = [plan(MODEL, DEVICE, 8).efficiency(i, overlap) for i in (1, 1.5, 3, 8)]
    assert values == sorted(values, reverse=True) and len(set(values)) == 4
    faster = [plan(MODEL, replace(DEVICE, between=1e3 * x), 8).efficiency(1, overlap) for x in (1, 2, 4)]
    assert faster == sorted(faster) and len(set(faster)) == 3
    for model in MODELS:
        for devices in scale.DEVICES:
            planned = plan(model, H100, devices)
            assert planned.efficiency(1, overlap=True) >= planned.efficiency(1, overlap=False)


def test_width_at_which_exchange_equals_compute_is_that_of_the_page():
    """4 b / (18 F) x rate / bandwidth x 7/8, whatever T, D and K are."""
    for width, link in ((428, "within"), (3848, "between")):
        found = plan(replace(MODELS[2], F=width), H100, 8 if link == "within" else 64)
        assert getattr(found, link) == pytest.approx(found.compute, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "devices", "named"),
    [
        ({}, 24, "24 devices for 16 experts: want a divisor or a multiple of 16"),
        ({}, 3, "3 devices for 16 experts"),
        ({}, 0, "0 devices for 16 experts"),
        ({"K": 0}, 8, "K = 0: want a positive number"),
        ({"T": -1}, 8, "T = -1: want a positive number"),
    ],
)
def test_what_cannot_be_spread_is_refused(change, devices, named):
    with pytest.raises(ConfigError, match=named):
        plan(replace(MODEL, **change), DEVICE, devices)


# Imbalance.


def test_imbalance_of_known_loads():
    load_NE = np.array([[0.5, 0.1, 0.1, 0.3]])
    assert imbalance([load_NE], 4, 4).mean == pytest.approx(2)
    assert imbalance([load_NE], 4, 2).mean == imbalance([load_NE], 2, 2).mean == pytest.approx(1.2)
    assert imbalance([load_NE], 4, 1).mean == pytest.approx(1)
    assert imbalance([np.full((3, 4), 0.25)] * 2, 64, 32).high == pytest.approx(1)


def test_more_experts_are_drawn_from_keys_and_even_out_on_a_device():
    loads = [np.random.default_rng(run).dirichlet(np.ones(16), 30) for run in range(3)]
    drawn = [imbalance(loads, 256, shards) for shards in (8, 64, 256)]
    assert drawn == [imbalance(loads, 256, shards) for shards in (8, 64, 256)]
    assert 1 < drawn[0].mean < drawn[1].mean < drawn[2].mean
    assert drawn[2].mean == pytest.approx(imbalance(loads, 16, 16).mean)  # one a device: no more than was recorded
    with pytest.raises(ConfigError, match="experts = 24: want a divisor or a multiple of the 16 recorded"):
        imbalance(loads, 24, 8)


# Against measurement.


def two_ranks(store):
    """Train a run; return this rank's pairs by step and device, counted from its own decisions."""
    data = DataConfig(spec="synth:documents=64,length=64", seq_len=16, eval_tokens=160)
    model = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=8, k=2, d_expert=8)
    train = TrainConfig(
        steps=STEPS, batch_size=64, micro_batches=4, warmup_steps=2, eval_every=STEPS, log_every=1, dtype="float64"
    )
    seen, by_step = [], []

    def count(module, inputs, output):
        if isinstance(module, Router) and inputs[1].micro_batch is not None:  # and no copy whose FLOPs are counted
            seen.append(torch.bincount(output.expert_ids_R[output.kept_R] // 4, minlength=2))

    def on_step(step):
        by_step.append(torch.stack(seen).sum(0).numpy())
        seen.clear()

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        loop.train(build_entry("switch", data, model, train), 0, store, on_step=on_step, group=Mesh(2))
    finally:
        hook.remove()
    dist.barrier()
    return by_step


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    store = tmp_path_factory.mktemp("runs")
    ranks = run_ranks(two_ranks, 2, store)
    (record,) = read_runs(store)
    return [np.stack(rows) for rows in zip(*ranks, strict=True)], record


@pytest.mark.processes
def test_bytes_of_two_ranks_are_those_of_their_decisions(trained):
    pairs_SPP, record = trained
    assert len(pairs_SPP) == len(record.train) == STEPS
    for pairs_PP, row in zip(pairs_SPP, record.train, strict=True):
        local, within, between = split_pairs(pairs_PP, 2)
        assert local + within == pairs_PP.sum() == 64 * 16 * 2 * 2 and between == 0  # tokens, k, layers
        assert row["traffic"]["bytes"] == 4 * within * 16 * 8  # width, float64


@pytest.mark.processes
def test_planned_bytes_and_imbalance_are_close_to_those_of_the_run(trained):
    """The plan has every device's tokens choose alike; what a run's do not is a few per cent here."""
    _, record = trained
    model = Model("", T=32 * 16, D=16, F=8, E=8, K=2, layers=2, number_bytes=8, source="")
    planned = 2 * 2 * plan(model, replace(DEVICE, per_node=2), 2).within_bytes  # devices, layers
    measured = [row["traffic"]["bytes"] for row in record.train]
    assert sum(measured) == pytest.approx(STEPS * planned, rel=0.02)
    recorded = imbalance(scale.recorded_loads([record])["switch"], 8, 2).mean
    logged = np.mean([row["traffic"]["device_max_vio_L"] for row in record.train[-STEPS // 4 :]])
    assert recorded == pytest.approx(1 + logged, abs=1e-4)


def bench_row(name, independent, together, share):
    ratios = {name: {"mean": 2, "low": 1, "high": 3} for name in ("time_over_base", "speed_of_ours")}
    figures = {"seconds": together, "all_to_all_share": share} | ratios
    contenders = {"alone": {"seconds": independent} | ratios, "both": figures}
    return {"what": f"{name}, experts", "work": "experts", "base": "alone", "ours": "both", "contenders": contenders}


def test_rates_of_one_shape_predict_a_machine_that_keeps_them():
    """Half the width: half the compute for the same rows."""
    rows = [
        bench_row("T=64 D=16 F=32 E=8 K=2", 3.0, 4.0, 0.25),
        bench_row("T=64 D=16 F=16 E=8 K=2", 1.5, 2.5, 0.4),
        {"work": "training step"},
    ]
    first, second = scale.hold_against({"rows": rows})
    assert first["share"] == {"predicted": pytest.approx(0.4), "measured": 0.4}
    assert second["share"] == {"predicted": pytest.approx(0.25), "measured": 0.25}
    assert first["slowdown"]["predicted"] == pytest.approx(2.5 / 1.5)
    assert first["bandwidth"] == pytest.approx(4 * 64 * 16 * 4)  # half of K = 2 pairs a token travel, in one second


# The command and the page.


@pytest.mark.processes
def test_command_writes_what_it_prints(trained, tmp_path):
    write_compact([trained[1]], tmp_path / "runs.jsonl")
    out = tmp_path / "out" / "scale.json"
    text = scale_page.write(tmp_path / "runs.jsonl", tmp_path / "none.json", out, "rlroute bench scale")
    assert text == out.with_suffix(".md").read_text() == benches.read_table(out)
    assert "No result of `rlroute bench parallel`" in text and "| switch |" in text


@pytest.mark.processes
def test_what_is_predicted_stands_beside_what_was_measured(trained, tmp_path):
    write_compact([trained[1]], tmp_path / "runs.jsonl")
    rows = [bench_row("T=64 D=16 F=32 E=8 K=2", 3.0, 4.0, 0.25), bench_row("T=64 D=16 F=16 E=8 K=2", 1.5, 2.5, 0.5)]
    where = {"device_name": "Xeon", "torch": "2.13", "triton": None, "threads": 1, "tile_table": "0", "commit": "abc"}
    result = {"bench": "parallel", "command": "rlroute bench parallel", "rounds": 3, "environment": where, "rows": rows}
    (tmp_path / "parallel.json").write_text(json.dumps(result))
    text = scale_page.to_markdown(
        scale_page.calculate(tmp_path / "runs.jsonl", tmp_path / "parallel.json") | {"command": ""}
    )
    assert "held against `rlroute bench parallel` at commit abc:" in text
    assert "| T=64 D=16 F=16 E=8 K=2 | 40.0% | 50.0% | 1.67 | 2.00 (1.00 to 3.00) |" in text


@pytest.mark.processes
def test_foreign_files_are_refused(tmp_path, trained):
    runs = RESULTS / "comparison.jsonl"
    (tmp_path / "foreign.json").write_text('{"rows": []}')
    with pytest.raises(
        StoreError, match=r"foreign\.json is not a result of bench parallel: bench: this field is missing"
    ):
        scale_page.calculate(runs, tmp_path / "foreign.json")
    dense = [record for record in read_runs(runs) if record.config["router"] == "dense"]
    with pytest.raises(StoreError, match="loads of no experts: want runs of one number"):
        scale.recorded_loads(dense)
    with pytest.raises(StoreError, match=r"loads of \[8, 16\] experts"):
        scale.recorded_loads([trained[1], *read_runs(runs)])


def test_the_page_shows_the_stored_result_and_the_stored_result_follows_from_its_files():
    stored = json.loads((RESULTS / "scale.json").read_text())
    page = (ROOT / "docs" / "scale.md").read_text()
    ((path, table),) = re.findall(r"<!-- bench: (\S+) -->\n(.*?)<!-- end of bench -->", page, re.S)
    assert path == "experiments/results/scale.json"
    assert table == scale_page.to_markdown(stored) == (RESULTS / "scale.md").read_text()
    again = scale_page.calculate(RESULTS / "comparison.jsonl", RESULTS / "parallel-cpu.json")
    assert scale_page.to_markdown(again | {"command": stored["command"]}) == table
