"""The Triton engine without a GPU: its kernels in Triton's interpreter against the float64 loop, and compiled ahead of time."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from rlroute.errors import ConfigError, DecisionError
from rlroute.kernels import ExpertWeights, expert_mlp, resolve_backend, sparse
from rlroute.kernels.plan import make_plan
from tests.test_kernels import CASES, NAMES, relative_error, run

pytestmark = pytest.mark.skipif(
    not sparse.INTERPRETING, reason="the kernels were defined for a GPU before this module ran"
)
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a block may use on an H100."""
SMALL = {name: case for name, case in CASES.items() if name != "several chunks of one expert"}


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_interpreter_equals_the_reference_and_itself(case):
    """Output and every gradient: by tensor, by expert, by row; and bit for bit when run again."""
    want, got, again = run(*case, "reference"), run(*case, "triton", torch.float32), run(*case, "triton", torch.float32)
    for name in NAMES:
        assert relative_error(got[name], want[name]) < 1e-5, name
        assert torch.equal(got[name], again[name]), name
        floor = 1e-5 * float(want[name].norm())
        for part, (a, b) in enumerate(zip(got[name], want[name], strict=True)):
            assert float((a - b).norm()) <= max(1e-5 * float(b.norm()), floor), f"{name}[{part}]"


def test_bfloat16_storage_is_as_good_as_the_same_rounding_in_torch():
    """Twice the error on a GPU; the interpreter cuts bits off where a chip rounds, which doubles it once more."""
    factor = 4 if sparse.INTERPRETING else 2
    case = CASES["fixed k"]
    want = run(*case, "reference")
    got, rounded = run(*case, "triton", torch.bfloat16), run(*case, "reference", torch.bfloat16)
    for name in NAMES:
        assert relative_error(got[name], want[name]) <= factor * relative_error(rounded[name], want[name]), name


@pytest.mark.parametrize("name", ["over capacity dropped", "variable k, some unused"])
def test_rows_that_do_not_run_are_never_read(name, monkeypatch):
    """Every new buffer starts as NaN, and so do the gates of pairs that do not run."""
    decision, width, hidden = CASES[name]
    runs_R = decision.kept_R & (decision.expert_ids_R < decision.num_experts)
    poisoned = replace(decision, gates_R=torch.where(runs_R, decision.gates_R, float("nan")))
    want = run(decision, width, hidden, "triton", torch.float32)

    def poison(self, like, columns):
        return like.new_full((self.rows, columns), float("nan"))

    monkeypatch.setattr(sparse._Launcher, "new_rows", poison)
    got = run(poisoned, width, hidden, "triton", torch.float32)
    assert all(torch.equal(got[n], want[n]) for n in NAMES)


def test_equal_pairs_give_equal_bits_whoever_made_them():
    """The promise of the harness: two routers that hand in the same pairs get the same model."""
    decision, width, hidden = CASES["fixed k"]
    other = replace(
        decision, logits_TE=torch.randn(37, 6), probs_TE=torch.rand(37, 6), memo={"anything": torch.ones(1)}
    )
    a, b = run(decision, width, hidden, "triton", torch.float32), run(other, width, hidden, "triton", torch.float32)
    assert all(torch.equal(a[name], b[name]) for name in NAMES)


def test_flat_pairs_are_the_same_as_token_major_ones():
    decision, width, hidden = CASES["fixed k"]
    flat = replace(decision, k=None)
    a, b = run(decision, width, hidden, "triton", torch.float32), run(flat, width, hidden, "triton", torch.float32)
    assert all(torch.equal(a[name], b[name]) for name in NAMES)


def test_second_backward_adds_the_same_gradient():
    decision, width, hidden = CASES["variable k, some unused"]
    decision = replace(decision, gates_R=decision.gates_R.float())
    x_TD = torch.randn(decision.num_tokens, width, requires_grad=True)
    weights = ExpertWeights(torch.randn(5, 2 * hidden, width), torch.randn(5, width, hidden))
    out_TD = expert_mlp(x_TD, decision, weights, "triton")
    out_TD.sum().backward(retain_graph=True)
    once = x_TD.grad.clone()
    out_TD.sum().backward()
    assert torch.equal(x_TD.grad, 2 * once)


