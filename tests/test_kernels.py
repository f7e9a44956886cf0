"""The shared expert MLP: every engine against the float64 loop, on every decision that the contract allows."""

from dataclasses import replace

import pytest
import torch

from rlroute.errors import ConfigError, DecisionError
from rlroute.kernels import ExpertWeights, Form, expert_mlp, resolve_backend
from rlroute.kernels import cpu as cpu_engine
from rlroute.kernels.activations import ACTIVATIONS, hidden_rows
from rlroute.routing import RoutingDecision
from tests.conftest import capped

NAMES, BIASES = ("out_TD", "x_TD", "in_EHD", "out_EDF", "gates_R"), ("in_bias_EH", "out_bias_ED")
ALL_OF_IT = "biases, gates at the input, dropout"
FORMS = ("", "biases", "gates at the input", "dropout", ALL_OF_IT)
"""What experts have besides."""


def decision_token_choice(tokens, experts, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k]
    return RoutingDecision.token_choice(
        ids_TK, torch.rand(tokens, k, generator=generator, dtype=torch.float64), experts
    )


def decision_variable_k(tokens, experts):
    base = decision_token_choice(tokens, experts, min(3, experts), seed=1)
    unused_R = torch.arange(len(base.expert_ids_R)) % 4 == 0
    unused_R[: base.k] = True  # the first token uses no expert at all
    return replace(base, k=None, expert_ids_R=torch.where(unused_R, experts, base.expert_ids_R))


