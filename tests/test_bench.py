"""The benches compare like with like: every contender computes the same function, ratios come from the same rounds, and
what fails is said and holds up nobody."""

import argparse
import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch

from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.bench import gpu as bench_gpu
from rlroute.experiments.bench import kernels as bench_kernels
from rlroute.experiments.bench import layer as bench_layer
from rlroute.experiments.bench import peers, timing
from rlroute.experiments.bench import run as benches
from rlroute.experiments.bench import sweep as bench_sweep
from rlroute.experiments.bench.kernels import ROUTINGS, Shape, choose_experts, make_problem, parse_shape, prepare
from rlroute.experiments.bench.layer import router_shape
from rlroute.experiments.bench.peers import contenders
from rlroute.experiments.bench.timing import Contest, choose, figures, measure, peak_bytes, ratio, to_markdown
from rlroute.registry import default_names
from tests import ROOT
from tests.conftest import HANG, until
from tests.strangers import install

SHAPE = Shape(24, 16, 8, 4, 2)
PEERS = ("rlroute", "grouped_mm", "padded_bmm", "transformers_eager", "transformers_grouped_mm")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", PEERS)
def test_every_contender_computes_the_same_function(name, routing):
    if name not in contenders(cuda=False):
        pytest.skip("transformers is not installed")
    problem = make_problem(SHAPE, routing, "cpu", torch.float32)
    leaves = problem.leaves[:4]
    upstream = torch.randn(24, 16)
    results = []
    for contender in ("loop", name):
        out_TD = contenders(cuda=False)[contender](problem)()
        results.append((out_TD, *torch.autograd.grad(out_TD, leaves, upstream)))
    for want, got in zip(*results, strict=True):
        assert torch.allclose(want, got, rtol=1e-4, atol=1e-5)


def test_dense_denominator_has_the_flops_of_the_pairs():
    problem = make_problem(SHAPE, "balanced", "cpu", torch.float32)
    dense_weights = sum(w.numel() for w in problem.dense)
    assert dense_weights * SHAPE.T == 3 * SHAPE.T * SHAPE.K * SHAPE.D * SHAPE.F


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_are_what_they_are_called(routing):
    shape = Shape(800, 16, 8, 8, 2)
    ids_TK = choose_experts(routing, shape, torch.Generator().manual_seed(0))
    assert bool((ids_TK[:, 0] != ids_TK[:, 1]).all())
    load_E = torch.bincount(ids_TK.flatten(), minlength=8)
    spread = int(load_E.max() - load_E.min())
    assert {"balanced": spread == 0, "zipf": spread > 200, "collapsed": int((load_E > 0).sum()) == 2}[routing]


# Measuring.


def test_ratio_is_of_the_same_rounds():
    """A machine that slows down by the round disturbs both alike: paired, the ratio is exact."""
    base = [1.0, 2.0, 4.0, 8.0]
    twice = ratio([2 * s for s in base], base)
    assert twice["low"] == twice["mean"] == twice["high"] == pytest.approx(2)
    assert ratio([2.0, 2.0, 2.0, 2.0], base)["low"] < 1 < ratio([2.0, 2.0, 2.0, 2.0], base)["high"]


def made_up(monkeypatch, seconds):
    """Let a call's time be what ``seconds`` says of it."""
    monkeypatch.setattr(timing, "_cpu_seconds", lambda call: seconds[call()])
    return {name: partial(str, name) for name in seconds}


def test_who_is_hopeless_in_three_rounds_is_not_called_again(monkeypatch):
    calls = made_up(monkeypatch, {"ours": 1.0, "close": 3.9, "hopeless": 4.1})
    contest = measure(calls, "ours", 10, cuda=False)
    assert {name: len(values) for name, values in contest.seconds.items()} == {"ours": 10, "close": 10, "hopeless": 3}
    rows = figures(contest, "ours", "close", tokens=8)
    assert rows["hopeless"]["rounds"] == 3 and rows["hopeless"]["speed_of_ours"]["mean"] == pytest.approx(4.1)
    assert rows["ours"]["tokens_per_second"] == 8 and rows["ours"]["time_over_base"]["mean"] == pytest.approx(1 / 3.9)


