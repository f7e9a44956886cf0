"""Published mixtures of experts: the router and the shape of each, what its authors print of it, and a tiny form.

What a preset says is the model's and the router's; data, batch and learning rate are ours. Figures are in billions of
parameters, to as many digits as their authors print. Ours are within one unit of the last digit of them, or within
1 %; ``differs`` says what our transformer cannot express, and what stands in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlroute.config import ModelConfig

NOT_PUBLISHED = "not published"
_SIGMOID = "topk:score=sigmoid,bias_rate=0.001"
_FOURTH = "gated_delta,gated_delta,gated_delta,attention"
_BEFORE_ATTENTION = 5 * "mamba2,mamba2,mamba2+attention," + 3 * "mamba2," + "mamba2+attention" + 4 * ",mamba2"
_LATENTS = {"kv_rank": 512, "q_rank": 1536, "rope_width": 64}
"""Of attention, as DeepSeek has them."""
_ENCODER = "an encoder, and a decoder that attends to it: one decoder as deep stands in"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model.

    Attributes:
        entry: its router.
        model: its transformer, as far as ours can express it.
        vocab_size: V.
        total, active: parameters, and those of a token, as printed; "" where they are not.
        source: where they and the shape are from.
        balance: what balances its loads, where the entry does not say so.
        differs: what is not the same here, and so why figures differ.
        rounded_to: what ``total`` is rounded to, where its digits do not tell.
        beside: billions of parameters that ``total`` has in it of what is no transformer of tokens (an encoder of
            images), by its published shapes.
        input_counts: whether the printed ``active`` has the embedding of the input in it, be it that of the logits too.
    """

    entry: str
    model: ModelConfig
    vocab_size: int
    total: str
    active: str
    source: str
    balance: str = ""
    differs: str = ""
    rounded_to: float | None = None
    beside: float = 0.0
    input_counts: bool = True


def _model(
    layers: int, width: int, heads: int, kv_heads: int = 0, head_width: int = 0, /, **fields: object
) -> ModelConfig:
    return replace(
        ModelConfig(),
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=head_width,
        **fields,  # type: ignore[arg-type]
    )


def _experts(experts: int, k: int, width: int, shared: int = 0, dense: int = 0) -> dict[str, int]:
    return {
        "num_experts": experts,
        "k": k,
        "d_expert": width,
        "num_shared_experts": shared,
        "num_dense_layers": dense,
    }


def _every(layers: int, dense: int) -> dict[str, int]:
    return {"moe_every": layers, "d_dense": dense}


def _states(mixers: str, heads: int, key_heads: int, value: int = 128, gate: str = "sigmoid") -> dict[str, object]:
    """Return mixers with states of 128 channels of keys, and the gate of attention beside them."""
    shape = {"state_heads": heads, "state_key_heads": key_heads, "state_key_width": 128, "state_value_width": value}
    return {"mixers": mixers, "attention_gate": gate, **shape}


