"""A library's agent, unmodified, learns the environments: Stable-Baselines3's PPO (opt-in: minutes, and it needs stable_baselines3)."""

import importlib.util

import pytest

if importlib.util.find_spec("gymnasium") is None or importlib.util.find_spec("stable_baselines3") is None:
    pytest.skip("needs gymnasium and stable_baselines3", allow_module_level=True)

import gymnasium
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env

from rlroute.envs import IDS
from rlroute.envs.references import play, reference_policies, score_interval

pytestmark = pytest.mark.slow


def _learn(name: str, steps: int, seed: int, **settings):
    """Train PPO on 8 copies and return its greedy policy's score over 64 other episodes, with the interval's half width."""
    envs = make_vec_env(f"rlroute:{name}", n_envs=8, seed=seed)
    model = PPO("MlpPolicy", envs, n_steps=256, batch_size=256, seed=seed, device="cpu", **settings).learn(steps)
    test = gymnasium.make_vec(f"rlroute:{name}", num_envs=64)
    rewards = play(test, lambda observations, _: model.predict(observations, deterministic=True)[0], seed=10_000)
    return score_interval(test, rewards)


@pytest.mark.parametrize("name", IDS)
def test_sb3_finds_no_fault(name):
    check_env(gymnasium.make(f"rlroute:{name}"))


@pytest.mark.parametrize("seed", range(3))
def test_ppo_learns_the_bandit(seed):
    score, half = _learn("rlroute/TokenBandit-v0", 40_960, seed, gamma=0.0, gae_lambda=0.0)
    print(f"PPO on TokenBandit-v0, seed {seed}: {score:.3f} +- {half:.3f}")
    assert score - half > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_ppo_beats_join_shortest_queue(seed):
    envs = gymnasium.make_vec("rlroute:rlroute/Dispatch-v0", num_envs=64)
    queue, queue_half = score_interval(envs, play(envs, reference_policies(envs)["join_shortest_queue"], seed=10_000))
    score, half = _learn("rlroute/Dispatch-v0", 81_920, seed, gamma=0.9)
    print(
        f"PPO on Dispatch-v0, seed {seed}: {score:.3f} +- {half:.3f}; join_shortest_queue {queue:.3f} +- {queue_half:.3f}"
    )
    assert score - half > queue + queue_half
