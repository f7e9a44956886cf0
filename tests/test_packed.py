"""Packed documents: attention stays within each, whatever else is in the window.

Shape suffixes: B sequences, S sequence length, V vocabulary.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlroute.errors import DataError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.model import Transformer
from rlroute.model.recompute import set_recompute
from rlroute.model.transformer import within_documents
from rlroute.reading import read_run
from rlroute.training import loop
from rlroute.training.batches import Batch
from rlroute.training.step import backward_batch
from tests.tiny import CPU64, DATA, MODEL, TRAIN, V, make_model, run_tokens, shake, small_config

BOS = V - 1
WINDOWS_BS = torch.tensor([[1, 2, BOS, 3, 4, 5, BOS, 6], [BOS, 7, 7, BOS, BOS, 8, 9, 1]])
DOCUMENTS = [[(0, 2), (2, 6), (6, 8)], [(0, 3), (3, 4), (4, 8)]]
"""Where they begin and end; the first of a window may have begun before it."""
CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "switch": ("switch", {"num_shared_experts": 1}),
    "attention": ("switch", {"attention_experts": 4}),
    "heads": ("switch", {"attention_experts": 4, "attention_form": "switchhead"}),
    "hash": ("hash", {}),
    "mixers": ("switch", {"mixers": "mamba2,gated_delta+attention", "state_key_width": 4, "attention_gate": "sigmoid"}),
    "latent": ("switch", {"kv_rank": 4, "q_rank": 6, "head_width": 4, "value_width": 5}),
}


def packed_model(case: str) -> Transformer:
    router, fields = CASES[case]
    model = shake(make_model(router, small_config(**fields)))
    model.packed = True
    return model


def test_whom_a_position_attends_to_is_written_out() -> None:
    mask_BSS = within_documents(torch.tensor([[1, BOS, 2]]), BOS)
    assert mask_BSS.long().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]


@pytest.mark.parametrize("case", CASES)
def test_each_document_has_the_logits_that_it_has_alone(case: str) -> None:
    """Positions begin anew with it: rotary ones are relative, to the rounding of their table, which is float32's."""
    model = packed_model(case)
    together_BSV, _ = run_tokens(model, WINDOWS_BS)
    model.packed = False
    for sequence, documents in enumerate(DOCUMENTS):
        for start, end in documents:
            alone_BSV, _ = run_tokens(model, WINDOWS_BS[sequence : sequence + 1, start:end])
            torch.testing.assert_close(together_BSV[sequence, start:end], alone_BSV[0], rtol=1e-5, atol=1e-6)


def test_without_packing_documents_see_one_another() -> None:
    model = packed_model("dense")
    packed_BSV, _ = run_tokens(model, WINDOWS_BS)
    model.packed = False
    plain_BSV, _ = run_tokens(model, WINDOWS_BS)
    torch.testing.assert_close(packed_BSV[0, :2], plain_BSV[0, :2], rtol=1e-9, atol=1e-9)
    assert (packed_BSV[0, 2:] - plain_BSV[0, 2:]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("case", ["dense", "attention"])
def test_no_gradient_crosses_a_boundary(case: str) -> None:
    model = packed_model(case)
    seen: list[Tensor] = []

    def note(module: Any, args: Any, embedded_BSD: Tensor) -> None:
        embedded_BSD.retain_grad()
        seen.append(embedded_BSD)

    model.embed.register_forward_hook(note)
    logits_BSV, _ = run_tokens(model, WINDOWS_BS)
    logits_BSV[0, 2:6].sum().backward()
    gradient = seen[0].grad
    assert gradient is not None
    assert bool((gradient[0, 2:6] != 0).any(1).all())
    assert not gradient[0, :2].any() and not gradient[0, 6:].any() and not gradient[1].any()


@pytest.mark.parametrize("case", CASES)
def test_recomputed_blocks_and_losses_in_chunks_are_packed_alike(case: str) -> None:
    model = packed_model(case)
    tokens_BS = WINDOWS_BS.numpy()
    batch = Batch(tokens_BS, np.roll(tokens_BS, -1, axis=1), np.arange(2), None)

    def trained() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        result = backward_batch(model, batch, CPU64, seed=0, step=0, micro_batches=1)
        return result.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    loss, wanted = trained()
    set_recompute(model, True)
    again, gradients = trained()
    assert torch.equal(loss, again) and all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    model.loss_chunk = 3
    assert trained()[0] == pytest.approx(float(loss), rel=1e-12)


def test_a_run_is_packed_and_says_so(tmp_path: Path) -> None:
    runs = []
    for packed in (False, True):
        config = build_entry("switch", replace(DATA, packed=packed), MODEL, TRAIN)
        loop.train(config, 0, tmp_path)
        runs.append(read_run(tmp_path / config.run_id(0)))
    plain, apart = runs
    assert plain.summary["batches"] == apart.summary["batches"] and plain.id != apart.id
    assert plain.evals[-1]["loss"] != apart.evals[-1]["loss"]
    assert apart.config["config"]["data"]["packed"] is True


def test_a_corpus_in_which_nothing_opens_a_document_is_refused(tmp_path: Path) -> None:
    for first, part in enumerate(("train", "valid")):
        (np.arange(first, 4000) % 50).astype("<u2").tofile(tmp_path / f"{part}.bin")
    spec = f"bin:{tmp_path}/*.bin,vocab=99,bytes_per_token=1"
    config = build_entry("hash", replace(DATA, spec=spec, packed=True), MODEL, TRAIN)
    with pytest.raises(DataError, match=r"data\.packed = True: token 98 opens no document of corpus"):
        loop.train(config, 0, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
