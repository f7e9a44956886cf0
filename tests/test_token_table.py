"""The bandit of a trained layer: each expert's counterfactual loss is what the model would really have said."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.play.games import play
from rlroute.experiments.play.player import Learning
from rlroute.experiments.play.token_table import token_table
from rlroute.experiments.recipes.entries import build_entry
from rlroute.reading import read_runs
from rlroute.routing import RoutingDecision
from rlroute.training.batches import eval_batches
from rlroute.training.checkpoint import load_weights
from rlroute.training.data import load_corpus
from rlroute.training.loop import train
from rlroute.training.prepare import build_model
from rlroute.training.step import Device, forward, make_context

DATA = DataConfig(spec="synth:documents=64,length=64", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=4, d_expert=8)
TRAIN = TrainConfig(steps=2, batch_size=4, log_every=1, eval_every=2, checkpoint_every=2, warmup_steps=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for entry in ("switch", "dense"):
        train(build_entry(entry, DATA, MODEL, TRAIN), 0, folder)
    return folder


def run_of(store, router):
    (record,) = [r for r in read_runs(store) if r.config["router"] == router]
    return record


def test_every_expert_s_loss_is_the_model_s_own(store, monkeypatch):
    record = run_of(store, "switch")
    table = token_table(record, store, 64)
    config = build_entry("switch", DATA, MODEL, TRAIN)
    corpus, device = load_corpus(DATA.spec, None), Device("cpu", torch.float32)
    model = build_model(config, corpus, 0)
    load_weights(store / record.id, model, record.id)
    (batch,) = eval_batches(corpus, num_tokens=64, batch_size=4, seq_len=16)
    context, last = make_context(batch, device, seed=0, step=0, explore=False), model.routers[-1]
    assert table.x_ND.shape == (64, 16) and np.array_equal(table.token_ids_N, batch.tokens_BS.reshape(-1))
    for expert in (*range(4), None):

        def only(x_TD, context, expert=expert):
            ids_T1 = torch.full((len(x_TD), 1), 4 if expert is None else expert)
            gates_T1 = torch.ones(len(x_TD), 1)
            decision = RoutingDecision.token_choice(ids_T1.clamp(max=3), gates_T1, 4)
            return (
                decision if expert is not None else replace(decision, kept_R=torch.zeros(len(x_TD), dtype=torch.bool))
            )

        monkeypatch.setattr(last, "forward", only)
        with torch.no_grad():
            loss_MT, _ = forward(model, batch, context, device)
        got_N = table.skip_N if expert is None else table.losses_NE[:, expert]
        np.testing.assert_allclose(got_N, loss_MT[0].numpy(), rtol=2e-5, atol=2e-5)


def test_what_every_token_runs_belongs_to_every_expert_s_loss(tmp_path):
    """With shared experts, the loss of skipping all routed ones is the model's own without any pair."""
    model = replace(MODEL, num_shared_experts=1, shared_gate="sigmoid", d_latent=8)
    train(build_entry("hash", DATA, model, TRAIN), 0, tmp_path)
    (record,) = read_runs(tmp_path)
    table = token_table(record, tmp_path, 64)
    corpus, device = load_corpus(DATA.spec, None), Device("cpu", torch.float32)
    built = build_model(build_entry("hash", DATA, model, TRAIN), corpus, 0)
    load_weights(tmp_path / record.id, built, record.id)
    (batch,) = eval_batches(corpus, num_tokens=64, batch_size=4, seq_len=16)
    built.routers[-1].table_XK.fill_(4)
    with torch.no_grad():
        loss_MT, _ = forward(built, batch, make_context(batch, device, seed=0, step=0, explore=False), device)
    np.testing.assert_allclose(table.skip_N, loss_MT[0].numpy(), rtol=2e-5, atol=2e-5)


def test_the_table_is_played(store, tmp_path):
    path = tmp_path / "tokens.npz"
    token_table(run_of(store, "switch"), store, 64).save(path)
    uniform, fixed, oracle = play("TokenBandit-v0", ("uniform", "fixed", "oracle"), 8, 0, Learning(), table=path)
    assert uniform.score < fixed.score < oracle.score and oracle.score == pytest.approx(1.0, abs=0.2)


def test_runs_without_experts_or_weights_are_refused(store, tmp_path):
    record = run_of(store, "switch")
    model = record.config["config"]["model"] | {"num_layers": 3, "moe_every": 2}
    changed = replace(record, config=record.config | {"config": record.config["config"] | {"model": model}})
    with pytest.raises(ConfigError, match="has a dense last layer"):
        token_table(changed, store, 64)
    with pytest.raises(ConfigError, match="has no MoE layer"):
        token_table(run_of(store, "dense"), store, 64)
    with pytest.raises(StoreError, match="holds no checkpoint"):
        token_table(run_of(store, "switch"), tmp_path, 64)