def test_every_round_has_its_own_order():
    seen = []
    measure({name: partial(seen.append, name) for name in "abcd"}, "a", 20, cuda=False)
    rounds = [tuple(seen[i : i + 4]) for i in range(0, len(seen), 4)]
    assert all(sorted(one) == list("abcd") for one in rounds) and len(set(rounds)) > 10


def test_a_failing_peer_is_recorded_and_a_failing_kernel_is_an_error():
    def fail():
        raise MemoryError("too much\nof it")

    contest = measure({"ours": str, "peer": fail}, "ours", 2, cuda=False)
    assert contest.failed == {"peer": "MemoryError: too much of it"} and list(contest.seconds) == ["ours"]
    with pytest.raises(MemoryError):
        measure({"ours": fail, "peer": str}, "ours", 2, cuda=False)


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    problem = make_problem(SHAPE, "balanced", "cpu", torch.float32)
    wrong = {"gateless": lambda p: 2 * peers.loop(p), "broken": lambda p: 1 / 0}
    monkeypatch.setattr(peers, "EVERYWHERE", peers.EVERYWHERE | wrong)
    calls, failed = prepare(problem, ["dense", "rlroute", "loop", *wrong])
    assert list(calls) == ["dense", "rlroute", "loop"]
    assert "computes something else: output is off by" in failed["gateless"]
    assert failed["broken"] == "ZeroDivisionError: division by zero"


def test_peak_memory_counts_what_is_held_at_once():
    def work():
        for _ in range(3):
            a = torch.empty(2**18)
            b = torch.empty(2**18)
            del a, b

    assert 2**21 <= peak_bytes(work, cuda=False) < 2**21 + 2**16


def test_peak_memory_of_a_pass_is_the_same_again():
    problem = make_problem(Shape(256, 64, 64, 4, 2), "balanced", "cpu", torch.float32)
    both = bench_kernels.passes(problem, lambda: peers.ours(problem))["forward+backward"]
    weights = sum(leaf.numel() for leaf in problem.leaves[:4]) * 4
    first, second = (peak_bytes(both, cuda=False) for _ in range(2))
    assert first == second > weights


# The commands.


def run(bench, tmp_path, **changes):
    wanted = {"shapes": ["24,16,8,4,2"], "rounds": 2, "minutes": 60, "out": tmp_path / "out" / "bench.json"} | changes
    return bench(benches.Wanted(command="rlroute bench", **wanted))


def test_kernels_bench_is_complete_and_its_table_is_in_its_file(tmp_path):
    text = run(benches.kernels, tmp_path)
    stored = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(r["routing"], r["direction"]) for r in stored["rows"]] == [
        (routing, direction) for routing in ROUTINGS for direction in bench_kernels.DIRECTIONS
    ]
    assert stored["environment"]["tile_table"] and stored["environment"]["kernel_backend"] == "cpu"
    for row in stored["rows"]:
        assert set(row["contenders"]) == set(contenders(cuda=False))
        assert all(values["peak_bytes"] > 0 for values in row["contenders"].values())
    assert text == to_markdown(stored) == (tmp_path / "out" / "bench.md").read_text()
    assert text.strip() == benches.read_table(tmp_path / "out" / "bench.json").strip()


def test_layer_bench_takes_every_router(tmp_path):
    run(benches.layer, tmp_path, names=default_names())
    stored = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["direction"] for row in stored["rows"]] == ["forward", "training"]
    for row in stored["rows"]:
        assert set(row["contenders"]) == {"dense", *default_names()}
        assert not [values for values in row["contenders"].values() if "failed" in values]


def layer_passes(entry, x_TD):
    config = bench_layer.config_of(entry, SHAPE, "cpu")
    return bench_layer._passes(config, SHAPE, x_TD, bench_layer.Experts(config.model, 0, 0, range(SHAPE.E), SHAPE.F))


