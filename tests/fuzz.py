"""``python -m tests.fuzz [--minutes 10] [--seed 0] [READER ...]``: damaged and hostile files for every reader.

A reader answers, or refuses with an RlrouteError; the command line also ends with code 2 and says why. Anything else,
a hang of half a minute included, is a fault: it is printed with the reader, the seed and the number of its case, which
``--seed N --case C READER`` runs again alone.

Longer than most: every reader has its way of making bad input.
"""

import argparse
import contextlib
import io
import json
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from rlroute.agents.sb3 import Sb3Router
from rlroute.choices import ChoiceLog
from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.envs.tables import SHAPES, load_table
from rlroute.errors import RlrouteError
from rlroute.experiments.bench.run import read_table
from rlroute.experiments.checkpoints.folder import open_checkpoint
from rlroute.experiments.checkpoints.imported import read_layer, write_layers
from rlroute.experiments.claims.ledger import CLAIMS
from rlroute.experiments.claims.outcomes import faults, read_outcomes
from rlroute.experiments.claims.page import claims_grid, page
from rlroute.experiments.comparison.ladder import reduce
from rlroute.experiments.comparison.ladder_file import FILE, read_ladder
from rlroute.experiments.comparison.registration import Registration, make_plan, register
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import to_csv, to_markdown
from rlroute.experiments.dashboard.follow import Followed
from rlroute.experiments.launch.spec import read_spec
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.report.board import Board, make_lots
from rlroute.experiments.report.choice import Choice
from rlroute.experiments.report.runs import list_runs, run_text, to_grid
from rlroute.experiments.report.views import PAGES, VIEWS
from rlroute.experiments.traces.flips import flips
from rlroute.experiments.traces.measure import measure
from rlroute.experiments.traces.reading import open_trace
from rlroute.experiments.traces.text import to_json
from rlroute.experiments.traces.write import write
from rlroute.reading import failure, last_row, read_runs
from rlroute.records import state, write_compact
from rlroute.registry import run_config
from rlroute.seal import of_part
from rlroute.training.data import load_corpus
from rlroute.training.loop import train
from tests import ROOT
from tests.conftest import make_shape
from tests.mutations import HOSTILE, TEXTS, change_bytes, change_json, change_value, change_words, several
from tests.policies import DESCRIBED, weights_of, write_policy
from tests.runs import interrupted
from tests.small_checkpoints import BLOCKS, config_of, lay_checkpoint, tensors_of

SECONDS = 30
"""A case that takes longer hangs."""
NUMBERS = (
    "0",
    "-1",
    "1e999",
    "nan",
    "inf",
    "9" * 400,
    "9" * 5000,
    "2147483648",
    "0x10",
    "1_000",
    "true",
    "none",
    "'x'",
)
Case = Callable[[Path, Random], None]
"""Makes a hostile file in an empty folder and reads it; raises nothing but what a user may see."""


class Hung(BaseException):
    """A reader that did not come back."""


@dataclass(frozen=True)
class Fault:
    """What a reader should not have done."""

    reader: str
    seed: int
    case: int
    trace: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz --seed {self.seed} --case {self.case} {self.reader}"
        return f"{self.reader}: {self.trace.rstrip().splitlines()[-1]}\n  again: {again}\n{self.trace}"


# Records


@cache
def _files() -> dict[str, dict[str, bytes]]:
    """Return the files of three ended runs by run and name."""
    from tests.test_table import diverged, make_run

    found = {}
    for run in (make_run("switch"), make_run("reinforce", 1), diverged(make_run("dense"))):
        metrics = sorted((*run.evals, *run.train), key=lambda row: row["step"])
        rows: dict[str, Any] = {"metrics": metrics, "loads": run.loads}
        parts: dict[str, Any] = {"config": run.config, "environment": run.environment, "summary": run.summary}
        failed = {"id": run.id, "reason": "a bug"}
        found[run.id] = {
            f"{name}.json": json.dumps(part).encode() for name, part in (parts | {"failed": failed}).items()
        }
        found[run.id] |= {
            f"{name}.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in part) for name, part in rows.items()
        }
    return found