CATALOGUE: dict[str, Published] = {
    "gshard": Published(
        entry="gshard:balance_weight=0.01",
        model=_model(
            36, 1024, 16, 0, 128, activation="relu", capacity_factor=1.0, **_every(2, 8192), **_experts(2048, 2, 8192)
        ),
        vocab_size=64_000,
        total="600",
        active="",
        source="MoE(2048E, 36L), arXiv 2006.16668",
        balance="its weight not published",
        differs=_ENCODER,
        rounded_to=100,
    ),
    "switch": Published(
        entry="switch:balance_weight=0.01,jitter=0.01",
        model=_model(
            24, 768, 12, activation="geglu", capacity_factor=1.25, **_every(2, 2048), **_experts(128, 1, 2048)
        ),
        vocab_size=32_128,
        total="7",
        active="0.2",
        source="Switch-Base, arXiv 2101.03961, table 9",
        differs=_ENCODER,
    ),
    "st-moe": Published(
        entry="gshard:balance_weight=0.01,z_weight=0.001",
        model=_model(
            54,
            5120,
            64,
            0,
            128,
            activation="geglu",
            capacity_factor=1.25,
            **_every(4, 20480),
            **_experts(64, 2, 20480, dense=3),
        ),
        vocab_size=250_112,
        total="269",
        active="32",
        source="ST-MoE-32B, arXiv 2202.08906",
        differs=f"{_ENCODER}, of which 12 layers have experts",
    ),
    "mixtral": Published(
        entry="topk",
        model=_model(32, 4096, 32, 8, **_experts(8, 2, 14336)),
        vocab_size=32_000,
        total="46.7",
        active="12.9",
        source="Mixtral 8x7B, arXiv 2401.04088",
        balance=NOT_PUBLISHED,
    ),
    "grok-1": Published(
        entry="topk:normalize=false",
        model=_model(64, 6144, 48, 8, 128, activation="geglu", tie_embeddings=True, **_experts(8, 2, 32768)),
        vocab_size=131_072,
        total="314",
        active="",
        source="Grok-1, model card: 314B, about a quarter of it active",
        balance=NOT_PUBLISHED,
    ),
    "dbrx": Published(
        entry="topk:balance_weight=0.05",
        model=_model(40, 6144, 48, 8, **_experts(16, 4, 10752)),
        vocab_size=100_352,
        total="132",
        active="36",
        source="DBRX, model card",
    ),
    "qwen1.5-moe": Published(
        entry="topk:normalize=false",
        model=_model(24, 2048, 16, shared_gate="sigmoid", **_experts(60, 4, 1408, shared=4)),
        vocab_size=151_936,
        total="14.3",
        active="2.7",
        source="Qwen1.5-MoE-A2.7B, model card",
        balance="f.P, weight not published",
    ),
    "qwen3-moe": Published(
        entry="topk",
        model=_model(48, 2048, 32, 4, 128, **_experts(128, 8, 768)),
        vocab_size=151_936,
        total="30.5",
        active="3.3",
        source="Qwen3-30B-A3B, arXiv 2505.09388",
        balance="f.P over the global batch, weight not published",
    ),
    "qwen3-next": Published(
        entry="topk",
        model=_model(
            48, 2048, 16, 2, 256, shared_gate="sigmoid", **_states(_FOURTH, 32, 16), **_experts(512, 10, 512, shared=1)
        ),
        vocab_size=151_936,
        total="80",
        active="3",
        source="Qwen3-Next-80B-A3B, model card",
        balance=NOT_PUBLISHED,
        differs="queries and keys are normed and a quarter of their channels turns: none are, and all do",
    ),
    "deepseek-moe": Published(
        entry="topk:normalize=false,balance_weight=0.001",
        model=_model(28, 2048, 16, d_dense=10944, **_experts(64, 6, 1408, shared=2, dense=1)),
        vocab_size=102_400,
        total="16.4",
        active="2.8",
        source="DeepSeekMoE 16B, arXiv 2401.06066",
    ),
    "deepseek-v2": Published(
        entry=(
            "topk:normalize=false,route_scale=16,groups=8,groups_kept=3,group_score=max,"
            "balance_weight=0.003,device_balance_weight=0.05,communication_balance_weight=0.02"
        ),
        model=_model(60, 5120, 128, 0, 128, devices=8, **_LATENTS, **_experts(160, 6, 1536, shared=2, dense=1)),
        vocab_size=102_400,
        total="236",
        active="21",
        source="DeepSeek-V2, arXiv 2405.04434",
    ),
    "deepseek-v3": Published(
        entry=(f"{_SIGMOID},bias_until=0.966,sequence_balance_weight=0.0001,route_scale=2.5,groups=8,groups_kept=4"),
        model=_model(61, 7168, 128, 0, 128, **_LATENTS, **_experts(256, 8, 2048, shared=1, dense=3)),
        vocab_size=129_280,
        total="671",
        active="37",
        source="DeepSeek-V3, arXiv 2412.19437",
    ),
    "deepseek-v4": Published(
        entry="topk:score=sqrt_softplus,bias_rate=0.001,route_scale=1.5+hash_gated:route_scale=1.5@0-2",
        model=_model(43, 4096, 64, 1, 192, **_experts(256, 6, 2048, shared=1)),
        vocab_size=129_280,
        total="284",
        active="13",
        source="DeepSeek-V4-Flash, its public code and model card",
        balance="its rate not published",
        differs=(
            "compressed and sparse attention with projections of low rank, four residual streams: plain attention of "
            "about as many parameters, and one stream, stand in"
        ),
    ),
    "kimi-k2": Published(
        entry=f"{_SIGMOID},route_scale=2.827",
        model=_model(61, 7168, 64, 0, 128, **_LATENTS, **_experts(384, 8, 2048, shared=1, dense=1)),
        vocab_size=163_840,
        total="1000",
        active="32",
        source="Kimi K2, arXiv 2507.20534: 1 trillion, 32 billion",
        balance="its rate not published",
        differs="a table there has a total of 1.04 T, which is more than the published shapes make",
        rounded_to=100,
    ),
    "kimi-k3": Published(
        entry="quantile:estimate=histogram",
        model=_model(
            *(93, 7168, 96, 0, 128),
            d_latent=3584,
            d_dense=33792,
            **_LATENTS,
            **_states(23 * f"{3 * 'kimi_delta,'}attention," + "attention", 96, 96),
            **_experts(896, 16, 3072, shared=2, dense=1),
        ),
        vocab_size=163_840,
        total="2780",
        active="104",
        source="Kimi K3, its configuration and technical report",
        balance="a bias by quantiles of each step",
        input_counts=False,
        differs="no positions, an activation of its own, layers that attend to earlier ones: none of them is here",
    ),
    "olmoe": Published(
        entry="topk:normalize=false,balance_weight=0.01,z_weight=0.001",
        model=_model(16, 2048, 16, **_experts(64, 8, 1024)),
        vocab_size=50_304,
        total="6.92",
        active="1.28",
        source="OLMoE-1B-7B, arXiv 2409.02060",
    ),
    "gpt-oss": Published(
        entry="topk:order=choose_first,linear_bias=true",
        model=_model(36, 2880, 64, 8, 64, activation="swiglu_clamped", expert_bias=True, **_experts(128, 4, 2880)),
        vocab_size=201_088,
        total="116.8",
        active="5.13",
        source="gpt-oss-120b, arXiv 2508.10925",
        balance=NOT_PUBLISHED,
        input_counts=False,
    ),
    "llama-4": Published(
        entry="topk:score=sigmoid,order=choose_first,normalize=false",
        model=_model(48, 5120, 40, 8, 128, gate_at="input", **_experts(16, 1, 8192, shared=1)),
        vocab_size=202_048,
        total="109",
        active="17",
        source="Llama 4 Scout, model card",
        balance=NOT_PUBLISHED,
        differs="the printed total has an encoder of images in it, of 0.87 B",
        beside=0.87,
    ),
    "jetmoe": Published(
        entry="topk:order=choose_first,balance_weight=0.01,z_weight=0.001",
        model=_model(24, 2048, 32, 0, 128, attention_experts=8, tie_embeddings=True, **_experts(8, 2, 5632)),
        vocab_size=32_000,
        total="8.52",
        active="2.2",
        source="JetMoE-8B, arXiv 2404.07413",
        input_counts=False,
    ),
    "phi-3.5-moe": Published(
        entry="sparse_mixer:jitter=0.01",
        model=_model(32, 4096, 32, 8, **_experts(16, 2, 6400)),
        vocab_size=32_064,
        total="41.9",
        active="6.6",
        source="Phi-3.5-MoE, arXiv 2404.14219, and GRIN, arXiv 2409.12136",
    ),
    "longcat-flash": Published(
        entry="longcat",
        model=_model(
            56,
            6144,
            64,
            0,
            128,
            copy_experts=256,
            **_LATENTS,
            **_every(2, 12288),
            **_experts(512, 12, 2048, shared=6),
        ),
        vocab_size=131_072,
        total="560",
        active="27",
        source="LongCat-Flash, arXiv 2509.01322",
        balance="a bias that holds 8 of 12 experts real, its rate not published",
        differs=(
            "28 layers of two attentions and two MLPs, with experts from the first attention to the layer's end: "
            "56 blocks, every second with experts beside its MLP, stand in"
        ),
    ),
    "ernie-4.5": Published(
        entry="topk:bias_rate=0.001",
        model=_model(28, 2560, 20, 4, tie_embeddings=True, **_experts(64, 6, 1536, shared=2, dense=1)),
        vocab_size=103_424,
        total="21",
        active="3",
        source="ERNIE-4.5-21B-A3B, model card",
        balance="its rate not published",
    ),
    "nemotron-h": Published(
        entry=f"{_SIGMOID},route_scale=2.5",
        model=_model(
            *(23, 2688, 32, 2, 128),
            activation="relu_squared",
            **_states(_BEFORE_ATTENTION, 64, 8, 64, gate="none"),
            **_experts(128, 6, 1856, shared=2),
        ),
        vocab_size=131_072,
        total="31.6",
        active="3.2",
        source="Nemotron 3 Nano 30B-A3B, technical report",
        differs="no positions: rotary ones in attention",
        input_counts=False,
    ),
    "inkling": Published(
        entry="joint_gates:route_scale=8",
        model=_model(66, 6144, 64, 16, 128, **_experts(256, 6, 3072, shared=2)),
        vocab_size=201_024,
        total="975",
        active="41",
        source="Inkling, its public code and model card",
        balance="its rate not published",
        differs=(
            "short convolutions, relative positions, encoders of images and sound: none of them is here; 8 heads of "
            "keys and values in 11 layers: 16 in all"
        ),
    ),
}
"""By name."""


