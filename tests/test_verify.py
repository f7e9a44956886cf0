"""Every edit of a record is caught and named; an untouched one is passed over in silence.

One small comparison is trained for all tests; each edits a copy of it.
"""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from rlroute import seal
from rlroute.config import DataConfig, ModelConfig, TrainConfig, content_hash, run_id
from rlroute.errors import StoreError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.verify.store import verify
from rlroute.reading import read_runs
from rlroute.records import write_compact
from tests import ROOT
from tests.commands import TINY, contents, ran, refused, rlroute
from tests.test_identity import checkout, git, head
from tests.test_include import SOURCE

SEEDS = 2
COMPARE = ("compare", "switch", "hash", "dense", "reinforce", *TINY, "--seeds", SEEDS, "--launcher", "local")
FILES = {"config": "config.json", "environment": "environment.json", "summary": "summary.json"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a store of eight runs; nobody may change it."""
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran(*COMPARE)
        ran("export", "all.jsonl")
    return folder


@pytest.fixture
def store(trained, tmp_path):
    """A copy of the store, to be edited."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def few(trained, tmp_path):
    """A copy of one entry's runs, to be edited, and of another run beside them; it misses the others."""
    for run in [*(trained / "runs").glob("switch-*"), run_of(trained / "runs", "hash")]:
        shutil.copytree(run, tmp_path / "runs" / run.name)
    return tmp_path / "runs"


def run_of(store: Path, router: str = "switch", seed: int = 0) -> Path:
    return next(store.glob(f"{router}-*-s{seed}"))


class Edit:
    """The files of a run, changed in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, Any] = {name: json.loads((folder / file).read_text()) for name, file in FILES.items()}
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        self.parts["metrics"] = [json.loads(line) for line in lines]

    def set(self, path: str, value: Any) -> "Edit":
        """Set a field; a path through ``evals`` goes to the last evaluation, in both places."""
        part, *names, last = path.split(".")
        targets = [self.parts[part]] if part != "evals" else [self.parts["summary"]["final"], self.evals[-1]]
        for target in targets:
            for name in names:
                target = target[int(name) if isinstance(target, list) else name]
            key = int(last) if isinstance(target, list) else last
            target[key] = value(target[key]) if callable(value) else value
        return self

    @property
    def evals(self) -> list[dict[str, Any]]:
        return [row for row in self.parts["metrics"] if row["kind"] == "eval"]

    def write(self) -> None:
        for name, file in FILES.items():
            (self.folder / file).write_text(json.dumps(self.parts[name]))
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.parts["metrics"]))

    def seal_anew(self) -> "Edit":
        """Let the seal be that of what stands there now, as a forger would who knows of it."""
        rows = {kind: [row for row in self.parts["metrics"] if row["kind"] == kind] for kind in ("eval", "train")}
        loads = [json.loads(line) for line in (self.folder / "loads.jsonl").read_text().splitlines()]
        parts = {name: self.parts[name] for name in FILES}
        whole = parts | {"evals": rows["eval"], "train": rows["train"], "loads": loads}
        (self.folder / "seal.json").write_text(json.dumps(seal.seal(whole)))
        return self

    def rename(self) -> "Edit":
        """Let hash, id and folder be those of the configuration as it stands now."""
        described, summary = self.parts["config"], self.parts["summary"]
        described["config_hash"] = summary["config_hash"] = content_hash(described["config"])
        described["id"] = summary["id"] = run_id(described["router"], described["config_hash"], described["seed"])
        self.folder = self.folder.rename(self.folder.parent / described["id"])
        return self


def found(store: Path, **options: Any) -> list[str]:
    return list(map(str, verify(store, **options)))


def named(store: Path, field: str, **options: Any) -> list[str]:
    """Return the findings about a field."""
    return [line for line in found(store, **options) if field in line]


def gone(store: Path) -> list[str]:
    """Return the runs that are found missing."""
    return [line.partition(":")[0] for line in found(store) if "missing" in line]


def test_an_untouched_store_and_its_export_are_passed_over_in_silence(trained):
    before = contents(trained)
    for path in ("runs", "all.jsonl"):
        done = rlroute("verify", trained / path)
        assert (done.code, done.out) == (0, ""), done
    done = rlroute("verify", trained / "runs", "--rerun", 3, "--evaluate")
    assert (done.code, done.out) == (0, ""), done
    assert contents(trained) == before


@pytest.mark.parametrize(("name", "schema"), [("reward-time", 1), ("comparison", 2)])
def test_published_records_are_what_they_say_as_far_as_their_schema_says_it(name, schema, tmp_path):
    pytest.importorskip("sympy")
    published = read_runs(ROOT / "experiments" / "results" / f"{name}.jsonl")
    assert {run.config["schema"] for run in published} == {schema}
    write_compact([run for run in published if run.config["seed"] == 1], tmp_path / "some.jsonl")
    expected = ("run is 'missing'", "made_from/")  # the runs of other seeds, and the code of another commit
    assert all(any(words in line for words in expected) for line in found(tmp_path / "some.jsonl"))


def test_the_command_says_what_where_and_ends_with_1(store):
    Edit(run_of(store)).set("summary.model.flops_per_token", 1).write()
    done = rlroute("verify", store)
    assert done.code == 1
    (line,) = [line for line in done.out.splitlines() if "model/flops" in line]
    want = json.loads((run_of(store, seed=1) / "summary.json").read_text())["model"]["flops_per_token"]
    assert line.startswith(f"{run_of(store).name}: summary.json: model/flops_per_token is 1, want {want}")


LONE = {
    "summary.final.bits_per_byte": ("evals.bits_per_byte", 1.5, "bits_per_byte"),
    "loss": ("evals.loss", 1.5, "bits_per_byte"),
    "max_vio": ("evals.max_vio_L.0", 0.0, "max_vio_L/0"),
    "dead": ("evals.dead_L.0", 3, "dead_L/0"),
    "a window's loss": ("evals.nats_W.0", 1.0, "nats_W sums"),
    "last chain": ("evals.chain", "0" * 64, "chain"),
    "k": ("config.config.model.k", 1, "config_hash"),
    "lr": ("config.config.train.lr", 0.5, "lr"),
    "clip": ("config.config.train.clip", 2.0, "config_hash"),
    "weight decay": ("config.config.train.weight_decay", 0.0, "config_hash"),
    "micro-batches": ("config.config.train.micro_batches", 2, "config_hash"),
    "steps": ("config.config.train.steps", 24, "steps"),
    "a router's field": ("config.config.router.balance_weight", 0.5, "weights/balance"),
    "a router's field that no row shows": ("config.config.router.normalize", False, "config_hash"),
    "the router's name": ("config.config.router.name", "unbalanced", "router"),
    "the summary's router": ("summary.router", "hash", "router"),
    "seed": ("config.seed", 5, "seed"),
    "shared fingerprint": ("summary.fingerprint.shared", "0" * 64, "fingerprint/shared"),
    "backbone fingerprint": ("summary.fingerprint.backbone", "0" * 64, "fingerprint/backbone"),
    "chain": ("summary.batches.chain", "0" * 64, "batches/chain"),
    "validation tokens": ("summary.eval_tokens_sha256", "0" * 64, "eval_tokens_sha256"),
    "active parameters": ("summary.model.active_parameters", 1, "model/active_parameters"),
    "all parameters": ("summary.model.total_parameters", 1, "model/total_parameters"),
    "router parameters": ("summary.model.router_parameters", 0, "model/router_parameters"),
    "training FLOPs": ("summary.model.training_only_flops_per_token", 7, "model/training_only_flops_per_token"),
    "tokens": ("summary.tokens", 7, "tokens"),
    "tokens/s": ("summary.tokens_per_second", 1e7, "tokens_per_second"),
    "seconds": ("summary.seconds.train", 1e-3, "seconds"),
    "budget": ("summary.budget.amount", 7, "budget/amount"),
    "gate": ("summary.gate.meaning", "something else", "gate/meaning"),
    "audit": ("summary.measured", None, "measured"),
    "audited pairs": ("summary.measured.evaluation.pairs_L.0", 8, "measured/evaluation/pairs_L/0"),
    "audited pairs in training": ("summary.measured.training.pairs_L.0", 1, "measured/training/pairs_L/0"),
    "who says that it is causal": ("summary.measured.causal_L.0", False, "measured/causal_L/0"),
    "booked FLOPs": ("summary.measured.flops.booked_L.0.training", 7, "measured/flops/booked_L/0/training"),
    "signals": ("summary.learns_from", ["reward"], "learns_from"),
    "corpus": ("summary.data.sha256", "0" * 64, "data/sha256"),
    "corpus size": ("summary.data.train_tokens", 7, "data/train_tokens"),
    "core": ("config.made_from.core", "0" * 64, "made_from/core"),
    "router file": ("config.made_from.routers.switch.sha256", "0" * 64, "made_from/routers/switch/sha256"),
    "training stream": ("config.made_from.data.train_sha256", "0" * 64, "made_from/data/train_sha256"),
    "threads": ("environment.threads", 4, "threads"),
    "kernel": ("environment.kernel_backend", "triton", "kernel_backend"),
    "torch": ("environment.torch", "1.0", "environment.json: torch is '1.0', want"),
    "numpy": ("environment.numpy", "1.0", "environment.json: numpy is '1.0', want"),
    "python": ("environment.python", "2.7", "environment.json: python is '2.7', want"),
    "rlroute": ("environment.rlroute", "9.9", "environment.json: rlroute is '9.9', want"),
    "commit": ("environment.commit", "0" * 40, "environment.json: commit is '0000"),
    "dirty": ("environment.dirty", None, "environment.json: dirty is None, want"),
    "cpu": ("environment.cpu_capability", "none", "environment.json: cpu_capability is 'none', want"),
    "a training loss": ("metrics.0.loss", 1.0, "metrics.jsonl: SHA-256"),
    "a gradient's norm": ("metrics.1.grad_norm", 1.0, "metrics.jsonl: SHA-256"),
    "a row's tokens": ("metrics.1.tokens", 1, "train row of step 2: tokens"),
    "a row's rate": ("metrics.1.lr", 1.0, "train row of step 2: lr"),
}


@pytest.mark.parametrize("name", LONE)
def test_an_edit_is_named(name, few):
    path, value, field = LONE[name]
    Edit(run_of(few)).set(path, value).write()
    lines = [line for line in named(few, field) if ": store: " not in line]  # those quote the command
    assert lines and all(line.startswith(("switch-", "unbalanced-")) for line in lines), found(few)


UNSEALED = {
    name: edit for name, edit in LONE.items() if not name.startswith(("a router's field that", "a train", "a grad"))
}
UNSEALED = {n: e for n, e in UNSEALED.items() if not e[2].startswith("environment.json")}


@pytest.mark.parametrize("name", UNSEALED)
def test_an_edit_is_named_although_it_was_sealed_anew(name, few):
    """What is computed from the configuration, the code and the data needs no seal."""
    path, value, field = UNSEALED[name]
    Edit(run_of(few)).set(path, value).seal_anew().write()
    assert named(few, field)


@pytest.mark.parametrize(
    "path",
    ["model.k", "train.lr", "train.clip", "train.weight_decay", "train.micro_batches", "router.balance_weight"],
)
def test_a_setting_is_named_although_the_hash_was_computed_again(path, store):
    value: Any = {"model.k": 3, "train.micro_batches": 4}.get(path, 0.25)
    Edit(run_of(store)).set(f"config.config.{path}", value).rename().write()
    lines = found(store)
    assert any("config.json: SHA-256" in line or "edited after the run ended" in line for line in lines), lines
    assert any(line.startswith("switch-") and "missing" in line for line in lines), "the run that was asked for is gone"


@pytest.mark.parametrize(
    "path",
    [
        "train.clip",
        "model.k",
        *(pytest.param(path, marks=pytest.mark.slow) for path in ("train.weight_decay", "router.balance_weight")),
    ],
)
def test_what_was_sealed_anew_under_another_hash_is_found_by_training_again(path, store):
    """Nothing in the record alone contradicts it."""
    value: Any = {"model.k": 3, "train.clip": 0.01}.get(path, 0.25)
    Edit(run_of(store)).set(f"config.config.{path}", value).rename().seal_anew().write()
    lines = found(store, reruns=8)
    assert any("trained again" in line and line.startswith("switch-") for line in lines), lines


@pytest.mark.parametrize("what", ["fingerprint", "chain"])
def test_fingerprints_and_chains_of_all_runs_zeroed_are_named(what, store):
    for folder in store.iterdir():
        edit = Edit(folder)
        if what == "fingerprint":
            edit.set("summary.fingerprint", {"shared": "0" * 64, "backbone": "0" * 64})
        else:
            edit.set("summary.batches.chain", "0" * 64).set("summary.final.chain", "0" * 64)
            for row in edit.evals:
                row["chain"] = "0" * 64
        edit.seal_anew().write()
    for folder in store.iterdir():
        assert [line for line in named(store, what) if line.startswith(folder.name)]


def test_bits_and_loss_changed_together_are_found_by_the_weights_and_by_training_again(store):
    def better(value):
        return 0.9 * value

    edit = Edit(run_of(store)).set("evals.bits_per_byte", better).set("evals.loss", better)
    edit.set("evals.nats_W", lambda nats: list(map(better, nats))).write()
    assert named(store, "metrics.jsonl: SHA-256")
    edit.seal_anew()
    assert found(store) == []
    assert named(store, "final/loss", evaluate=True)
    assert [line for line in found(store, reruns=8) if "loss" in line and "trained again" in line]


def test_training_again_is_seeded_and_takes_the_diverged_first(store):
    from rlroute.experiments.verify.replay import chosen

    runs = read_runs(store)
    ids = [[run.id for run in chosen(runs, 3, draw)] for draw in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    declare_diverged(run_of(store, "hash", 1), remove=True)
    assert [run.id for run in chosen(read_runs(store), 1, 0)] == [run_of(store, "hash", 1).name]


def declare_diverged(folder: Path, remove: bool) -> None:
    edit = Edit(folder)
    edit.set("summary.status", "diverged").set("summary.final", None)
    edit.set("summary.diverged", {"step": edit.parts["summary"]["steps"], "what": "the validation loss is not finite"})
    if remove:
        last = edit.evals[-1]
        edit.parts["metrics"] = [row for row in edit.parts["metrics"] if row is not last]
    edit.seal_anew().write()


@pytest.mark.parametrize("remove", [False, True], ids=["as it is", "without its last evaluation"])
def test_a_bad_run_declared_diverged_is_named(remove, store):
    declare_diverged(run_of(store), remove)
    if not remove:
        assert named(store, "summary.json: status is 'diverged', want 'finished'")
    assert named(store, "status is 'diverged', want 'finished'", reruns=1)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "patterns", [["switch-*-s1"], ["*-s1"], ["hash-*"]], ids=["of one entry", "of all", "an entry"]
)
def test_dropped_runs_are_named(patterns, compact, store, tmp_path):
    dropped = sorted({folder.name for pattern in patterns for folder in store.glob(pattern)})
    path = store
    if compact:
        records = (tmp_path / "all.jsonl", tmp_path / "fewer.jsonl")
        ran("export", records[0], "--store", store)
        lines = [line for line in records[0].read_text().splitlines(keepends=True)]
        records[1].write_text("".join(x for x in lines if json.loads(x)["summary"]["id"] not in dropped))
        path = records[1]
    else:
        for name in dropped:
            shutil.rmtree(store / name)
    assert gone(path) == dropped


ASKED = {
    "options before entries": ("compare", "--seeds=2", "switch", "hash"),
    "a router brought in": ("--include", "plain.py", "compare", "plain", "switch", "hash", "--seeds", "2"),
    "variants of one router": ("compare", "switch", "hash:table=position", "hash", "--seeds", "2"),
    "sites": ("compare", "switch", "hash+uniform@0", "--seeds", "2"),
}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=how, marks=[pytest.mark.slow] if how.startswith("variants") else [])
        for how, words in ASKED.items()
    ],
)
def test_however_a_comparison_was_asked_for_nothing_is_missing_until_it_is_dropped(
    words, tmp_path, monkeypatch, routers
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.py").write_text(SOURCE)
    ran(*words, *TINY, "--launcher", "local")
    assert found(Path("runs")) == []
    of_hash = sorted(folder.name for folder in Path("runs").glob("hash*"))
    assert [sum(name.endswith(f"-s{seed}") for name in of_hash) for seed in range(2)] == 2 * [len(of_hash) / 2]
    for dropped in (of_hash[-1:], of_hash):
        for run in dropped:
            shutil.rmtree(Path("runs") / run, ignore_errors=True)
        assert gone(Path("runs")) == dropped


def test_a_sweep_of_other_seeds_by_the_same_command_misses_nothing_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)
    }
    base = "".join(f"{name} = {value if value.isdigit() else json.dumps(value)}\n" for name, value in fields.items())
    for entries, seeds in ((["switch", "dense"], 2), (["hash"], 3)):
        Path("some.toml").write_text(f"entries = {entries}\nseeds = {seeds}\n[base]\n{base}")
        ran("sweep", "some.toml", "--launcher", "local")
    assert found(Path("runs")) == []
    shutil.rmtree(run_of(Path("runs"), "hash", 2))
    (of_hash,) = gone(Path("runs"))
    assert of_hash.startswith("hash-") and of_hash.endswith("-s2")


def test_of_records_that_do_not_say_what_was_asked_for_the_seeds_are_held_against_those_of_the_command(store):
    for folder in store.iterdir():
        edit = Edit(folder)
        del edit.parts["config"]["asked"]
        edit.seal_anew().write()
    assert found(store) == []
    dropped = run_of(store, "hash", 1)
    shutil.rmtree(dropped)
    assert gone(store) == [dropped.name]


def test_a_run_that_has_not_ended_is_not_dropped(store):
    (run_of(store) / "summary.json").unlink()
    assert found(store) == []


@pytest.mark.parametrize("kept", ["the hash", "nothing"])
def test_a_renamed_router_is_named(kept, store):
    uniform = build_entry("uniform", DataConfig(), ModelConfig(), TrainConfig()).to_dict()["router"]
    edit = Edit(run_of(store, "hash")).set("config.config.router", uniform)
    if kept == "nothing":
        edit.set("config.router", "uniform").set("summary.router", "uniform").rename().seal_anew()
    edit.write()
    lines = found(store)
    assert [line for line in lines if "made_from/routers" in line or "config/router" in line], lines


def test_weights_that_a_compact_file_does_not_hold_are_not_evaluated_in_silence(trained):
    said = refused(rlroute("verify", trained / "all.jsonl", "--evaluate"))
    assert "--evaluate does not apply to" in said and "a compact file holds no weights" in said


@pytest.mark.slow
def test_an_edited_compact_file_is_named_too(trained, tmp_path):
    lines = [json.loads(line) for line in (trained / "all.jsonl").read_text().splitlines()]
    for name, (path, value, field) in LONE.items():
        part, *names, last = path.split(".")
        if part not in FILES or name == "seed":
            continue
        edited = deepcopy(lines)
        (target, *_) = [line for line in edited if line["summary"]["router"] == "switch"]
        line_of = lines[edited.index(target)]
        target = target[part]
        for key in names:
            target = target[int(key) if isinstance(target, list) else key]
        target[int(last) if isinstance(target, list) else last] = value
        (tmp_path / "edited.jsonl").write_text("".join(json.dumps(line) + "\n" for line in edited))
        try:
            assert named(tmp_path / "edited.jsonl", field), name
        except StoreError as error:  # it is no record any more
            assert f"edited.jsonl, line {1 + lines.index(line_of)}: " in str(error), name


def test_a_commit_that_is_not_its_sources_is_named(store, tmp_path, monkeypatch):
    clone = checkout(tmp_path / "clone")
    git(clone, "init", "-q")
    (clone / "rlroute" / "metrics.py").write_text("# another\n")
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "another")
    from rlroute.commit import core_sha256_at
    from rlroute.experiments.verify import hand

    monkeypatch.setattr(hand, "core_sha256_at", lambda commit: core_sha256_at(commit, clone / "rlroute"))
    edit = Edit(run_of(store)).set("environment.commit", head(clone)).set("environment.dirty", False)
    edit.seal_anew().write()
    assert named(store, f"commit {head(clone)[:12]}, whose core")


def test_damaged_weights_and_weights_of_another_run_are_named(store):
    (weights,) = run_of(store).glob("checkpoint-*/model.safetensors")
    (other,) = run_of(store, seed=1).glob("checkpoint-*/model.safetensors")
    shutil.copy(other, weights)
    assert named(store, "checkpoint: weights")
    weights.write_bytes(weights.read_bytes()[:-7])
    assert named(store, "checkpoint: weights")
    shutil.rmtree(weights.parent)
    assert found(store) == []


def test_other_data_at_hand_is_named_once_for_each_run(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(30):
        (corpus / f"{number}.txt").write_text(f"{number} green bottles " * 20)
    ran("train", "hash", "--data.spec", f"file:{corpus}/*.txt", *TINY[2:], "--store", tmp_path / "runs")
    assert found(tmp_path / "runs") == []
    (corpus / "1.txt").write_text("no bottles")
    lines = found(tmp_path / "runs")
    assert any("made_from/data/sha256" in line for line in lines) and any(" data/sha256" in line for line in lines)
    assert not any("chain" in line or "bits_per_byte" in line for line in lines)
    shutil.rmtree(corpus)
    assert named(tmp_path / "runs", "no file matches")


def test_a_record_that_cannot_be_read_is_a_finding_and_the_others_are_looked_at(store):
    (run_of(store, "hash") / "summary.json").write_text("{")
    Edit(run_of(store)).set("summary.model.flops_per_token", 1).write()
    lines = found(store)
    assert named(store, "flops_per_token") and [
        line for line in lines if line.startswith("hash-") and "damaged" in line
    ]


def test_an_empty_store_and_none_are_refused(tmp_path):
    with pytest.raises(StoreError):
        verify(tmp_path)
    with pytest.raises(StoreError):
        verify(tmp_path / "none")


def test_runs_too_short_to_log_a_step_are_passed_over_whatever_pairs_ran(tmp_path):
    """Variable k, every expert, dropped pairs and free experts: nothing but the record says what training took."""
    few = (*TINY, "--train.log-every", 100, "--launcher", "local", "--seeds", 1, "--out", tmp_path / "out")
    ran("compare", "top_p", "soft", "dense_mixer", *few, "--store", tmp_path / "varied")
    ran("compare", "switch", "longcat", *few, "--model.zero-experts", 1, "--store", tmp_path / "free")
    for store in (tmp_path / "varied", tmp_path / "free"):
        assert not any(row["kind"] == "train" for run in read_runs(store) for row in run.train)
        assert not verify(store)
    summary = next((tmp_path / "free").glob("switch-*")) / "summary.json"
    edited = json.loads(summary.read_text())
    edited["model"]["training_flops"] *= 2
    summary.write_text(json.dumps(edited))
    assert any("training_only_flops_per_token" in str(found) for found in verify(tmp_path / "free"))