def lay_store(folder: Path) -> Path:
    """Write the store of three ended runs and return it."""
    store = folder / "runs"
    for run, files in _files().items():
        (store / run).mkdir(parents=True)
        for name, data in files.items():
            (store / run / name).write_bytes(data)
    return store


def _changed(data: bytes, random: Random) -> bytes:
    if random.random() < 0.2:
        return several(partial(change_bytes, random=random), data, random)
    try:
        return several(partial(change_json, random=random), data, random)
    except (ValueError, RecursionError):  # what has been changed once is no JSON any more
        return change_bytes(data, random)


def _show(records: list[Any], folder: Path) -> None:
    table = build_table(records)
    to_markdown(table)
    to_csv(table)
    write_compact(records, folder / "again.jsonl")


def record(folder: Path, random: Random) -> None:
    store = lay_store(folder)
    run = random.choice(list(_files()))
    name = random.choice(list(_files()[run]))
    target = store / run / name
    target.write_bytes(_changed(target.read_bytes(), random))
    if random.random() < 0.3:  # an unfinished run
        (store / run / "summary.json").unlink()
    for ask in (state, failure, last_row):
        with contextlib.suppress(RlrouteError):
            ask(store / run)
    with contextlib.suppress(RlrouteError):
        to_grid(list_runs(store))
    with contextlib.suppress(RlrouteError):
        run_text(store, run)
    seen = Followed(store).look()
    for lot in make_lots(seen):
        board = Board(runs=lot.runs, others=tuple(one for one in seen if one.config is None))
        for view in VIEWS.values():
            view.draw(board, Choice(run=run))
    _show(read_runs(store), folder)


def compact(folder: Path, random: Random) -> None:
    path = folder / "some.jsonl"
    write_compact(read_runs(lay_store(folder)), path)
    path.write_bytes(_changed(path.read_bytes(), random))
    to_grid(list_runs(path))
    _show(read_runs(path), folder)


def registration(folder: Path, random: Random) -> None:
    """What a judgement registered; whoever changes it has its hash made anew, half of the time."""
    config = build_entry("switch", DataConfig(), ModelConfig(), TrainConfig())
    made: Any = {"core": 64 * "0", "routers": {}, "reads": {}, "data": {}, "tokenizer": None}
    plan = make_plan(config, config, {config: made}, ("tuned", "tuned"), 0.02, [3, 4], [])
    path = folder / "judgement.json"
    register(path, plan, Registration, [], lambda asked: None)
    path.write_bytes(_changed(path.read_bytes(), random))
    if random.random() < 0.5:
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            changed = json.loads(path.read_bytes())
            path.write_text(json.dumps(changed | {"sha256": of_part(changed["plan"])}))
    register(path, plan, Registration, [], lambda asked: None)


def outcomes(folder: Path, random: Random) -> None:
    """What was found of claims."""
    claim = CLAIMS["3"]
    ends = {"effect": 0.5, "interval": [0.4, 0.6], "n": 5, "verdict": "refuted", "unit": "share", "undefined": []}
    found: dict[str, Any] = asdict(claim.parts[0]) | ends | {"values": {str(seed): 0.5 for seed in claim.seeds}}
    path = folder / "claims.jsonl"
    line: dict[str, Any] = {name: 64 * "0" for name in ("registration", "core")} | {
        "claim": "3",
        "sha256": claim.sha256,
    }
    line |= {"verdict": "refuted", "parts": [found], "seeds": list(claim.seeds), "runs": ["a-s0"], "diverged": []}
    line |= {"cost": {"runs": 5, "tokens": 1, "training_flops": 1, "seconds": 1.0}, "there_before": 0, "dirty": False}
    line |= {"registered": "2026-01-01T00:00:00+00:00", "commit": 40 * "a", "torch": "2", "cpu_capability": "a"}
    text = json.dumps(line | {"threads": 1, "device": "cpu"}) + "\n"
    path.write_bytes(text.encode() if random.random() < 0.1 else _changed(text.encode(), random))
    there = read_outcomes(path)
    claims_grid(there)
    if not list(faults(there, CLAIMS)):
        page(there)