def test_layer_training_is_that_of_the_loop():
    """Bias balancing moves its bias, REINFORCE its running mean: observe and adapt are part of the work."""
    x_TD = torch.randn(24, 16)
    for entry, buffer in (("bias_balanced", "bias_E"), ("reinforce", "started")):
        made = []

        class Layer(bench_layer.MoELayer):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                made.append(self)  # noqa: B023 (used within the loop)

        original, bench_layer.MoELayer = bench_layer.MoELayer, Layer
        try:
            work = layer_passes(entry, x_TD)
        finally:
            bench_layer.MoELayer = original
        state = {name: value for name, value in made[0].router.named_buffers() if buffer in name}
        assert state and not any(value.any() for value in state.values())
        work["forward"]()
        assert not any(value.any() for value in state.values())
        gradients = []
        made[0].experts.in_EHD.register_post_accumulate_grad_hook(lambda p, seen=gradients: seen.append(p.grad.clone()))
        work["training"]()
        assert any(value.any() for value in state.values())
        assert gradients[0].any() and made[0].experts.in_EHD.grad is None


def test_layer_bench_leaves_out_who_refuses_a_shape_and_says_so(monkeypatch, tmp_path, capsys):
    install(monkeypatch, "picky")
    run(benches.layer, tmp_path)
    stored = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert set(stored["rows"][0]["contenders"]) == {"dense", *default_names()} - {"picky"}
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "left out" in line)
    assert said == "left out: picky (num_experts = 4 at site 1: legal are 5 behind another site)"


def test_layer_bench_refuses_who_is_named_and_refuses_a_shape_before_any_work(monkeypatch, tmp_path):
    install(monkeypatch, "picky")
    with pytest.raises(ConfigError, match="router picky: num_experts = 4"):
        run(benches.layer, tmp_path, names=["hash", "picky"])
    assert not list(tmp_path.iterdir())


def test_layer_bench_takes_any_choice_and_its_routers_see_their_credit(monkeypatch, tmp_path):
    install(monkeypatch, "threshold_like", "expert_choice_like")
    run(benches.layer, tmp_path, names=["threshold_like", "threshold_like:threshold=1.5", "expert_choice_like"])
    for row in json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]:
        assert not [values for values in row["contenders"].values() if "failed" in values]
    router = bench_layer.make_router(bench_layer.config_of("threshold_like", SHAPE, "cpu").router, router_shape(SHAPE))
    monkeypatch.setattr(bench_layer, "make_router", lambda config, shape: router)
    layer_passes("threshold_like", torch.randn(24, 16))["training"]()
    assert router.seen["credit"][0] > 0


