"""A router of another distribution plugs in by its entry point: it is listed, compared, and refused by name where it
does not fit.
"""

import json
import os
import shutil
from dataclasses import asdict

import pytest

from rlroute import registry
from rlroute.config import RouterConfig
from tests import ROOT
from tests.commands import TINY, ran, refused, rlroute, rows, start
from tests.conftest import HANG, forget
from tests.distributions import ROUTER, install
from tests.tiny import STEPS


@pytest.mark.slow
@pytest.mark.processes
def test_a_new_process_lists_and_compares_it(tmp_path):
    path = os.pathsep.join((str(ROOT), install(tmp_path / "site")))
    process = start(tmp_path, "compare", "fragile", "hash", *TINY, "--launcher", "local", path=path)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert "\n| fragile |" in out
    assert "softmax over all experts (fragile)" in out
    for folder in (tmp_path / "runs").iterdir():
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        assert len(rows(folder, "train")) == STEPS


def test_it_is_listed_with_its_paper_and_fields(site):
    install(site)
    text = ran("routers")
    (part,) = (part for part in text.split("\n\n") if part.startswith("fragile "))
    assert "(acme.fragile)" in part
    assert "Nobody et al. 2026" in part
    assert "fault='none'" in part


def test_it_is_part_of_the_default_comparison(site):
    from rlroute.experiments.recipes.presets import all_entries

    install(site)
    assert "fragile" in all_entries()


def test_it_learns_and_takes_its_fields_from_the_entry(site, tmp_path):
    install(site)
    ran("train", "fragile:step=7", "--store", tmp_path / "runs", *TINY)
    (folder,) = (tmp_path / "runs").iterdir()
    config = json.loads((folder / "config.json").read_text())["config"]["router"]
    assert {"name": "fragile", "fault": "none", "step": 7, "seed": 0}.items() <= config.items()
    assert config.keys() - {"name", "fault", "step", "seed"} == asdict(RouterConfig()).keys()
    assert all(row["router_grad_norm"] > 0 for row in rows(folder, "train"))
    assert "'stp'" in refused(rlroute("train", "fragile:stp=7", "--store", tmp_path / "runs", *TINY))


def test_a_module_without_a_paper_does_not_break_the_list(site):
    install(site, source='"""One line."""\n' + ROUTER[ROUTER.index("from dataclasses") :])
    assert "fragile  (acme.fragile)" in ran("routers")


@pytest.mark.parametrize("taken", ["switch", "dense"])
def test_a_name_that_is_taken_is_refused(site, tmp_path, taken):
    install(site, taken, f"acme.{taken}:FragileRouter")
    for command in (("routers",), ("train", "hash", "--store", tmp_path / "runs", *TINY)):
        said = refused(rlroute(*command))
        assert f"{taken!r}" in said
        assert f"acme.{taken}:FragileRouter" in said
        assert "taken" in said
    assert not (tmp_path / "runs").exists()


def test_two_distributions_with_one_name_are_refused(site):
    install(site)
    install(site, value="emca.fragile2:FragileRouter")
    said = refused(rlroute("routers"))
    assert "'fragile'" in said
    assert "taken" in said


@pytest.mark.parametrize(
    ("value", "source", "said"),
    [
        ("acme.other:FragileRouter", ROUTER, "'other'"),
        ("acme.fragile:Config", "class Config:\n    pass\n", "want a subclass of rlroute.routing.Router"),
        ("acme.fragile:Missing", ROUTER, "acme.fragile:Missing"),
        ("acme.fragile:FragileRouter", "import not_there_at_all\n", "not_there_at_all"),
    ],
    ids=["other name", "no router", "no such class", "cannot be imported"],
)
def test_an_entry_point_that_does_not_fit_is_refused_by_name(site, tmp_path, value, source, said):
    install(site, value=value, source=source)
    error = refused(rlroute("train", "fragile", "--store", tmp_path / "runs", *TINY))
    assert "'fragile'" in error and said in error
    assert not (tmp_path / "runs").exists()
    for command in (("routers",), ("train", "hash", "--store", tmp_path / "runs", *TINY)):
        done = rlroute(*command)  # the others are not held up
        (line,) = (line for line in done.err.splitlines() if line.startswith("left out: "))
        assert done.code == 0 and "'fragile'" in line and said in line


@pytest.mark.parametrize("own", [True, False])
def test_a_router_made_from_one_of_ours_leaves_that_alone(site, tmp_path, own):
    """Without a Config of its own it would give ours its name."""
    source = '"""Switch by another name.\n\nNo paper."""\nfrom rlroute.baselines.switch import SwitchRouter\n\n\n'
    body = "    class Config(SwitchRouter.Config):\n        pass\n" if own else "    pass\n"
    install(site, source=source + "class FragileRouter(SwitchRouter):\n" + body)
    done = rlroute("train", "fragile", "--store", tmp_path / "runs", *TINY)
    assert done.code == 0 if own else "'fragile'" in refused(done)
    ran("train", "switch", "--store", tmp_path / "runs", *TINY)
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "runs").iterdir())
    assert names == (["fragile", "switch"] if own else ["switch"])


def test_a_router_that_fails_takes_no_other_run_with_it(site, tmp_path, monkeypatch):
    install(site)
    monkeypatch.chdir(tmp_path)
    entries = ("fragile:fault=raise,step=5,seed=0", "hash")
    said = refused(rlroute("compare", *entries, *TINY, "--seeds", "2", "--launcher", "local"))
    assert "1 of 4 runs failed" in said
    assert "RuntimeError" in said
    assert "of trouble" in said
    ended = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/summary.json"))
    assert [run.partition("-")[0] + run[-3:] for run in ended] == ["fragile-s1", "hash-s0", "hash-s1"]


@pytest.mark.parametrize("what", ["sha256", "version"])
def test_a_run_of_changed_code_is_neither_handed_out_nor_continued_nor_pooled(site, tmp_path, what):
    install(site)
    command = ("train", "fragile", *TINY)
    ran(*command, "--store", tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    if what == "sha256":
        module = site / "acme" / "fragile.py"
        module.write_text(module.read_text() + "# another line\n")
        forget(site)
    else:
        pytest.importorskip("importlib_metadata")  # Dash brings it, and with it entry points are of another class
        (metadata,) = site.glob("*.dist-info/METADATA")
        metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
        registry._sources.cache_clear()
    said = f"made by another router fragile: its {what} was"
    before = (folder / "metrics.jsonl").read_bytes()
    assert said in refused(rlroute(*command, "--store", tmp_path / "runs"))
    assert said in refused(rlroute("compare", "fragile", *TINY, "--seeds", 1, "--store", tmp_path / "runs"))
    ran(*command, "--store", tmp_path / "other", "--seed", 1)
    (fresh,) = (tmp_path / "other").iterdir()
    shutil.copytree(fresh, tmp_path / "runs" / fresh.name)
    assert "config.made_from.routers.fragile." in ran("table", tmp_path / "runs")  # as what is left out
    (folder / "summary.json").unlink()
    assert said in refused(rlroute(*command, "--store", tmp_path / "runs"))
    assert (folder / "metrics.jsonl").read_bytes() == before
