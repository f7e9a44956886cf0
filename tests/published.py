"""The router classes of transformers, and the entries of ours that :mod:`tests.parity` holds equal to them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

D, E, K, V = 32, 16, 4, 11
ZERO = 4
"""Of LongCat's experts, those that cost nothing."""
SETTINGS: dict[str, Any] = {
    "hidden_size": D,
    "vocab_size": V,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), 2.5),
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "rms_norm_eps": 1e-6,
    "moe_norm_min": 1e-12,
    "output_multiplier": 1.5,
    "moe_router_logit_softcapping": 3.0,
    "router_bias": False,
    "router_dtype": "float32",
    "router_jitter_noise": 0.0,
    "router_ignore_padding_tokens": False,
    "expert_capacity": 10_000,
}
"""What the classes read of their configurations, whatever the model's other fields; a row may say otherwise."""


class Row(NamedTuple):
    """A published class under some of its settings, and the entry of ours that equals it."""

    entry: str
    published: str
    settings: dict[str, Any]
    k: int

    @property
    def said(self) -> str:
        """The settings, and k where it is another one, in words."""
        k = [] if self.k == K else [f"k={self.k}"]
        return ", ".join(k + [f"{name}={value}" for name, value in self.settings.items()])


def _rows(entry: str, *published: str, k: int = K, **settings: Any) -> list[Row]:
    return [Row(entry, name, settings, k) for name in published]


