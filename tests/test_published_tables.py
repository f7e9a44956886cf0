"""Tables in pages: what their runs do not give, and what is wrong with these, is caught and named."""

import json
import os
import shutil

import pytest

from rlroute.experiments.comparison import page_tables as tables
from rlroute.experiments.comparison.ladder import reduce
from rlroute.experiments.comparison.ladder_file import FILE, key_of
from rlroute.experiments.verify import replay
from rlroute.reading import read_runs
from rlroute.records import write_compact
from tests.commands import TINY, contents, ran, refused, rlroute
from tests.test_ladder import rungs
from tests.test_verify import Edit, run_of

MARKER = "<!-- table: {} -->\n<!-- end of table -->\n"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a store of four runs, and in a folder below a page with a table of it and one of its export."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran("compare", "switch", "hash", *TINY, "--seeds", "2", "--launcher", "local")
        ran("export", "all.jsonl")
        (folder / "docs").mkdir()
        page = (
            "# Results\n\n" + MARKER.format("runs timings=no notes=all margin=0.5") + "\n" + MARKER.format("all.jsonl")
        )
        (folder / "docs" / "page.md").write_text(page)
        assert ran("table", "docs/page.md", "--write") == "2 tables changed in docs/page.md\n"
        assert ran("table", "docs/page.md", "--write") == "0 tables changed in docs/page.md\n"
    return folder


@pytest.fixture
def folder(published, tmp_path):
    """A copy of it, to be edited."""
    return shutil.copytree(published, tmp_path / "copy")


def found(folder, **options):
    return tables.check_page(folder / "docs" / "page.md", **options)


def test_a_page_that_is_what_its_runs_give_is_passed_over_in_silence(published):
    before = contents(published)
    done = rlroute("table", published / "docs" / "page.md", "--check", "--rerun", 1)
    assert (done.code, done.out) == (0, ""), done
    assert contents(published) == before
    first, second = tables.tables_of(published / "docs" / "page.md")
    assert first.text == tables.to_markdown(
        tables.build_table(read_runs(published / "runs"), margin=0.5), timings=False
    )
    assert "tokens/s" in second.text and "**Budget**" not in second.text and "**Budget**" in first.text


def test_a_table_that_was_edited_by_hand_is_named_by_line_and_cell(folder):
    page = folder / "docs" / "page.md"
    text = page.read_text()
    row = max((line for line in text.splitlines() if line.startswith("| hash")), key=len)  # with timings
    bits = row.split("|")[4].strip()
    page.write_text(text.replace(row, row.replace(bits, "1.2345 ± 0.0001")))
    done = rlroute("table", page, "--check")
    number = text.splitlines().index(row) + 1
    assert done.out == f"{page}, line {number}: '1.2345 ± 0.0001' stands there, its runs give {bits!r}\n"
    assert done.code == 1
    page.write_text(text.replace(row + "\n", ""))
    assert any(line.startswith(f"{page}, line {number}: ") for line in found(folder))
    ran("table", page, "--write")
    assert page.read_text() == text


def test_a_table_of_a_store_with_a_ladder_is_that_of_the_command(folder):
    """With its compute multipliers."""
    configs = {run.config["router"]: run.config["config"] for run in read_runs(folder / "runs")}
    ladder = reduce(rungs(1.0, 1.3), ["switch", "hash"], ["run"], None).to_dict()
    for entry, name in zip(ladder["entries"], ("switch", "hash"), strict=True):
        entry["key"] = key_of(configs[name])
    (folder / "runs" / FILE).write_text(json.dumps(ladder))
    assert found(folder), "the page lacks them"
    assert ran("table", folder / "docs" / "page.md", "--write").startswith("1 tables changed")
    first, _ = tables.tables_of(folder / "docs" / "page.md")
    assert "compute multiplier" in first.text and found(folder) == []
    assert first.text.strip() == ran("table", folder / "runs", "--no-timings", "--margin", "0.5").strip()
    (folder / "runs" / FILE).write_text("{}")
    assert FILE in refused(rlroute("table", folder / "docs" / "page.md", "--write"))
    assert any(FILE in line for line in found(folder))


def test_a_tampered_record_is_named(folder):
    Edit(run_of(folder / "runs")).set("evals.max_vio_L.0", 0.0).write()
    lines = found(folder)
    run = run_of(folder / "runs").name
    assert any(line.startswith(f"{run}: metrics.jsonl: ") and "edited after the run ended" in line for line in lines)
    assert any(line.startswith(f"{folder}/docs/page.md, line ") for line in lines)  # and the table is another
    (folder / "runs" / run / "summary.json").write_text("{}")
    assert any("summary.json" in line for line in found(folder))


