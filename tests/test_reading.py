"""A stored record is held to its schema before anyone reads it, and what is read controls nothing.

Longer than most: one store is damaged in each way.
"""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from rlroute.choices import ChoiceLog
from rlroute.config import SCHEMA, DataConfig, ModelConfig, TrainConfig
from rlroute.envs.tables import load_table
from rlroute.errors import DataError, StoreError
from rlroute.experiments.bench.run import read_table
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import no_formula, to_csv, to_markdown
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.report.board import Board, Seen
from rlroute.experiments.report.listing import routers_text
from rlroute.experiments.report.page import render
from rlroute.foreign import Unfit, parse_json, plain, printable, read_members, shown
from rlroute.reading import READABLE, failure, last_row, read_runs
from rlroute.records import RunFolder, state, write_compact
from rlroute.schema import Stored
from tests import ROOT
from tests.commands import ran
from tests.fuzz import lay_store
from tests.mutations import HOSTILE, NOT_FINITE, change_value, places, to_json
from tests.test_table import make_run

RESULTS = ROOT / "experiments" / "results"
CONFIG = build_entry("hash", DataConfig(), ModelConfig(), TrainConfig())
PARTS = ("config", "environment", "summary", "evals", "loads", "train")


@pytest.fixture
def store(tmp_path):
    return lay_store(tmp_path)


def plain_run(**where: Any) -> dict[str, Any]:
    run = make_run("switch", **where)
    return {name: json.loads(json.dumps(getattr(run, name))) for name in PARTS}


def read_compact(folder: Path, *runs: Any) -> list[Any]:
    path = folder / "some.jsonl"
    path.write_bytes(b"".join(to_json(run) + b"\n" for run in runs))
    return read_runs(path)


def refusal(folder: Path, run: Any) -> str:
    """Return the one line with which a run is refused."""
    with pytest.raises(StoreError) as refused:
        read_compact(folder, run)
    said = str(refused.value)
    assert "\n" not in said and said.startswith(f"{folder}/some.jsonl, line 1") and len(said) < 500
    return said


def leaf(run: Any, path: str) -> tuple[Any, Any]:
    """Return the dictionary or list that holds a dotted path's last part, and that part."""
    *above, last = [int(part) if part.lstrip("-").isdigit() else part for part in path.split(".")]
    for part in above:
        run = run[part]
    return run, last


def set_(run: Any, path: str, value: Any) -> Any:
    run = deepcopy(run)
    holder, last = leaf(run, path)
    holder[last] = value
    return run


# What fits


@pytest.mark.parametrize("name", ["comparison", "reward-flops", "reward-time"])
def test_published_records_are_read(name):
    assert read_runs(RESULTS / f"{name}.jsonl")


def test_every_older_schema_is_read_and_no_later_one(tmp_path):
    assert max(READABLE) == SCHEMA and min(READABLE) == 1
    for number in READABLE:
        run = set_(set_(plain_run(), "config.schema", number), "summary.schema", number)
        assert len(read_compact(tmp_path, run)) == 1
    for number in (0, SCHEMA + 1, True, "1", None, [1], 1.5):
        assert "has schema" in refusal(tmp_path, set_(plain_run(), "config.schema", number))


def test_what_a_later_version_adds_is_no_fault(tmp_path):
    run = set_(plain_run(), "summary.new", {"a": [1.5, "b"]})
    assert read_compact(tmp_path, run)[0].summary["new"] == {"a": [1.5, "b"]}


def test_values_are_handed_on_as_they_are_written(tmp_path):
    run = plain_run()
    run["summary"]["budget"]["amount"] = 819200  # an integer where a float is legal stays one
    write_compact(read_compact(tmp_path, run), tmp_path / "again.jsonl")
    assert json.loads((tmp_path / "again.jsonl").read_text())["summary"] == run["summary"]


