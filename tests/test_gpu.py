"""The Triton engine and steps of training on a CUDA device: what the interpreter cannot show. `make gpu` runs these;
elsewhere they are skipped.
"""

from dataclasses import replace

import pytest
import torch

from rlroute.experiments.recipes.entries import build_entry
from rlroute.kernels import ExpertWeights, expert_mlp
from rlroute.kernels.activations import ACTIVATIONS, hidden_rows
from rlroute.routing import RoutingDecision
from rlroute.training import loop
from tests.test_kernels import (
    BIASES,
    CASES,
    FORMS,
    NAMES,
    besides,
    decision_collapsed,
    decision_token_choice,
    differing,
    relative_error,
)
from tests.test_waits import DATA, ENTRIES, MODEL, TRAIN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LARGE = {
    "balanced": (decision_token_choice(4096, 16, 4), 1024, 512),
    "collapsed": (decision_collapsed(4096, 16, 4), 1024, 512),
    "odd sizes": (decision_token_choice(1000, 7, 3), 200, 120),
    "few rows each": (decision_token_choice(512, 128, 1), 512, 256),
}
PRECISIONS = {torch.float32: 1e-5, torch.bfloat16: None}


def to_cuda(decision):
    tensors = {n: getattr(decision, n) for n in ("token_ids_R", "expert_ids_R", "kept_R", "gates_R")}
    return replace(decision, **{name: tensor.cuda() for name, tensor in tensors.items()})


def run(decision, width, inner, backend, dtype, activation="swiglu", form=""):
    """Return output and gradients on the card for inputs of order 1, which are the same numbers in every precision."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape, scale=1.0):
        values = (torch.randn(shape, generator=generator) * scale).bfloat16()
        return values.to("cuda", dtype).requires_grad_()

    x_TD, experts = draw(decision.num_tokens, width), decision.num_experts
    weights = ExpertWeights(
        draw(experts, hidden_rows(activation, inner), width, scale=width**-0.5),
        draw(experts, width, inner, scale=inner**-0.5),
    )
    gates_R = decision.gates_R.bfloat16().to("cuda", dtype).requires_grad_()
    upstream_TD = torch.randn(x_TD.shape, generator=generator).bfloat16().to("cuda", dtype)
    biases, how = besides(form, weights, gates_R, draw)
    out_TD = expert_mlp(x_TD, replace(to_cuda(decision), gates_R=gates_R), weights, backend, activation, how)
    gradients = torch.autograd.grad(out_TD, (x_TD, *weights, gates_R, *biases), upstream_TD)
    return dict(zip(NAMES + BIASES[: len(biases)], (out_TD.detach(), *gradients), strict=True))


@pytest.mark.parametrize("case", (CASES | LARGE).values(), ids=(CASES | LARGE).keys())
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_card_equals_the_reference_and_itself(case, dtype):
    """float32 to 1e-5; bfloat16 with at most twice the error of the same rounding in torch; every rerun bit for bit."""
    want = run(*case, "reference", torch.float64)
    got, again = run(*case, "triton", dtype), run(*case, "triton", dtype)
    rounded = run(*case, "reference", dtype) if PRECISIONS[dtype] is None else None
    for name in NAMES:
        limit = 2 * relative_error(rounded[name], want[name]) if rounded else PRECISIONS[dtype]
        assert relative_error(got[name], want[name]) <= limit, name
        assert torch.equal(got[name], again[name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_other_experts_on_the_card(activation, form):
    case = LARGE["odd sizes"]
    want = run(*case, "reference", torch.float64, activation, form)
    got, again = (run(*case, "triton", torch.float32, activation, form) for _ in range(2))
    assert differing(got, want, 1e-5) == {}
    assert all(torch.equal(got[name], again[name]) for name in want)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
def test_nothing_waits_for_the_device():
    case = LARGE["balanced"]
    run(*case, "triton", torch.bfloat16)  # compiles
    decision = to_cuda(case[0])
    decision = replace(decision, gates_R=decision.gates_R.bfloat16().requires_grad_())
    x_TD = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    shapes = (16, 1024, 1024), (16, 1024, 512)
    weights = ExpertWeights(*(torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes))
    torch.cuda.set_sync_debug_mode("error")
    try:
        expert_mlp(x_TD, decision, weights, "triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(("entry", "model", "train"), ENTRIES.values(), ids=ENTRIES.keys())
def test_no_step_of_training_waits(entry, model, train, tmp_path, monkeypatch):
    take = loop._Run._step

    def unwaiting(run, used):
        torch.cuda.set_sync_debug_mode("error" if run.progress.step > 1 else "default")  # the first ones are looked at
        try:
            return take(run, used)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop._Run, "_step", unwaiting)
    config = build_entry(entry, DATA, replace(MODEL, **model), replace(TRAIN, device="cuda", **train))
    assert loop.train(config, 0, tmp_path)["status"] == "finished"


def test_offsets_beyond_32_bits():
    """R * 2F above 2^31: the last tokens must come out, and get gradients, as if they were alone."""
    tokens, experts, k, width, inner, last = 2**18 + 64, 8, 8, 64, 512, 64
    assert tokens * k * 2 * inner > 2**31
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    ids_TK = torch.rand(tokens, experts, generator=generator, device="cuda").argsort(1)[:, :k]
    gates_TK, x_TD, upstream_TD = draw(tokens, k), draw(tokens, width), draw(tokens, width)
    weights = ExpertWeights(draw(experts, 2 * inner, width), draw(experts, width, inner))

    def outcome(first):
        x = x_TD[first:].clone().requires_grad_()
        decision = RoutingDecision.token_choice(ids_TK[first:], gates_TK[first:], experts)
        out_TD = expert_mlp(x, decision, weights, "triton")
        (dx_TD,) = torch.autograd.grad(out_TD, x, upstream_TD[first:])
        return out_TD[-last:].detach(), dx_TD[-last:]

    for whole, alone in zip(outcome(0), outcome(tokens - last), strict=True):
        assert relative_error(whole, alone) < 1e-2


def test_weights_beyond_32_bits():
    experts, width, inner, tokens = 66, 4096, 4096, 40
    assert experts * 2 * inner * width > 2**31
    weights = ExpertWeights(
        torch.zeros(experts, 2 * inner, width, device="cuda", dtype=torch.bfloat16),
        torch.zeros(experts, width, inner, device="cuda", dtype=torch.bfloat16),
    )
    weights.in_EHD[-1].normal_(std=width**-0.5)
    weights.out_EDF[-1].normal_(std=inner**-0.5)
    alone = ExpertWeights(weights.in_EHD[-1:].clone(), weights.out_EDF[-1:].clone())
    x_TD = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    gates_TK = torch.ones(tokens, 1, device="cuda")

    def outcome(expert, of):
        ids_TK = torch.full((tokens, 1), expert, device="cuda")
        return expert_mlp(x_TD, RoutingDecision.token_choice(ids_TK, gates_TK, len(of.in_EHD)), of, "triton")

    assert relative_error(outcome(experts - 1, weights), outcome(0, alone)) < 1e-2
