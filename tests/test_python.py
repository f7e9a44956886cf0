"""The commands from Python: results as objects, DataFrames of both libraries, an import that stays light."""

import ast
import csv
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import rlroute
from rlroute.errors import ConfigError, MissingDependencyError, StoreError
from rlroute.experiments.comparison import frames
from rlroute.experiments.comparison.entries import make_entries
from rlroute.experiments.comparison.table import paired
from rlroute.experiments.comparison.text import pairs_to_csv, plain_rows, to_markdown
from rlroute.experiments.statistics import holm, paired_p_value
from rlroute.reading import read_runs
from rlroute.records import write_compact
from tests import ROOT
from tests.commands import TINY, ran
from tests.tiny import DATA, MODEL, STEPS, TRAIN

HERE = {"tuned": False, "data": DATA, "model": MODEL, "train": TRAIN}
LIBRARIES = [name for name in ("polars", "pandas") if importlib.util.find_spec(name)]
PAGE = ROOT / "docs" / "python.md"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("python") / "runs"


@pytest.fixture(scope="module")
def how(store):
    return rlroute.Launch(store=store, launcher="local")


@pytest.fixture(scope="module")
def found(how):
    return rlroute.compare(["hash", "switch", "dense"], seeds=2, how=how, **HERE)


def table(frame):
    """A DataFrame of either library as lists by column, what is not there as None."""
    columns = frame.to_dict(as_series=False) if hasattr(frame, "to_dicts") else frame.to_dict("list")
    return {name: [None if value != value else value for value in values] for name, values in columns.items()}


def test_a_comparison_has_table_runs_and_verdicts(found, store):
    assert {run.id for run in found.runs} == {run.id for run in read_runs(store)}
    assert found.verdicts == {row.label: row.verdict for row in found.table.rows if row.label != "switch"}
    assert set(found.verdicts) == {"hash", "dense"} and found.left_out == ()
    assert found._repr_markdown_() == to_markdown(found.table)
    head, *lines = repr(found).splitlines()
    assert head.split()[0] == "router" and {line.split()[0].strip(",") for line in lines} == {"hash", "switch", "dense"}


def test_every_pair_has_a_verdict_and_those_with_the_reference_are_the_table_s(found):
    rows = {row.label: row for row in found.table.rows}
    pairs = {(pair.entry, pair.against): pair for pair in found.pairs}
    assert list(pairs) == list(itertools.permutations(rows, 2)) and len(found.pairs) == 6
    for (entry, other), pair in pairs.items():
        back = pairs[other, entry]
        assert pair.difference.mean == pytest.approx(-back.difference.mean) and pair.p_holm == back.p_holm
        assert pair.verdict.equivalent == back.verdict.equivalent and pair.margin == found.table.margin
        if other == found.table.reference:
            assert (pair.difference, pair.verdict) == (rows[entry].difference, rows[entry].verdict)
            assert pair.p_holm >= rows[entry].p_holm, "it is corrected for more comparisons"
    entries = {entry.label: entry for entry in make_entries(found.runs)}
    p_values = {f"{a} {b}": paired_p_value(paired(entries[a], entries[b])) for a, b in itertools.combinations(rows, 2)}
    assert {f"{a} {b}": pairs[a, b].p_holm for a, b in itertools.combinations(rows, 2)} == holm(p_values)
    written = list(csv.DictReader(pairs_to_csv(found.pairs).splitlines()))
    for one, pair in zip(written, found.pairs, strict=True):
        assert (one["entry"], one["against"], one["verdict"]) == (pair.entry, pair.against, str(pair.verdict))
        assert float(one["difference_low"]) == pair.difference.low and int(one["difference_n"]) == pair.difference.n
        assert float(one["margin"]) == pair.margin and float(one["p_holm"]) == pair.p_holm
    for library in LIBRARIES:
        shown = table(found.frame(library, of="pairs"))
        assert list(shown) == list(written[0]) and shown["difference_mean"] == [p.difference.mean for p in found.pairs]
    assert pairs_to_csv([]).count("\n") == 1
    with pytest.raises(ConfigError, match="of = 'rows'"):
        found.frame(of="rows")