def bench(folder: Path, random: Random) -> None:
    names = ("kernels-cpu", "layer-cpu", "parallel-cpu", "scale")
    path = folder / "bench.json"
    path.write_bytes(_changed((ROOT / f"experiments/results/{random.choice(names)}.json").read_bytes(), random))
    read_table(path)


def ladder(folder: Path, random: Random) -> None:
    """The ladder of a run store, which tables and pages show."""
    from tests.test_ladder import rungs

    whole = reduce(rungs(1.0, 1.3), ["a", "b"], ["run"], None).to_dict()
    (folder / FILE).write_bytes(_changed(json.dumps(whole).encode(), random))
    board = Board(runs=(), ladder=read_ladder(folder))
    for view in PAGES["ladder"][1]:
        VIEWS[view].draw(board, Choice())


# What is written by hand

SWEEP = """entries = ["switch", "hash:table=random", "dense"]
seeds = [0, 1]
[base]
train.steps = 30
model.capacity_factor = "none"
[grid]
train.lr = [4e-3, 8e-3]
router.balance_weight = [0.01, 0.03]
[random]
trials = 3
seed = 7
[random.fields]
"train.weight_decay" = { low = 0.01, high = 0.5, log = true }
"model.num_experts" = { low = 4, high = 9 }
"model.gate_form" = { choice = ["own", "unit"] }
[resources]
workers = 1
cpus = 1
[asha]
grace = 10
reduction = 2
"""
TOML_WORDS = (
    *NUMBERS,
    "[" * 3000,
    "a." * 3000 + "b",
    "1e400",
    "-9223372036854775809",
    "1000000000",
    "1979-05-27",
    "''",
)
ENTRIES = ("switch", "hash:table=position", "reinforce:baseline=none,balance_weight=0.1", "switch+hash@0-1", "dense")
ENTRY_WORDS = (*NUMBERS, *TEXTS, "+", "@", ":", "=", ",", "@attention", "@0-99999999999999999999", "sb3", "replay:run")


def sweep(folder: Path, random: Random) -> None:
    path = folder / "sweep.toml"
    text = several(partial(change_words, words=TOML_WORDS, random=random), SWEEP, random)
    data = text.encode(errors="surrogatepass")
    path.write_bytes(change_bytes(data, random) if random.random() < 0.2 else data)
    spec = read_spec(path)
    spec.search(spec.jobs("command"))


def entry(folder: Path, random: Random) -> None:
    text = several(partial(change_words, words=ENTRY_WORDS, random=random), random.choice(ENTRIES), random)
    _settle(build_entry(text, DataConfig(), ModelConfig(), TrainConfig()))


def values(folder: Path, random: Random) -> None:
    plain = build_entry(random.choice(ENTRIES), DataConfig(), ModelConfig(), TrainConfig()).to_dict()
    _settle(run_config(several(partial(change_value, random=random), plain, random)))


def _settle(config: RunConfig) -> None:
    for part in (config.data, config.model, config.train):
        part.check()
    config.run_id(0)


def command(folder: Path, random: Random) -> None:
    """The command line, where it reads only."""
    store = lay_store(folder)
    lines = (
        f"table {store} --csv",
        f"table {store} --only switch --reference switch",
        f"runs {store}",
        f"runs {store} switch",
        f"export {folder}/out.jsonl --only dense",
        f"bench kernels --show --out {ROOT}/experiments/results/kernels-cpu.json",
    )
    words = random.choice(lines).split()
    place = random.randrange(1, len(words) + 1)
    typed = [text for text in TEXTS if text.isprintable()]  # the rest would be one's own, not a record's
    words[place : place + random.randrange(2)] = [random.choice((*NUMBERS, *typed, "--only", "--no-timings", "--help"))]
    said, code = run_command(words, folder)
    if code not in (0, 2) or (code == 2 and not said.strip()):
        raise AssertionError(f"code {code}, and this on stderr: {said!r}")
    if "\x1b" in said or "Traceback" in said:
        raise AssertionError(f"this on stderr: {said!r}")