# What does not


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("summary.final.bits_per_byte", -0.1),
        ("evals.2.loss", "2.5"),
        ("evals.0.step", 100.0),
        ("evals.0.step", True),
        ("evals.1.max_vio_L.0", -1.5),
        ("evals.1.dead_L.0", -1),
        ("evals.1.drop_rate", 1.5),
        ("evals.1.chain", "abc"),
        ("evals.1.kind", "train"),
        ("loads.3.load_LE.1.4", 2.0),
        ("train.5.lr", -1e-3),
        ("train.5.terms", []),
        ("config.seed", "0"),
        ("config.seed", -1),
        ("config.id", "../elsewhere"),
        ("config.id", "=1+1"),
        ("config.id", ""),
        ("config.router", "switch</script>"),
        ("config.config_hash", "0123456789AB"),
        ("config.config.model.k", 0),
        ("config.asked", {"entries": ["hash-0123456789ab"]}),
        ("config.asked", {"entries": ["../hash"], "seeds": [0]}),
        ("config.asked", {"entries": ["hash-0123456789ab"], "seeds": [-1]}),
        ("config.config.model.num_layers", 10**9),
        ("config.config.model.num_experts", "16"),
        ("config.config.train.steps", -1),
        ("config.config.train", None),
        ("config.config.router", {}),
        ("config.config.others", [{"name": "hash"}]),
        ("summary.status", "running"),
        ("summary.steps", 2**63),
        ("summary.tokens_per_second", -1),
        ("summary.model.flops_per_token", 1.5),
        ("summary.seconds.train", -1),
        ("summary.budget.kind", "money"),
        ("summary.fingerprint.shared", "0" * 63),
        ("summary.data.sha256", None),
        ("summary.causal", 1),
        ("environment.threads", 0.5),
        ("environment.torch", None),
    ],
)
def test_a_value_out_of_its_limits_is_refused_by_its_field(path, value, tmp_path):
    said = refusal(tmp_path, set_(plain_run(), path, value))
    part, field = path.split(".")[0], path.rpartition(".")[2]
    assert part in said and (field in said or path.split(".")[-2] in said)


@pytest.mark.parametrize("path", ["summary.final", "evals.3.step", "config.config.router.name", "environment.commit"])
def test_a_missing_field_is_named(path, tmp_path):
    run = plain_run()
    holder, last = leaf(run, path)
    del holder[last]
    assert f"{path.replace('.', '/').removeprefix('config/')}: this field is missing" in refusal(tmp_path, run)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("summary.id", "hash-0123456789ab-s0", "summary/id = 'hash-0123456789ab-s0', the configuration says"),
        ("summary.seed", 7, "summary/seed = 7, the configuration says 0"),
        ("config.config.router.name", "hash", "config/router = 'switch', the configuration says 'hash'"),
        ("config.config.model.num_layers", 3, "evals/0/max_vio_L has 2 sites, the model 3"),
        ("config.config.model.num_experts", 8, "evals/0/load_LE/0 has 16 experts, the model 8"),
        ("loads.0.load_LE", [[1.0] * 16], "loads/0/load_LE has 1 sites, the model 2"),
        ("train.0.terms.balance", [1.0], "train/0/terms/balance has 1 sites, the model 2"),
        ("evals.1.step", 100, "evals has step 100 after step 100"),
        ("loads.-1.step", 4000, "loads has step 4000, the run ended at step 400"),
        ("summary.diverged", {"step": 3, "what": "loss"}, "summary/diverged = a dict in a run that finished"),
        ("summary.final", None, "summary/final = None in a run that finished"),
        (
            "config.asked",
            {"entries": ["hash-0123456789ab"] * 1001, "seeds": list(range(1000))},
            "config/asked = 1001000",
        ),
        ("evals.-1.loss", 3.0, "it is truncated: its evaluations do not end with the summary's"),
    ],
)
def test_what_readers_rely_on_between_fields_is_checked(path, value, said, tmp_path):
    assert said in refusal(tmp_path, set_(plain_run(), path, value))


@pytest.mark.parametrize("bad", [*NOT_FINITE, 10**400])
def test_no_number_of_a_record_is_too_large_or_none(bad, tmp_path):
    for path in ("summary.final.loss", "evals.0.cv_L.1", "config.config.train.lr", "summary.new", "train.3.grad_norm"):
        said = refusal(tmp_path, set_(plain_run(), path, bad))
        assert path.replace(".", "/") in said


def test_depth_and_long_numbers_are_refused_in_every_text():
    for text in ("[" * 50 + "]" * 50, "[" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000):
        with pytest.raises(Unfit, match="is nested deeper than 32 levels"):
            parse_json(text)
    for text in ("9" * 5000, "9" * 400, "1e400", "-1e999", "NaN", '{"a":', "", "\ufeff1", "{'a': 1}", b"\xff\xfe"):
        with pytest.raises(Unfit):
            parse_json(text)