def test_without_gradients_nothing_is_saved_and_the_output_is_the_same(monkeypatch):
    decision, width, hidden = CASES["fixed k"]
    decision = replace(decision, gates_R=decision.gates_R.float())
    x_TD = torch.randn(37, width)
    weights = ExpertWeights(torch.randn(6, 2 * hidden, width), torch.randn(6, width, hidden))
    widths = []
    new_rows = sparse._Launcher.new_rows
    monkeypatch.setattr(sparse._Launcher, "new_rows", lambda s, like, n: (widths.append(n), new_rows(s, like, n))[1])
    quiet = expert_mlp(x_TD, decision, weights, "triton")
    assert 2 * hidden not in widths
    assert torch.equal(quiet, expert_mlp(x_TD.requires_grad_(), decision, weights, "triton"))


def test_primitives_compose_to_a_linear_expert_layer():
    """gather_linear and linear_combine against the plain loop, with their gradients."""
    decision, width, _ = CASES["over capacity dropped"]
    plan, generator = make_plan(decision), torch.Generator().manual_seed(3)
    leaves = [torch.randn(s, generator=generator, requires_grad=True) for s in ((20, width), (4, 5, width), (4, 3, 5))]
    gates_R = decision.gates_R.float().requires_grad_()
    upstream = torch.randn(20, 3, generator=generator)
    x_TK, first_ENK, second_ENK = leaves
    y_RN = sparse.gather_linear(x_TK, plan, first_ENK)
    out = sparse.linear_combine(y_RN.tanh(), plan, second_ENK, gates_R)
    want = torch.zeros(20, 3)
    for pair in torch.nonzero(decision.kept_R).flatten().tolist():
        token, expert = int(decision.token_ids_R[pair]), int(decision.expert_ids_R[pair])
        y = gates_R[pair] * (second_ENK[expert] @ (first_ENK[expert] @ x_TK[token]).tanh())
        want = want.index_add(0, torch.tensor([token]), y[None])
    assert relative_error(out.detach(), want.detach()) < 1e-5
    inputs = (*leaves, gates_R)
    for got, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("size", [1, 16, 64])
def test_plan_runs_each_pair_once_under_its_expert(case, size):
    decision, *_ = case
    plan = make_plan(decision)
    runs_R = decision.kept_R & (decision.expert_ids_R < decision.num_experts)
    running = int(plan.starts_E[-1])
    assert running == int(runs_R.sum())
    assert torch.equal(plan.pairs_R.sort().values, torch.arange(len(runs_R)))
    assert torch.equal(plan.starts_E.diff(), decision.load_E())
    experts_R = decision.expert_ids_R[plan.pairs_R[:running]]
    covered = torch.zeros(len(runs_R), dtype=torch.long)
    for expert, row in zip(*(t.tolist() for t in plan.tiles(size)), strict=True):
        if expert >= 0:
            end = min(row + size, int(plan.starts_E[expert + 1]))
            assert row < end and bool((experts_R[row:end] == expert).all())
            covered[row:end] += 1
    assert bool((covered[:running] == 1).all()) and not bool(covered[running:].any())
    by_token = [plan.rows_R[a:b] for a, b in zip(plan.first_T[:-1].tolist(), plan.first_T[1:].tolist(), strict=True)]
    for token, rows in enumerate(by_token):
        assert bool((plan.tokens_R[rows[rows >= 0]] == token).all())
    assert sum(int((rows >= 0).sum()) for rows in by_token) == running


def test_impossible_choices_are_errors(monkeypatch):
    decision, width, hidden = CASES["fixed k"]
    with pytest.raises(DecisionError, match="float64"):
        run(decision, width, hidden, "triton", torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="'triton' does not run on device 'cpu'"):
        resolve_backend("triton", "cpu")
    assert resolve_backend("auto", "cuda") == "triton"


def test_pinned_kernels_compile_for_an_h100_without_spills_or_atomics():
    """In a process of its own: what is interpreted here cannot be compiled here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = (
        "import json; from rlroute.kernels.aot import compile_pinned\n"
        "for one in compile_pinned(90): print(json.dumps(vars(one)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert 0 < len(kernels) <= 40
    for one in kernels:
        found = one["instructions"]
        assert one["spilled"] == 0, one
        assert one["shared"] <= SHARED_LIMIT, one
        assert not any(found[word] for word in ("ATOM", "ATOMG", "RED", "REDG")), one
        if one["name"].startswith("bfloat16"):
            assert found["HMMA"] + found["HGMMA"] > 0, one
