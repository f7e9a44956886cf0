"""What the README shows is what the repository does: its table comes from the stored records, its sample is a working
router.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlroute.experiments.comparison.page_tables import OPENED, check_page, tables_of
from rlroute.experiments.laws.contract import LAWS
from rlroute.experiments.recipes.tuned import TUNING_SEEDS, settings_of
from rlroute.reading import read_runs
from rlroute.registry import router_names, run_config
from tests import ROOT
from tests.commands import TINY, ran

RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


TABLES = {"README.md": 1, "docs/agents.md": 2, "docs/compare.md": 1, "docs/lengths.md": 4}
"""How many tables of stored runs a page has."""


@pytest.mark.parametrize(("page", "tables"), TABLES.items())
def test_published_tables_are_what_the_stored_records_say(page, tables):
    """What `rlroute table PAGE --check` does."""
    assert len(tables_of(ROOT / page)) == tables
    assert check_page(ROOT / page) == []


def test_every_page_with_a_table_is_checked():
    pages = [path for path in PAGES if OPENED.search(path.read_text())]
    assert {str(page.relative_to(ROOT)) for page in pages} == TABLES.keys()


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            name, _, part = target.partition("#")
            if not name.startswith("http"):
                linked = page.parent / name if name else page
                assert linked.exists() and (not part or part in _headings(linked)), f"{page.name}: {target}"


def _headings(page):
    """Return the names by which a page's headings are linked."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_index_names_every_page():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text())
    assert sorted(linked) == sorted(path.name for path in ROOT.glob("docs/*.md") if path.name != "README.md")


def test_stored_comparison_used_seeds_that_tuning_did_not_and_its_best_trials():
    records = read_runs(RESULTS / "comparison.jsonl")
    assert not {record.config["seed"] for record in records} & set(TUNING_SEEDS)
    for record in records:
        config = record.config["config"]
        now = run_config(config).to_dict()  # fields that are newer than the record take their defaults
        assert {part: {name: now[part][name] for name in config[part]} for part in config} == config
        assert settings_of(now) == "tuned"


def test_routers_that_it_names_are_there():
    listed = README.partition("\n## Routers\n")[2].partition("[docs/routers.md]")[0]
    names = set(re.findall(r"`(\w+)`", listed))
    assert {"reinforce", "switch", "hash", "dense"} <= names <= {*router_names(), "dense"}


@pytest.fixture
def sample(tmp_path, routers):
    """The README's router, saved as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    path = tmp_path / "cosine.py"
    path.write_text(code)
    return path


def test_readme_sample_keeps_every_law_and_trains(sample, tmp_path):
    lines = ran("check", sample).splitlines()
    assert len(lines) == len(LAWS) + 2 and all(line.startswith("pass ") for line in lines[1:-1]), lines
    ran("compare", "cosine", "switch", "--include", sample, *TINY, "--launcher", "local", "--out", tmp_path / "out",
        "--store", tmp_path / "runs", "--seeds", "1", "--no-tuned")  # fmt: skip


@pytest.mark.slow
@pytest.mark.processes
def test_readme_sample_passes_the_checks_of_the_repository_as_pasted(sample, tmp_path):
    copy, tools = tmp_path / "copy", Path(sys.executable).parent
    left_out = shutil.ignore_patterns(".*", "results", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    pasted = shutil.copy(sample, copy / "baselines" / "cosine.py")
    for command in (
        ("ruff", "format", "--check", pasted),
        ("ruff", "check", pasted),
        ("lint-imports",),
        ("mypy", "--cache-dir", tmp_path / "cache", "-m", "rlroute.baselines.cosine"),
        (sys.executable, "-m", "rlroute", "check", "cosine"),
    ):
        tool, *words = command
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([tools / tool, *words], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
