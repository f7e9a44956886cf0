"""The Triton engine without a GPU: its kernels in Triton's interpreter against the float64 loop, and compiled ahead of
time.
"""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from rlroute.errors import ConfigError, DecisionError
from rlroute.kernels import (
    ExpertWeights,
    aot,
    expert_mlp,
    gather_linear,
    linear_combine,
    make_plan,
    resolve_backend,
    sparse,
    tiles,
)
from rlroute.kernels.activations import ACTIVATIONS
from rlroute.routing import RoutingDecision
from tests import ROOT
from tests.test_kernels import ALL_OF_IT, CASES, FORMS, NAMES, differing, relative_error, run

pytestmark = pytest.mark.skipif(
    not sparse.INTERPRETING, reason="the kernels were defined for a GPU before this module ran"
)
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


OTHERS = {
    ("gelu", "", "variable k, some unused"),
    ("relu", "biases", "expert choice"),
    ("geglu", "gates at the input", "over capacity dropped"),
    ("relu_squared", "dropout", "more experts than pairs"),
    ("swiglu_clamped", ALL_OF_IT, "variable k, some unused"),
}
"""Each activation and each thing besides, once."""
RARER = {
    *product(ACTIVATIONS, FORMS, ["variable k, some unused"]),
    *product(["swiglu", "swiglu_clamped"], [ALL_OF_IT], SMALL),
}


@pytest.mark.parametrize(
    ("activation", "form", "name"),
    [*sorted(OTHERS), *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(RARER - OTHERS))],
)
def test_interpreter_equals_the_reference_with_other_experts(activation, form, name):
    case = CASES[name]
    want = run(*case, "reference", activation=activation, form=form)
    got, again = (run(*case, "triton", torch.float32, activation, form) for _ in range(2))
    assert differing(got, want, 1e-5) == {}
    assert all(torch.equal(got[one], again[one]) for one in want)


@pytest.mark.parametrize("form", ["", pytest.param(ALL_OF_IT, marks=pytest.mark.slow)])
def test_by_descriptor_and_by_pointer_are_the_same_bits(form, monkeypatch):
    """16-byte rows: weights, and rows in the order of experts, come and go by descriptor; elsewhere none may."""
    case = (CASES["fixed k"][0], 32, 48)
    asked, describable = [], sparse._Launcher._describable
    monkeypatch.setattr(
        sparse._Launcher, "_describable", lambda *args: (asked.append(describable(*args)), asked[-1])[1]
    )
    got = run(*case, "triton", torch.float32, form=form)
    bodies = {"up": 1, "down": 3, "back": 1, "rows": 3, "weights": 2}  # weights alone; or all three; or the sorted side
    biases = [True, False] if form else []  # the gradients of biases: of what is behind them, of gates
    assert sorted(asked) == sorted([True] * sum(bodies.values()) + biases)
    monkeypatch.setattr(sparse, "HAVE_TMA", ())
    asked.clear()
    by_pointer = run(*case, "triton", torch.float32, form=form)
    assert asked and not any(asked)
    assert all(torch.equal(got[name], by_pointer[name]) for name in got)
    assert differing(got, run(*case, "reference", form=form), 1e-5) == {}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # in columns that are never stored
def test_infinite_weights_of_one_expert_stay_with_it(monkeypatch):
    """Blocks that reach past an expert's rows must not multiply what they find there."""
    ids_TK = torch.zeros(5, 1, dtype=torch.long)
    decision = RoutingDecision.token_choice(ids_TK, torch.ones(5, 1), 2)
    for width, hidden in ((32, 48), (20, 12)):
        weights = ExpertWeights(torch.randn(2, 2 * hidden, width), torch.randn(2, width, hidden))
        for tensor in weights:
            tensor[1] = float("inf")
        x_TD = torch.randn(5, width, requires_grad=True)
        out_TD = expert_mlp(x_TD, decision, weights, "triton")
        out_TD.sum().backward()
        assert bool(out_TD.isfinite().all()) and bool(x_TD.grad.isfinite().all())


