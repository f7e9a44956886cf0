"""Saved policies without Stable-Baselines3: zips that hold what ``model.save`` writes, as far as the router ``sb3``
reads it.
"""

import io
import json
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rlroute.config import RouterConfig
from rlroute.registry import router_class, router_names

OF_A_RUN = ("replay",)
"""Routers that exist for the shapes and steps of one run alone: they have tests of their own (tests/test_replay.py)."""
FOLDER = TemporaryDirectory(prefix="rlroute-policies-")
DESCRIBED = {"policy_class": {"__module__": "stable_baselines3.common.policies"}, "policy_kwargs": {}}


def weights_of(width: int, actions: int, hidden: tuple[int, ...] = (10, 5), seed: int = 0) -> dict[str, torch.Tensor]:
    """Return an actor's and a critic's weights under Stable-Baselines3's names, the layers not in order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [width, *hidden, actions]
    names = [*(f"mlp_extractor.policy_net.{2 * i}" for i in range(len(hidden))), "action_net"]
    shapes: dict[str, tuple[int, ...]] = {"value_net.weight": (1, hidden[-1] if hidden else width)}
    for name, inputs, outputs in reversed(list(zip(names, sizes, sizes[1:], strict=False))):
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_policy(path: Path, weights: dict[str, Any], described: dict[str, Any] = DESCRIBED) -> Path:
    """Write a policy's file."""
    saved = io.BytesIO()
    torch.save(weights, saved)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", json.dumps(described))
        file.writestr("policy.pth", saved.getvalue())
    return path


@cache
def policy_file(width: int, experts: int) -> str:
    """Return the path of a policy of these sizes, there until the process ends."""
    return str(write_policy(Path(FOLDER.name) / f"ppo-{width}-{experts}.zip", weights_of(width, experts)))


def needs(name: str, width: int, experts: int) -> dict[str, Any]:
    """Return what a router's ``Config`` cannot do without, for a layer of these sizes."""
    return {"policy": policy_file(width, experts), "sha256": ""} if name == "sb3" else {}


def any_router_names() -> list[str]:
    """Return the names of the routers that can be built for any layer."""
    return [name for name in router_names() if name not in OF_A_RUN]


def default_config(name: str, width: int = 6, experts: int = 8) -> RouterConfig:
    """Return the router's default configuration, with what it needs."""
    return router_class(name).Config(**needs(name, width, experts))