_GROUPED = "topk:score=sigmoid,bias_rate=0.001,groups=4,groups_kept=2,route_scale=2.5"
_BIASED = "topk:score=sigmoid,bias_rate=0.001"
_FLAGGED = (
    "flex_olmo.FlexOlmoTopKRouter",
    "lara_mini.LaraMiniTopKRouter",
    "mellum.MellumTopKRouter",
    "olmoe.OlmoeTopKRouter",
    "qwen2_moe.Qwen2MoeTopKRouter",
    "qwen3_moe.Qwen3MoeTopKRouter",
    "qwen3_next.Qwen3NextTopKRouter",
    "qwen3_omni_moe.Qwen3OmniMoeTalkerTextTopKRouter",
    "qwen3_omni_moe.Qwen3OmniMoeThinkerTextTopKRouter",
    "qwen4_exp.Qwen4ExpTextTopKRouter",
)
_LIKE_DEEPSEEK_V3 = (
    "axk1.AXK1TopkRouter",
    "bailing_hybrid.BailingHybridTopkRouter",
    "deepseek_v3.DeepseekV3TopkRouter",
    "deepseek_v32.DeepseekV32TopkRouter",
    "dots1.Dots1TopkRouter",
    "dots3_note.Dots3NoteTextTopkRouter",
    "exaone_moe.ExaoneMoeTopkRouter",
    "glm4_moe.Glm4MoeTopkRouter",
    "glm4_moe_lite.Glm4MoeLiteTopkRouter",
    "glm4v_moe.Glm4vMoeTextTopkRouter",
    "glm5_next.Glm5NextTextTopkRouter",
    "glm_moe_dsa.GlmMoeDsaTopkRouter",
    "hy_v4.HYV4TopkRouter",
    "hy_v4_vl.HYV4VLTopkRouter",
    "kimi_linear.KimiLinearTopkRouter",
    "mimo_v2_flash.MiMoV2FlashTopkRouter",
    "nemotron_h.NemotronHTopkRouter",
    "solar_open.SolarOpenTopkRouter",
)
_LIKE_DEEPSEEK_V2 = (
    "deepseek_ocr2.DeepseekOcr2TextTopkRouter",
    "deepseek_v2.DeepseekV2TopkRouter",
    "unlimited_ocr.UnlimitedOcrTextTopkRouter",
)
ROWS: list[Row] = [
    # Softmax over all experts, then the best.
    *_rows(
        "topk",
        "hunyuan_v1_moe.HunYuanMoEV1Gate",
        "minimax.MiniMaxTopKRouter",
        "mixtral.MixtralTopKRouter",
        "qwen3_5_moe.Qwen3_5MoeTopKRouter",
        "qwen3_omni_moe.Qwen3OmniMoeTextTopKRouter",
        "qwen3_vl_moe.Qwen3VLMoeTextTopKRouter",
        *_FLAGGED,
    ),
    *_rows("topk:normalize=false", *_FLAGGED, norm_topk_prob=False),
    *_rows("topk:normalize=false", "jamba.JambaTopKRouter"),
    *_rows("topk", "dbrx.DbrxFFN", moe_normalize_expert_weights=1, moe_jitter_eps=None),
    *_rows("topk:normalize=false", "dbrx.DbrxFFN", moe_normalize_expert_weights=None, moe_jitter_eps=None),
    *_rows(
        "topk",
        "nllb_moe.NllbMoeTop2Router",
        k=2,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        batch_prioritized_routing=False,
        moe_eval_capacity_token_fraction=1.0,
    ),
    *_rows("topk", "switch_transformers.SwitchTransformersTop1Router", k=1),
    *_rows("switch", "switch_transformers.SwitchTransformersTop1Router", k=1),
    *_rows(
        "topk:norm_input=true,expert_scales=true",
        "diffusion_gemma.DiffusionGemmaTextRouter",
        "gemma4.Gemma4TextRouter",
    ),
    # The best logits, then a softmax over them.
    *_rows(
        "topk:order=choose_first",
        "aria.AriaTextTopKRouter",
        "granitemoe.GraniteMoeTopKRouter",
        "granitemoe_swa.GraniteMoeSWATopKRouter",
        "granitemoehybrid.GraniteMoeHybridTopKRouter",
        "granitemoeshared.GraniteMoeSharedTopKRouter",
        "jetmoe.JetMoeTopKGating",
    ),
    *_rows("topk:order=choose_first", "cohere2_moe.Cohere2MoeTopKRouter", expert_selection_fn="softmax"),
    *_rows("topk:order=choose_first,linear_bias=true", "gpt_oss.GptOssTopKRouter"),
    *_rows(
        f"topk:order=choose_first,linear_bias=true,route_scale={1 / K}",
        "openai_privacy_filter.OpenAIPrivacyFilterTopKRouter",
    ),
    *_rows("sparse_mixer:jitter=0.1", "phimoe.PhimoeTopKRouter", k=2, router_jitter_noise=0.1, input_jitter_noise=0.0),
    # Softmax in groups, or with a bias that the choice alone sees.
    *_rows(
        "topk:normalize=false,groups=4,groups_kept=2,group_score=max,outside=zero,route_scale=2.5", *_LIKE_DEEPSEEK_V2
    ),
    *_rows("topk:normalize=false,route_scale=2.5", *_LIKE_DEEPSEEK_V2, topk_method="greedy"),
    *_rows(
        "topk:groups=4,groups_kept=2,outside=zero,route_scale=2.5",
        "mistral4.Mistral4TopkRouter",
        "mistral_large4.MistralLarge4TextTopkRouter",
    ),
    *_rows(
        "topk:bias_rate=0.001", "ernie4_5_moe.Ernie4_5_MoeTopKRouter", "ernie4_5_vl_moe.Ernie4_5_VLMoeMoeTopKRouter"
    ),
    *_rows(
        "topk:bias_rate=0.001,normalize=false,route_scale=2.5",
        "longcat_flash.LongcatFlashTopkRouter",
        n_routed_experts=E - ZERO,
        zero_expert_num=ZERO,
    ),
    *_rows(
        "longcat:route_scale=2.5",
        "longcat_flash.LongcatFlashTopkRouter",
        n_routed_experts=E - ZERO,
        zero_expert_num=ZERO,
    ),
    # Sigmoids.
    *_rows(_GROUPED, *_LIKE_DEEPSEEK_V3),
    *_rows(_GROUPED + ",normalize=false", *_LIKE_DEEPSEEK_V3, norm_topk_prob=False),
    *_rows(_GROUPED + ",outside=zero", "axk2.AXK2TopkRouter"),
    *_rows(_BIASED + ",route_scale=2.5", "axk2.AXK2TopkRouter", n_group=None),
    *_rows(_GROUPED.removesuffix(",route_scale=2.5"), "beam.BeamTopKRouter"),  # its block scales, after the experts
    *_rows(
        _BIASED,
        "minimax_m2.MiniMaxM2TopKRouter",
        "minimax_m3_vl.MiniMaxM3VLTopKRouter",
        "step3p7.Step3p7TopKRouter",
    ),
    *_rows(
        _BIASED + ",route_scale=2.5",
        "afmoe.AfmoeTokenChoiceRouter",
        "dots3_note.Dots3NoteVisionTopKRouter",
        "hy_v3.HYV3TopKRouter",
        "lfm2_moe.Lfm2MoeTopKRouter",
    ),
    *_rows(
        _BIASED + ",route_scale=2.5",
        "inkling2.Inkling2TopKRouter",
        "inkling2_loop.Inkling2LoopTopKRouter",
        scoring_func="sigmoid",
    ),
    *_rows("joint_gates:route_scale=2.5", "inkling.InklingTopkRouter", n_shared_experts=2),
    *_rows(_BIASED + ",order=choose_first", "kolibri1.Kolibri1TopKRouter"),
    *_rows(_BIASED + ",soft_cap=3", "laguna.LagunaTopKRouter"),
    *_rows(_BIASED + ",logit_scale=1.5,route_scale=2.5", "muse_spark.MuseSparkTopkRouter"),
    *_rows("topk:score=sigmoid", "flint.FlintTopKRouter"),
    *_rows("topk:score=sigmoid,normalize=false", "flint.FlintTopKRouter", norm_topk_prob=False),
    *_rows("topk:score=sigmoid,order=choose_first", "cohere2_moe.Cohere2MoeTopKRouter", expert_selection_fn="sigmoid"),
    *_rows("topk:score=sigmoid,order=choose_first,normalize=false", "llama4.Llama4Router"),
    *_rows("topk:score=sigmoid,order=choose_first,normalize=false", "llama4.Llama4Router", k=1),
    # A state from the layer below, and a last class that skips.
    *_rows("zaya:width=16", "zaya.ZayaRouter", k=1, num_experts=E - 1, router_hidden_size=16),
    # Roots of softplus.
    *_rows("hash_gated:route_scale=2.5", "deepseek_v4.DeepseekV4HashRouter", scoring_func="sqrtsoftplus"),
    *_rows(
        "topk:score=sqrt_softplus,bias_rate=0.001,route_scale=2.5",
        "deepseek_v4.DeepseekV4TopKRouter",
        "inkling2.Inkling2TopKRouter",
        "inkling2_loop.Inkling2LoopTopKRouter",
        scoring_func="sqrtsoftplus",
    ),
]
"""Every class with a router in it, under each setting that changes the rule."""
AWAITED: dict[str, str] = {}
"""Router classes that no entry of ours stands for, and what is missing."""
NO_ROUTERS = {
    "bailing_hybrid.BailingHybridForgetGate": "a gate of linear attention",
    "d_fine.DFineGate": "mixes two inputs of a detector's decoder",
    "dbrx.DbrxRouter": "the logits alone: DbrxFFN has the rule",
    "deimv2.Deimv2Gate": "mixes two inputs of a detector's decoder",
    "doge.DogeCDMoE": "retrieves rows by product keys: there are no experts with an input and an output",
    "glm5_next.Glm5NextTextForgetGate": "a gate of linear attention",
    "granite_docling.GraniteDoclingDensityRouter": "one number for a whole page",
    "inkling2_loop.Inkling2LoopMessageGate": "mixes a message into the hidden states, element by element",
    "kimi_linear.KimiLinearForgetGate": "a gate of linear attention",
    "kyutai_speech_to_text.KyutaiSpeechToTextGatingMLP": "a dense MLP",
    "moshi.MoshiGatingMLP": "a dense MLP",
    "muse_spark.MuseSparkResidualGate": "weighs the residual stream, element by element",
    "zaya.ZayaRouterMLP": "the logits alone: ZayaRouter has the rule",
}
"""Classes that look like routers and choose no experts, with what they are."""

_CLASS = re.compile(r"^class (\w+)[^\n]*\n(?:[ \t#\n)][^\n]*\n?|\n)*", re.MULTILINE)


def found() -> Iterator[str]:
    """Yield the classes of the installed transformers that look like routers, by name or because they rank experts."""
    import transformers

    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for match in _CLASS.finditer(path.read_text()):
            ranks = ".topk(" in match[0] and "expert" in match[0]
            if ranks or re.search(r"Router|Gate$|Gating|Gater", match[1]):
                yield f"{path.parent.name}.{match[1]}"