def run_command(words: list[str], folder: Path) -> tuple[str, object]:
    """Run the command line in this process, in a folder; return what stands on stderr, and the exit code."""
    from rlroute.experiments.cli.main import main

    said, before = io.StringIO(), sys.argv
    sys.argv = ["rlroute", *words]
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main()
    except SystemExit as end:
        return said.getvalue(), end.code or 0
    finally:
        sys.argv = before
    return said.getvalue(), 0


# Arrays and weights


def sb3(folder: Path, random: Random) -> None:
    weights: dict[Any, Any] = dict(weights_of(6, 8))
    if random.random() < 0.5:
        name = random.choice(list(weights))
        weights[name] = random.choice(tensors(weights[name]))
    described = DESCRIBED if random.random() < 0.5 else several(partial(change_value, random=random), DESCRIBED, random)
    path = folder / "policy.zip"
    try:
        write_policy(path, weights, described)
    except ValueError:  # no JSON says that
        return
    if random.random() < 0.6:
        change_archive(path, random)
    Sb3Router(Sb3Router.Config(policy=str(path)), make_shape(8, 2))


def tensors(tensor: torch.Tensor) -> list[Any]:
    """Return what is no finite float32 tensor of this many dimensions with memory of its own."""
    return [
        tensor.double(),
        tensor.long(),
        tensor.to(torch.complex64),
        tensor.to_sparse(),
        tensor * torch.nan,
        tensor / 0,
        tensor.flatten(),
        tensor[None],
        tensor[:0],
        tensor[..., :1].expand(*tensor.shape[:-1], 2**40) if tensor.dim() > 1 else tensor[:1].expand(2**40),
        tensor.t() if tensor.dim() > 1 else tensor[::2],
        tensor.to("meta"),
        *HOSTILE[:8],
        [tensor],
        {"a": tensor},
    ]


def change_archive(path: Path, random: Random) -> None:
    """Change an archive's bytes, or those of a member, or its members; or pack a member that unpacks to very much."""
    if random.random() < 0.4:
        path.write_bytes(several(partial(change_bytes, random=random), path.read_bytes(), random))
        return
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = random.choice(list(members))
    kind = random.choice(("change", "change", "change", "remove", "empty", "packed bomb", "swap"))
    if kind == "remove":
        del members[name]
    elif kind == "swap":
        members[name] = members[random.choice(list(members))]
    else:
        bomb = bytes(20_000_000) if kind == "packed bomb" else b""
        members[name] = (
            several(partial(change_bytes, random=random), members[name], random) if kind == "change" else bomb
        )
    packing = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(path, "w", packing if kind == "packed bomb" else zipfile.ZIP_STORED) as file:
        for member, data in members.items():
            file.writestr(member, data)


def tokens(folder: Path, random: Random) -> None:
    arrays: dict[str, Any] = {
        "x_ND": np.ones((6, 3), np.float32),
        "losses_NE": np.ones((6, 4), np.float32),
        "skip_N": np.ones(6, np.float32),
        "token_ids_N": np.arange(6),
        "labels_N": np.full(6, -1),
    }
    name = random.choice(list(SHAPES))
    array = arrays[name]
    others = [array.astype(kind) for kind in ("float64", "int8", "complex64", "O", "U3", ">f4", "bool")]
    others += [
        array * np.nan,
        array * 10.0**38,
        array[:0],
        array[None],
        array[:-1],
        np.float32(3),
        -array - 2,
        array[::-1],
    ]
    if random.random() < 0.5:
        arrays[name] = random.choice(others)
    path = folder / "tokens.npz"
    with np.errstate(all="ignore"):
        np.savez(path, **{key: value for key, value in arrays.items() if random.random() < 0.95})
    if random.random() < 0.6:
        change_archive(path, random)
    table = load_table(str(path))
    if not all(np.isfinite([table.bound, table.uniform, table.fixed, table.oracle])):
        raise AssertionError("a table whose figures are not finite")


