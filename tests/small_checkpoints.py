"""Checkpoints of others of every format that ``rlroute import`` reads, of one block each and as small as can be: its
``config.json`` says what is read of it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
D, E, F = 4, 4, 3
HERE = "model.layers.0.mlp"
CHOICE: dict[str, Any] = {"num_experts_per_tok": 2, "hidden_act": "silu"}
SCALED = CHOICE | {"routed_scaling_factor": 2.5, "n_group": 2, "topk_group": 2}
JOINED = {"gate.weight": (E, D), "experts.gate_up_proj": (E, 2 * F, D), "experts.down_proj": (E, D, F)}


def _mlp(name: str, gate: str, up: str, down: str) -> Shapes:
    return {f"{name}.{gate}.weight": (F, D), f"{name}.{up}.weight": (F, D), f"{name}.{down}.weight": (D, F)}


def _shared(name: str) -> Shapes:
    return JOINED | _mlp(name, "gate_proj", "up_proj", "down_proj")


BLOCKS: dict[str, tuple[str, dict[str, Any], Mapping[str, tuple[int, ...]]]] = {
    "dbrx": (
        "transformer.blocks.0.ffn",
        {"ffn_config": {"moe_top_k": 2, "moe_num_experts": E, "ffn_act_fn": {"name": "silu"}}},
        {"router.layer.weight": (E, D)} | {f"experts.mlp.{name}": (E * F, D) for name in ("w1", "v1", "w2")},
    ),
    "deepseek_v2": (
        HERE,
        SCALED | {"topk_method": "group_limited_greedy"},
        _shared("shared_experts"),
    ),
    "deepseek_v3": (
        HERE,
        SCALED | {"norm_topk_prob": True},
        _shared("shared_experts") | {"gate.e_score_correction_bias": (E,)},
    ),
    "gpt_oss": (
        HERE,
        {"num_experts_per_tok": 2, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        {"router.weight": (E, D), "router.bias": (E,)}
        | {"experts.gate_up_proj": (E, D, 2 * F), "experts.gate_up_proj_bias": (E, 2 * F)}
        | {"experts.down_proj": (E, F, D), "experts.down_proj_bias": (E, D)},
    ),
    "jetmoe": (
        HERE,
        {"num_experts_per_tok": 2, "activation_function": "silu"},
        {"router.layer.weight": (E, D), "input_linear.weight": (E, 2 * F, D), "output_linear.weight": (E, D, F)}
        | {"bias": (D,)},
    ),
    "mixtral": (
        "model.layers.0.block_sparse_moe",
        CHOICE,
        {"gate.weight": (E, D)}
        | {name: s for e in range(E) for name, s in _mlp(f"experts.{e}", "w1", "w3", "w2").items()},
    ),
    "olmoe": (HERE, CHOICE | {"norm_topk_prob": False}, JOINED),
    "qwen2_moe": (
        HERE,
        CHOICE | {"norm_topk_prob": True},
        _shared("shared_expert") | {"shared_expert_gate.weight": (1, D)},
    ),
    "qwen3_moe": (HERE, CHOICE | {"norm_topk_prob": True}, JOINED),
    "switch_transformers": (
        "decoder.block.1.layer.2.mlp",
        {"num_experts": E, "dense_act_fn": "relu"},
        {"router.classifier.weight": (E, D)}
        | {f"experts.expert_{e}.wi.weight": (F, D) for e in range(E)}
        | {f"experts.expert_{e}.wo.weight": (D, F) for e in range(E)},
    ),
}
"""By format: where its block is, what its ``config.json`` says, and the shapes of its weights."""


def config_of(kind: str) -> dict[str, Any]:
    """Return what a format's ``config.json`` says."""
    return {"model_type": kind} | BLOCKS[kind][1]


def tensors_of(kind: str) -> dict[str, Tensor]:
    """Return a format's tensors by their full names."""
    place, _, shapes = BLOCKS[kind]
    return {f"{place}.{name}": torch.ones(shape) for name, shape in shapes.items()}


def lay_checkpoint(folder: Path, config: object, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint into a folder and return that; a configuration may be its text."""
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tensors:
        save_file(tensors, folder / "model.safetensors")
    return folder
