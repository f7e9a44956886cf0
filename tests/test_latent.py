"""Latent attention: DeepSeek-V3's own with the same weights, what is refused, and what it is for.

Shape suffixes: B sequences, S sequence length, D model width.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.errors import ConfigError
from rlroute.model.latent import LatentAttention
from rlroute.model.transformer import within_documents
from tests.conftest import draw
from tests.tiny import small_config

WIDTHS = {"d_model": 24, "num_heads": 3, "head_width": 6, "kv_rank": 10, "rope_width": 4}
NAMES = {"q_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"}
LATENT = NAMES | {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "out": "o_proj"}
DIRECT = NAMES | {"q_up": "q_proj", "out": "o_proj"}


def theirs(fields: dict[str, Any], x_BSD: Tensor, state: dict[str, Tensor], mask_BSS: Tensor) -> Tensor:
    """Return what DeepSeek-V3's attention of transformers gives with our weights."""
    pytest.importorskip("transformers")
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

    config = small_config(**fields)
    plain, turning, value = config.latent_widths
    same = DeepseekV3Config(
        hidden_size=config.d_model,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        q_lora_rank=config.q_rank or None,
        kv_lora_rank=config.kv_rank,
        qk_nope_head_dim=plain,
        qk_rope_head_dim=turning,
        v_head_dim=value,
        rope_interleave=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        attn_implementation="eager",
    )
    attention = module.DeepseekV3Attention(same, 0)
    attention.load_state_dict(
        {f"{(LATENT if config.q_rank else DIRECT)[n.rpartition('.')[0]]}.weight": p for n, p in state.items()}
    )
    rotary = module.DeepseekV3RotaryEmbedding(same)
    places_BS = torch.arange(x_BSD.shape[1])[None].expand(len(x_BSD), -1)
    hidden_BSS = torch.zeros(mask_BSS.shape).masked_fill(~mask_BSS, -torch.inf)
    out_BSD: Tensor = attention(x_BSD, rotary(x_BSD, places_BS), hidden_BSS[:, None])[0]
    return out_BSD


@pytest.mark.parametrize("fields", [{}, {"q_rank": 14}, {"q_rank": 14, "value_width": 9}], ids=str)
@torch.no_grad()
def test_it_is_deepseeks_with_the_same_weights(fields: dict[str, Any]) -> None:
    config = small_config(**WIDTHS | fields)
    ours, x_BSD = LatentAttention(config, 16, 0, 0), draw(2, 11, 24).float()
    for norm in (ours.q_norm, ours.kv_norm):
        if norm is not None:
            norm.weight.copy_(1 + 0.3 * draw(len(norm.weight)))
            norm.eps = 1e-6
    tokens_BS = torch.tensor([[0] * 11, [0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0]])
    mask_BSS = within_documents(tokens_BS, 1)
    want_BSD = theirs(WIDTHS | fields, x_BSD, ours.state_dict(), mask_BSS)
    found_BSD = ours(x_BSD, mask_BSS)
    assert float((found_BSD - want_BSD).abs().max()) <= 1e-5 * float(want_BSD.abs().max())
    torch.testing.assert_close(ours(x_BSD)[0], found_BSD[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"q_rank": 4}, "model.q_rank = 4 does nothing without model.kv_rank: legal is 0"),
        ({"value_width": 4}, "model.value_width = 4 does nothing without model.kv_rank"),
        ({"kv_rank": 4, "rope_width": 3}, "model.rope_width = 3: must be even"),
        ({"kv_rank": 4, "num_kv_heads": 1}, "model.num_kv_heads = 1 with model.kv_rank = 4: legal is 0"),
        ({"kv_rank": 4, "attention_experts": 4}, "model.kv_rank = 4 with model.attention_experts = 4: legal is 0"),
    ],
)
def test_what_does_not_combine_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small_config(**fields).check()
