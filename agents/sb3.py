"""A policy trained elsewhere, frozen: the actor of a Stable-Baselines3 PPO or A2C routes, and learns nothing more.

PPO, Schulman et al. 2017 (arXiv 1707.06347); A2C, Mnih et al. 2016 (arXiv 1602.01783); saved by Stable-Baselines3,
Raffin et al. 2021.

``TokenBandit-v0`` shows of a token exactly what a router is given. A policy trained there on the tokens of a checkpoint
(``rlroute export-tokens``) therefore routes as it is; docs/environments.md tells the whole way. Every MoE layer gets a
copy of it, whichever layer it was trained on. It draws one expert in the environment; here k by Plackett-Luce while
exploring, and the k most probable greedily.

The file is read without stable_baselines3 and nothing in it is run: of what it holds, this takes the weights, which are
tensors, and two names out of JSON. A ``VecNormalize`` is not in it: a policy trained behind one sees other numbers
here.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from rlroute.errors import ConfigError
from rlroute.policies import DrawConfig, perturb, policy_decision
from rlroute.routing import Router, RouterShape, RoutingContext, RoutingDecision

LEGAL = {
    "activation_fn": "<class 'torch.nn.modules.activation.Tanh'>",
    "features_extractor_class": "<class 'stable_baselines3.common.torch_layers.FlattenExtractor'>",
}
"""The defaults of an MlpPolicy, as Stable-Baselines3 writes them where they are said."""
POLICIES = "stable_baselines3.common.policies"
HIDDEN = r"mlp_extractor\.policy_net\.\d+\.weight"
USED = r"(mlp_extractor\.policy_net\.\d+|action_net)\.(weight|bias)"
CRITIC = r"(mlp_extractor\.)?value_net\..*"


class Sb3Router(Router):
    """A frozen multi-layer perceptron from hidden states to the logits of experts."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DrawConfig):
        """Fields of a saved policy."""

        policy: str
        """The .zip that ``model.save`` wrote."""
        sha256: str = ""
        """Of that file, and so a part of the run's identity: filled in where it is empty, else the file must have
        it.
        """

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.sha256:
                object.__setattr__(self, "sha256", hashlib.sha256(self.read()).hexdigest())

        def read(self) -> bytes:
            """Return the file's bytes.

            Raises:
                ConfigError: it cannot be read, or it is not the one that ``sha256`` names.
            """
            try:
                content = Path(self.policy).read_bytes()
            except OSError as error:
                raise self.refusal(f"cannot be read: {error.strerror}") from error
            found = hashlib.sha256(content).hexdigest()
            if self.sha256 not in ("", found):
                raise self.refusal(f"has SHA-256 {found}, want {self.sha256}: another policy needs another run")
            return content

        def reads(self) -> dict[str, str]:
            """Return the SHA-256 of the policy's file as it lies there."""
            return {"policy": hashlib.sha256(self.read()).hexdigest()}

        def refusal(self, reason: str) -> ConfigError:
            """Return an error that names the file."""
            return ConfigError(f"router sb3.policy = {self.policy!r} {reason}")

    gate_meaning = "1/k"
    stochastic = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = read_actor(config, shape)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Sample k experts in order where exploring, else take the k most probable."""
        logits_TE = self.scores(x_TD.detach())
        policy_TE = logits_TE / self.config.temperature_at(context.step)
        ids_TK = context.choose(perturb(policy_TE, context, "sb3"), self.shape.k)
        return policy_decision(logits_TE, policy_TE, ids_TK, context)


def read_actor(config: Sb3Router.Config, shape: RouterShape) -> nn.Sequential:
    """Return the saved policy's network from observations to logits, frozen.

    Raises:
        ConfigError: the file is not a saved actor-critic MlpPolicy with its default activation, or not one of these
            sizes.
    """
    weights = _read_weights(config)
    hidden = [name.removesuffix(".weight") for name in weights if re.fullmatch(HIDDEN, name)]
    layers = [_linear(weights, name) for name in [*sorted(hidden, key=_place), "action_net"]]
    width, actions = layers[0].in_features, layers[-1].out_features
    if width != shape.d_model:
        raise config.refusal(f"observes {width} numbers, want the width of hidden states, {shape.d_model}")
    if actions != shape.num_experts:
        raise config.refusal(f"has {actions} actions, want as many as experts, {shape.num_experts}")
    modules = [module for layer in layers for module in (layer, nn.Tanh())]
    return nn.Sequential(*modules[:-1]).requires_grad_(False)


def _read_weights(config: Sb3Router.Config) -> dict[str, Tensor]:
    content = config.read()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            described = json.loads(file.read("data"))
            weights = dict(torch.load(io.BytesIO(file.read("policy.pth")), map_location="cpu", weights_only=True))
    except (zipfile.BadZipFile, KeyError, ValueError, UnpicklingError, RuntimeError) as error:
        raise config.refusal(f"is no policy that Stable-Baselines3 saved: {error}") from error
    _check(config, described, weights)
    return weights


def _check(config: Sb3Router.Config, described: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse what would route otherwise than it did in its own library."""
    module = described.get("policy_class", {}).get("__module__")
    if module != POLICIES:
        raise config.refusal(f"is a policy of {module}, legal are those of {POLICIES}")
    for name, legal in LEGAL.items():
        found = described.get("policy_kwargs", {}).get(name, legal)
        if found != legal:
            raise config.refusal(f"has {name} = {found}, legal is {legal}")
    unknown = [name for name in weights if not re.fullmatch(f"{USED}|{CRITIC}", name)]
    if unknown or "action_net.weight" not in weights:
        raise config.refusal(f"is no MlpPolicy of PPO or A2C: it holds {', '.join(unknown) or 'no action_net'}")


def _place(name: str) -> int:
    return int(name.rpartition(".")[2])


def _linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")  # draws no numbers
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer
