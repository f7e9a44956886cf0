"""Blocks of transformers with random weights, and the layers of ours that are read from them, give the same output.

Shape suffixes: B sequences, S sequence length, T = B * S tokens, D model width.
"""

import importlib
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.errors import ConfigError
from rlroute.experiments.checkpoints.blocks import FORMATS, Block, read_block
from tests.conftest import make_context

pytestmark = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")

D, E, K, F = 24, 8, 2, 12
B, S = 3, 16
SIZES: dict[str, Any] = {"hidden_size": D, "num_experts_per_tok": K, "intermediate_size": F}
LOCAL: dict[str, Any] = SIZES | {"num_local_experts": E}
DEEPSEEK = SIZES | {"num_attention_heads": 4, "moe_intermediate_size": F, "n_routed_experts": E, "n_shared_experts": 2}
QWEN = SIZES | {"moe_intermediate_size": F, "num_experts": E}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
FFN = {"hidden_size": D, "ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": K}
DBRX = {"d_model": D, "n_heads": 4}
SWITCH = {"d_model": D, "d_ff": F, "num_experts": E, "expert_capacity": S}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Mixtral": ("mixtral", "MixtralSparseMoeBlock", LOCAL),
    "Qwen2-MoE": ("qwen2_moe", "Qwen2MoeSparseMoeBlock", QWEN | {"shared_expert_intermediate_size": 4 * F}),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", QWEN),
    "Qwen3-MoE, normalised": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", QWEN | {"norm_topk_prob": True}),
    "OLMoE": ("olmoe", "OlmoeSparseMoeBlock", SIZES | {"num_experts": E}),
    "DeepSeek-V2": ("deepseek_v2", "DeepseekV2Moe", DEEPSEEK | GROUPS | {"topk_method": "group_limited_greedy"}),
    "DeepSeek-V2-Lite": ("deepseek_v2", "DeepseekV2Moe", DEEPSEEK | {"topk_method": "greedy"}),
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3MoE", DEEPSEEK | GROUPS),
    "DBRX": ("dbrx", "DbrxFFN", DBRX | {"ffn_config": FFN}),
    "DBRX, not normalised": ("dbrx", "DbrxFFN", DBRX | {"ffn_config": FFN | {"moe_normalize_expert_weights": None}}),
    "GPT-OSS": ("gpt_oss", "GptOssMLP", LOCAL),
    "Switch": ("switch_transformers", "SwitchTransformersSparseMLP", SWITCH),
    "JetMoE": ("jetmoe", "JetMoeMoE", LOCAL),
}


def published(kind: str, **fields: Any) -> Any:
    """Return a configuration of transformers, which is imported where it is needed: collecting tests is cheaper."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **fields)


def build(kind: str, name: str, fields: dict[str, Any]) -> tuple[Any, Any]:
    """Return a configuration of transformers and a block with random weights and biases of the choice."""
    config = published(kind, **fields)
    config._experts_implementation = "eager"
    block = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name)(config).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in block.state_dict().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return config, block


@torch.no_grad()
def outputs(block: Any, ours: Block) -> tuple[Tensor, Tensor]:
    """Return what both give for the same sequences, rows of shape (T, D)."""
    x_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))
    want = block(x_BSD.clone())
    got_TD, _ = ours.layer()(x_BSD.flatten(0, 1), make_context(B * S, S, explore=False))
    return got_TD, (want[0] if isinstance(want, tuple) else want).flatten(0, 1)


def assert_same(got_TD: Tensor, want_TD: Tensor) -> None:
    assert float((got_TD - want_TD).abs().max()) <= 1e-5 * float(want_TD.abs().max())


@pytest.mark.parametrize(("kind", "name", "fields"), CASES.values(), ids=CASES.keys())
def test_a_block_and_the_layer_read_from_it_give_the_same_output(kind: str, name: str, fields: dict[str, Any]) -> None:
    config, block = build(kind, name, fields)
    ours = read_block(kind, config, block.state_dict())
    assert (ours.model.num_experts, ours.model.d_expert, ours.model.d_model) == (E, F, D)
    assert_same(*outputs(block, ours))


def test_every_format_is_held_to_its_block() -> None:
    assert {kind for kind, _, _ in CASES.values()} == set(FORMATS)


def test_the_capacity_of_switch_is_a_factor_here() -> None:
    kind, name, fields = CASES["Switch"]
    config, block = build(kind, name, fields | {"expert_capacity": 3})
    ours = read_block(kind, config, block.state_dict())
    got_TD, want_TD = outputs(block, ours)
    assert float((got_TD - want_TD).abs().max()) > 0.1
    assert_same(
        *outputs(block, replace(ours, model=replace(ours.model, capacity_factor=3 * E / S, capacity_rows="sequence")))
    )


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("Mixtral", {"more.weight": torch.ones(1)}, "'mixtral' has weights that are not known here: more.weight"),
        ("Mixtral", {"experts.down_proj": None}, "no experts.down_proj among the block's weights: "),
        ("Mixtral", {"config": {"hidden_act": "tanh"}}, "activation 'tanh': legal are 'silu', 'swish'"),
        ("DBRX", {"config": {"ffn_config": FFN | {"moe_normalize_expert_weights": 2.0}}}, "= 2.0: legal are None, 1"),
        ("DeepSeek-V2", {"config": {"topk_method": "noaux"}}, "topk_method = 'noaux': legal are 'greedy', "),
        ("DeepSeek-V3", {"shared_experts": 5}, "width 5: must be a multiple of the experts' width 12"),
        ("GPT-OSS", {"config": {"swiglu_limit": 5.0}}, "swiglu_limit = 5.0: legal are 1.702, 7.0"),
    ],
)
def test_what_our_layer_cannot_express_is_refused_by_name(case: str, change: dict[str, Any], message: str) -> None:
    kind, name, fields = CASES[case]
    config, block = build(kind, name, fields)
    config = published(kind, **fields | change.pop("config", {}))
    state = dict(block.state_dict())
    if width := change.pop("shared_experts", 0):
        for part in ("gate", "up", "down"):
            weight = state[f"shared_experts.{part}_proj.weight"]
            state[f"shared_experts.{part}_proj.weight"] = weight[:, :width] if part == "down" else weight[:width]
    state = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    with pytest.raises(ConfigError, match=message):
        read_block(kind, config, state)


def test_a_model_that_nobody_reads_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="blocks of 'llama': legal are dbrx, deepseek_v2, "):
        read_block("llama", None, {})
