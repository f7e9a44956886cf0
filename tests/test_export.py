"""What is exported says the same: classes of transformers load it and give equal logits; a mixture is run by hand from
its file.

Shape suffixes: B sequences, S sequence length, T = B * S tokens, D model width, E experts, K experts per token.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load
from torch.nn import functional

from rlroute.errors import ConfigError
from rlroute.experiments.checkpoints.classes import export_class
from rlroute.experiments.checkpoints.moe_file import LAYOUT, moe_file, moe_tensors
from rlroute.experiments.checkpoints.trained import TrainedRun
from rlroute.experiments.recipes.entries import build_entry
from rlroute.training.data import load_corpus
from rlroute.training.loop import train
from rlroute.training.prepare import build_model
from tests import export_figure
from tests.commands import ran, refused, rlroute
from tests.conftest import make_context
from tests.tiny import DATA, MODEL, TRAIN, run_tokens, shake

TWO = {"num_layers": 2, "num_experts": 8}


def made(entry: str, train: Any = TRAIN, data: Any = DATA, **model: Any) -> TrainedRun:
    """Return a run as if it had been trained: its weights are random, its biases of the choice too."""
    config = build_entry(entry, data, replace(MODEL, **TWO | model), train)
    corpus = load_corpus(data.spec, None)
    record: Any = SimpleNamespace(
        id=config.run_id(0), config={"seed": 0}, summary={"steps": train.steps, "status": "finished"}
    )
    run = TrainedRun(record, config, Path(), corpus)
    run.__dict__["model"] = shake(build_model(config, corpus, 0)).requires_grad_(False)
    for name, buffer in run.model.named_buffers():
        if name.endswith("bias_E"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(7)))
    return run


SHARED = {"num_shared_experts": 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "switch": ("mixtral", "switch", {}),
    "topk, heads of keys and values shared": ("mixtral", "topk", {"num_kv_heads": 1, "head_width": 12}),
    "one matrix for both embeddings": ("mixtral", "switch", {"tie_embeddings": True}),
    "topk, chosen first, scaled logits": ("mixtral", "topk:order=choose_first,logit_scale=2", {"k": 3}),
    "one expert a token": ("qwen2_moe", "switch", {"k": 1}),
    "gates not normalised": ("qwen2_moe", "topk:normalize=false", {"activation": "geglu"}),
    "gated shared experts": ("qwen2_moe", "topk", SHARED | {"shared_gate": "sigmoid"}),
    "shared experts": ("qwen2_moe", "switch:normalize=false", SHARED),
    "dense blocks between": ("qwen2_moe", "topk", {"num_layers": 3, "moe_every": 2, "d_dense": 20}),
    "biased sigmoids": ("glm4_moe", "bias_balanced:route_scale=2.5", {}),
    "sigmoids, one expert a token": ("glm4_moe", "bias_balanced", {"k": 1}),
    "groups": ("glm4_moe", "topk:score=sigmoid,bias_rate=0.1,groups=4,groups_kept=2", SHARED | {"num_dense_layers": 1}),
    "sigmoids not normalised": (
        "glm4_moe",
        "topk:score=sigmoid,normalize=false",
        {"d_dense": 20, "num_dense_layers": 1},
    ),
}


@pytest.mark.parametrize(("kind", "entry", "model"), CASES.values(), ids=CASES.keys())
def test_a_class_of_transformers_loads_a_model_and_gives_its_logits(
    kind: str, entry: str, model: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    run = made(entry, **model)
    exported = export_class(run)
    for name, data in exported.files.items():
        (tmp_path / name).write_bytes(data)
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert theirs.config.model_type == kind and theirs.dtype == torch.float32
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_BS = torch.randint(0, run.corpus.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    want_BSV, _ = run_tokens(run.model, tokens_BS)
    with torch.no_grad():
        got_BSV = theirs.eval()(tokens_BS).logits
    assert float((got_BSV - want_BSV).abs().max()) <= 1e-5 * float(want_BSV.abs().max())


@pytest.mark.parametrize(
    ("entry", "model", "said"),
    [
        ("hash", {}, "router hash: of ours classes of transformers have topk, switch and bias_balanced"),
        ("topk:soft_cap=3", {}, "router topk.soft_cap = 3.0: no class has it with these scores, legal is 0.0"),
        ("topk:score=sqrt_softplus", {}, "router topk.score = 'sqrt_softplus'"),
        ("topk:groups=2", {}, "router topk.groups = 2"),
        ("topk:order=choose_first,normalize=false", {}, "router topk.order = 'choose_first'"),
        ("switch", {"capacity_factor": 1.0}, "model.capacity_factor = 1.0"),
        ("switch", {"zero_experts": 2}, "model.num_free_experts = 2"),
        ("switch", {"attention_experts": 4}, "model.attention_experts = 4"),
        ("switch", {"activation": "relu"}, "model.activation = 'relu'"),
        ("bias_balanced", {"num_shared_experts": 1, "shared_gate": "sigmoid"}, "model.shared_gate = 'sigmoid'"),
        ("bias_balanced", {"moe_every": 2}, "model.moe_every = 2"),
        ("switch+topk@0-0", {}, "the same router in all layers"),
    ],
)
def test_what_no_class_expresses_is_refused_with_the_reason(entry: str, model: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        export_class(made(entry, **model))
    assert said in str(error.value)


def test_a_mixture_is_run_by_hand_from_its_file() -> None:
    model = {"num_shared_experts": 1, "shared_gate": "sigmoid", "expert_bias": True, "d_latent": 8}
    run = made("topk", num_layers=1, num_experts=4, **model)
    t = {name.removeprefix("layers.0."): tensor for name, tensor in load(moe_file(run)).items()}
    x_TD = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    best = functional.linear(x_TD, t["router.scores.weight"]).softmax(1).topk(2)
    gates_TK = best.values / best.values.sum(1, keepdim=True)

    def mlp(x_D: torch.Tensor, name: str, *expert: int) -> torch.Tensor:
        def linear(part: str, x: torch.Tensor) -> torch.Tensor:
            bias = t.get(f"{name}.{part}_bias")
            return functional.linear(x, t[f"{name}.{part}"][expert], None if bias is None else bias[expert])

        return linear("down", functional.silu(linear("gate", x_D)) * linear("up", x_D))

    def token(row: int) -> torch.Tensor:
        x_D = x_TD[row]
        low_D = t["latent.down"] @ x_D
        pairs = zip(gates_TK[row], best.indices[row].tolist(), strict=True)
        routed_D = t["latent.up"] @ sum((gate * mlp(low_D, "experts", e) for gate, e in pairs), torch.zeros(8))
        return routed_D + (t["shared_gate"] @ x_D).sigmoid() * mlp(x_D, "shared")

    moe = run.model.blocks[0].moe
    assert moe is not None
    want_TD, _ = moe(x_TD, make_context(9, 9, explore=False))
    torch.testing.assert_close(torch.stack([token(row) for row in range(9)]), want_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("entry", "model"),
    [
        ("switch", {"activation": "relu"}),
        ("longcat", {"zero_experts": 2, "constant_experts": 1}),
        ("hash", {"attention_experts": 4}),
        ("switch", {"attention_experts": 4, "attention_form": "switchhead"}),
    ],
)
def test_a_file_has_every_weight_of_the_mixture_once(entry: str, model: dict[str, Any]) -> None:
    run = made(entry, **model)
    parts = [part for block in run.model.blocks for part in block.routed_parts]
    of_sites = sum(tensor.numel() for part in parts for tensor in part.state_dict().values())
    assert sum(tensor.numel() for tensor in moe_tensors(run).values()) == of_sites


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for entry in ("switch", "hash", "dense"):
        train(build_entry(entry, DATA, MODEL, TRAIN), 0, folder)
    return folder


def test_the_command_writes_a_mixture_and_a_class(store: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "a/moe.safetensors", tmp_path / "b/mixtral"
    assert str(file) in ran("export", file, "--weights", "switch", "--store", store)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
        assert header["layout"] == LAYOUT and header["step"] == str(TRAIN.steps) and "switch" in header["run"]
        assert json.loads(header["config"])["router"]["name"] == "switch"
        assert set(opened.keys()) == {
            "layers.0.router.scores.weight",
            *(f"layers.0.experts.{p}" for p in ("gate", "up", "down")),
        }
    said = ran("export", folder, "--weights", "switch", "--form", "transformers", "--store", store)
    assert "MixtralForCausalLM" in said and {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("x.safetensors", "--weights", "dense"), "has no MoE layer"),
        (("x.bin", "--weights", "switch"), "x.bin: legal are names that end in .safetensors"),
        (("x", "--weights", "hash", "--form", "transformers"), "router hash: "),
        (("x", "--weights", "switch", "--only", "hash"), "--only does not apply to --weights"),
        (("x", "--form", "transformers"), "--form applies to --weights alone"),
        (("full", "--weights", "switch", "--form", "transformers"), "full is there already"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    words: tuple[str, ...], said: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/config.json").write_text("mine")
    assert said in refused(rlroute("export", *words, "--store", store))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_figure_of_the_page_has_every_tensor_of_a_file_with_its_shape() -> None:
    assert export_figure.figure() == export_figure.FIGURE.read_text(), "python -m tests.export_figure"