def decision_expert_choice(tokens, experts):
    generator = torch.Generator().manual_seed(2)
    ids_EC = torch.rand(experts, tokens, generator=generator).argsort(1)[:, : max(1, tokens // 2)]
    return RoutingDecision.expert_choice(
        ids_EC, torch.rand(ids_EC.shape, generator=generator, dtype=torch.float64), tokens
    )


def decision_collapsed(tokens, experts, k):
    ids_TK = torch.arange(experts - k, experts).expand(tokens, k)
    return RoutingDecision.token_choice(ids_TK, torch.full((tokens, k), 0.5, dtype=torch.float64), experts)


CASES = {
    "fixed k": (decision_token_choice(37, 6, 2), 10, 7),
    "one token, k = E": (decision_token_choice(1, 3, 3), 4, 5),
    "variable k, some unused": (decision_variable_k(29, 5), 8, 3),
    "expert choice": (decision_expert_choice(24, 4), 6, 6),
    "collapsed onto k experts": (decision_collapsed(40, 8, 2), 5, 4),
    "more experts than pairs": (decision_token_choice(3, 16, 1), 4, 4),
    "over capacity dropped": (capped(decision_collapsed(20, 4, 2), 7), 6, 4),
    "all dropped": (capped(decision_token_choice(9, 4, 2), 0), 6, 4),
    "several chunks of one expert": (decision_collapsed(2 * cpu_engine.CHUNK_ROWS + 5, 2, 1), 3, 2),
}


def run(decision, width, hidden, backend, dtype=torch.float64, activation="swiglu", form=""):
    """Return the output and every gradient, for fixed inputs of order 1.

    Args:
        form: what the experts have besides, of ``FORMS``.
    """
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x_TD, experts = draw(decision.num_tokens, width), decision.num_experts
    weights = ExpertWeights(draw(experts, hidden_rows(activation, hidden), width), draw(experts, width, hidden))
    gates_R = decision.gates_R.detach().clone().to(dtype).requires_grad_()
    upstream_TD = torch.randn(x_TD.shape, generator=generator, dtype=torch.float64).to(dtype)
    biases, how = besides(form, weights, gates_R, draw)
    out_TD = expert_mlp(x_TD, replace(decision, gates_R=gates_R), weights, backend, activation, how)
    gradients = torch.autograd.grad(out_TD, (x_TD, *weights, gates_R, *biases), upstream_TD)
    return dict(zip(NAMES + BIASES[: len(biases)], (out_TD.detach(), *gradients), strict=True))


def besides(form, weights, gates_R, draw):
    """Return the biases of a form that is given by name, and the form."""
    biases = [draw(*tensor.shape[:2]) for tensor in weights] if "biases" in form else []
    keys_R = torch.arange(len(gates_R), device=gates_R.device) * 7919 if "dropout" in form else None
    return biases, Form(*biases, gate_at_input="input" in form, dropout=0.3, keys_R=keys_R)


def differing(got, want, tolerance):
    """Return the errors of what differs, by name."""
    return {name: e for name in want if (e := relative_error(got[name], want[name])) > tolerance}


def relative_error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_cpu_engine_equals_the_reference(case, dtype, tolerance):
    want = run(*case, "reference")
    got = run(*case, "cpu", dtype)
    assert {name: e for name in NAMES if (e := relative_error(got[name], want[name])) > tolerance} == {}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_expert_and_each_row_is_right(case):
    """A norm over a whole tensor hides one wrong expert among many: compare each by itself."""
    want, got = run(*case, "reference"), run(*case, "cpu")
    for name in NAMES[:4]:
        for part, (a, b) in enumerate(zip(got[name], want[name], strict=True)):
            assert relative_error(a, b) < 1e-12 or (a - b).abs().max() < 1e-14, f"{name}[{part}]"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("form", FORMS)
def test_cpu_engine_equals_the_reference_with_other_experts(case, form):
    for activation in ACTIVATIONS:
        want, got = (run(*case, backend, activation=activation, form=form) for backend in ("reference", "cpu"))
        assert differing(got, want, 1e-13) == {}, activation


@pytest.mark.parametrize("counts", [[3], [0, 0], [512, 512, 1], [5000, 0, 7, 511, 513], [1] * 3000, [1024, 1024]])
@pytest.mark.parametrize("hidden", [1, 300, 10**6])
def test_chunks_cover_every_row_once_and_cut_an_expert_where_its_neighbours_do_not_matter(counts, hidden):
    end, sizes = 0, {}
    for rows, pieces in cpu_engine.chunks(counts, hidden):
        assert rows.start == end
        end += sum(piece.size for piece in pieces)
        assert rows.stop == end and rows.stop - rows.start <= cpu_engine.CHUNK_ROWS
        for expert, size, first in pieces:
            assert first == (expert not in sizes)
            sizes.setdefault(expert, []).append(size)
    assert end == sum(counts)
    alone = {e: [p.size for _, ps in cpu_engine.chunks([c], hidden) for p in ps] for e, c in enumerate(counts) if c}
    assert sizes == alone


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reruns_are_bit_equal(backend):
    for form in ("", ALL_OF_IT):
        first, second = (run(*CASES["fixed k"], backend, torch.float32, form=form) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", ["", ALL_OF_IT])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_analytic_gradient_equals_finite_differences(activation, form):
    decision = decision_token_choice(4, 3, 2)
    weights = [
        torch.randn(3, hidden_rows(activation, 2), 3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True),
    ]
    x_TD = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gates_R = decision.gates_R.clone().requires_grad_()
    biases, how = besides(form, weights, gates_R, lambda *s: torch.randn(s, dtype=torch.float64, requires_grad=True))

    def function(x, w_in, w_out, gates, *biases):
        made = replace(decision, gates_R=gates)
        return expert_mlp(
            x,
            made,
            ExpertWeights(w_in, w_out),
            "cpu",
            activation,
            replace(how, **dict(zip(BIASES, biases, strict=False))),
        )

    assert torch.autograd.gradcheck(function, (x_TD, *weights, gates_R, *biases))


def test_gate_gradient_is_the_credit_of_its_pair():
    """<dL/dout_t, y_r>, for a gate of any value, 0 included."""
    decision = decision_token_choice(6, 4, 2)
    zeros = replace(decision, gates_R=torch.zeros_like(decision.gates_R))
    credit_R = run(zeros, 5, 3, "cpu")["gates_R"]
    assert torch.allclose(credit_R, run(decision, 5, 3, "cpu")["gates_R"])
    assert float(credit_R.abs().min()) > 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_router_with_constant_gates_gets_its_credit_by_asking(backend):
    decision = decision_token_choice(6, 4, 2)
    want_R = run(decision, 5, 3, backend)["gates_R"]
    generator = torch.Generator().manual_seed(7)
    x_TD, w_in, w_out = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 5), (4, 6, 5), (4, 5, 3))
    )
    asking = replace(decision, gates_R=torch.full_like(decision.gates_R, 0.5).requires_grad_())
    out_TD = expert_mlp(x_TD, asking, ExpertWeights(w_in, w_out), backend)
    out_TD.backward(torch.randn(6, 5, generator=generator, dtype=torch.float64))
    assert torch.allclose(asking.gates_R.grad, want_R)


