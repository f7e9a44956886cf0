"""The booked FLOPs against those that PyTorch counts while the model runs.

A causal token at position p needs p + 1 keys, (S + 1) / 2 on average, and that is what is booked: 4 D FLOPs a key and
layer (2 D for its score, 2 D for its value). The counter sees the matrices without their mask, S keys for every token:
2 D (S - 1) more a token and layer.

Shape suffixes: S sequence length, D model width.
"""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlroute.config import ModelConfig
from rlroute.model import Transformer
from rlroute.model.accounting import costs
from tests.tiny import make_batch, make_model, run_batch, small_config

ROUTERS = [None, "switch", "hash"]
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_experts": 6, "k": 3, "num_shared_experts": 2},
    {"num_layers": 3, "num_dense_layers": 1, "d_model": 16, "num_heads": 4, "activation": "gelu"},
    {"k": 1, "d_expert": 5, "num_shared_experts": 1, "num_dense_layers": 2},
    {"num_heads": 6, "num_kv_heads": 2, "head_width": 4},
    {"tie_embeddings": True},
    {"kv_rank": 5, "head_width": 4, "value_width": 7},
]


@torch.no_grad()
def counted(router: str | None, config: ModelConfig, length: int, vocab_size: int) -> float:
    """Return a forward's FLOPs per token on the reference engine, which multiplies each expert's rows and no others.

    Attention runs as plain products of matrices, since its fused kernel is not counted on the CPU.
    """
    model = make_model(router, config, seq_len=length, vocab_size=vocab_size, backend="reference")
    batch = make_batch(3, length, vocab_size=vocab_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_batch(model, batch)
    return counter.get_total_flops() / batch.tokens_BS.size


def expected(model: Transformer, config: ModelConfig, length: int) -> dict[str, int]:
    """Return the costs of a greedy forward in which every token runs k experts at each site."""
    return costs(model, config, length).per_token([config.k] * len(model.routed))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("fields", SHAPES, ids=str)
@pytest.mark.parametrize(("length", "vocab_size"), [(8, 11), (5, 30)])
def test_booked_flops_are_those_that_run(
    router: str | None, fields: dict[str, Any], length: int, vocab_size: int
) -> None:
    config = small_config(**fields)
    model = make_model(router, config, seq_len=length, vocab_size=vocab_size)
    booked = expected(model, config, length)["flops_per_token"]
    widths = sum(config.latent_widths) if config.kv_rank else 2 * config.attention_width // config.num_heads
    masked = widths * config.num_heads * (length - 1) * config.num_layers
    assert booked + masked == counted(router, config, length, vocab_size)


def test_the_counter_sees_attention_grow_with_the_square_of_the_length() -> None:
    """Else the test above would hold for attention that is left out by both."""
    config = small_config()
    short, long = (counted("hash", config, length, 11) for length in (4, 12))
    assert long - short == 4 * config.d_model * config.num_layers * (12 - 4)


@pytest.mark.parametrize("router", ROUTERS)
def test_active_parameters_are_those_that_a_token_multiplies_or_looks_up(router: str | None) -> None:
    """FLOPs without attention are two for each of them, but for gains and embeddings."""
    config = small_config(num_shared_experts=1)
    model = make_model(router, config)
    booked = expected(model, config, 8)
    matrices = (booked["flops_per_token"] - 2 * config.num_layers * 9 * config.d_model) // 2
    gains = (2 * config.num_layers + 1) * config.d_model
    assert booked["active_parameters"] == matrices + gains + model.embed.weight.numel()
    assert costs(model, config, 8).total_parameters == sum(p.numel() for p in model.parameters())
