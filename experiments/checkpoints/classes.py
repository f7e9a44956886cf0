"""Whole models as checkpoints that classes of transformers load, where one expresses all of a model.

Ours is what they call Llama's block: RMSNorm before attention and before experts, rotary positions on halves of each
head, no biases. Classes that normalise queries and keys (Qwen3-MoE, OLMoE) or compress them (DeepSeek) have no weights
with which they would do neither. Left are

- Mixtral: every block has experts, the gates of the chosen are normalised, nothing is shared;
- Qwen2-MoE: gates normalised or not, dense blocks anywhere, experts that all tokens share behind a gate. Ungated ones
  get a gate of weight 0, which is 1/2, and twice the output matrix, which is exact; where there are none, one of width
  1 whose weights are 0;
- GLM-4-MoE: sigmoid scores with a bias of the choice, groups and a scale, as DeepSeek-V3 has them; dense blocks in
  front, ungated shared experts.

transformers itself is not needed to write one.

Shape suffixes: D model width, E experts, F expert width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rlroute.config import ModelConfig, RunConfig
from rlroute.errors import ConfigError
from rlroute.experiments.checkpoints.trained import TrainedRun
from rlroute.model.attention import Attention
from rlroute.model.linear import KeyedLinear
from rlroute.model.moe import Experts, MoELayer
from rlroute.model.transformer import Block, Transformer

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}
"""Of experts, by their names there."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a router does with its linear scores when it is greedy.

    Attributes:
        sigmoid: each by itself; else a softmax over all.
        normalized: whether gates are divided by their sum over the chosen.
        scale: factor on all gates.
        logit_scale: factor on the logits.
        groups, groups_kept: of experts, ranked by the sum of their two best.
        biased: whether a bias moves the choice.
    """

    sigmoid: bool
    normalized: bool
    scale: float = 1.0
    logit_scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    biased: bool = False


@dataclass(frozen=True)
class Exported:
    """A checkpoint.

    Attributes:
        config: config.json.
        tensors: by their names on disk.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def files(self) -> dict[str, bytes]:
        """What the checkpoint's folder holds."""
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        return {"config.json": text.encode(), "model.safetensors": save(self.tensors, {"format": "pt"})}


def export_class(run: TrainedRun) -> Exported:
    """Return a run's model as a checkpoint of the first class that expresses it.

    Raises:
        ConfigError: none does; this says what of the model it is.
        StoreError, CheckpointError: its weights cannot be read.
    """
    _refuse_model(run.config)
    scores = _scores(run.config)
    shaped = _glm4_moe if scores.sigmoid else _softmax(run.config.model, scores)
    fields, tensors = shaped(run.config.model, scores, run.model)
    wide = torch.float64 if run.config.train.dtype == "float64" else torch.float32
    tensors = {name: tensor.detach().cpu().to(wide).contiguous().clone() for name, tensor in tensors.items()}
    return Exported(_common(run, wide) | fields, tensors)


def _refuse_model(config: RunConfig) -> None:
    """Refuse what no class has."""
    model = config.model
    wrong: dict[str, bool] = {
        "attention_experts": bool(model.attention_experts),
        "kv_rank": bool(model.kv_rank),
        "mixers": model.mixers != "attention",
        "attention_gate": model.attention_gate != "none",
        "num_free_experts": bool(model.num_free_experts),
        "d_latent": model.d_latent is not None,
        "expert_bias": model.expert_bias,
        "gate_at": model.gate_at != "output",
        "gate_form": model.gate_form != "own",
        "capacity_factor": model.capacity_factor is not None,
        "router_dtype": model.router_dtype != "float32",
        "activation": model.activation not in ACTIVATIONS,
    }
    if name := next((name for name, is_wrong in wrong.items() if is_wrong), None):
        raise ConfigError(
            f"model.{name} = {getattr(model, name)!r}: no class of transformers has attention like ours and this; "
            "--form moe writes any mixture"
        )
    if config.data.packed:
        raise ConfigError("data.packed = True: classes of transformers attend over the bounds of documents")
    if config.others:
        raise ConfigError(f"routers {config.router_name}: a class of transformers has the same router in all layers")


