"""Gymnasium environments in which routing is the action; importing this package registers them by id, and no more.

``gym.make("rlroute.envs:rlroute/TokenBandit-v0")`` imports it by itself; ``gym.make_vec`` of the same id gives the
native vector environment. docs/environments.md describes each.
"""

from __future__ import annotations

from rlroute.extras import missing

try:
    import gymnasium
except ImportError as error:
    raise missing("the package rlroute.envs", "gymnasium") from error

IDS = {
    "rlroute/TokenBandit-v0": "token_bandit:TokenBandit",
    "rlroute/TokenBanditHard-v0": "token_bandit:TokenBandit",
    "rlroute/TokenBandits-v0": "token_bandit:TokenBandits",
    "rlroute/Dispatch-v0": "dispatch:Dispatch",
}
"""Each environment's module and the stem of its classes: ``<stem>Env`` steps one copy, ``<stem>VectorEnv`` many at
once.
"""
SETTINGS = {"rlroute/TokenBanditHard-v0": {"experts": 64, "features": 64, "sigma": 0.6, "skew": 1.2}}
"""What an environment is registered with, where that differs from its defaults."""


for _id, _stem in IDS.items():
    gymnasium.register(
        _id,
        entry_point=f"rlroute.envs.{_stem}Env",
        vector_entry_point=f"rlroute.envs.{_stem}VectorEnv",
        kwargs=SETTINGS.get(_id, {}),
    )
