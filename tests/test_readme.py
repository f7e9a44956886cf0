"""What the README shows is what the repository does: its table comes from the stored records, its example is a working
router.
"""

import json
import re
import types
from pathlib import Path

import pytest
import torch

from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import to_markdown
from rlroute.records import read_runs
from rlroute.registry import run_config
from rlroute.routing import RouterShape, RoutingContext

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("page", "tables"), [("README.md", 1), ("docs/agents.md", 2)])
def test_published_tables_are_what_the_stored_records_say(page, tables):
    marked = r"<!-- table: experiments/results/(\S+) -->\n(.*?)<!-- end of table -->"
    published = re.findall(marked, (ROOT / page).read_text(), re.S)
    assert len(published) == tables
    for name, text in published:
        table = to_markdown(build_table(read_runs(RESULTS / name)))
        rows, sampled = ([x for x in table.splitlines() if x.startswith(s)] for s in ("|", "- **Sampled**"))
        assert text == "\n".join([*rows, "", *sampled, ""])


def test_stored_comparison_used_seeds_that_tuning_did_not_and_its_best_trials():
    tuning = json.loads((RESULTS / "tuning.json").read_text())
    found = {}
    for row in tuning["trials"]:  # best first within an entry
        found.setdefault(row["entry"], row["overrides"])
    records = read_runs(RESULTS / "comparison.jsonl")
    assert not {record.config["seed"] for record in records} & set(tuning["seeds"])
    for record in records:
        best = found[record.config["router"]]
        config = record.config["config"]
        now = run_config(config).to_dict()  # fields that are newer than the record take their defaults
        assert {part: {name: now[part][name] for name in config[part]} for part in config} == config
        assert config["train"] | best["train"] == config["train"]
        assert config["router"] | best.get("router", {}) == config["router"]


@pytest.fixture
def example():
    """The README's router, executed as a module of its own."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    module = types.ModuleType("cosine")
    exec(
        "import torch.nn.functional as F\n"
        "from rlroute.config import RouterConfig\n"
        "from rlroute.routing import LinearScores, Router, RoutingDecision\n" + code,
        module.__dict__,
    )
    return module.CosineRouter


def test_readme_example_is_a_working_router(example):
    assert example.Config.name == "cosine"
    router = example(example.Config(), RouterShape(d_model=8, num_experts=4, k=2, site=0, vocab_size=9, seed=0))
    rows = torch.arange(6)
    context = RoutingContext(
        seed=0,
        site=0,
        step=0,
        token_ids_T=rows,
        position_T=rows,
        sequence_T=torch.zeros_like(rows),
        mask_T=torch.ones(6, dtype=torch.bool),
        explore=True,
    )
    decision = router(torch.randn(6, 8), context)
    assert int(decision.demand_E().sum()) == 12
    (decision.gates_R * torch.randn(12)).sum().backward()
    assert float(router.scores.weight.grad.abs().max()) > 0