def _scores(config: RunConfig) -> Scores:
    """Return what the run's router does.

    Raises:
        ConfigError: no class has such a router.
    """
    router, k = config.router, config.model.k
    assert router is not None
    values = vars(router)
    if router.name == "switch":
        return Scores(sigmoid=False, normalized=values["normalize"] and k > 1)
    if router.name == "bias_balanced":
        return Scores(sigmoid=True, normalized=k > 1, scale=values["route_scale"], biased=True)
    if router.name != "topk":
        raise ConfigError(f"router {router.name}: of ours classes of transformers have topk, switch and bias_balanced")
    plain = {
        "expert_scales": False,
        "norm_input": False,
        "linear_bias": False,
        "soft_cap": 0.0,
        "outside": "forbidden",
        "group_score": "top2",
    }
    first = values["order"] == "choose_first"
    sigmoid = values["score"] == "sigmoid"
    if not sigmoid:
        plain |= {"score": "softmax", "groups": 1, "bias_rate": 0.0, "route_scale": 1.0}
    if first and (sigmoid or not values["normalize"]):
        plain["order"] = "score_first"
    for name, wanted in plain.items():
        if values[name] != wanted:
            raise ConfigError(
                f"router topk.{name} = {values[name]!r}: no class has it with these scores, legal is {wanted!r}"
            )
    return Scores(
        sigmoid=sigmoid,
        normalized=values["normalize"] and k > 1,
        scale=values["route_scale"],
        logit_scale=values["logit_scale"],
        groups=values["groups"] or config.model.devices or 1,
        groups_kept=values["groups_kept"],
        biased=values["bias_rate"] > 0,
    )


def _common(run: TrainedRun, dtype: torch.dtype) -> dict[str, Any]:
    """Return what all classes call the same."""
    model, vocabulary = run.config.model, run.corpus.vocab_size
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocabulary,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.attention_width // model.num_heads,
        "hidden_act": ACTIVATIONS[model.activation],
        "max_position_embeddings": run.config.data.seq_len,
        "rms_norm_eps": torch.finfo(dtype).eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base, "partial_rotary_factor": 1.0},
        "rope_theta": model.rope_base,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "num_experts_per_tok": model.k,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": None,
        "pad_token_id": None,
    }


Written = tuple[dict[str, Any], dict[str, Tensor]]
"""Fields of a configuration, and tensors."""


def _softmax(model: ModelConfig, scores: Scores) -> Callable[[ModelConfig, Scores, Transformer], Written]:
    every = len(model.moe_layers) == model.num_layers
    return _mixtral if scores.normalized and every and not model.num_shared_experts else _qwen2_moe


def _mixtral(model: ModelConfig, scores: Scores, ours: Transformer) -> Written:
    fields = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": model.num_experts,
        "intermediate_size": model.d_expert,
        "sliding_window": None,
    }

    def layer(moe: MoELayer) -> Iterator[tuple[str, Tensor]]:
        yield "block_sparse_moe.gate.weight", _logits(moe, scores)
        names = ("w1", "w3", "w2")
        for expert in range(model.num_experts):
            for name, tensor in zip(names, _gate_up_down(moe.experts, expert), strict=True):
                yield f"block_sparse_moe.experts.{expert}.{name}.weight", tensor

    return fields, _tensors(ours, layer)


def _qwen2_moe(model: ModelConfig, scores: Scores, ours: Transformer) -> Written:
    shared = model.num_shared_experts * model.d_expert or 1
    fields = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": model.num_experts,
        "moe_intermediate_size": model.d_expert,
        "shared_expert_intermediate_size": shared,
        "intermediate_size": model.d_dense or model.active_width,
        "norm_topk_prob": scores.normalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(model.num_layers) if layer not in model.moe_layers],
        "qkv_bias": False,
        "use_sliding_window": False,
    }

    def layer(moe: MoELayer) -> Iterator[tuple[str, Tensor]]:
        yield "mlp.gate.weight", _logits(moe, scores)
        yield from _by_expert(moe.experts)
        gate_FD, up_FD, down_DF = _shared(moe, shared)
        gate_1D = gate_FD.new_zeros(1, model.d_model) if moe.shared_gate is None else moe.shared_gate.weight
        parts = (gate_FD, up_FD, down_DF if moe.shared_gate is not None else 2 * down_DF)
        yield from _mlp("mlp.shared_expert", parts)
        yield "mlp.shared_expert_gate.weight", gate_1D

    return fields, _tensors(ours, layer)


