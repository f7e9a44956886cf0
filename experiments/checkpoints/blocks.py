"""Mixture-of-experts blocks of transformers as layers of ours: the same weights give the same output.

``read_block`` takes a block's configuration and its ``state_dict()`` and returns what our layer is made of: fields of a
model, an entry for its router, and the weights by our names. Nothing of a block is left out silently: what a
format does not know is refused by name. transformers itself is not needed.

Left out on purpose are rules of training (jitter, dropout, losses of balance) and Switch's capacity, which there is a
number of tokens of a sequence and here a factor on an expert's fair share (``capacity_factor``).

Shape suffixes: D model width, E experts, H hidden rows of an expert, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlroute.config import ModelConfig
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import router_of
from rlroute.foreign import Unfit, clipped, hold
from rlroute.kernels import choose_backend
from rlroute.kernels.activations import CLAMP, SLOPE
from rlroute.limits import Count, Experts
from rlroute.model.moe import MoELayer
from rlroute.registry import make_router
from rlroute.routing import RouterShape

GATED = {"silu": "swiglu", "swish": "swiglu"}
PLAIN = {"relu": "relu", "gelu": "gelu"}
"""Activations by their names there, of experts with a gate and without."""
Config = Mapping[str, Any]
"""What a ``config.json`` says."""


@dataclass(frozen=True)
class Block:
    """A block that was read.

    Attributes:
        model: the fields of a model that the layer hangs on.
        entry: its router.
        weights: a :class:`rlroute.model.moe.MoELayer`'s state.
    """

    model: ModelConfig
    entry: str
    weights: dict[str, Tensor]

    def layer(self) -> MoELayer:
        """Return the layer, with copies of the weights in float32, on the CPU."""
        made = self._made()
        made.load_state_dict(self.weights)
        return made

    def as_stored(self) -> MoELayer:
        """Return the layer with the weights themselves, in their precision."""
        made = self._empty()
        made.load_state_dict(self.weights, assign=True)
        return made

    def _empty(self) -> MoELayer:
        """Return the layer with shapes alone."""
        with torch.device("meta"):
            return self._made()

    def _made(self) -> MoELayer:
        model, config = self.model, router_of(self.entry)
        assert config is not None
        shape = RouterShape(
            d_model=model.d_model,
            num_experts=model.num_experts,
            k=model.k,
            site=0,
            vocab_size=1,
            seed=0,
            num_shared_experts=model.num_shared_experts,
        )
        return MoELayer(model, make_router(config, shape), 0, 0, choose_backend("auto", "cpu"))


class _State:
    """The weights of a block, each of which is taken once."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.left = {name: tensor.detach() for name, tensor in state.items()}

    def take(self, name: str, dims: int) -> Tensor:
        """Return a tensor of so many dimensions and strike it off."""
        if name not in self.left:
            raise ConfigError(f"no {name} among the block's weights: {', '.join(self.left) or 'none'}")
        tensor = self.left.pop(name)
        if tensor.dim() != dims or not tensor.numel() or not tensor.is_floating_point():
            raise ConfigError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: want floating point of {dims} dimensions"
            )
        return tensor

    def linear(self, *names: str) -> Tensor:
        """Return the matrices of linear maps, one below the other."""
        return torch.cat([self.take(f"{name}.weight", 2) for name in names])


def read_block(kind: str, config: Any, state: Mapping[str, Tensor]) -> Block:
    """Return a block of transformers as what our layer is made of.

    Args:
        kind: the ``model_type`` of its configuration, one of :data:`FORMATS`.
        config: that configuration, or what its ``config.json`` says.
        state: the block's ``state_dict()``.

    Raises:
        ConfigError: there is no such format; it wants a field or a weight that is not there, or is of another type or
            shape; or there are weights that it does not know, or settings that our layer cannot express.
    """
    if kind not in FORMATS:
        raise ConfigError(f"blocks of {kind!r}: legal are {', '.join(FORMATS)}")
    weights = _State(state)
    try:
        block = FORMATS[kind](config if isinstance(config, Mapping) else config.to_dict(), weights)
    except RuntimeError as error:  # as torch says that shapes do not go together
        raise ConfigError(f"the weights do not fit together: {clipped(str(error))}") from error
    if weights.left:
        raise ConfigError(f"the block of {kind!r} has weights that are not known here: {', '.join(weights.left)}")
    return block