def test_bfloat16_storage_is_as_good_as_the_same_rounding_in_torch():
    """Twice the error on a GPU; the interpreter cuts bits off where a chip rounds, which doubles it once more."""
    factor = 4 if sparse.INTERPRETING else 2
    case = CASES["fixed k"]
    want = run(*case, "reference")
    got, rounded = run(*case, "triton", torch.bfloat16), run(*case, "reference", torch.bfloat16)
    for name in NAMES:
        assert relative_error(got[name], want[name]) <= factor * relative_error(rounded[name], want[name]), name


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # in rows not stored
@pytest.mark.parametrize("widths", [(20, 12), (32, 48)], ids=["by pointer", "by descriptor"])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("variable k, some unused", ALL_OF_IT),
        pytest.param("variable k, some unused", "", marks=pytest.mark.slow),
        pytest.param("over capacity dropped", ALL_OF_IT, marks=pytest.mark.slow),
        pytest.param("over capacity dropped", "", marks=pytest.mark.slow),
    ],
)
def test_rows_that_do_not_run_are_never_read(name, form, widths, monkeypatch):
    """Every new buffer starts as NaN, and so do the gates of pairs that do not run."""
    decision, (width, hidden) = CASES[name][0], widths
    runs_R = decision.kept_R & (decision.expert_ids_R < decision.num_experts)
    poisoned = replace(decision, gates_R=torch.where(runs_R, decision.gates_R, float("nan")))
    want = run(decision, width, hidden, "triton", torch.float32, form=form)

    def poison(self, like, columns):
        return like.new_full((self.rows, columns), float("nan"))

    monkeypatch.setattr(sparse._Launcher, "new_rows", poison)
    got = run(poisoned, width, hidden, "triton", torch.float32, form=form)
    assert all(torch.equal(got[n], want[n]) for n in want)


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


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_primitives_compose_to_a_linear_expert_layer(backend):
    """gather_linear and linear_combine against the plain loop, with their gradients."""
    decision, width, _ = CASES["over capacity dropped"]
    plan, generator = make_plan(decision), torch.Generator().manual_seed(3)
    leaves = [torch.randn(s, generator=generator, requires_grad=True) for s in ((20, width), (4, 5, width), (4, 3, 5))]
    gates_R = decision.gates_R.float().requires_grad_()
    upstream = torch.randn(20, 3, generator=generator)
    x_TK, first_ENK, second_ENK = leaves
    y_RN = gather_linear(x_TK, plan, first_ENK, backend)
    idle = int(plan.starts_E[-1])
    assert not bool(y_RN[idle:].any()) and len(y_RN) == len(gates_R)
    out = linear_combine(y_RN.tanh(), plan, second_ENK, gates_R, backend)
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
    experts_G, rows_G, count = plan.tiles(size)
    assert int(count) == int((experts_G >= 0).sum()) and bool((experts_G[: int(count)] >= 0).all())
    for expert, row in zip(experts_G.tolist(), rows_G.tolist(), strict=True):
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


ENTRIES = [
    tiles.Entry(chip, "bfloat16", rows_from, width, inner, tiles.Tiles(*[tiles.Tile(size, 32, 32, 4, 2)] * 5))
    for size, (chip, rows_from, width, inner) in {
        16: ("sm_90", 0, None, None),
        32: ("sm_90", 256, None, None),
        64: ("sm_90", 0, 2048, 768),
        128: ("sm_80", 0, None, None),
    }.items()
]


@pytest.mark.parametrize(
    ("problem", "size"),
    [
        (("sm_90", 10, 512, 512), 16),
        (("sm_90", 256, 512, 512), 32),
        (("sm_90", 9999, 2048, 512), 32),
        (("sm_90", 9999, 2048, 768), 64),
        (("sm_80", 9999, 2048, 768), 128),
    ],
)
def test_tiles_are_those_of_the_most_specific_line(problem, size, monkeypatch):
    monkeypatch.setattr(tiles, "pinned", lambda: ENTRIES)
    chip, rows, width, inner = problem
    picked = tiles.pick_tiles(chip, "bfloat16", rows, width, inner)
    assert picked.up == tiles.Tile(size, 32, 32, 4, 2)


def test_a_chip_or_precision_without_tiles_is_named(monkeypatch):
    monkeypatch.setattr(tiles, "pinned", lambda: ENTRIES)
    with pytest.raises(ConfigError, match="no tiles for float32 on sm_90: legal are sm_80 bfloat16, sm_90 bfloat16"):
        tiles.pick_tiles("sm_90", "float32", 10, 64, 64)


