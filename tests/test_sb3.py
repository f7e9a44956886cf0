"""A policy saved by Stable-Baselines3 routes as it acted, stays as it is, and is part of the run's identity."""

import base64
import io
import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlroute.agents.sb3 import Sb3Router
from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.gradients.instrument import default_entries as gradient_entries
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.recipes.presets import all_entries
from rlroute.model.accounting import costs
from rlroute.registry import default_names, router_names, run_config
from rlroute.training.loop import train
from rlroute.training.prepare import build_model
from tests.commands import ran, refused, rlroute
from tests.conftest import draw, make_context, make_shape
from tests.fuzz import tensors
from tests.policies import DESCRIBED, policy_file, weights_of, write_policy
from tests.test_training import CORPUS, MODEL, TRAIN, train_steps
from tests.tiny import DATA

WIDTH, EXPERTS = MODEL.d_model, MODEL.num_experts


@pytest.fixture
def path(tmp_path):
    return write_policy(tmp_path / "ppo-tokens.zip", weights_of(WIDTH, EXPERTS))


def entry_of(path, **train):
    return build_entry(f"sb3:policy={path}", DATA, MODEL, replace(TRAIN, **train))


@pytest.mark.parametrize("hidden", [(), (7,), tuple(range(4, 16))], ids=["linear", "one", "twelve"])
def test_its_distribution_is_that_of_the_saved_network(hidden, tmp_path):
    weights = weights_of(6, 8, hidden)
    config = Sb3Router.Config(policy=str(write_policy(tmp_path / "p.zip", weights)))
    x_TD = draw(12, 6).float()
    decision = Sb3Router(config, make_shape(8, 2))(x_TD, make_context(12, explore=False))
    for layer in range(len(hidden)):
        name = f"mlp_extractor.policy_net.{2 * layer}"
        x_TD = torch.tanh(x_TD @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"])
    logits_TE = x_TD @ weights["action_net.weight"].t() + weights["action_net.bias"]
    torch.testing.assert_close(decision.logits_TE, logits_TE)
    torch.testing.assert_close(decision.probs_TE, logits_TE.softmax(1))
    assert torch.equal(decision.expert_ids_R.view(12, 2), logits_TE.topk(2).indices)


def test_training_leaves_it_as_it_is_and_counts_it(path):
    model = build_model(entry_of(path, dtype="float64"), CORPUS, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = train_steps(model, 3)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".router." not in name}
    actor = (WIDTH * 10 + 10 * 5 + 5 * EXPERTS) * MODEL.num_layers
    counted = costs(model, MODEL, DATA.seq_len)
    assert counted.router_parameters == actor + (10 + 5 + EXPERTS) * MODEL.num_layers
    assert counted.training_flops == 0 and not model.routers[0].learns_from


def test_another_file_of_the_same_name_is_another_run(path, tmp_path):
    first = entry_of(path, steps=2, checkpoint_every=1)
    train(first, 0, tmp_path / "runs")
    assert run_config(json.loads(json.dumps(first.to_dict()))) == first
    write_policy(path, weights_of(WIDTH, EXPERTS, seed=1))
    assert entry_of(path).run_id(0) != first.run_id(0)
    with pytest.raises(ConfigError, match=f"has SHA-256 [0-9a-f]{{64}}, want {first.router.sha256}"):
        build_model(run_config(first.to_dict()), CORPUS, 0)
    path.unlink()
    assert run_config(first.to_dict()) == first, "a record is read without the file"
    with pytest.raises(ConfigError, match=r"ppo-tokens\.zip' cannot be read: No such file"):
        entry_of(path)


def test_it_needs_its_field_and_takes_no_part_unasked(tmp_path, monkeypatch):
    assert set(router_names()) - set(default_names()) == {"replay", "sb3"}
    assert "sb3" not in (*all_entries(), *gradient_entries())
    with pytest.raises(ConfigError, match="router sb3 needs policy: say policy=VALUE"):
        build_entry("sb3", DataConfig(), ModelConfig(), TrainConfig())
    monkeypatch.chdir(tmp_path)
    done = rlroute("train", "sb3", "--store", tmp_path)
    assert done.code == 2 and "router sb3 needs policy" in done.err and not os.listdir(tmp_path)
    (listed,) = (part for part in rlroute("routers").out.split("\n\n") if part.startswith("sb3 "))
    assert "needs policy: takes no part where no router is named" in listed and "policy=?, sha256=''" in listed


def described(**parts):
    return DESCRIBED | {
        name: {"__module__": value} if isinstance(value, str) else value for name, value in parts.items()
    }


class Foreign:
    """What a pickle could run; here it would leave a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("run.txt"),)


@pytest.mark.parametrize(
    ("weights", "data", "message"),
    [
        (weights_of(7, 8), DESCRIBED, "observes 7 numbers, want the width of hidden states, 6"),
        (weights_of(6, 9), DESCRIBED, "has 9 actions, want as many as experts, 8"),
        (weights_of(6, 8), described(policy_class="acme.policies"), "is a policy of acme.policies, legal are those of"),
        (
            weights_of(6, 8),
            described(policy_kwargs={"activation_fn": "<class 'torch.nn.modules.activation.ReLU'>"}),
            "has activation_fn = <class 'torch.nn.modules.activation.ReLU'>, legal is .*Tanh",
        ),
        (
            weights_of(6, 8),
            described(policy_kwargs={"features_extractor_class": "<class 'acme.Extractor'>"}),
            "has features_extractor_class = <class 'acme.Extractor'>, legal is .*FlattenExtractor",
        ),
        (weights_of(6, 8) | {"features_extractor.cnn.0.weight": torch.ones(1)}, DESCRIBED, "holds features_extractor"),
        ({"value_net.weight": torch.ones(1, 3)}, DESCRIBED, "is no MlpPolicy of PPO or A2C: it holds no action_net"),
        ({"action_net.weight": Foreign()}, DESCRIBED, "is no policy that Stable-Baselines3 saved"),
    ],
    ids=["width", "actions", "class", "activation", "extractor", "more weights", "no actor", "pickle"],
)
def test_what_it_cannot_route_by_is_refused_by_name(weights, data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_policy(tmp_path / "p.zip", weights, data)
    with pytest.raises(ConfigError, match=message):
        Sb3Router(Sb3Router.Config(policy=str(path)), make_shape(8, 2))
    assert os.listdir(tmp_path) == ["p.zip"]


def test_what_is_no_zip_is_refused(tmp_path):
    (tmp_path / "p.zip").write_text("policy")
    with pytest.raises(ConfigError, match="is no policy that Stable-Baselines3 saved: File is not a zip file"):
        Sb3Router(Sb3Router.Config(policy=str(tmp_path / "p.zip")), make_shape(8, 2))


@pytest.mark.parametrize("bad", tensors(torch.ones(8, 5)))
@pytest.mark.parametrize("name", ["action_net.weight", "mlp_extractor.policy_net.2.bias"])
def test_weights_that_are_no_finite_matrices_of_float32_are_refused(name, bad, tmp_path):
    """Of any type, layout or place, or with more in them than their file holds."""
    path = write_policy(tmp_path / "p.zip", weights_of(6, 8) | {name: bad})
    with pytest.raises(ConfigError, match=r"router sb3\.policy = "):
        Sb3Router(Sb3Router.Config(policy=str(path)), make_shape(8, 2))


def test_layers_that_do_not_follow_one_another_are_refused(tmp_path):
    weights = weights_of(6, 8)
    lacking = {name: value for name, value in weights.items() if name != "action_net.bias"}
    for changed in (lacking, weights | {"action_net.weight": torch.ones(8, 4)}):
        with pytest.raises(ConfigError, match=r"has no tensor action_net.bias|has a layer of 5 numbers before one"):
            Sb3Router(Sb3Router.Config(policy=str(write_policy(tmp_path / "p.zip", changed))), make_shape(8, 2))


@pytest.mark.parametrize("name", ["data", "policy.pth", "weights within"])
def test_an_archive_that_unpacks_to_more_than_fits_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr("rlroute.agents.sb3.MOST", 10**6)
    within = io.BytesIO()
    with zipfile.ZipFile(within, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(10**7))
    members = {"data": json.dumps(DESCRIBED).encode(), "policy.pth": within.getvalue()}
    path = tmp_path / "p.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member, data in members.items():
            file.writestr(member, bytes(10**7) if member == name else data)
    with pytest.raises(ConfigError, match=r"is no policy that Stable-Baselines3 saved: .*more than"):
        Sb3Router(Sb3Router.Config(policy=str(path)), make_shape(8, 2))


def test_a_policy_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read"):
            Sb3Router.Config(policy=str(path))


def test_it_plays_without_stable_baselines():
    pytest.importorskip("gymnasium")
    from rlroute.experiments.play.games import play
    from rlroute.experiments.play.player import Learning

    path = policy_file(16, 8)
    for name in (f"sb3:policy={path}", f"sb3:{path}"):
        greedy, sampled = play("TokenBandit-v0", (name,), 4, 0, Learning())
        assert "untaught" in greedy.name and "(sampled)" in sampled.name


def test_what_a_zip_could_run_is_not_run_where_it_plays(tmp_path, monkeypatch):
    """A pickle in place of the weights, or among what ``load`` of Stable-Baselines3 unpickles."""
    pytest.importorskip("gymnasium")
    monkeypatch.chdir(tmp_path)
    write_policy(tmp_path / "ppo-bad.zip", {"action_net.weight": Foreign()})
    said = refused(rlroute("play", "TokenBandit-v0", "sb3:ppo-bad.zip"))
    assert "sb3.policy = 'ppo-bad.zip' is no policy that Stable-Baselines3 saved" in said
    pickled = {":type:": "x", ":serialized:": base64.b64encode(pickle.dumps(Foreign())).decode()}
    write_policy(tmp_path / "ppo-a,b.zip", weights_of(16, 8), DESCRIBED | {"lr_schedule": pickled})
    assert "sb3:ppo-a,b.zip (greedy" in ran("play", "TokenBandit-v0", "sb3:ppo-a,b.zip", "--episodes", 2)
    assert "cannot be read: No such file" in refused(rlroute("play", "TokenBandit-v0", "sb3:nothing.zip"))
    assert sorted(os.listdir(tmp_path)) == ["ppo-a,b.zip", "ppo-bad.zip"]
