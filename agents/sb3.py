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
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from rlroute.errors import ConfigError
from rlroute.foreign import hold, parse_json, printable, read_bytes, read_members, why
from rlroute.policies import DrawConfig, perturb, policy_decision
from rlroute.routing import Router, RouterShape, RoutingContext, RoutingDecision

LEGAL = {
    "activation_fn": "<class 'torch.nn.modules.activation.Tanh'>",
    "features_extractor_class": "<class 'stable_baselines3.common.torch_layers.FlattenExtractor'>",
}
"""The defaults of an MlpPolicy, as Stable-Baselines3 writes them where they are said."""
POLICIES = "stable_baselines3.common.policies"
HIDDEN = r"mlp_extractor\.policy_net\.[0-9]{1,4}\.weight"
USED = r"(mlp_extractor\.policy_net\.[0-9]{1,4}|action_net)\.(weight|bias)"
CRITIC = r"(mlp_extractor\.)?value_net\..*"
MOST = 1 << 28
"""Bytes of the largest policy, packed or unpacked."""


class Described(TypedDict):
    """What this reads of the JSON that stands beside the weights."""

    policy_class: dict[str, Any]
    """Its ``__module__`` says whose class it is."""
    policy_kwargs: NotRequired[dict[str, Any]]
    """What was said in place of the defaults."""


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
                content = read_bytes(Path(self.policy), MOST, follow=True)
            except (OSError, ValueError) as error:
                raise self.refusal(f"cannot be read: {why(error)}") from error
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
    layers = [_linear(config, weights, name) for name in [*sorted(hidden, key=_place), "action_net"]]
    for one, other in pairwise(layers):
        if one.out_features != other.in_features:
            raise config.refusal(f"has a layer of {one.out_features} numbers before one that takes {other.in_features}")
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
        parts = read_members(content, ("data", "policy.pth"), MOST)
        described = parse_json(parts["data"])
        hold(described, Described)
        weights = _load(parts["policy.pth"])
    except ValueError as error:
        raise config.refusal(f"is no policy that Stable-Baselines3 saved: {why(error)}") from error
    _check(config, described, weights)
    return weights


def _load(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file of PyTorch's; no code of it is run, and nothing in it grows when it is read.

    Raises:
        ValueError: it holds something else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            members = file.infolist()
        if sum(member.file_size for member in members) > MOST or any(member.compress_type for member in members):
            raise ValueError("its weights are packed, or more than fit")
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what is damaged makes the two readers raise nearly anything
        raise ValueError(f"its weights cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError("its weights have no names")
    return dict(weights)


def _check(config: Sb3Router.Config, described: Described, weights: Mapping[str, object]) -> None:
    """Refuse what would route otherwise than it did in its own library."""
    module = described["policy_class"].get("__module__")
    if module != POLICIES:
        raise config.refusal(f"is a policy of {printable(str(module))[:200]}, legal are those of {POLICIES}")
    for name, legal in LEGAL.items():
        found = described.get("policy_kwargs", {}).get(name, legal)
        if found != legal:
            raise config.refusal(f"has {name} = {printable(str(found))[:200]}, legal is {legal}")
    unknown = [printable(name) for name in weights if not re.fullmatch(f"{USED}|{CRITIC}", name)]
    if unknown or "action_net.weight" not in weights:
        raise config.refusal(f"is no MlpPolicy of PPO or A2C: it holds {', '.join(unknown[:3]) or 'no action_net'}")


def _place(name: str) -> int:
    return int(name.rpartition(".")[2])


def _tensor(config: Sb3Router.Config, weights: Mapping[str, object], name: str, dimensions: int) -> Tensor:
    """Return a tensor that is what it says: dense, in memory of its own, of finite numbers."""
    value = weights.get(name)
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
        raise config.refusal(f"has no tensor {name}")
    if value.dtype != torch.float32 or value.dim() != dimensions or not value.is_contiguous() or not value.numel():
        raise config.refusal(
            f"has {name} of {value.dtype} and shape {tuple(value.shape)}: want float32 in {dimensions} dimension(s)"
        )
    if not value.isfinite().all():
        raise config.refusal(f"has numbers in {name} that are not finite")
    return value.detach()


def _linear(config: Sb3Router.Config, weights: Mapping[str, object], name: str) -> nn.Linear:
    weight, bias = _tensor(config, weights, f"{name}.weight", 2), _tensor(config, weights, f"{name}.bias", 1)
    if len(bias) != len(weight):
        raise config.refusal(f"has a bias of {len(bias)} numbers in {name}, which has {len(weight)} rows")
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")  # draws no numbers
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer
