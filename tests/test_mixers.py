"""Mixers with a state: their scan against the recurrence, published layers of transformers with the same weights, what
they cost, and what is refused.

Shape suffixes: those of :mod:`rlroute.model.scan`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rlroute.config import ModelConfig
from rlroute.errors import ConfigError
from rlroute.model.accounting import costs
from rlroute.model.attention import Mixer
from rlroute.model.delta import GatedDelta
from rlroute.model.scan import CHUNK, everything, scan
from rlroute.model.transformer import make_mixer, within_documents
from tests.conftest import draw
from tests.tiny import make_batch, make_model, run_batch, shake, small_config

TOKENS_BS = torch.tensor([[0] * 19, [0] * 6 + [1, 1] + [0] * 9 + [1, 0]])
"""Two sequences, the second of four documents."""
STATE = {"d_model": 12, "state_heads": 4, "state_key_heads": 2, "state_key_width": 3, "state_value_width": 5}
EPS = 1e-6
"""Of norms."""
KINDS = ("gated_delta", "kimi_delta", "mamba2")

# The scan


def recurrence(
    q_BNSK: Tensor, k_BNSK: Tensor, v_BNSV: Tensor, log_decay_BNSG: Tensor, beta_BNS: Tensor | None, mask_BSS: Tensor
) -> Tensor:
    """One position after the other, by the definition."""
    state_BNKV, read = k_BNSK.new_zeros(*k_BNSK.shape[:2], k_BNSK.shape[-1], v_BNSV.shape[-1]), []
    for here in range(q_BNSK.shape[2]):
        goes_on_B = mask_BSS[:, here, max(here - 1, 0)].double()
        state_BNKV = state_BNKV * goes_on_B[:, None, None, None] * log_decay_BNSG[:, :, here, :, None].exp()
        taken_BNV = v_BNSV[:, :, here]
        if beta_BNS is not None:
            held_BNV = (k_BNSK[:, :, here, :, None] * state_BNKV).sum(2)
            taken_BNV = beta_BNS[:, :, here, None] * (taken_BNV - held_BNV)
        state_BNKV = state_BNKV + k_BNSK[:, :, here, :, None] * taken_BNV[:, :, None]
        read.append((q_BNSK[:, :, here, :, None] * state_BNKV).sum(2))
    return torch.stack(read, 2)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("chunk", [1, 4, 19, 32])
def test_chunks_read_what_the_recurrence_reads_with_its_gradients(delta: bool, channels: int, chunk: int) -> None:
    mask_BSS = within_documents(TOKENS_BS, 1)
    q_BNSK, k_BNSK, v_BNSV, log_decay_BNSG, beta_BNS = inputs = [
        draw(2, 2, 19, 3),
        nn.functional.normalize(draw(2, 2, 19, 3), dim=-1),
        draw(2, 2, 19, 4),
        -3 * draw(2, 2, 19, channels).abs(),
        draw(2, 2, 19).sigmoid(),
    ]
    leaves = [tensor.requires_grad_() for tensor in inputs[: 4 + delta]]
    share_BNS = beta_BNS if delta else None
    found_BNSV = scan(q_BNSK, k_BNSK, v_BNSV, log_decay_BNSG, share_BNS, mask_BSS, chunk)
    want_BNSV = recurrence(q_BNSK, k_BNSK, v_BNSV, log_decay_BNSG, share_BNS, mask_BSS)
    torch.testing.assert_close(found_BNSV, want_BNSV, rtol=1e-9, atol=1e-10)
    direction_BNSV = draw(*found_BNSV.shape)
    grads = [torch.autograd.grad((y * direction_BNSV).sum(), leaves) for y in (found_BNSV, want_BNSV)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


# Layers of transformers with the same weights


def _qwen3_next(config: ModelConfig, ours: GatedDelta) -> tuple[nn.Module, dict[str, Tensor]]:
    """Their rows come by heads of keys: query, key, values and gates of each; decays behind shares."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    heads, groups, key, value = config.state_shape
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=config.d_model,
            linear_num_value_heads=heads,
            linear_num_key_heads=groups,
            linear_key_head_dim=key,
            linear_value_head_dim=value,
            rms_norm_eps=EPS,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        0,
    )
    q, k, v = torch.split(ours.qkv.weight, [groups * key, groups * key, heads * value])
    by_group = [part.view(groups, -1, config.d_model) for part in (q, k, v, ours.gate.weight)]
    shares = [part.view(groups, -1, config.d_model) for part in (ours.beta.weight, ours.step.weight)]
    return theirs, {
        "in_proj_qkvz.weight": torch.cat(by_group, 1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat(shares, 1).flatten(0, 1),
        "conv1d.weight": ours.convolution.weight_IW[:, None],
        "dt_bias": ours.decay.bias_I,
        "A_log": ours.decay.log_rate_N,
        "norm.weight": ours.norm.weight,
        "out_proj.weight": ours.out.weight,
    }


def _kimi_linear(config: ModelConfig, ours: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Their gate goes through a narrow projection: ours is the product of both."""
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    heads, _, key, _ = config.state_shape
    theirs = KimiLinearDeltaAttention(
        KimiLinearConfig(
            hidden_size=config.d_model,
            linear_head_dim=key,
            linear_num_heads=heads,
            rms_norm_eps=EPS,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        0,
    )
    up, down = draw(heads * key, key).float(), draw(key, config.d_model).float()
    ours.gate.weight.copy_(up @ down)
    parts = torch.split(ours.qkv.weight, heads * key)
    return theirs, {
        **{f"{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)},
        "conv1d.weight": ours.convolution.weight_IW[:, None],
        "forget_gate.f_a_proj.weight": ours.step_down.weight,
        "forget_gate.f_b_proj.weight": ours.step_up.weight,
        "forget_gate.dt_bias": ours.decay.bias_I,
        "forget_gate.A_log": ours.decay.log_rate_N.view(1, 1, -1, 1),
        "b_proj.weight": ours.beta.weight,
        "g_a_proj.weight": down,
        "g_b_proj.weight": up,
        "o_norm.weight": ours.norm.weight,
        "o_proj.weight": ours.out.weight,
    }


def _nemotron_h(config: ModelConfig, ours: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    heads, groups, key, value = config.state_shape
    theirs = NemotronHMamba2Mixer(
        NemotronHConfig(
            hidden_size=config.d_model,
            mamba_num_heads=heads,
            mamba_head_dim=value,
            n_groups=groups,
            ssm_state_size=key,
            chunk_size=8,
            layer_norm_epsilon=EPS,
            time_step_min=0.0,
            layers_block_type=["mamba"],
        ),
        0,
    )
    return theirs, {
        "in_proj.weight": torch.cat([ours.gate.weight, ours.vkq.weight, ours.step.weight]),
        "conv1d.weight": ours.convolution.weight_IW[:, None],
        "conv1d.bias": ours.convolution.bias_I,
        "dt_bias": ours.decay.bias_I,
        "A_log": ours.decay.log_rate_N,
        "D": ours.past_N,
        "norm.weight": ours.gain_I,
        "out_proj.weight": ours.out.weight,
    }


PUBLISHED: dict[str, tuple[str, dict[str, Any], Callable[..., Any]]] = {
    "Qwen3-Next": ("gated_delta", {}, _qwen3_next),
    "Kimi Linear": ("kimi_delta", {"state_key_heads": 0, "state_value_width": 0}, _kimi_linear),
    "Nemotron-H": ("mamba2", {}, _nemotron_h),
}


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_it_is_the_published_layer_with_the_same_weights(name: str) -> None:
    pytest.importorskip("transformers")
    kind, fields, build = PUBLISHED[name]
    config = small_config(**STATE | fields, mixers=kind)
    ours: Any = make_mixer(kind, config, 64, 0, 0)
    ours.norm.eps = EPS
    for number, parameter in enumerate(ours.parameters()):
        if parameter.dim() == 1:
            parameter.add_(0.3 * draw(len(parameter), seed=number))
    theirs, weights = build(config, ours)
    loaded = theirs.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    x_BSD = draw(2, CHUNK + 9, config.d_model).float()
    want_BSD, found_BSD = theirs(x_BSD), ours(x_BSD)
    assert float((found_BSD - want_BSD).abs().max()) <= 1e-5 * float(want_BSD.abs().max())


# In a model


@pytest.mark.parametrize("mixers", [*KINDS, "gated_delta,mamba2+attention"])
@pytest.mark.parametrize("length", [9, CHUNK + 5])
def test_booked_flops_are_those_that_run(mixers: str, length: int) -> None:
    """Convolutions are booked as products, and run as sums; a triangular system has half a product's FLOPs."""
    config = small_config(**STATE | {"d_model": 16}, mixers=mixers)
    model, batch = make_model("hash", config, seq_len=length, backend="reference"), make_batch(3, length)

    def solved(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
        return a[0] * a[1] * a[2] * a[2] * b[3]

    system = {torch.ops.aten.linalg_solve_triangular: solved}
    with FlopCounterMode(display=False, custom_mapping=system) as counter, torch.no_grad(), _plain_attention():
        run_batch(model, batch)
    convolved = 2 * sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight_IW"))
    attends = sum("attention" in config.mixers_at(layer) for layer in range(config.num_layers))
    masked = 2 * config.d_model * (length - 1) * attends
    booked = costs(model, config, length).per_token([config.k] * len(model.routed))["flops_per_token"]
    assert booked - convolved + masked == pytest.approx(counter.get_total_flops() / batch.tokens_BS.size, abs=2)


def _plain_attention() -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_sees_no_later_position_and_no_other_document(kind: str) -> None:
    """Decays from before a document cancel out, to rounding."""
    config = small_config(**STATE, mixers=kind)
    mixer = make_mixer(kind, config, 19, 0, 0).double()
    x_BSD, mask_BSS = draw(2, 19, config.d_model).requires_grad_(), within_documents(TOKENS_BS, 1)
    y_BSD = mixer(x_BSD, mask_BSS)
    for here in (0, 6, 7, 12, 18):
        (grad_BSD,) = torch.autograd.grad(y_BSD[:, here].square().sum(), x_BSD, retain_graph=True)
        assert torch.equal(grad_BSD.abs().sum(2) > 1e-12, mask_BSS[:, here])
    torch.testing.assert_close(mixer(x_BSD), mixer(x_BSD, everything(x_BSD)))


def test_blocks_have_mixers_in_turn() -> None:
    config = small_config(num_layers=5, mixers="mamba2,kimi_delta+attention")
    blocks = make_model("switch", config).blocks
    found = [[type(part).__name__ for part in block.parts if isinstance(part, Mixer)] for block in blocks]
    assert found == 2 * [["Mamba2"], ["KimiDelta", "Attention"]] + [["Mamba2"]]


def test_a_gate_weighs_what_heads_give() -> None:
    """Zero weights weigh by a half."""
    for fields in ({}, {"kv_rank": 4}):
        plain, gated = (
            shake(make_model(None, small_config(**fields, num_layers=1, attention_gate=gate)))
            for gate in ("none", "sigmoid")
        )
        attention: Any = gated.blocks[0].attention
        attention.load_state_dict(plain.blocks[0].attention.state_dict(), strict=False)  # type: ignore[union-attr]
        with torch.no_grad():
            attention.gate.weight.zero_()
        x_BSD = draw(2, 5, 8)
        torch.testing.assert_close(attention(x_BSD), plain.blocks[0].attention(x_BSD) / 2)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixers": "mamba"}, "model.mixers = 'mamba': 'mamba' is none, legal are attention, gated_delta"),
        ({"mixers": "attention+mamba2"}, "'attention.mamba2' is none"),
        ({"mixers": "mamba2,"}, "'' is none"),
        ({"state_heads": 4}, "model.state_heads = 4 does nothing without model.mixers: legal is 0"),
        ({"mixers": "mamba2", "state_key_heads": 3}, "model.state_key_heads = 3: must divide model.state_heads = 2"),
        ({"mixers": "mamba2", "attention_experts": 4}, "model.mixers = 'mamba2' with model.attention_experts = 4"),
        ({"mixers": "mamba2", "kv_rank": 4}, "model.kv_rank = 4 does nothing with model.mixers = 'mamba2': legal is 0"),
        ({"attention_gate": "sigmoid", "attention_experts": 4}, "model.attention_gate = 'sigmoid' with model.att"),
    ],
)
def test_what_does_not_combine_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small_config(**fields).check()
