"""The bench of whole training steps: it trains as the loop does, counts what ran, and says what failed."""

import json
import math
from dataclasses import replace

import pytest
import torch

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.bench import run as benches
from rlroute.experiments.bench import step as bench
from rlroute.experiments.bench.step import PRODUCT, Trainee, contenders, vendor_rate
from rlroute.training import loop
from rlroute.training.checkpoint import load_weights
from rlroute.training.data import load_corpus
from rlroute.training.prepare import build_model

DATA = DataConfig(spec="stdlib", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_experts=4, k=2, d_expert=8)
TRAIN = TrainConfig(steps=6, batch_size=2, micro_batches=2, log_every=1, eval_every=6, warmup_steps=1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(bench.SIZE, "cpu", 64)


def run(tmp_path, *, variants=(), data=DATA, model=MODEL, train=TRAIN, **wanted):
    given = {"names": ("switch", "reinforce"), "rounds": 2, "minutes": 5, "steps": 2, "out": tmp_path / "o" / "b.json"}
    return benches.step(benches.Wanted(command="bench", **(given | wanted)), data, model, train, variants)


def test_every_contender_has_its_figures_and_the_table_is_in_its_file(tmp_path):
    text = run(tmp_path, variants=("eager", "deterministic"))
    stored = json.loads((tmp_path / "o" / "b.json").read_text())
    (row,) = stored["rows"]
    names = ["dense", "switch", "reinforce"]
    assert list(row["contenders"]) == names + [f"{name}, deterministic" for name in names]
    for values in row["contenders"].values():
        assert values["rounds"] == 2 and values["host_waits"] is None and values["mfu_of_vendor"] is None
        assert values["tokens_per_second"] == pytest.approx(32 / values["seconds"])
        assert values["mfu"] == pytest.approx(values["flops"] / values["seconds"] / row["product_flops_per_second"])
        assert values["peak_bytes"] > 0
    assert row["contenders"]["dense"]["time_over_base"]["mean"] == 1
    assert text == (tmp_path / "o" / "b.md").read_text() == benches.read_table(tmp_path / "o" / "b.json")
    assert f"| {PRODUCT}" not in text and all(f"| {name} |" in text for name in row["contenders"])


@pytest.mark.parametrize("entry", ["dense", "switch", "reinforce", "bias_balanced"])
def test_it_trains_as_the_loop_does_and_counts_the_same_flops(entry, tmp_path):
    """After as many steps the same weights, batches and FLOPs as a run's."""
    config = contenders([entry], ["eager"], DATA, MODEL, TRAIN)[entry]
    trainee = Trainee(config, load_corpus(DATA.spec, "bytes"), 6)
    trainee()
    flops = trainee.flops()
    summary = loop.train(config, 0, tmp_path)
    assert math.isclose(6 * flops, summary["model"]["training_flops"])
    assert trainee.chain == summary["batches"]["chain"]
    weights = dict(trainee.model.named_parameters())
    model = build_model(config, load_corpus(DATA.spec, "bytes"), 0)
    load_weights(tmp_path / config.run_id(0), model, config.run_id(0))
    for parameter, value in model.named_parameters():
        assert torch.equal(value, weights[parameter]), parameter


def test_held_are_weights_and_both_moments():
    config = contenders([], ["eager"], DATA, MODEL, TRAIN)["dense"]
    trainee = Trainee(config, load_corpus(DATA.spec, "bytes"), 1)
    trainee()
    numbers = sum(p.numel() for p in trainee.model.parameters())
    extra = sum(b.numel() for b in trainee.model.buffers()) + len(list(trainee.model.parameters()))  # counts of updates
    assert trainee.held_bytes() == 4 * (3 * numbers + extra)


def test_who_fails_is_set_apart_and_the_dense_model_must_not(tmp_path, monkeypatch):
    step = Trainee._step

    def fail(self):
        if self.config.router_name in failing:
            raise MemoryError("too much")
        step(self)

    monkeypatch.setattr(Trainee, "_step", fail)
    failing = {"switch"}
    text = run(tmp_path)
    (row,) = json.loads((tmp_path / "o" / "b.json").read_text())["rows"]
    assert row["contenders"]["switch"] == {"failed": "MemoryError: too much"} and "MemoryError: too much" in text
    assert row["contenders"]["reinforce"]["rounds"] == 2
    failing.add("dense")
    with pytest.raises(MemoryError):
        run(tmp_path)


def test_time_is_up_after_two_rounds(tmp_path):
    run(tmp_path, rounds=9, minutes=0, names=("hash",))
    (row,) = json.loads((tmp_path / "o" / "b.json").read_text())["rows"]
    assert {values["rounds"] for values in row["contenders"].values()} == {2}


@pytest.mark.parametrize("field", ["mfu", "host_waits", "time_over_base"])
def test_a_file_that_lacks_a_figure_is_refused(field, tmp_path):
    run(tmp_path, names=("hash",))
    path = tmp_path / "o" / "b.json"
    stored = json.loads(path.read_text())
    del stored["rows"][0]["contenders"]["hash"][field]
    path.write_text(json.dumps(stored))
    with pytest.raises(StoreError, match=r"b\.json is not a bench's result"):
        benches.read_table(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"variants": ["fast"]}, "variant 'fast': legal are eager, compiled, deterministic, both"),
        ({"names": ["switsh"]}, "switsh"),
        ({"rounds": 1}, "rounds = 1"),
        ({"shapes": ["1,2,3,4,5"]}, "bench step takes no shapes"),
        ({"routings": ["zipf"]}, "no routings"),
        ({"train": replace(TRAIN, device="cuda")}, "no CUDA device|CUDA"),
        ({"model": replace(MODEL, num_heads=3)}, r"model\.d_model"),
        ({"data": replace(DATA, spec="file:/nothing/*")}, "nothing"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(changes, named, tmp_path):
    if "train" in changes and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(Exception, match=named) as caught:
        run(tmp_path, **changes)
    assert isinstance(caught.value, ConfigError) or "DataError" in type(caught.value).__name__
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 836e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Someone's accelerator", None),
    ],
)
def test_the_vendors_rate_is_of_the_device_and_of_bfloat16(name, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert vendor_rate(replace(TRAIN, device="cuda", dtype="bfloat16")) == rate
    assert vendor_rate(replace(TRAIN, device="cuda", dtype="float32")) is None
    assert vendor_rate(replace(TRAIN, dtype="bfloat16")) is None
