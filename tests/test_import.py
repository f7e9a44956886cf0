"""Whole checkpoints as transformers stores them: every MoE block of each format is read from the files, and gives the
output of the block.

Shape suffixes: B sequences, S sequence length, D model width.
"""

import json
import re
from copy import deepcopy
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlroute.errors import ConfigError, RlrouteError, StoreError
from rlroute.experiments.checkpoints.blocks import FORMATS
from rlroute.experiments.checkpoints.folder import DEFAULTS, open_checkpoint, together
from rlroute.experiments.checkpoints.imported import Layer, read_layer, write_layers
from tests.commands import ran, refused, rlroute
from tests.fuzz import misshapen
from tests.mutations import places
from tests.small_checkpoints import BLOCKS, config_of, lay_checkpoint, tensors_of
from tests.test_blocks import CASES, assert_same, outputs, published

pytestmark = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")

LAYERS = {"num_hidden_layers": 3, "vocab_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS |= {"max_position_embeddings": 32}
LATENT = {"first_k_dense_replace": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
WHOLE: dict[str, dict[str, Any]] = dict.fromkeys(FORMATS, LAYERS) | {
    "dbrx": {"n_layers": 2, "vocab_size": 32, "max_seq_len": 32, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "deepseek_v2": LAYERS | LATENT | {"q_lora_rank": None},
    "deepseek_v3": LAYERS | LATENT | {"q_lora_rank": 8},
    "gpt_oss": LAYERS | {"head_dim": 8},
    "jetmoe": LAYERS | {"kv_channels": 8},
    "qwen3_moe": LAYERS | {"head_dim": 8},
    "switch_transformers": {
        **{"num_layers": 2, "num_decoder_layers": 2, "vocab_size": 32, "num_heads": 4, "d_kv": 6},
        **{"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    },
}
"""Sizes of whole models beside those of :data:`CASES`."""
FIRST = {kind: fields for kind, _, fields in reversed(CASES.values())}


def stored(kind: str, folder: Path, **save: Any) -> Any:
    """Store a model with random weights; return it."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = published(kind, **(WHOLE[kind] | FIRST[kind]))
    config._experts_implementation = "eager"
    made = AutoModelForSeq2SeqLM if kind == "switch_transformers" else AutoModelForCausalLM
    model = made.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder, **save)
    return model


def blocks_of(model: Any) -> list[Any]:
    """Return its MoE blocks, first to last."""
    names = {name for _, name, _ in CASES.values()}
    return [module for module in model.modules() if type(module).__name__ in names and _routes(module)]


def _routes(module: Any) -> bool:
    return any(name.split(".")[0] in ("gate", "router") for name, _ in module.named_parameters())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_block_of_a_stored_checkpoint_gives_the_output_of_ours(kind: str, tmp_path: Path) -> None:
    blocks = blocks_of(stored(kind, tmp_path))
    layers = write_layers(open_checkpoint(tmp_path), tmp_path)
    assert len(layers) == len(blocks) >= 2
    for block, layer in zip(blocks, layers, strict=True):
        assert_same(*outputs(block, read_layer(layer.path)))


def test_shards_and_single_files_are_read_and_the_command_says_what_they_are(tmp_path: Path) -> None:
    blocks = blocks_of(stored("mixtral", tmp_path / "model", max_shard_size="8KB"))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    said = ran("import", tmp_path / "model", tmp_path / "ours")
    options = "topk --model.d-model 24 --model.num-experts 8 --model.d-expert 12"
    assert f"3 of mixtral, model.layers.0.block_sparse_moe to model.layers.2.block_sparse_moe: {options}\n" in said
    assert_same(*outputs(blocks[2], read_layer(tmp_path / "ours/layer-002.safetensors")))
    whole = {name: t for file in (tmp_path / "model").glob("*.safetensors") for name, t in load_file(file).items()}
    save_file(whole, tmp_path / "model" / "whole.safetensors")
    again = write_layers(open_checkpoint(tmp_path / "model" / "whole.safetensors"), tmp_path)
    assert_same(*outputs(blocks[1], read_layer(again[1].path)))


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss", "qwen2_moe", "switch_transformers"])
def test_what_is_printed_are_options_of_every_command_that_trains(kind: str, tmp_path: Path) -> None:
    stored(kind, tmp_path)
    (first, *_) = write_layers(open_checkpoint(tmp_path), tmp_path)
    words = " ".join(first.options).split()
    planned = ran("plan", *words, "--data.spec", "synth:vocab=32,documents=40", "--data.seq-len", "16")
    assert words[0] in planned


def test_what_published_configurations_leave_out_is_what_transformers_takes() -> None:
    for kind, plain in DEFAULTS.items():
        config = published(kind)
        for name, value in plain.items():
            theirs = getattr(config, name)
            assert value == ({n: getattr(theirs, n) for n in value} if isinstance(value, dict) else theirs)


MIXTRAL = {"model_type": "mixtral", "num_experts_per_tok": 2, "hidden_act": "silu"}
HERE = "model.layers.0.block_sparse_moe"
GATE = {f"{HERE}.gate.weight": torch.ones(2, 4)}
UP = {f"{HERE}.experts.{e}.{w}.weight": torch.ones(3, 4) for e in range(2) for w in ("w1", "w3")}
DOWN = {f"{HERE}.experts.{e}.w2.weight": torch.ones(4, 3) for e in range(2)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"model_type": "llama"}, GATE, "model_type is 'llama', legal are dbrx, deepseek_v2, .*switch_transformers"),
        ({}, GATE, "model_type is None, legal are dbrx"),
        ("[]", GATE, r"config\.json is a list: want an object"),
        ("{", GATE, r"config\.json: it is not JSON"),
        (MIXTRAL, {}, r"holds no \.safetensors"),
        (MIXTRAL, {"lm_head.weight": torch.ones(1)}, "no MoE block of 'mixtral' among 1 tensors"),
        (MIXTRAL, GATE, f"{HERE}: no experts.gate_up_proj among the block's weights"),
        (MIXTRAL, GATE | UP, f"{HERE}: expert 0 of 2 has no down projection"),
        (MIXTRAL, GATE | UP | dict(list(DOWN.items())[:1]), f"{HERE}: expert 1 of 2 has no down projection"),
        (MIXTRAL, GATE | UP | DOWN | {next(iter(DOWN)): torch.ones(4, 5)}, "its experts are not of one shape"),
        (MIXTRAL, GATE | UP | DOWN | {f"{HERE}.norm": torch.ones(1)}, "weights that are not known here: norm"),
        ({"model_type": "mixtral"}, GATE | UP | DOWN, r"config\.json does not say 'num_experts_per_tok'"),
        (MIXTRAL | {"hidden_act": "tanh"}, GATE | UP | DOWN, "activation 'tanh': legal are"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused_by_name(
    config: Any, tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RlrouteError, match=message):
        write_layers(open_checkpoint(lay_checkpoint(tmp_path, config, tensors)), tmp_path)


def layers_of(folder: Path, config: Any, tensors: dict[str, torch.Tensor]) -> list[Layer]:
    return write_layers(open_checkpoint(lay_checkpoint(folder, config, tensors)), folder)


def test_every_format_has_a_small_checkpoint(tmp_path: Path) -> None:
    assert BLOCKS.keys() == FORMATS.keys()
    for kind in BLOCKS:
        (layer,) = layers_of(tmp_path, config_of(kind), tensors_of(kind))
        assert layer.place == BLOCKS[kind][0]
        layer.path.unlink()


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_weight_of_another_shape_or_type_is_refused(kind: str, tmp_path: Path) -> None:
    weights = tensors_of(kind)
    for name, tensor in weights.items():
        for changed in misshapen(tensor):
            if not (changed.shape == tensor.shape and changed.is_floating_point()):
                with pytest.raises(ConfigError, match=rf"^{re.escape(BLOCKS[kind][0])}: "):
                    layers_of(tmp_path, config_of(kind), weights | {name: changed})


NO_FIELDS: tuple[Any, ...] = ([], {"a": {}})


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_field_that_is_a_list_or_an_object_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    for *above, name in places(config_of(kind)):
        for value in NO_FIELDS:
            config = deepcopy(config_of(kind))
            fields = reduce(dict.__getitem__, above, config)
            if not isinstance(fields[name], type(value)):  # an object in an object's place is read
                fields[name] = value
                with pytest.raises(ConfigError, match=f"{name} (=|is) a {type(value).__name__}[:,]"):
                    layers_of(tmp_path, config, tensors_of(kind))


FFN = {"moe_top_k": 2, "moe_num_experts": 4}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mixtral", {"num_experts_per_tok": "2"}, "num_experts_per_tok = '2': it should be a valid integer"),
        ("mixtral", {"num_experts_per_tok": 5}, "router topk: k = 5: legal are 1 to num_experts = 4"),
        ("mixtral", {"hidden_act": None}, "hidden_act = None: it should be a valid string"),
        ("olmoe", {"norm_topk_prob": 1}, "norm_topk_prob = 1: it should be a valid boolean"),
        ("switch_transformers", {"num_experts": "8"}, "num_experts = '8': it should be a valid integer"),
        ("switch_transformers", {"num_experts": None}, "num_experts = None: it should be a valid integer"),
        ("switch_transformers", {"num_experts": 10**9}, "num_experts = 1000000000: it should be less than or equal to"),
        ("deepseek_v2", {"n_group": None}, "n_group = None: it should be a valid integer"),
        ("deepseek_v3", {"routed_scaling_factor": "2,k=1"}, "routed_scaling_factor = '2,k=1': it should be a valid n"),
        ("deepseek_v3", {"routed_scaling_factor": -1.0}, "route_scale = -1.0: legal are numbers above 0"),
        ("dbrx", {"ffn_config": "none"}, "ffn_config = 'none': it should be a valid dictionary"),
        ("dbrx", {"ffn_config": FFN | {"moe_num_experts": "4"}}, "moe_num_experts = '4': it should be a valid integer"),
        ("dbrx", {"ffn_config": FFN | {"moe_num_experts": 5}}, "the weights do not fit together: "),
        ("dbrx", {"ffn_config": FFN | {"ffn_act_fn": "silu"}}, "ffn_act_fn = 'silu': it should be a valid dictionary"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        layers_of(tmp_path, config_of(kind) | change, tensors_of(kind))


def test_damaged_files_and_an_index_that_leads_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = lay_checkpoint(tmp_path, MIXTRAL, GATE | UP | DOWN)
    (layer,) = write_layers(open_checkpoint(folder), folder)
    assert read_layer(layer.path).entry == "topk"
    layer.path.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(StoreError, match="want a weight_map from tensors to files beside it"):
        open_checkpoint(folder)
    index.unlink()
    with pytest.raises(StoreError, match="its metadata have no 'entry' and 'model'"):
        read_layer(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        open_checkpoint(folder)
    assert "nowhere: No such file" in refused(rlroute("import", tmp_path / "nowhere", tmp_path / "out"))


def test_layers_keep_the_checkpoint_s_precision_under_the_names_of_every_exported_mixture(tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in (GATE | UP | DOWN).items()}
    (layer,) = write_layers(open_checkpoint(lay_checkpoint(tmp_path, MIXTRAL, tensors)), tmp_path)
    stored = load_file(layer.path)
    names = {"router.scores.weight", "experts.gate", "experts.up", "experts.down"}
    assert {f"layers.0.{name}" for name in names} == stored.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    assert read_layer(layer.path).layer().experts.in_EHD.dtype == torch.float32


def test_experts_that_lie_in_one_tensor_are_left_as_they_are() -> None:
    state = {"experts.gate_up_proj": torch.ones(2, 6, 4), "gate.weight": torch.ones(2, 4)}
    assert together(state) == state