def choices(folder: Path, random: Random) -> None:
    log = ChoiceLog(folder)
    for step in range(3):
        log.write(step, 0, {0: torch.arange(8).view(4, 2)})
    path = random.choice(sorted(log.folder.iterdir()))
    path.write_bytes(several(partial(_either, random=random), path.read_bytes(), random))
    log.sha256()
    log.read(random.choice((0, 2, 3, 2**40)), 0, 0)


def trace(folder: Path, random: Random) -> None:
    """A trace of another program, changed, is measured, held against itself and written, or refused."""
    ids_TLK = np.arange(24).reshape(4, 3, 2) % 8
    path = folder / f"trace{random.choice(('.npy', '.npz', '.safetensors', '.jsonl'))}"
    if path.suffix == ".npy":
        np.save(path, ids_TLK.astype(random.choice(("int16", "uint8", ">i4", "float32", "O"))))
    elif path.suffix == ".npz":
        np.savez(path, ids_TLK, random.choice((ids_TLK, ids_TLK.astype("int8"), ids_TLK - 3, ids_TLK[0], ids_TLK[:0])))
    elif path.suffix == ".safetensors":
        save_file({"a": ids_TLK, "b": random.choice((ids_TLK, ids_TLK.astype("float32")))}, path)
    else:
        rows = [{"step": 0, "layer": n, "num_tokens": 4, "topk": 2, "block": "decoder"} for n in range(3)]
        lines = [json.dumps(row | {"top_indices": ids_TLK[:, n].tolist()}) for n, row in enumerate(rows)]
        path.write_text("\n".join(lines) + "\n")
    if path.suffix == ".npz" and random.random() < 0.7:
        change_archive(path, random)
    elif path.suffix == ".jsonl":
        path.write_bytes(_changed(path.read_bytes(), random))
    elif random.random() < 0.9:
        path.write_bytes(several(partial(_either, random=random), path.read_bytes(), random))
    opened = open_trace(str(path), folder)
    to_json([measure(opened)], flips(opened, opened), "command")
    for end in (".npz", ".jsonl"):
        write(opened, folder / f"again{end}")


def _either(data: bytes, random: Random) -> bytes:
    return b"%a" % random.choice(HOSTILE) if random.random() < 0.3 else change_bytes(data, random)


def small_config(folder: Path) -> RunConfig:
    """Return the configuration of a run of four steps, over texts that this writes into a folder."""
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"the quick brown fox {name} " * 400)
    model = ModelConfig(num_layers=1, d_model=8, num_heads=1, num_experts=4, d_expert=4)
    schedule = TrainConfig(steps=4, batch_size=2, warmup_steps=0, eval_every=4, log_every=1, checkpoint_every=2)
    data = DataConfig(spec=f"file:{folder}/*.txt", seq_len=8, eval_tokens=16)
    return build_entry("switch", data, model, schedule)