def test_unused_and_dropped_pairs_touch_nothing():
    """Their gates may hold anything, NaN included."""
    decision = capped(decision_collapsed(20, 4, 2), 7)
    poisoned = replace(decision, gates_R=torch.where(decision.kept_R, decision.gates_R, float("nan")))
    want, got = run(decision, 6, 4, "cpu"), run(poisoned, 6, 4, "cpu")
    assert all(torch.equal(want[name], got[name]) for name in NAMES)
    assert bool((got["gates_R"][~decision.kept_R] == 0).all())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_cpu_engine_reads_nothing_that_it_did_not_write(case, monkeypatch):
    """Every uninitialised buffer starts as NaN."""
    want = [run(*case, "cpu", form=form) for form in ("", ALL_OF_IT)]
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    got = [run(*case, "cpu", form=form) for form in ("", ALL_OF_IT)]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(got, want, strict=True) for name in other)


def test_without_gradients_the_output_is_the_same():
    decision, width, hidden = CASES["fixed k"]
    weights = ExpertWeights(torch.randn(6, 2 * hidden, width), torch.randn(6, width, hidden))
    x_TD, decision = torch.randn(37, width), replace(decision, gates_R=decision.gates_R.float())
    with torch.no_grad():
        quiet = expert_mlp(x_TD, decision, weights)
    assert torch.equal(quiet, expert_mlp(x_TD.requires_grad_(), decision, weights))


def test_a_token_does_not_depend_on_unrelated_ones():
    """Dropless: what a batch-mate is routed to changes nothing (within the rounding of another matrix shape)."""
    decision, width, hidden = CASES["fixed k"]
    alone = RoutingDecision.token_choice(
        decision.expert_ids_R.view(-1, 2)[:5], decision.gates_R.view(-1, 2)[:5], decision.num_experts
    )
    weights = ExpertWeights(torch.randn(6, 2 * hidden, width).double(), torch.randn(6, width, hidden).double())
    x_TD = torch.randn(37, width).double()
    assert torch.allclose(expert_mlp(x_TD, decision, weights)[:5], expert_mlp(x_TD[:5], alone, weights), atol=1e-12)


def test_more_pairs_than_a_decision_says_are_refused():
    decision, width, hidden = CASES["fixed k"]
    with pytest.raises(DecisionError, match="74 pairs run: legal are 0 to 73, the decision's max_pairs"):
        run(replace(decision, max_pairs=73), width, hidden, "cpu")