def test_no_mutation_of_a_record_gets_past_the_reader_and_breaks_a_table(tmp_path):
    """Every named part of a record is taken away, and replaced by hostile values."""
    run, random = plain_run(), Random(0)
    for path in places(run):
        if any(isinstance(part, int) and part for part in path):  # of lists the first alone
            continue
        for value in ("remove", *random.sample(HOSTILE, 3)):
            other = deepcopy(run)
            if value == "remove":
                del _at(other, path[:-1])[path[-1]]
            else:
                _at(other, path[:-1])[path[-1]] = value
            try:
                records = read_compact(tmp_path, other)
            except StoreError as error:
                assert str(error).isprintable()
                continue
            table = build_table(records)
            assert (to_markdown(table) + to_csv(table)).replace("\n", "").isprintable()


# Files


def irregular(path: Path, kind: str, elsewhere: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)  # of nothing: it takes no room


IRREGULAR = ("pipe", "folder", "device", "link", "sparse")


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("name", ["config.json", "environment.json", "summary.json", "metrics.jsonl", "loads.jsonl"])
def test_what_is_no_file_of_the_run_neither_hangs_nor_is_read(name, kind, store, tmp_path):
    (folder,) = store.glob("switch-*")
    (tmp_path / "elsewhere").write_bytes((folder / name).read_bytes())
    irregular(folder / name, kind, tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=rf"{folder.name}/{name}"):
        read_runs(store)
    assert state(folder) in ("finished", "damaged")


@pytest.mark.parametrize("kind", IRREGULAR)
def test_an_unfinished_run_is_looked_at_as_carefully(kind, store, tmp_path):
    (folder,) = store.glob("switch-*")
    (folder / "summary.json").unlink()
    (tmp_path / "elsewhere").write_text("{}")
    for name, ask in (("failed.json", failure), ("metrics.jsonl", last_row)):
        irregular(folder / name, kind, tmp_path / "elsewhere")
        with pytest.raises(StoreError, match=name):
            ask(folder)
    irregular(folder / ".lock", kind, tmp_path / "elsewhere")
    assert state(folder) != "running"


def test_a_folder_that_is_a_link_or_another_runs_is_refused_by_name(store, tmp_path):
    (folder,) = store.glob("switch-*")
    folder.rename(tmp_path / folder.name)
    folder.symlink_to(tmp_path / folder.name)
    with pytest.raises(StoreError, match=f"{folder.name} is a link"):
        read_runs(store)
    folder.unlink()
    (tmp_path / folder.name).rename(store / "switch-other")
    with pytest.raises(StoreError, match="switch-other holds the record of another run, switch-"):
        read_runs(store)


def test_a_store_and_a_compact_file_may_be_links(store, tmp_path):
    (tmp_path / "link").symlink_to(store)
    records = read_runs(tmp_path / "link")
    write_compact(records, tmp_path / "some.jsonl")
    (tmp_path / "other.jsonl").symlink_to("some.jsonl")
    assert len(read_runs(tmp_path / "other.jsonl")) == len(records) == 3


# Writing


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "loads.jsonl"])
def test_nothing_is_written_through_a_link(name, tmp_path):
    folder, precious = RunFolder(tmp_path / "runs", CONFIG, 0), tmp_path / "precious"
    precious.write_text("mine")
    folder.path.mkdir(parents=True)
    (folder.path / name).symlink_to(precious)
    with pytest.raises(StoreError, match=folder.id), folder.lock(patience=0.0):
        folder.append("metrics", {"step": 1})
        folder.append("loads", {"step": 1})
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("target", ["precious", "nothing yet"])
def test_a_run_is_not_begun_in_a_folder_that_is_a_link(target, tmp_path):
    folder = RunFolder(tmp_path / "runs", CONFIG, 0)
    (tmp_path / "precious").mkdir()
    (tmp_path / "runs").mkdir()
    folder.path.symlink_to(tmp_path / target)
    with pytest.raises(StoreError, match=f"{folder.id} is a link"):
        folder.create()
    assert list((tmp_path / "precious").iterdir()) == [] and not (tmp_path / "nothing yet").exists()