def test_a_comparison_is_the_command_s(found, tmp_path, monkeypatch):
    """Of the same settings, in another store: the same figures."""
    monkeypatch.chdir(tmp_path)
    ran("compare", "hash", "switch", "dense", *TINY, "--seeds", "1", "--launcher", "local", "--no-tuned")
    config = next(run.config["config"] for run in read_runs(tmp_path / "runs") if run.config["router"] == "hash")
    parts = {
        "data": rlroute.DataConfig(**config["data"]),
        "model": rlroute.ModelConfig(**config["model"]),
        "train": rlroute.TrainConfig(**config["train"]),
    }
    how = rlroute.Launch(store=tmp_path / "again", launcher="local")
    again = rlroute.compare(["hash", "switch", "dense"], seeds=1, tuned=False, how=how, **parts)
    command = (tmp_path / "results" / "table.csv").read_text().splitlines()
    rows = plain_rows(again.table)
    assert [line.split(",")[0] for line in command[1:]] == [row["label"] for row in rows]
    at = command[0].split(",").index("bits_per_byte_mean")
    assert [float(line.split(",")[at]) for line in command[1:]] == [row["bits_per_byte_mean"] for row in rows]


def test_a_judgement_is_an_object_with_its_runs_and_a_frame(how, found):
    judged = rlroute.judge("unbalanced", max_seeds=3, how=how, say=lambda line: None, **HERE)
    assert repr(judged) == str(judged) and str(judged.verdict) in repr(judged)
    rows = table(judged.frame())
    assert rows["seed"] == [0, 1, 2] and rows["difference"] == list(judged.differences.values())
    both = zip(rows["candidate"], rows["reference"], strict=True)
    assert [one - other for one, other in both] == pytest.approx(rows["difference"])
    assert len(judged.runs) == 6


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_row_for_each_run_has_its_figures_and_its_configuration(library, found, store, tmp_path):
    runs = sorted(found.runs, key=lambda run: run.id)
    only = tmp_path / "runs.jsonl"
    write_compact(runs, only)
    rows = table(rlroute.load_runs(only, library=library))
    assert rows["id"] == [run.id for run in runs] and rows["status"] == ["finished"] * 6
    assert rows["entry"] == ["dense"] * 2 + ["hash"] * 2 + ["switch"] * 2 and rows["seed"] == [0, 1] * 3
    finals = [run.summary["final"] for run in runs]
    assert rows["bits_per_byte"] == [final["bits_per_byte"] for final in finals]
    assert rows["max_vio_L/0"] == [(final["max_vio_L"] or [None])[0] for final in finals] == rows["max_vio"]
    assert rows["train.lr"] == [TRAIN.lr] * 6 and rows["model.num_experts"] == [4] * 6
    assert rows["router.table"] == [None, None, "random", "random", None, None]
    assert type(rlroute.load_runs(only, library=library)).__module__.startswith(library)


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_by_step_and_by_expert_are_all_there(library, found, store):
    runs = {run.id: run for run in read_runs(store)}
    evals, train, loads = (
        table(rlroute.load_runs(store, what, library=library)) for what in ("evals", "train", "loads")
    )
    assert evals["loss"] == [row["loss"] for run in runs.values() for row in run.evals]
    assert train["step"] == list(range(1, STEPS + 1)) * len(runs)
    assert train["grad_norm"] == [row["grad_norm"] for run in runs.values() for row in run.train]
    routed = [run for run in runs.values() if run.config["router"] != "dense"]
    assert loads["share"] == [share for run in routed for row in run.loads for share in row["load_LE"][0]]
    assert loads["expert"][:5] == [0, 1, 2, 3, 0] and set(loads["site"]) == {"0"}


def test_columns_hold_one_type_and_what_is_nested_is_text():
    rows = [{"a": 1, "b": "x", "c": [1, None]}, {"a": 2.5, "b": 3, "d": None}, {"a": None, "b": True}]
    assert table(frames.to_frame(rows)) == {
        "a": [1.0, 2.5, None],
        "b": ["x", "3", "True"],
        "c": ["[1, null]", None, None],
        "d": [None] * 3,
    }


