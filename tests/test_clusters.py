"""The synthetic ladder: its task, what is measured on it, and that it tells routers apart."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

from rlroute.errors import ComparisonError, ConfigError
from rlroute.experiments import clusters
from rlroute.experiments.clusters import TASKS, Ladder, Outcome, mutual_information, to_markdown, train
from rlroute.experiments.statistics import wilson
from rlroute.routing import RoutingDecision

SHORT = Ladder(steps=40, tokens=128)
TASK = TASKS["uniform"]


class Informed:
    """A router that is told the clusters: the likeliest given what it sees, or one merged pair of them."""

    stochastic, num_samples, wrong = False, 1, False

    def __call__(self, x_TD, context):
        ids_T = torch.from_numpy(TASK.bayes_actions(x_TD.double().numpy()))
        ids_T = torch.where(ids_T == 0, 1, ids_T) if self.wrong else ids_T
        return RoutingDecision.token_choice(ids_T[:, None], torch.ones(len(ids_T), 1), TASK.experts)

    def parameters(self):
        return [torch.nn.Parameter(torch.zeros(1))]

    def objective(self, decision, feedback):
        return {}

    def observe(self, decision, feedback):
        return {}

    def adapt(self, sums):
        return None


@pytest.mark.parametrize("wrong", [False, True])
def test_an_informed_router_reaches_the_ladder_s_top_and_a_merged_pair_costs_an_eighth(wrong, monkeypatch):
    informed = Informed()
    informed.wrong = wrong
    monkeypatch.setattr(clusters, "_router", lambda entry, task, seed: informed)
    outcome = train("informed", TASK, "own", 0, Ladder(steps=400, tokens=256, lr=1e-2))
    bayes = TASK.ladder()["bayes"]
    if wrong:
        assert outcome.merged == 1 and outcome.arrived is None
        assert outcome.loss == pytest.approx(bayes + 2 / 8 * 0.5, abs=0.03)
    else:
        assert outcome.merged == 0 and outcome.loss < clusters.NEAR * bayes and outcome.arrived < 400
        assert outcome.nmi > 0.99 and outcome.max_vio < 0.2


def test_data_come_from_the_seed_and_the_step_alone():
    a, b, other = (clusters._Tokens(TASK, 64, *key) for key in ((0, 3), (0, 3), (0, 4)))
    assert torch.equal(a.x_TD, b.x_TD) and torch.equal(a.y_TW, b.y_TW) and not torch.equal(a.x_TD, other.x_TD)
    width = a.z_TW.shape[1]
    for token in range(8):
        right = torch.roll(a.z_TW[token], int(a.label_T[token]))
        assert float((a.y_TW[token] - right).square().mean()) == pytest.approx(0.0025, abs=0.002), width


@pytest.mark.parametrize("entry", ["switch", "reinforce", "reinforce:baseline=leave_one_out", "hash"])
def test_the_same_seed_gives_the_same_outcome(entry):
    first, again, other = (train(entry, TASK, "own", seed, SHORT) for seed in (0, 0, 1))
    assert first == again != other
    assert (first.overlap is None) == (first.sampled_loss is None) == (entry in ("switch", "hash"))


@pytest.mark.processes
def test_in_processes_of_their_own_the_outcomes_are_the_same():
    rows = clusters.compare(["hash"], [0], SHORT, 2, lambda text: None)
    assert [(row["task"], row["gate"]) for row in rows] == [(t, f) for t in TASKS for f in clusters.FORMS]
    here = train("hash", TASK, "unit", 0, SHORT)
    assert rows[1]["outcomes"][0] == vars(here)
    text = to_markdown(rows)
    assert text.count("| hash |") == 4 and "bayes" in text and "never" in text


def test_who_is_not_a_router_is_refused_before_any_work():
    with pytest.raises(ConfigError, match="no dense model"):
        clusters.compare(["hash", "dense"], [0], SHORT, 1, lambda text: None)


def test_mutual_information_of_known_tables():
    assert mutual_information(np.eye(4)) == pytest.approx(1.0)
    assert mutual_information(np.ones((4, 4))) == pytest.approx(0.0, abs=1e-12)
    assert mutual_information(np.array([[1.0, 0], [1, 0]])) == 0.0
    merged = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])  # two pairs: I = log 2, H = log 4 and log 2
    assert mutual_information(merged) == pytest.approx(2 * math.log(2) / (math.log(4) + math.log(2)))


def test_merged_clusters_are_those_without_an_expert_of_their_own():
    labels, experts = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 1, 1, 0, 2, 2])
    found = clusters._agreement(labels, experts, 3)  # cluster 1 is split evenly: its main expert is the lower one
    assert found["merged"] == 0 and found["max_vio"] == pytest.approx(0.5)
    assert clusters._agreement(labels, np.ones(6, dtype=int), 3)["merged"] == 2


def test_wilson_s_interval_is_the_textbook_s():
    low, high = wilson(16, 20)
    assert (low, high) == (pytest.approx(0.5840, abs=1e-4), pytest.approx(0.9193, abs=1e-4))
    assert wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == 1.0
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ComparisonError):
            wilson(successes, n)


def test_documented_ladder_is_what_the_stored_record_says():
    root = Path(__file__).parents[1]
    ((path, shown),) = re.findall(
        r"<!-- clusters: (\S+) -->\n(.*?)<!-- end of clusters -->", (root / "docs/agents.md").read_text(), re.S
    )
    rows = json.loads((root / path).read_text())["rows"]
    assert shown == to_markdown([row for row in rows if row["gate"] == "own"])
    assert {len(row["outcomes"]) for row in rows} == {20}


def test_a_gate_that_does_not_learn_is_trained_once_for_both_forms(monkeypatch):
    for entry, forms in (("hash", {"own"}), ("switch", {"own", "unit"})):
        assert {form for _, form in trained_cells(entry, monkeypatch)} == forms


def trained_cells(entry, monkeypatch):
    """Return the tasks and gate forms that are trained for an entry."""

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, mp_context):
            super().__init__(1)

    trained = []

    def train(entry, task, form, seed, how):
        trained.append((task, form))
        return Outcome(1.0, 0, 1.0, 0.0, None)

    monkeypatch.setattr(clusters, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(clusters, "train", train)
    rows = clusters.compare([entry], [0], clusters.Ladder(), 1, lambda text: None)
    assert [(row["task"], row["gate"]) for row in rows] == list(product(clusters.TASKS, clusters.FORMS))
    return trained