def tiny(published: Published) -> ModelConfig:
    """Return a model of the same make that trains on a CPU in minutes: 16 experts at most, of which at most 4 run; of
    width 64, with experts of which those that a router chooses are together 128 wide.

    It has two layers, or as many more as it takes for some to have experts, for all of an entry's routers to decide, or
    for every kind of block to be there.
    """
    model, dense = published.model, min(published.model.num_dense_layers, 1)
    k, turns = min(model.k, 4), list(dict.fromkeys(model.mixers.split(",")))
    return replace(
        model,
        num_layers=max(4 if "@" in published.entry else 2, dense + model.moe_every, len(turns)),
        d_model=64,
        num_heads=4,
        num_kv_heads=2 if model.num_kv_heads else 0,
        head_width=0,
        num_experts=min(model.num_experts, 16),
        k=k,
        d_expert=128 // k,
        num_dense_layers=dense,
        d_dense=None,
        d_latent=32 if model.d_latent else None,
        copy_experts=min(model.copy_experts, 8),
        kv_rank=32 if model.kv_rank else 0,
        q_rank=48 if model.q_rank else 0,
        rope_width=0,
        mixers=",".join(turns),
        state_heads=4 if model.state_heads else 0,
        state_key_heads=2 if model.state_key_heads < model.state_heads else 0,
        state_key_width=0,
        state_value_width=0,
    )