def test_what_is_illegal_is_one_line(found, store, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="what = 'rows'"):
        rlroute.load_runs(store, "rows")
    with pytest.raises(ConfigError, match="library = 'arrow'"):
        rlroute.load_runs(store, library="arrow")
    with pytest.raises(StoreError, match="no run store"):
        rlroute.load_runs(tmp_path / "none")
    with pytest.raises(ConfigError, match="--seeds"):
        rlroute.compare(["switch"], seeds=0)
    with pytest.raises(ConfigError, match="--margin"):
        rlroute.compare(["switch"], margin=-1.0)
    with pytest.raises(AttributeError, match="no attribute 'compares'"):
        rlroute.compares  # noqa: B018
    monkeypatch.setattr(frames, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs the package polars: pip install"):
        rlroute.load_runs(store)


def test_pandas_is_taken_where_polars_is_not_there(found, store, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.setattr(frames, "find_spec", lambda name: SimpleNamespace() if name == "pandas" else None)
    assert type(rlroute.load_runs(store)).__module__.startswith("pandas")


@pytest.mark.processes
def test_the_import_is_light_and_names_are_found_late():
    code = (
        "import sys, rlroute; assert set(rlroute.__all__) <= set(dir(rlroute)); "
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'rlroute')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['rlroute']\n"
    assert all(getattr(rlroute, name) is not None for name in rlroute.__all__)


# The notebook

NOTEBOOK = ROOT / "docs" / "notebook.py"


def test_the_notebook_runs_without_a_screen(tmp_path, monkeypatch):
    pytest.importorskip("marimo")
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("notebook", NOTEBOOK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    outputs, names = module.app.run()
    assert set(names["found"].verdicts) == {"hash", "dense"} and names["judged"].looks
    assert len(read_runs(tmp_path / "runs" / "notebook")) == 3 * 3 + 3
    assert outputs[-1].loc["unbalanced", "fullest expert"] > outputs[-1].loc["switch", "fullest expert"]


def test_the_executed_notebook_is_that_one():
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    written = {line.strip() for line in NOTEBOOK.read_text().splitlines()}
    said = [line.strip() for cell in cells for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert [line for line in said if line not in written] == []
    assert len(cells) == NOTEBOOK.read_text().count("@app.cell")
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert len(outputs) > 5 and not [output for output in outputs if output["output_type"] == "error"]


def test_what_it_shows_of_the_published_record_is_what_that_gives():
    """Its cells that read the record are executed anew: whoever publishes another one executes the notebook again."""
    pytest.importorskip("pandas")
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    names = {"rlroute": rlroute, "published": ROOT / "experiments" / "results" / "comparison.jsonl"}
    shown = 0
    for cell in cells:
        if "load_runs(published" not in (source := "".join(cell["source"])):
            continue
        *body, last = ast.parse(source).body
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        frame = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        html = "".join(next(o["data"]["text/html"] for o in cell["outputs"] if "text/html" in o.get("data", {})))
        assert [float(value) for value in re.findall(r"<td>(.*?)</td>", html)] == frame.to_numpy().ravel().tolist()
        shown += 1
    assert shown == 2


# The page


def test_the_queries_of_the_page_read_the_store_without_rlroute(found, store, monkeypatch):
    duckdb = pytest.importorskip("duckdb")
    queries = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.S)
    assert len(queries) == 3
    monkeypatch.chdir(store.parent)
    runs = {run.id: run for run in read_runs(store)}
    best, curves, loads = (duckdb.sql(query).fetchall() for query in queries)
    finals = {run.id: run.summary["final"] for run in runs.values()}
    assert [row[-1] for row in best] == sorted(final["bits_per_byte"] for final in finals.values())
    assert {(row[0], row[1]) for row in best} == {(run.config["router"], run.config["seed"]) for run in runs.values()}
    assert {row[2] for row in best} == {TRAIN.lr}
    wanted = [(run.id, row["step"], row["bits_per_byte"]) for run in runs.values() for row in run.evals]
    assert sorted(curves) == sorted(wanted)
    assert len(loads) == sum(4 * len(run.loads) for run in runs.values() if run.config["router"] != "dense")
    (first,) = (run for run in runs.values() if run.id == loads[0][0])
    assert [row[-1] for row in loads[:4]] == first.loads[0]["load_LE"][0]


def test_the_page_names_every_column(found, store):
    """But for those of the configuration, which docs/routers.md and --help name."""
    text = PAGE.read_text()
    for what in ("runs", "evals", "train", "loads"):
        names = {re.sub(r"/.*", "", name) for name in rlroute.load_runs(store, what).columns if "." not in name}
        assert [name for name in sorted(names) if f"`{name}`" not in text] == []