BAD = {
    "ids out of range": (lambda d, x, w: (replace(d, expert_ids_R=d.expert_ids_R + 2), x, w), "0 to 2"),
    "negative ids": (lambda d, x, w: (replace(d, expert_ids_R=d.expert_ids_R - 1), x, w), "0 to 2"),
    "tokens disagree": (lambda d, x, w: (d, x[:-1], w), "x_TD"),
    "experts disagree": (lambda d, x, w: (d, x, ExpertWeights(w.in_EHD[:-1], w.out_EDF[:-1])), "experts"),
    "widths disagree": (lambda d, x, w: (d, x, ExpertWeights(w.in_EHD, w.out_EDF[:, :, :-1])), "out_EDF"),
    "dtypes disagree": (lambda d, x, w: (d, x, ExpertWeights(w.in_EHD.double(), w.out_EDF)), "in_EHD"),
    "x not contiguous": (lambda d, x, w: (d, x.repeat(1, 2)[:, ::2], w), "x_TD has strides"),
    "weights not contiguous": (
        lambda d, x, w: (d, x, ExpertWeights(w.in_EHD.transpose(1, 2).contiguous().transpose(1, 2), w.out_EDF)),
        "in_EHD has strides",
    ),
    "gates of another precision": (lambda d, x, w: (replace(d, gates_R=d.gates_R.half()), x, w), "float16"),
    "another device": (lambda d, x, w: (replace(d, gates_R=d.gates_R.to("meta")), x, w), "gates_R is on meta"),
    "gates too short": (lambda d, x, w: (replace(d, gates_R=d.gates_R[:-1]), x, w), "gates_R"),
}


@pytest.mark.parametrize(("breaks", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(breaks, named):
    decision = RoutingDecision.token_choice(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), 3)
    decision, x_TD, weights = breaks(
        decision, torch.randn(2, 4), ExpertWeights(torch.randn(3, 6, 4), torch.randn(3, 4, 3))
    )
    with pytest.raises(DecisionError, match=named):
        expert_mlp(x_TD, decision, weights)


def test_an_unknown_activation_is_named():
    decision = RoutingDecision.token_choice(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), 3)
    with pytest.raises(ConfigError, match="'tanh': legal are 'swiglu', 'gelu', 'relu', 'swiglu_clamped', 'geglu'"):
        expert_mlp(
            torch.randn(2, 4), decision, ExpertWeights(torch.randn(3, 6, 4), torch.randn(3, 4, 3)), "cpu", "tanh"
        )


BAD_VALUES = {
    "NaN gate": (lambda d: replace(d, gates_R=torch.tensor([1.0, 1, float("nan"), 1])), r"gates_R\[2\] is nan"),
    "infinite gate": (lambda d: replace(d, gates_R=torch.tensor([float("inf"), 1, 1, 1])), r"gates_R\[0\] is inf"),
    "expert": (lambda d: replace(d, expert_ids_R=d.expert_ids_R + 2), "expert_ids_R holds 4: legal are 0 to 3"),
    "token": (lambda d: replace(d, token_ids_R=d.token_ids_R - 1), "token_ids_R holds -1: legal are 0 to 1"),
}


@pytest.mark.parametrize(("breaks", "named"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_values_are_looked_at_when_the_switch_is_set(breaks, named, monkeypatch):
    decision = RoutingDecision.token_choice(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), 3)
    arguments = torch.randn(2, 4), breaks(decision), ExpertWeights(torch.randn(3, 6, 4), torch.randn(3, 4, 3))
    monkeypatch.setenv("RLROUTE_CHECK_VALUES", "1")
    with pytest.raises(DecisionError, match=named):
        expert_mlp(*arguments, "reference")
    monkeypatch.setenv("RLROUTE_CHECK_VALUES", "0")
    if "gate" in named:
        expert_mlp(*arguments, "reference")


def test_the_switch_does_not_mind_what_pairs_that_do_not_run_hold(monkeypatch):
    monkeypatch.setenv("RLROUTE_CHECK_VALUES", "1")
    decision = capped(decision_collapsed(20, 4, 2), 7)
    run(replace(decision, gates_R=torch.where(decision.kept_R, decision.gates_R, float("nan"))), 6, 4, "cpu")


def test_engine_is_chosen_once_and_an_impossible_choice_is_an_error():
    assert resolve_backend("auto", "cpu") == "cpu"
    assert resolve_backend("reference", "cpu") == "reference"
    with pytest.raises(ConfigError, match="does not run on device 'cuda'"):
        resolve_backend("cpu", "cuda")
    with pytest.raises(ConfigError, match="'cpu', 'triton', 'reference'"):
        resolve_backend("magic", "cpu")