def test_time_is_up_after_a_row_and_what_was_measured_is_kept(tmp_path):
    path = tmp_path / "bench.json"
    run(benches.kernels, tmp_path, names=["dense"], minutes=0, out=path)
    assert len(json.loads(path.read_text())["rows"]) == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shapes": ["1,2,3"]}, "shape '1,2,3': want T,D,F,E,K"),
        ({"shapes": ["24,16,8,4,0"]}, "want T,D,F,E,K as five positive numbers"),
        ({"shapes": ["24,16,8,2,4"]}, "K = 4 exceeds E = 2"),
        ({"routings": ["skewed"]}, "routing 'skewed': legal are balanced, zipf, collapsed"),
        ({"names": ["megablocks"]}, "contender 'megablocks': legal are dense, rlroute"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_what_is_not_there_is_refused_before_any_work(changes, named, tmp_path):
    if torch.cuda.is_available() and "device" in changes:
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=named):
        run(benches.kernels, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_layer_refuses_what_it_does_not_take(tmp_path):
    with pytest.raises(ConfigError, match="takes none"):
        run(benches.layer, tmp_path, routings=["zipf"])
    with pytest.raises(ConfigError, match="nobody"):
        run(benches.layer, tmp_path, names=["nobody"])
    with pytest.raises(StoreError, match="is not a bench's result"):
        benches.read_table(tmp_path / "nothing.json")
    assert choose((), ["a", "b"], "x") == ["a", "b"] and choose(["b"], ["a", "b"], "x") == ["b"]
    assert parse_shape("1,2,3,4,4") == Shape(1, 2, 3, 4, 4)


def test_figures_of_a_failure_are_its_reason():
    assert figures(Contest({"ours": [1.0, 1.0]}, {"peer": "why"}), "ours", "ours")["peer"] == {"failed": "why"}


# What a machine with a card runs.


@pytest.mark.slow
@pytest.mark.processes
def test_the_gpu_command_runs_without_the_command_line_s_packages(tmp_path):
    missing = ("ray", "tyro", "gymnasium", "wandb", "plotly")
    for name in missing:
        (tmp_path / "without" / name).mkdir(parents=True)
        (tmp_path / "without" / name / "__init__.py").write_text(f"raise ImportError('no {name} here')\n")
    command = [
        sys.executable,
        "-m",
        "rlroute.experiments.bench.gpu",
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(tmp_path / "out"),
    ]
    own = os.environ | {"PYTHONPATH": f"{tmp_path / 'without'}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [step["outcome"] for step in summary["steps"].values()] == ["passed"] * 5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "tests.txt",
        "kernels.json",
        "kernels.md",
        "layer.json",
        "layer.md",
        "comparison.jsonl",
        "step.json",
    } <= names
    assert bench_kernels.BASE in (tmp_path / "out" / "kernels.md").read_text()


@pytest.mark.processes
def test_a_step_that_is_stopped_leaves_no_process(tmp_path):
    """Neither its own nor one that it started, which would go on beside the steps that follow."""
    child = "import time; print('there', flush=True); time.sleep(10**6)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], stdout=open('said', 'w'))"
    code = f"import os; os.chdir({str(tmp_path)!r}); open('group', 'w').write(str(os.getpgid(0))); {parent}"
    limit = 1.0
    while not ((tmp_path / "said").exists() and (tmp_path / "said").read_text()):  # it was stopped before it got there
        assert bench_gpu.run_within(limit, [sys.executable, "-c", code], dict(os.environ)) is None and limit < HANG
        limit *= 2
    group = int((tmp_path / "group").read_text())
    with pytest.raises(ProcessLookupError):
        until(lambda: os.killpg(group, 0))
    assert bench_gpu.run_within(HANG, [sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == 3


def test_the_gpu_command_names_the_steps_there_are(capsys):
    assert bench_gpu._steps("layer,tests") == ["tests", "layer"] and bench_gpu._steps("") == list(bench_gpu.STEPS)
    with pytest.raises(argparse.ArgumentTypeError, match="'kernel': legal are tests, kernels, layer, comparison, step"):
        bench_gpu._steps("kernel")


@pytest.mark.parametrize(("page", "tables"), [("kernels.md", 2), ("parallel.md", 1)])
def test_the_tables_of_the_documentation_are_those_of_the_stored_results(page, tables):
    text = (ROOT / "docs" / page).read_text()
    shown = re.findall(r"<!-- bench: (\S+) -->\n(.*?)<!-- end of bench -->", text, re.S)
    assert len(shown) == tables
    for path, table in shown:
        stored = json.loads((ROOT / path).read_text())
        assert table == to_markdown(stored) == (ROOT / path).with_suffix(".md").read_text()
        assert not stored["environment"]["dirty"] and stored["rounds"] >= 15


def test_what_the_documentation_says_of_ray_is_what_was_measured():
    ((path, text),) = re.findall(
        r"<!-- bench: (\S+) -->\n(.*?)\n<!-- end of bench -->", (ROOT / "docs" / "sweeps.md").read_text(), re.S
    )
    stored = json.loads((ROOT / path).read_text())
    assert text == bench_sweep.to_text(stored) and not stored["environment"]["dirty"]