def _glm4_moe(model: ModelConfig, scores: Scores, ours: Transformer) -> Written:
    if model.moe_every > 1:
        raise ConfigError(
            f"model.moe_every = {model.moe_every}: of sigmoid scores GLM-4-MoE has dense blocks in front alone"
        )
    if model.shared_gate != "none":
        raise ConfigError(
            f"model.shared_gate = {model.shared_gate!r}: of sigmoid scores GLM-4-MoE has ungated ones alone"
        )
    shared = model.num_shared_experts or 1
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": model.num_experts,
        "n_shared_experts": shared,
        "moe_intermediate_size": model.d_expert,
        "intermediate_size": model.d_dense or model.active_width,
        "first_k_dense_replace": model.num_dense_layers,
        "routed_scaling_factor": scores.scale,
        "norm_topk_prob": scores.normalized,
        "n_group": scores.groups,
        "topk_group": scores.groups_kept,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 1.0,
    }

    def layer(moe: MoELayer) -> Iterator[tuple[str, Tensor]]:
        yield "mlp.gate.weight", _logits(moe, scores)
        bias_E = moe.router.get_buffer("bias_E") if scores.biased else torch.zeros(model.num_experts)
        yield "mlp.gate.e_score_correction_bias", bias_E
        yield from _by_expert(moe.experts)
        yield from _mlp("mlp.shared_experts", _shared(moe, shared * model.d_expert))

    return fields, _tensors(ours, layer)


# Parts


def _tensors(ours: Transformer, layer: Callable[[MoELayer], Iterator[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    """Return the tensors of a whole model, whose mixtures are named by ``layer``."""
    found = {
        "model.embed_tokens.weight": ours.embed.weight,
        "model.norm.weight": ours.norm.weight,
    }
    if isinstance(ours.unembed, KeyedLinear):
        found["lm_head.weight"] = ours.unembed.weight
    for number, block in enumerate(ours.blocks):
        named = [*_attention(block)]
        if block.moe is not None:
            named += layer(block.moe)
        elif block.mlp is not None:
            named += _mlp("mlp", _gate_up_down(block.mlp.experts, 0))
        found |= {f"model.layers.{number}.{name}": tensor for name, tensor in named}
    return found


def _attention(block: Block) -> Iterator[tuple[str, Tensor]]:
    attention, norm = block.attention, block.attention_norm
    assert isinstance(attention, Attention) and norm is not None
    queries = attention.out.weight.shape[1]
    keys = (len(attention.qkv.weight) - queries) // 2
    parts = torch.split(attention.qkv.weight, [queries, keys, keys])
    yield from ((f"self_attn.{name}_proj.weight", part) for name, part in zip("qkv", parts, strict=True))
    yield "self_attn.o_proj.weight", attention.out.weight
    yield "input_layernorm.weight", norm.weight
    yield "post_attention_layernorm.weight", block.ffn_norm.weight


def _logits(moe: MoELayer, scores: Scores) -> Tensor:
    return scores.logit_scale * moe.router.score_weights


def _gate_up_down(experts: Experts, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    gate_FD, up_FD = experts.in_EHD[expert].chunk(2)
    return gate_FD, up_FD, experts.out_EDF[expert]


def _mlp(name: str, parts: tuple[Tensor, Tensor, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for part, tensor in zip(("gate", "up", "down"), parts, strict=True):
        yield f"{name}.{part}_proj.weight", tensor


def _by_expert(experts: Experts) -> Iterator[tuple[str, Tensor]]:
    for expert in range(len(experts.in_EHD)):
        yield from _mlp(f"mlp.experts.{expert}", _gate_up_down(experts, expert))


def _shared(moe: MoELayer, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices of the experts that all tokens share; of so many rows of 0 where there are none."""
    if moe.shared is not None:
        return _gate_up_down(moe.shared.experts, 0)
    zeros_FD = moe.experts.in_EHD.new_zeros(width, moe.config.d_model)
    return zeros_FD, zeros_FD, zeros_FD.t()
