"""Many processes compute the model of one: decisions pair for pair, losses, gradients, checkpoints, and failures that
all agree on.

Longer than most: starting ranks costs seconds, so that what they prove shares models and starts.

Ranks are real processes over gloo, started without Ray; what Ray adds is in ``test_workers``.

Shape suffixes: T tokens, D model width, E experts, K experts per token, R pairs.
"""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from rlroute.config import DataConfig, ModelConfig, RouterConfig, TrainConfig
from rlroute.errors import CheckpointError, ComparisonError, ConfigError, StoreError
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.recipes.entries import build_entry
from rlroute.kernels import ExpertWeights
from rlroute.learning import adapt
from rlroute.model import ModelShape, Transformer
from rlroute.model.accounting import costs, fingerprints, is_expert
from rlroute.model.moe import HERE
from rlroute.parallel.local import run_ranks
from rlroute.parallel.mesh import Mesh, WorkerError, check_mesh
from rlroute.reading import read_runs
from rlroute.records import RunFolder
from rlroute.registry import default_names
from rlroute.routing import LinearScores, Router, RoutingDecision
from rlroute.schema import untimed
from rlroute.training import checkpoint, loop, manifest, prepare
from rlroute.training.batches import sample_batch
from rlroute.training.data import load_corpus
from rlroute.training.group import ALONE
from rlroute.training.optimizer import Optimizer
from rlroute.training.step import Device, backward_batch
from tests.conftest import capped, draw, make_context
from tests.runs import interrupted

pytestmark = pytest.mark.processes

DATA = DataConfig(
    spec="synth:documents=64,length=64", seq_len=16, eval_tokens=160
)  # five micro-batches of two sequences
MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=8, k=2, d_expert=8)
TRAIN = TrainConfig(steps=12, batch_size=8, micro_batches=4, warmup_steps=2, dtype="float64")
VARIANTS = [
    "reinforce:baseline=leave_one_out,charge_weight=0.1",
    "reinforce:discount=0.9",
    "capacity",
    "expert_choice",
    "shared",
    "topk:groups=0,groups_kept=2,group_score=max",
    "free",
    "dense",
]
STEPS = 6
APART = 1e-9
"""How far sums in another order come apart in so many steps, on any instruction set: figures are about 10."""