@cache
def _interrupted() -> tuple[RunConfig, dict[str, bytes]]:
    """Return a small run that was stopped after its first checkpoint: its configuration, and its files."""
    with TemporaryDirectory() as place:
        config = small_config(Path(place))
        run = interrupted(config, Path(place, "runs"), 3)
        return config, {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def checkpoint(folder: Path, random: Random) -> None:
    """A run whose checkpoint was changed goes on, or says why not."""
    config, files = _interrupted()
    place = folder / config.run_id(0)
    name = random.choice([name for name in files if name.startswith("checkpoint")])
    for file, data in files.items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(change_bytes(data, random) if file == name else data)
    train(config, 0, folder)


def imported(folder: Path, random: Random) -> None:
    """A checkpoint of another library, whose configuration, tensors or bytes were changed, becomes layers of ours."""
    kind = random.choice(list(BLOCKS))
    weights = tensors_of(kind)
    if random.random() < 0.5:
        name = random.choice(list(weights))
        weights[name] = random.choice(misshapen(weights[name]))
    lay_checkpoint(folder, config_of(kind), {name: t for name, t in weights.items() if random.random() < 0.99})
    path = folder / random.choice(("config.json", "config.json", "model.safetensors"))
    if path.suffix == ".json":
        path.write_bytes(_changed(path.read_bytes(), random))
    elif random.random() < 0.5:
        path.write_bytes(several(partial(change_bytes, random=random), path.read_bytes(), random))
    for layer in write_layers(open_checkpoint(folder), folder):
        read_layer(layer.path).layer()


def misshapen(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a tensor in other shapes and types; a file holds them."""
    twice = [torch.cat([tensor, tensor], dim) for dim in range(tensor.dim())]
    return [*twice, tensor.flatten(), tensor.sum(), tensor[None].clone(), tensor[:0], tensor.long(), tensor.double()]


def corpus(folder: Path, random: Random) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 500
    if random.random() < 0.5:
        shard = header.tobytes() + np.arange(500, dtype=np.uint16).tobytes()
        (folder / "a.bin").write_bytes(several(partial(change_bytes, random=random), shard, random))
        load_corpus(f"bin:{folder}/*.bin", None)
    else:
        text = b"def f(x):\n    return x\n" * 40
        (folder / "a.py").write_bytes(several(partial(change_bytes, random=random), text, random))
        load_corpus(random.choice((f"file:{folder}/*.py", f"file:{folder}/**", f"file:{random.choice(TEXTS)}")), None)


def tokenizer(folder: Path, random: Random) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    path = folder / "tokenizer.json"
    path.write_bytes(_changed(made.to_str().encode(), random))
    (folder / "a.py").write_text("def f(x):\n    return x\n" * 40)
    load_corpus(f"file:{folder}/*.py", str(path))


CASES: tuple[Case, ...] = (
    record,
    compact,
    registration,
    outcomes,
    ladder,
    sweep,
    entry,
    values,
    command,
    bench,
    sb3,
    tokens,
    choices,
    trace,
    checkpoint,
    imported,
    corpus,
    tokenizer,
)
READERS: dict[str, Case] = {case.__name__: case for case in CASES}
if find_spec("tokenizers") is None:
    del READERS["tokenizer"]


# The search


@contextlib.contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """Raise Hung in the block after so many seconds."""

    def ring(number: int, frame: object) -> None:
        raise Hung(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(reader: str, seed: int, case: int) -> Fault | None:
    """Run one case and return the fault that it shows."""
    with TemporaryDirectory(prefix="rlroute-fuzz-") as place:
        try:
            with bounded(SECONDS):
                READERS[reader](Path(place), Random(f"{seed}/{reader}/{case}"))
        except (RlrouteError, ModuleNotFoundError) as error:
            return _unclear(reader, seed, case, error)
        except KeyboardInterrupt:
            raise
        except BaseException:
            return Fault(reader, seed, case, traceback.format_exc())
    return None


def _unclear(reader: str, seed: int, case: int, error: Exception) -> Fault | None:
    """A refusal that is no text, or is longer than a screen, is a fault too."""
    told = str(error)
    fine = isinstance(error, RlrouteError) and 0 < len(told) < 20_000
    return None if fine else Fault(reader, seed, case, f"{type(error).__name__}: {told[:200]}")


def search(readers: list[str], seed: int, until: Callable[[int], bool], say: Callable[[str], None]) -> list[Fault]:
    """Run the cases of all readers in turn, until a case's number is one at which to stop; return the faults."""
    faults: list[Fault] = []
    case = 0
    while not until(case):
        for reader in readers:
            if (fault := run_case(reader, seed, case)) is not None:
                faults.append(fault)
                say(str(fault))
        case += 1
    say(f"{case} cases of each of {len(readers)} readers, seed {seed}: {len(faults)} faults")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone")
    wanted = parser.parse_args()
    if unknown := [name for name in wanted.readers if name not in READERS]:
        parser.error(f"unknown reader {unknown[0]!r}: legal are {', '.join(READERS)}")
    readers = wanted.readers or list(READERS)
    torch.set_num_threads(1)
    if wanted.case is not None:
        faults = [fault for reader in readers if (fault := run_case(reader, wanted.seed, wanted.case))]
        print("\n".join(map(str, faults)) or "no fault")
    else:
        deadline = time.monotonic() + 60 * wanted.minutes
        faults = search(readers, wanted.seed, lambda case: time.monotonic() > deadline, partial(print, flush=True))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
