"""A library's agent, unmodified, learns the environments: Stable-Baselines3's PPO (opt-in: minutes, and it needs
stable_baselines3).
"""

import importlib.util

import pytest

if importlib.util.find_spec("gymnasium") is None or importlib.util.find_spec("stable_baselines3") is None:
    pytest.skip("needs gymnasium and stable_baselines3", allow_module_level=True)

import gymnasium
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env

from rlroute.agents.sb3 import Sb3Router
from rlroute.envs import IDS
from rlroute.envs.references import play, reference_policies, score_interval
from rlroute.routing import RouterShape
from tests.conftest import make_context

pytestmark = pytest.mark.slow


def _learn(name: str, steps: int, seed: int, **settings):
    """Train PPO on 8 copies and return its greedy policy's score over 64 other episodes, with the interval's half
    width.
    """
    envs = make_vec_env(f"rlroute.envs:{name}", n_envs=8, seed=seed)
    model = PPO("MlpPolicy", envs, n_steps=256, batch_size=256, seed=seed, device="cpu", **settings).learn(steps)
    test = gymnasium.make_vec(f"rlroute.envs:{name}", num_envs=64)
    rewards = play(test, lambda observations, _: model.predict(observations, deterministic=True)[0], seed=10_000)
    return score_interval(test, rewards)


@pytest.mark.parametrize("name", IDS)
def test_sb3_finds_no_fault(name):
    check_env(gymnasium.make(f"rlroute.envs:{name}"))


@pytest.mark.parametrize("settings", [{}, {"policy_kwargs": {"net_arch": [32], "activation_fn": torch.nn.Tanh}}])
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_a_saved_policy_routes_with_its_own_probabilities(algorithm, settings, tmp_path):
    env = gymnasium.make("rlroute.envs:rlroute/TokenBandit-v0")
    model = algorithm("MlpPolicy", env, gamma=0.0, n_steps=256, learning_rate=0.01, seed=0, device="cpu", **settings)
    model.learn(2048).save(tmp_path / "policy.zip")
    shape = RouterShape(d_model=16, num_experts=8, k=1, layer=0, vocab_size=11, seed=0)
    router = Sb3Router(Sb3Router.Config(policy=str(tmp_path / "policy.zip")), shape)
    x_TD = 2 * torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    decision = router(x_TD, make_context(512, explore=False))
    with torch.no_grad():
        want_TE = model.policy.get_distribution(x_TD).distribution.probs
    assert want_TE.max() > 0.5, "a policy that has learnt something"
    torch.testing.assert_close(decision.probs_TE, want_TE, rtol=0, atol=1e-6)
    assert decision.expert_ids_R.tolist() == model.predict(x_TD.numpy(), deterministic=True)[0].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_ppo_learns_the_bandit(seed):
    score, half = _learn("rlroute/TokenBandit-v0", 40_960, seed, gamma=0.0, gae_lambda=0.0)
    print(f"PPO on TokenBandit-v0, seed {seed}: {score:.3f} +- {half:.3f}")
    assert score - half > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_ppo_beats_join_shortest_queue(seed):
    envs = gymnasium.make_vec("rlroute.envs:rlroute/Dispatch-v0", num_envs=64)
    queue, queue_half = score_interval(envs, play(envs, reference_policies(envs)["join_shortest_queue"], seed=10_000))
    score, half = _learn("rlroute/Dispatch-v0", 81_920, seed, gamma=0.9)
    print(
        f"PPO on Dispatch-v0, seed {seed}: {score:.3f} +- {half:.3f}; "
        f"join_shortest_queue {queue:.3f} +- {queue_half:.3f}"
    )
    assert score - half > queue + queue_half