class ExpertChoiceRouter(Router):
    """Each expert takes its two best tokens of eight: no fixed k, tokens without experts, experts that share tokens."""

    @classmethod
    def make(cls, shape):
        return cls(RouterConfig(), shape)

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 1.0)

    def forward(self, x_TD, context):
        noise_TE = context.noise(
            "tie", (self.shape.num_experts,)
        )  # equal tokens have equal scores, and rounding would choose
        probs_TE = (self.scores(x_TD) + 0.1 * noise_TE).softmax(1)
        gates_EC, ids_EC = probs_TE.t().topk(max(1, len(x_TD) // 4), dim=1)
        return RoutingDecision.expert_choice(ids_EC, gates_EC, len(x_TD), probs_TE=probs_TE)


def config_of(entry, **train):
    changed = {
        "capacity": {"capacity_factor": 1.0},
        "shared": {"num_shared_experts": 1, "tie_embeddings": True, "kv_rank": 8, "mixers": "gated_delta+attention"},
        "free": {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2, "capacity_factor": 1.0},
        "topk:groups=0": {"devices": 4},
    }
    model = replace(MODEL, **changed.get(entry.partition(",")[0], {}))
    name = {"capacity": "switch", "shared": "switch", "free": "switch", "expert_choice": "uniform"}.get(entry, entry)
    return build_entry(name, DATA, model, replace(TRAIN, **train))


def model_of(entry, config, corpus, group):
    if entry != "expert_choice":
        return prepare.build_model(config, corpus, 0, group)
    shape = ModelShape(vocab_size=corpus.vocab_size, seq_len=16, seed=0, backend="cpu", placement=group.placement)
    return Transformer(config.model, shape, ExpertChoiceRouter.make).double()


def trained(entry, group, **train):
    """Train some steps; return losses, gradient norms, objective terms, and the chosen experts by step, micro-batch and
    layer.
    """
    config, corpus = config_of(entry, **train), load_corpus(DATA.spec)
    model = model_of(entry, config, corpus, group)
    optimizer, device = Optimizer(model, config.train, group), Device("cpu", loop.DTYPES[config.train.dtype])
    chosen, figures = [], []
    for router in model.routers:
        router.register_forward_hook(lambda module, inputs, decision: chosen.append(decision.expert_ids_R.clone()))
    for step in range(STEPS):
        batch = sample_batch(corpus, seed=0, step=step, batch_size=8, seq_len=16)
        parts = {"micro_batches": config.train.micro_batches, "scope": config.train.balance_scope}
        result = backward_batch(model, batch, device, seed=0, step=step, group=group, **parts)
        norms = optimizer.step(step, step / STEPS)
        adapt(model.routers, result.sums_L, step / STEPS)
        terms = [value for values in result.terms.values() for value in values]
        figures.append([result.loss, norms["grad_norm"], norms["router_grad_norm"], *terms])
    state = {name: group.whole(v) if is_expert(name) else v for name, v in model.state_dict().items()}
    return {
        "figures": torch.tensor(figures, dtype=torch.float64),
        "chosen": torch.stack(chosen).view(STEPS, -1, len(model.routers), chosen[0].numel())
        if chosen
        else torch.empty(1, 0),
        "state": state,
    }


def all_trained(entries, expert_parallel, chunks, train):
    group = Mesh(expert_parallel, chunks=chunks)
    return [trained(entry, group, **train) for entry in entries]


@pytest.fixture(scope="module")
def alone():
    """What one process computes, by entry."""
    return {entry: trained(entry, ALONE) for entry in [*default_names(), *VARIANTS]}


@pytest.mark.parametrize(
    ("workers", "expert_parallel", "chunks"), [(2, 2, 1), pytest.param(4, 2, 1, marks=pytest.mark.slow)]
)
def test_workers_equal_one_process_for_every_router(workers, expert_parallel, chunks, alone):
    assert_equal_to(alone, workers, expert_parallel, chunks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "expert_parallel", "chunks"), [(1, 1, 1), (2, 1, 1), pytest.param(4, 4, 2, marks=pytest.mark.slow)]
)
def test_other_meshes_and_chunks_compute_the_same(workers, expert_parallel, chunks, alone):
    assert_equal_to({entry: alone[entry] for entry in ("switch", *VARIANTS)}, workers, expert_parallel, chunks)


def assert_equal_to(alone, workers, expert_parallel, chunks):
    ranks = run_ranks(all_trained, workers, list(alone), expert_parallel, chunks, {})
    for index, (entry, expected) in enumerate(alone.items()):
        mine = [rank[index] for rank in ranks]
        for rank in mine:
            assert (rank["figures"] - expected["figures"]).abs().max() < APART, entry
            for name, value in expected["state"].items():
                torch.testing.assert_close(rank["state"][name], value, rtol=0, atol=APART, msg=f"{entry} {name}")
        chosen = torch.cat([rank["chosen"] for rank in mine], dim=1)
        assert torch.equal(chosen, expected["chosen"]), entry


def all_parts(parts):
    group = Mesh(2)
    return [trained("switch", group, parts=part) for part in parts]


def test_what_is_frozen_is_so_in_every_shard():
    parts = ["non-moe", "moe", "router"]
    ranks = run_ranks(all_parts, 2, parts)
    for index, part in enumerate(parts):
        expected = trained("switch", ALONE, parts=part)
        for rank in (rank[index] for rank in ranks):
            assert (rank["figures"] - expected["figures"]).abs().max() < 1e-10, part
            for name, value in expected["state"].items():
                torch.testing.assert_close(rank["state"][name], value, rtol=0, atol=1e-10, msg=f"{part} {name}")


@pytest.mark.slow
def test_float32_differs_in_rounding_only():
    entries = ["switch", "bias_balanced", "reinforce"]
    ranks = run_ranks(all_trained, 2, entries, 2, 1, {"dtype": "float32"})
    for index, entry in enumerate(entries):
        expected = trained(entry, ALONE, dtype="float32")
        chosen = torch.cat([rank[index]["chosen"] for rank in ranks], dim=1)
        assert (chosen == expected["chosen"]).double().mean() >= 0.999, entry
        assert abs(ranks[0][index]["figures"][-1, 0] - expected["figures"][-1, 0]) < 1e-4, entry


def test_balance_over_the_batch_is_that_of_one_process_with_the_whole_batch():
    entries = ["switch", "noisy_topk", "reinforce:charge_weight=0.1"]
    ranks = run_ranks(all_trained, 2, entries, 2, 1, {"micro_batches": 2, "balance_scope": "batch"})
    for index, entry in enumerate(entries):
        expected = trained(entry, ALONE, micro_batches=1)["figures"]
        assert (ranks[1][index]["figures"] - expected).abs().max() < 1e-10, entry
        cut = trained(entry, ALONE, micro_batches=2)["figures"]
        assert (cut - expected).abs().max() > 1e-6, f"{entry} does not depend on the scope, so this shows nothing"


# --- dispatch
# -------------------------------------------------------------------------------------------------------------------


def decision_of(kind, seed):
    """A decision over 6 experts of 9 tokens of this rank: spread, one expert for all, dropped pairs, unused slots, none
    kept.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(9, 6, generator=generator).topk(3).indices
    if kind == "collapsed":
        ids_TK = torch.tensor([[5, 1, 2]]).expand(9, 3).contiguous()
    if kind == "unused":
        ids_TK[::2, 1] = 6
    gates_TK = torch.rand(9, 3, generator=generator, dtype=torch.float64).requires_grad_()
    decision = RoutingDecision.token_choice(ids_TK, gates_TK, 6)
    if kind == "dropped":
        decision = capped(decision, 3)
    if kind == "none kept":
        decision = replace(decision, kept_R=torch.zeros_like(decision.kept_R))
    decision.gates_R.retain_grad()
    return decision


def dispatched(kind, chunks):
    """Return this rank's output and gradients, and the traffic, next to those of the plain kernel with all experts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = Mesh(ranks, chunks=chunks)
    weights = [draw(6, 8, 5, seed=1), draw(6, 5, 4, seed=2)]
    held = mesh.placement.held(6)
    outcomes = []
    for start, rows in ((mesh.placement.start, slice(held.start, held.stop)), (HERE.start, slice(0, 6))):
        x_TD, mine = draw(9, 5, seed=10 + rank).requires_grad_(), [w[rows].clone().requires_grad_() for w in weights]
        decision = decision_of(kind, rank)
        out_TD = start(x_TD, decision, ExpertWeights(*mine), "cpu", "swiglu")()
        out_TD.backward(draw(9, 5, seed=20 + rank))
        outcomes.append((out_TD.detach(), x_TD.grad, decision.gates_R.grad, [w.grad for w in mine]))
    for gradient in outcomes[1][3]:  # of all ranks' tokens
        dist.all_reduce(gradient)
    outcomes[1] = (*outcomes[1][:3], [gradient[held.start : held.stop] for gradient in outcomes[1][3]])
    away = decision.kept_R & (decision.expert_ids_R < 6)
    away &= (decision.expert_ids_R < held.start) | (decision.expert_ids_R >= held.stop)
    return outcomes, mesh.traffic(), int(away.sum())


KINDS, CHUNKS = ("spread", "collapsed", "dropped", "unused", "none kept"), (0, 1, 2, 5)


def all_dispatched():
    return {(kind, chunks): dispatched(kind, chunks) for kind in KINDS for chunks in CHUNKS}


@pytest.fixture(scope="module")
def dispatches():
    return run_ranks(all_dispatched, 3)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_equals_the_kernel_with_all_experts(kind, chunks, dispatches):
    ranks = [rank[kind, chunks] for rank in dispatches]
    for (mine, expected), traffic, _ in ranks:
        for got, want in zip([*mine[:3], *mine[3]], [*expected[:3], *expected[3]], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        sent = sum(away for *_, away in ranks)  # out and home, forward and backward, rows of 5 float64
        assert traffic["bytes"] == 4 * sent * 5 * 8


def devices():
    """Return the devices of the experts as routers see them, with two shards and with one."""
    groups, config = [Mesh(shards) for shards in (2, 1)], config_of("switch")
    models = [model_of("switch", config, load_corpus(DATA.spec), group) for group in groups]
    return [make_context().at(model.routers[0].shape, {}).expert_device_E for model in models]


def test_routers_see_the_devices_of_the_experts():
    two, one = run_ranks(devices, 2)[1]
    assert two.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and one is None


@pytest.mark.slow
def test_balance_by_device_sees_real_devices_and_evens_their_loads():
    entries = [f"switch:balance_weight=0,device_balance_weight={weight}" for weight in (0.0, 10.0)]
    spread = []
    for one in run_ranks(all_trained, 2, entries, 2, 1, {})[0]:
        demand_E = torch.bincount(one["chosen"][-8:].flatten(), minlength=8).double()
        by_device = demand_E.view(2, 4).sum(1) / demand_E.sum()
        spread.append(float((by_device - 0.5).abs().max()))
    assert spread[1] < 0.5 * spread[0]


def described(expert_parallel):
    group, config = Mesh(expert_parallel), config_of("switch")
    model = model_of("switch", config, load_corpus(DATA.spec), group)
    return fingerprints(model, config.model, group.whole), costs(model, config.model, DATA.seq_len)


def test_identity_and_costs_do_not_depend_on_the_shards():
    config = config_of("switch")
    model = model_of("switch", config, load_corpus(DATA.spec), ALONE)
    assert (
        run_ranks(described, 2, 2)
        == [(fingerprints(model, config.model), costs(model, config.model, DATA.seq_len))] * 2
    )


# --- runs, checkpoints, failures
# ------------------------------------------------------------------------------------------------


def run(store, expert_parallel, entry, stop=None):
    """Train a run of 8 steps; ``stop`` interrupts it after that step, on all ranks."""
    config = config_of(entry, steps=8, eval_every=4, log_every=1, checkpoint_every=4)
    group = Mesh(expert_parallel) if expert_parallel else ALONE
    if stop is not None:
        return interrupted(config, store, stop, group=group)
    return loop.train(config, 0, store, group=group)


@pytest.mark.parametrize("entry", [pytest.param("bias_balanced", marks=pytest.mark.slow), "noisy_topk"])
def test_a_run_of_workers_leaves_the_record_of_one(entry, tmp_path):
    summary = run(tmp_path / "one", None, entry)
    assert run_ranks(run, 2, tmp_path / "two", 2, entry)[0]["final"] is not None
    records = [RunFolder(tmp_path / name, config_of(entry, **eight()), 0).read() for name in ("one", "two")]
    one, two = (untimed(record.summary) | {"final": None} for record in records)
    mine, theirs = (part["measured"].pop("regret") for part in (one, two))  # a sum, as the loss is
    assert mine["nats"] > 0 and all(theirs[name] == pytest.approx(mine[name], abs=1e-10) for name in mine)
    assert one == two
    for a, b in zip(records[0].evals, records[1].evals, strict=True):
        assert a["chain"] == b["chain"] and a["load_LE"] == b["load_LE"] and a["dead_L"] == b["dead_L"]
        assert abs(a["loss"] - b["loss"]) < 1e-10
        assert (a["sampled"] is None) == (b["sampled"] is None)
    if summary["final"]["sampled"]:
        for name, value in summary["final"]["sampled"].items():
            assert records[1].evals[-1]["sampled"][name] == pytest.approx(value, abs=1e-10)
    assert records[0].loads == records[1].loads
    assert records[1].environment["workers"] == 2 and records[1].environment["expert_parallel"] == 2
    traffic = records[1].train[-1]["traffic"]
    assert traffic["bytes"] > 0 and traffic["seconds"] > 0 and len(traffic["device_max_vio_L"]) == 2
    assert "traffic" not in records[0].train[-1]


def eight():
    return {"steps": 8, "eval_every": 4, "log_every": 1, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The store of a run of two shards that was stopped after five steps; nobody may change it."""
    store = tmp_path_factory.mktemp("halves")
    run_ranks(run, 2, store, 2, "switch", 5)
    return store


def test_a_run_that_went_on_with_other_workers_says_so_and_enters_no_table_of_either(halves, tmp_path):
    shutil.copytree(halves, tmp_path / "cut")
    run(tmp_path / "cut", None, "switch", 7)
    run(tmp_path / "cut", None, "switch")
    run(tmp_path / "one", None, "uniform")
    records = [read_runs(tmp_path / name)[0] for name in ("cut", "one")]
    assert records[0].environment["workers"] == records[0].environment["expert_parallel"] == "2, then 1"
    assert records[0].environment["torch"] == records[1].environment["torch"]
    with pytest.raises(ComparisonError, match=r"environment\.workers"):
        build_table(records)


@pytest.fixture(scope="module")
def quarters(tmp_path_factory):
    """The store of a run of four shards that was stopped after five steps, and the summary of the whole run in one
    process.
    """
    folder = tmp_path_factory.mktemp("quarters")
    run_ranks(run, 4, folder / "cut", 4, "bias_balanced", 5)
    return folder / "cut", run(folder / "whole", None, "bias_balanced")


@pytest.mark.parametrize(
    ("workers", "expert_parallel"), [pytest.param(4, 4, marks=pytest.mark.slow), (2, 2), (1, None)]
)
def test_a_checkpoint_of_four_shards_goes_on_at_any_number(workers, expert_parallel, quarters, tmp_path):
    cut, whole = quarters
    shutil.copytree(cut, tmp_path / "cut")
    files = sorted(p.name for p in tmp_path.glob("cut/*/checkpoint-00000004/*"))
    shards = [f"{n}-{i}-of-4.{s}" for n, s in (("model", "safetensors"), ("trainer", "pt")) for i in range(1, 5)]
    assert files == ["manifest.json", *shards]
    arguments = (tmp_path / "cut", expert_parallel, "bias_balanced")
    summary = run(*arguments) if workers == 1 else run_ranks(run, workers, *arguments)[0]
    assert abs(summary["final"]["loss"] - whole["final"]["loss"]) < 1e-10
    assert summary["batches"] == whole["batches"]
    rows = [json.loads(line)["step"] for line in next(tmp_path.glob("cut/*/loads.jsonl")).read_text().splitlines()]
    assert rows == list(range(1, 9))


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SHARDS = {
    "missing weights": lambda p: (p / "model-2-of-2.safetensors").unlink(),
    "missing state": lambda p: (p / "trainer-2-of-2.pt").unlink(),
    "truncated": lambda p: os.truncate(p / "trainer-2-of-2.pt", 1000),
    "a bit of the second weights": lambda p: flipped(p / "model-2-of-2.safetensors"),
    "a bit of the second state": lambda p: flipped(p / "trainer-2-of-2.pt"),
    "a third": lambda p: shutil.copy(p / "model-2-of-2.safetensors", p / "model-3-of-3.safetensors"),
    "the first twice": lambda p: shutil.copy(p / "model-1-of-2.safetensors", p / "model-2-of-2.safetensors"),
    "other numbers": lambda p: [f.rename(p / f.name.replace("of-2", "of-4")) for f in p.glob("*-of-2.*")],
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_are_not_as_they_were_written_are_refused(case, halves, tmp_path):
    shutil.copytree(halves, tmp_path, dirs_exist_ok=True)
    SHARDS[case](next(tmp_path.glob("*/checkpoint-*")))
    with pytest.raises(CheckpointError, match=r"checkpoint-00000004: .*(of-[234]|manifest)"):
        run(tmp_path, None, "switch")


def resumed(store):
    """Go on from two checkpoints, the newest of which only the second rank cannot read; return where both stand."""
    read = manifest.Manifest.read

    def fail(self, folder, name, most):
        if dist.get_rank() == 1 and folder.name == "checkpoint-00000008":
            raise OSError(5, "Input/output error")
        return read(self, folder, name, most)

    manifest.Manifest.read = fail
    config = config_of("switch", steps=12, eval_every=4, log_every=1, checkpoint_every=4)
    group = Mesh(2)
    model = prepare.build_model(config, load_corpus(DATA.spec), 0, group)
    optimizer = Optimizer(model, config.train, group)
    found, damaged = checkpoint.load_checkpoint(store / config.run_id(0), model, optimizer, config.run_id(0), group)
    return found.step, damaged


def stopped(store):
    """Train twelve steps, and stop after ten."""
    interrupted(config_of("switch", steps=12, eval_every=4, log_every=1, checkpoint_every=4), store, 10, group=Mesh(2))


@pytest.mark.slow
def test_ranks_take_the_same_checkpoint_though_only_one_cannot_read_the_newest(tmp_path):
    run_ranks(stopped, 2, tmp_path)
    (one, said), (other, seen) = run_ranks(resumed, 2, tmp_path)
    assert one == other == 4
    assert "another worker" in said[0] and "Input/output error" in seen[0]


def failing_checkpoint(store):
    """The second rank's disk is full at the second checkpoint; return what each rank raised."""
    write, calls = checkpoint._write_shard, []

    def fail(*arguments):
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    checkpoint._write_shard = fail
    try:
        run(store, 2, "switch")
    except (StoreError, WorkerError) as error:
        return type(error).__name__
    return None


@pytest.mark.slow
def test_a_checkpoint_that_one_rank_cannot_write_is_none_and_the_one_before_stays(tmp_path):
    assert run_ranks(failing_checkpoint, 2, tmp_path) == ["WorkerError", "StoreError"]
    assert [p.name for p in tmp_path.glob("*/*checkpoint-*")] == ["checkpoint-00000004"]
    whole = run(tmp_path / "whole", None, "switch")
    resumed = run(tmp_path, None, "switch")
    assert abs(resumed["final"]["loss"] - whole["final"]["loss"]) < 1e-10


@pytest.mark.parametrize(
    ("change", "workers", "message"),
    [
        ({"micro_batches": 2}, 4, "micro_batches = 2: must be a multiple of the 4 workers"),
        ({"micro_batches": 8, "balance_scope": "batch"}, 4, "micro_batches = 8: needs as many workers, not 4"),
        ({"balance_scope": "all"}, 4, "balance_scope = 'all': legal are 'micro_batch', 'batch'"),
    ],
)
def test_a_step_that_cannot_be_shared_is_refused(change, workers, message):
    with pytest.raises(ConfigError, match=message):
        prepare.check_shares(config_of("switch", **change), workers)


def test_experts_that_cannot_be_cut_are_refused():
    with pytest.raises(ConfigError, match="3 workers with expert parallelism 2"):
        check_mesh(3, 2)
    with pytest.raises(ConfigError, match="num_experts = 8: must be a multiple of the 3 expert shards"):
        replace(ALONE.placement, shards=3).held(8)