def test_table_survives_writing_and_another_entry_is_another_hash(tmp_path, monkeypatch):
    tiles.write_table(ENTRIES, tmp_path / "tiles.json")
    assert sorted(map(str, tiles.read_table(tmp_path / "tiles.json"))) == sorted(map(str, ENTRIES))
    before = tiles.table_hash()
    changed = replace(ENTRIES[0], tiles=ENTRIES[1].tiles)
    assert [e for e in tiles.with_entry(ENTRIES, changed) if e.key() == changed.key()] == [changed]
    monkeypatch.setattr(tiles, "pinned", lambda: ENTRIES)
    one = tiles.table_hash()
    monkeypatch.setattr(tiles, "pinned", lambda: tiles.with_entry(ENTRIES, changed))
    assert len({before, one, tiles.table_hash()}) == 3


def test_every_problem_finds_tiles():
    for chip in ("interpreter", "sm_80", "sm_90", "sm_100"):
        for dtype in ("float32", "bfloat16"):
            for rows in (0.1, 100, 1e6):
                assert tiles.pick_tiles(chip, dtype, rows, 96, 96)


COMPILED = """if True:
    import sys
    from rlroute.kernels import aot
    entries = [entry for entry in aot.pinned() if entry.chip == "sm_90"][:{entries}]
    sources, aot.pinned = aot.sources, lambda: entries
    def wanted(entry, tma):
        others = [word for word in aot.ACTIVATIONS if word not in ("swiglu", "swiglu_clamped")]
        for launch in sources(entry, tma):
            words = launch[0].split()
            if words[1:] != ["swiglu", "all"] and words[1:] != ["swiglu_clamped"] and not set(words) & set(others):
                yield launch
    aot.sources = wanted
    sys.exit(aot.main(90))
"""


@pytest.mark.parametrize("entries", [1, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.processes
def test_pinned_kernels_compile_for_an_h100_without_faults_and_cost_what_the_page_says(entries):
    """The plainest and the fullest, in a process of its own: what is interpreted here cannot be compiled here. All
    others, and other chips: `make aot`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED.format(entries=entries)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    page, found = (ROOT / "docs/compiled.md").read_text(), done.stdout.splitlines()
    rows = [line for line in found if line.startswith("| ") and line != aot.COLUMNS]
    assert rows and len(rows) % 9 == 0
    if page.startswith("\n".join(found[:3])):  # of the same version of triton
        assert [one for one in rows if one not in page] == []


FAULTY = {
    "spills 8 bytes": {"spilled": 8},
    "shared memory": {"shared": 300_000},
    "uses atomics": {"RED": 1},
    "misses the tensor cores": {"HGMMA": 0, "HMMA": 0},
    "misses the products of warp groups": {"HGMMA": 0},
    "misses the tensor memory accelerator": {"UTMALDG": 0},
}


@pytest.mark.parametrize(("named", "change"), FAULTY.items(), ids=FAULTY.keys())
def test_faults_of_compiled_kernels_are_found(named, change):
    counts = dict.fromkeys((*aot.TENSOR_CORE, aot.TMA_LOAD, "ATOM", "ATOMG", "RED", "REDG"), 0)
    good = aot.Compiled(
        "bfloat16 from 0 up",
        tiles.Tile(128, 128, 64, 8, 3),
        255,
        0,
        200_000,
        counts | {"HGMMA": 4, "HMMA": 4, "UTMALDG": 4},
    )
    assert aot.faults(good, 90) == []
    sizes = {name: value for name, value in change.items() if name in ("spilled", "shared")}
    instructions = good.instructions | {name: value for name, value in change.items() if name not in sizes}
    assert named in aot.faults(replace(good, instructions=instructions, **sizes), 90)[0]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [(128, 8, 98_328, 2), (134, 8, 98_328, 1), (94, 8, 98_328, 2), (128, 8, 120_000, 1), (255, 8, 0, 1), (96, 4, 0, 5)],
)
def test_blocks_of_a_multiprocessor(registers, warps, shared, blocks):
    """By hand, from the chip's tables: 65,536 registers given out by 256 a warp, 228 KiB less 1 KiB a block."""
    one = aot.Compiled("back", tiles.Tile(128, 128, 64, warps, 3), registers, 0, shared, {})
    assert one.blocks(90) == blocks