def test_a_missing_seed_is_named(folder):
    gone = run_of(folder / "runs", "hash", 1)
    shutil.rmtree(gone)
    lines = found(folder)
    assert any(line.startswith(f"{gone.name}: store: run is 'missing'") for line in lines)
    assert any("seeds differs" in line for line in lines)
    kept = [run for run in read_runs(folder / "all.jsonl") if run.config["seed"] == 0]
    write_compact(kept, folder / "all.jsonl")  # of every entry: the runs that are left are comparable
    assert sum("run is 'missing'" in line for line in found(folder)) == 3


def test_runs_of_other_fingerprints_are_named(folder):
    other = "0" * 64
    Edit(run_of(folder / "runs")).set("summary.fingerprint.backbone", other).write()
    (line,) = (line for line in found(folder) if "docs/page.md" in line)
    assert "fingerprint.backbone differs" in line and other in line


def test_what_is_sealed_anew_is_found_by_training_again(folder):
    for edit in (Edit(run_of(folder / "runs", name, seed)) for name in ("switch", "hash") for seed in (0, 1)):
        edit.set("evals.loss", lambda loss: loss * 1.001).set("evals.bits_per_byte", lambda bits: bits * 1.001)
        edit.set("evals.nats_W", lambda nats_W: [nats * 1.001 for nats in nats_W])
        edit.seal_anew().write()
    ran("table", folder / "docs" / "page.md", "--write")
    assert found(folder) == []
    (line,) = found(folder, reruns=1)
    assert "loss" in line and "trained again" in line


def test_on_another_kind_of_cpu_the_bits_per_byte_are_held_to_one_percent(folder):
    (run,) = (run for run in read_runs(folder / "runs") if run.config["router"] == "hash" and run.config["seed"] == 0)
    elsewhere = dict(run.environment) | {"cpu_capability": "OTHER"}
    for change, findings in ((1.009, 0), (0.98, 1), (1.02, 1)):
        final = dict(run.summary["final"])
        final["bits_per_byte"] *= change
        edited = tables.replay.RunRecord(
            run.id, run.config, elsewhere, dict(run.summary) | {"final": final}, run.evals, run.loads, run.train
        )
        lines = list(map(str, replay.repeat(edited, None)))
        assert len(lines) == findings
        assert all("final/bits_per_byte" in line and "over 1%" in line and "OTHER" in line for line in lines)


def test_the_sample_is_drawn_by_the_seed(published):
    runs = read_runs(published / "runs")
    drawn = [[run.id for run in replay.chosen(runs, 2, seed)] for seed in (0, 0, *range(1, 9))]
    assert drawn[0] == drawn[1] and len(set(map(tuple, drawn))) > 2 and all(len(set(ids)) == 2 for ids in drawn)


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("", "a table wants"),
        ("<!-- table: runs -->\n| a |\n", "a table wants"),
        (MARKER.format("runs margins=1"), "margins"),
        (MARKER.format("runs margin=much"), "margin = 'much'"),
        (MARKER.format("runs margin=-1"), "margin = -1"),
        (MARKER.format("runs timings=maybe"), "timings = 'maybe'"),
        (MARKER.format("runs dense"), "RECORDS option=value"),
    ],
)
def test_illegal_markers_are_one_line(marker, said, folder):
    page = folder / "docs" / "page.md"
    page.write_text(f"# Results\n\n{marker}")
    assert said in refused(rlroute("table", page, "--check"))
    assert said in refused(rlroute("table", page, "--write"))


def test_what_does_not_go_with_a_page_is_refused(published):
    page = published / "docs" / "page.md"
    assert "--csv" in refused(rlroute("table", page, "--check", "--csv"))
    assert "--margin" in refused(rlroute("table", page, "--check", "--margin", "0.1"))
    assert "--check, with or without" in refused(rlroute("table", page, "--check", "--write"))
    assert "--check, with or without" in refused(rlroute("table", page, "--rerun", "1"))
    assert "cannot be read" in refused(rlroute("table", published / "runs", "--check"))


def test_records_that_are_not_there_are_named(folder):
    os.rename(folder / "all.jsonl", folder / "none.jsonl")
    (line,) = found(folder)
    assert "no run store or compact file" in line and line.startswith(f"{folder}/docs/page.md, line ")
    (folder / "all.jsonl").write_text(json.dumps({"config": 1}) + "\n")
    (line,) = found(folder)
    assert "all.jsonl, line 1" in line