def _said(config: Config, **kinds: Any) -> list[Any]:
    """Return fields of a configuration, each held to its type."""
    for name, kind in kinds.items():
        if name not in config:
            raise ConfigError(f"config.json does not say {name!r}")
        try:
            hold(config[name], kind, name)
        except Unfit as error:
            raise ConfigError(f"config.json: {error}") from error
    return [config[name] for name in kinds]


def _activation(name: str, legal: Mapping[str, str]) -> str:
    if name not in legal:
        raise ConfigError(f"activation {name!r}: legal are {', '.join(map(repr, legal))}")
    return legal[name]


def _block(entry: str, k: int, activation: Any, weights: dict[str, Tensor], **fields: Any) -> Block:
    """Return a block whose sizes are those of its weights, all of which have the shapes of our layer's."""
    experts, width, inner = weights["experts.out_EDF"].shape
    shared = weights["shared.experts.out_EDF"].shape[2] if "shared.experts.out_EDF" in weights else 0
    if shared % inner:
        raise ConfigError(f"shared experts of width {shared}: must be a multiple of the experts' width {inner}")
    fields |= {"num_experts": experts, "d_model": width, "d_expert": inner, "num_shared_experts": shared // inner}
    block = Block(replace(ModelConfig(), **fields, k=k, activation=activation), entry, weights)
    for name, own in block._empty().state_dict().items():
        if weights[name].shape != own.shape:
            raise ConfigError(
                f"{name} of shape {tuple(weights[name].shape)}: the other weights want {tuple(own.shape)}"
            )
    return block


def _gated(state: _State) -> dict[str, Tensor]:
    """Return the weights of a linear router and of experts as most models have them."""
    return {
        "router.scores.weight": state.linear("gate"),
        "experts.in_EHD": state.take("experts.gate_up_proj", 3),
        "experts.out_EDF": state.take("experts.down_proj", 3),
    }


def _shared(state: _State, name: str) -> dict[str, Tensor]:
    """Return the weights of experts that every token runs."""
    return {
        "shared.experts.in_EHD": state.linear(f"{name}.gate_proj", f"{name}.up_proj")[None],
        "shared.experts.out_EDF": state.linear(f"{name}.down_proj")[None],
    }


def _normalized(flag: bool) -> str:
    return "topk" if flag else "topk:normalize=false"


def _mixtral(config: Config, state: _State) -> Block:
    k, activation = _said(config, num_experts_per_tok=Count, hidden_act=str)
    return _block("topk", k, _activation(activation, GATED), _gated(state))


def _flagged(config: Config, state: _State) -> Block:
    """Qwen3-MoE and OLMoE."""
    k, activation, flag = _said(config, num_experts_per_tok=Count, hidden_act=str, norm_topk_prob=bool)
    return _block(_normalized(flag), k, _activation(activation, GATED), _gated(state))


def _qwen2_moe(config: Config, state: _State) -> Block:
    k, activation, flag = _said(config, num_experts_per_tok=Count, hidden_act=str, norm_topk_prob=bool)
    weights = _gated(state) | _shared(state, "shared_expert")
    weights["shared_gate.weight"] = state.linear("shared_expert_gate")
    return _block(_normalized(flag), k, _activation(activation, GATED), weights, shared_gate="sigmoid")


def _groups(config: Config) -> str:
    """Return the part of an entry for experts in groups, of which a token has some."""
    return ",groups={},groups_kept={}".format(*_said(config, n_group=Count, topk_group=Count))


def _deepseek_v2(config: Config, state: _State) -> Block:
    k, activation = _said(config, num_experts_per_tok=Count, hidden_act=str)
    scale, method = _said(config, routed_scaling_factor=float, topk_method=str)
    entry = f"topk:normalize=false,route_scale={scale}"
    if method == "group_limited_greedy":
        entry += _groups(config) + ",group_score=max" * (config["n_group"] > 1)
    elif method != "greedy":
        raise ConfigError(f"topk_method = {method!r}: legal are 'greedy', 'group_limited_greedy'")
    weights = _gated(state) | _shared(state, "shared_experts")
    return _block(entry, k, _activation(activation, GATED), weights)


def _deepseek_v3(config: Config, state: _State) -> Block:
    k, activation, flag = _said(config, num_experts_per_tok=Count, hidden_act=str, norm_topk_prob=bool)
    (scale,) = _said(config, routed_scaling_factor=float)
    entry = f"topk:score=sigmoid,bias_rate=0.001,route_scale={scale}{_groups(config)}"
    entry += "" if flag else ",normalize=false"
    weights = _gated(state) | _shared(state, "shared_experts")
    weights["router.bias_E"] = state.take("gate.e_score_correction_bias", 1)
    return _block(entry, k, _activation(activation, GATED), weights)


def _dbrx(config: Config, state: _State) -> Block:
    (ffn,) = _said(config, ffn_config=dict[str, Any])
    k, experts, function = _said(ffn, moe_top_k=Count, moe_num_experts=Experts, ffn_act_fn=dict[str, Any])
    (norm,), (activation,) = _said(ffn, moe_normalize_expert_weights=float | None), _said(function, name=str)
    if norm not in (None, 1):
        raise ConfigError(f"moe_normalize_expert_weights = {norm}: legal are None, 1")
    gate_EFD, up_EFD, down_EFD = (
        torch.unflatten(state.take(f"experts.mlp.{name}", 2), 0, (experts, -1)) for name in ("w1", "v1", "w2")
    )
    weights = {
        "router.scores.weight": state.linear("router.layer"),
        "experts.in_EHD": torch.cat([gate_EFD, up_EFD], 1),
        "experts.out_EDF": down_EFD.transpose(1, 2),
    }
    return _block(_normalized(norm is not None), k, _activation(activation, GATED), weights)


def _gpt_oss(config: Config, state: _State) -> Block:
    """The rows of gate and up take turns there; the matrices lie the other way round."""
    k, slope, clamp = _said(config, num_experts_per_tok=Count, swiglu_alpha=float, swiglu_limit=float)
    if (slope, clamp) != (SLOPE, CLAMP):
        raise ConfigError(f"swiglu_alpha = {slope}, swiglu_limit = {clamp}: legal are {SLOPE}, {CLAMP}")
    in_EDH, bias_EH = state.take("experts.gate_up_proj", 3), state.take("experts.gate_up_proj_bias", 2)
    weights = {
        "router.scores.weight": state.linear("router"),
        "router.scores.bias": state.take("router.bias", 1),
        "experts.in_EHD": torch.cat([in_EDH[..., ::2], in_EDH[..., 1::2]], 2).transpose(1, 2),
        "experts.in_bias_EH": torch.cat([bias_EH[..., ::2], bias_EH[..., 1::2]], 1),
        "experts.out_EDF": state.take("experts.down_proj", 3).transpose(1, 2),
        "experts.out_bias_ED": state.take("experts.down_proj_bias", 2),
    }
    return _block("topk:order=choose_first,linear_bias=true", k, "swiglu_clamped", weights, expert_bias=True)


def _switch(config: Config, state: _State) -> Block:
    count, activation = _said(config, num_experts=Experts, dense_act_fn=str)
    experts = [f"experts.expert_{expert}" for expert in range(count)]
    weights = {
        "router.scores.weight": state.linear("router.classifier"),
        "experts.in_EHD": torch.stack([state.linear(f"{expert}.wi") for expert in experts]),
        "experts.out_EDF": torch.stack([state.linear(f"{expert}.wo") for expert in experts]),
    }
    return _block("switch", 1, _activation(activation, PLAIN), weights)


def _jetmoe(config: Config, state: _State) -> Block:
    """The bias of the sum is that of every expert here: its gates add up to 1."""
    k, activation = _said(config, num_experts_per_tok=Count, activation_function=str)
    in_EHD, out_EDF = state.take("input_linear.weight", 3), state.take("output_linear.weight", 3)
    weights = {
        "router.scores.weight": state.linear("router.layer"),
        "experts.in_EHD": in_EHD,
        "experts.in_bias_EH": torch.zeros(in_EHD.shape[:2]),
        "experts.out_EDF": out_EDF,
        "experts.out_bias_ED": state.take("bias", 1).expand(len(out_EDF), -1),
    }
    return _block("topk:order=choose_first", k, _activation(activation, GATED), weights, expert_bias=True)


FORMATS: dict[str, Callable[[Config, _State], Block]] = {
    "dbrx": _dbrx,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "jetmoe": _jetmoe,
    "mixtral": _mixtral,
    "olmoe": _flagged,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _flagged,
    "switch_transformers": _switch,
}
"""How a block is read, by the ``model_type`` of its configuration."""