def test_a_lock_keeps_what_its_file_holds_and_a_temporary_file_is_new(tmp_path):
    folder = RunFolder(tmp_path, CONFIG, 0)
    folder.create()
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (folder.path / ".lock").unlink()
    (folder.path / ".lock").hardlink_to(precious)
    (folder.path / f".summary.json.{os.getpid()}.tmp").symlink_to(precious)
    with folder.lock(patience=0.0):
        folder.describe(CONFIG, 0, "cpu", None, {}, {})
        folder.finish({"status": "finished"})
    assert precious.read_text() == "mine" and state(folder.path) == "finished"


# What is shown


ESCAPES = (
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\r",
    "\x08" * 9,
    "\u202e",
    "\u2066",
    "\x7f",
    "\u2028",
    "\ud800",
    "\0",
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_what_controls_a_terminal_is_shown_as_its_escape(escape):
    assert escape not in printable(f"a{escape}b") and printable(f"a{escape}b").startswith("a\\")
    assert printable("é–×\n\t 漢") == "é–×\n\t 漢"


def test_no_text_of_a_record_controls_a_terminal(tmp_path):
    run, escape = plain_run(), "".join(ESCAPES).replace("\ud800", "")  # no text has that in any encoding
    texts = [path for path in places(run) if isinstance(_at(run, path), str)]
    shown_ones = 0
    for path in texts:
        other = deepcopy(run)
        _at(other, path[:-1])[path[-1]] = f"{_at(run, path)}{escape}"
        try:
            records = read_compact(tmp_path, other)
        except StoreError as error:
            assert str(error).isprintable()
            continue
        shown_ones += 1
        table, file = build_table(records), tmp_path / "some.jsonl"
        said = to_markdown(table) + to_csv(table) + ran("runs", file) + ran("runs", file, "switch")
        assert said.replace("\n", "").isprintable()
    assert shown_ones > 10


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        value = value[part]
    return value


def test_folders_notes_and_routers_are_printable(store):
    (folder,) = store.glob("switch-*")
    (folder / "summary.json").unlink()
    (folder / "failed.json").write_text(json.dumps({"id": folder.name, "reason": "a \x1b[31mred\x1b[0m bug"}))
    other = store / "\x1b[2Jswitch"
    folder.rename(other)
    said = ran("runs", store)
    assert "set aside" in said and r"a \x1b[31mred\x1b[0m bug" in said
    assert said.replace("\n", "").isprintable() and routers_text().replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1", "|cmd", "\n@a", '=HYPERLINK("x")']
)
def test_no_cell_is_a_formula(text):
    assert no_formula(text) == f"'{printable(text)}"
    table = to_csv(build_table([make_run("switch"), make_run(text)]))
    assert f"'{printable(text)}" in table.replace('""', '"')


def test_other_cells_stay_as_they_are():
    cells = ["", "switch", "a=b", "a-b", -0.5, 3, None, True, "1.attention"]
    assert [no_formula(cell) for cell in cells] == cells


def test_a_hostile_seed_or_key_is_no_script(tmp_path):
    hostile = "</script><script>alert(1)</script>"
    assert "seed" in refusal(tmp_path, set_(plain_run(), "config.seed", hostile))
    run = make_run("switch")
    run.config["config"]["router"] = {"name": "switch", hostile: hostile}
    runs = [run, make_run("hash")]
    assert "<script>alert" not in render(Board(runs=tuple(map(Seen.of, runs)), compared=runs))


# The other readers


def test_values_are_shown_briefly():
    assert shown("a\x1b" * 100) == repr("a\x1b" * 100)[:60] + "..." and shown(list(range(10**6))) == "a list"
    assert shown(10**10_000).startswith("a number of") and len(shown(10**4000)) < 80


def test_texts_of_values_stay_as_they_are_and_names_must_be_printable():
    said = {"a": ["b\x1b\n", {"c": "\u202e"}]}
    assert plain(deepcopy(said)) == said
    with pytest.raises(Unfit, match="want Unicode text"):
        plain({"a": ["\ud800"]})
    with pytest.raises(Unfit, match="a name cannot hold what controls a terminal"):
        plain({"a": {"\x1b": 1}})
    for value in (object(), {"a": (1, 2)}, [b"bytes"]):
        with pytest.raises(Unfit):
            plain(value)


