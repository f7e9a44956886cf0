"""What is checked before a run needs neither its memory nor its device."""

from dataclasses import replace

import pytest
import torch

from rlroute.config import DataConfig, ModelConfig, RouterConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError, DataError
from rlroute.experiments.comparison.budget import with_budget
from rlroute.model.accounting import costs
from rlroute.registry import router_class
from rlroute.training.data import load_corpus
from rlroute.training.prepare import build_model, check, meta_model
from tests.policies import any_router_names, default_config

DATA = DataConfig(spec="synth:vocab=64,documents=64,length=128", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=8, d_expert=8, num_dense_layers=1)
TRAIN = TrainConfig(steps=20, batch_size=4, eval_every=10)
CORPUS = load_corpus(DATA.spec, None)


def run_of(router: RouterConfig | None = None, **train) -> RunConfig:
    return RunConfig(data=DATA, model=MODEL, router=router, train=replace(TRAIN, **train))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", [None, *any_router_names()])
def test_a_model_without_weights_has_the_costs_of_the_real_one(name):
    config = run_of(None if name is None else default_config(name, MODEL.d_model, MODEL.num_experts))
    meta, real = meta_model(config, CORPUS), build_model(config, CORPUS, 0)
    assert costs(meta, MODEL, DATA.seq_len) == costs(real, MODEL, DATA.seq_len)
    learned = [parameter for parameter in meta.parameters() if parameter.requires_grad]
    assert learned and all(parameter.is_meta for parameter in learned)


def test_a_model_that_fits_no_machine_is_checked():
    huge = replace(MODEL, d_model=2**17, d_expert=2**17, num_experts=64)
    routers = (router_class(name).Config() for name in ("switch", "reinforce"))
    runs = {RunConfig(data=DATA, model=huge, router=router, train=TRAIN): [0] for router in routers}
    check(runs, elsewhere=True)
    with pytest.raises(ConfigError, match="GiB of memory"):
        check(runs)


def test_a_device_is_wanted_where_the_run_is_to_be(no_gpu):
    config = run_of(default_config("switch"), device="cuda")
    check({config: [0]}, elsewhere=True)
    with pytest.raises(ConfigError, match=r"^train\.device = 'cuda': no CUDA device is there, legal is 'cpu'$"):
        check({config: [0]})
    with pytest.raises(ConfigError, match="kernel 'cpu' does not run on device 'cuda'"):
        check({run_of(device="cuda", kernel="cpu"): [0]}, elsewhere=True)


def test_equal_flops_are_counted_without_the_device(no_gpu):
    here, there = (run_of(router_class("hash").Config(), device=device) for device in ("cpu", "cuda"))
    (counted,), (wanted,) = (with_budget([config], "flops", config, None) for config in (there, here))
    assert counted.train.budget_amount == wanted.train.budget_amount
    check({counted: [0]}, elsewhere=True)
    real = costs(build_model(here, CORPUS, 0), MODEL, DATA.seq_len)
    per_token = real.per_token([MODEL.k])["flops_per_token"]
    assert counted.train.budget_amount == 20 * 3 * 4 * 16 * per_token


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (run_of(default_config("sb3", 32, 8)), ConfigError, "observes 32 numbers"),
        (run_of(budget="flops", budget_amount=1.0), ConfigError, r"train\.budget_amount = 1 FLOPs: 10 steps cost"),
        (run_of(batch_size=2, micro_batches=2, balance_scope="batch"), ConfigError, "needs as many workers, not 1"),
        (replace(run_of(), data=replace(DATA, seq_len=10**6)), DataError, "token"),
        (replace(run_of(), data=replace(DATA, eval_tokens=10**9)), DataError, "token"),
    ],
)
def test_what_cannot_be_trained_is_found_before_any_work(config, error, message, elsewhere):
    with pytest.raises(error, match=message):
        check({config: [0]}, elsewhere=elsewhere)