@pytest.mark.parametrize("packing", ["ZIP_STORED", "ZIP_DEFLATED", "ZIP_BZIP2", "ZIP_LZMA"])
def test_an_archive_is_unpacked_no_further_than_its_bound(packing, tmp_path):
    import zipfile

    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", getattr(zipfile, packing)) as file:
        file.writestr("a", bytes(10**6))
        file.writestr("b", b"b")
    assert read_members(path.read_bytes(), ("b",), 1) == {"b": b"b"}
    with pytest.raises(Unfit, match="hold more than"):
        read_members(path.read_bytes(), ("b", "a"), 10**6)
    with pytest.raises(Unfit):
        read_members(path.read_bytes(), ("c",), 10**6)


def test_a_token_table_is_no_pipe_and_holds_figures_that_can_be_averaged(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    arrays = {"x_ND": np.ones((4, 2), np.float32), "losses_NE": np.ones((4, 3), np.float32)}
    arrays |= {"skip_N": np.ones(4, np.float32), "token_ids_N": np.arange(4), "labels_N": np.full(4, -1)}
    changed = {
        "zero": arrays | {"x_ND": np.float32(3)},
        "large": arrays | {"losses_NE": arrays["losses_NE"] * np.float32(1e38)},
        "negative": arrays | {"token_ids_N": np.arange(4) - 1},
        "lacking": {"x_ND": arrays["x_ND"]},
    }
    for name, held in changed.items():
        np.savez(tmp_path / f"{name}.npz", **held)
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    np.save(tmp_path / "one.npz.npy", arrays["x_ND"])
    (tmp_path / "one.npz.npy").rename(tmp_path / "one.npz")
    for path in sorted(tmp_path.glob("*.npz")):
        with pytest.raises(DataError):
            load_table(str(path))
    with pytest.raises(DataError):
        load_table("a\0b")


def test_recorded_choices_are_read_within_their_file(tmp_path):
    import torch

    log = ChoiceLog(tmp_path)
    log.write(0, 0, {0: torch.arange(8).view(4, 2)})
    (shape,) = log.folder.glob("*.json")
    for text in (
        "[2147483647, 2147483647]",
        "[4]",
        "[4, -2]",
        "[4, 2, 1]",
        "4",
        "[4.0, 2]",
        "[true, 2]",
        "x",
        "[" * 9999,
    ):
        shape.write_text(text)
        with pytest.raises(StoreError):
            log.read(0, 0, 0)
    shape.unlink()
    os.mkfifo(shape)
    with pytest.raises(StoreError, match="no regular file"):
        log.read(0, 0, 0)
    with pytest.raises(StoreError, match="no regular file"):
        log.sha256()


@pytest.mark.parametrize("name", ["kernels-cpu", "layer-cpu", "parallel-cpu", "scale"])
def test_published_bench_results_are_read_and_changed_ones_refused(name, tmp_path):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert read_table(RESULTS / f"{name}.json")
    random = Random(name)
    for _ in range(40):
        path = tmp_path / "some.json"
        path.write_bytes(to_json(change_value(result, random)))
        try:
            read_table(path)
        except StoreError as error:
            assert "some.json is not a bench's result: " in str(error)


@pytest.mark.processes
def test_training_imports_no_pydantic_and_reading_says_so_where_it_is_missing(tmp_path):
    script = (
        "import sys\n"
        "sys.modules['pydantic'] = None\n"  # as if it were not installed
        "from pathlib import Path\n"
        "from tests.fuzz import small_config\n"
        "from rlroute.training.loop import train\n"
        "from rlroute.errors import MissingDependencyError\n"
        "from rlroute.reading import read_runs\n"
        f"print(train(small_config(Path({str(tmp_path)!r})), 0, Path({str(tmp_path)!r}) / 'runs')['status'])\n"
        "try:\n"
        f"    read_runs(Path({str(tmp_path)!r}) / 'runs')\n"
        "except MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    said = ["finished", "reading stored files needs the package pydantic: pip install pydantic"]
    assert done.stdout.splitlines() == said, done.stdout + done.stderr


def test_the_parts_of_a_record_are_those_of_the_schema():
    assert {*Stored.__annotations__} - {"seal"} == {*PARTS} == {*Stored.__required_keys__}
