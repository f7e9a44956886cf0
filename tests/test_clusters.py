"""The synthetic ladder: its task, what is measured on it, and that it tells routers apart."""

import json
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

from rlroute.config import RouterConfig
from rlroute.errors import ComparisonError, ConfigError
from rlroute.experiments.cli.games import compare_clusters
from rlroute.experiments.play import ladder as clusters
from rlroute.experiments.play.agreement import agreement, joint_counts, mutual_information
from rlroute.experiments.play.ladder import TASKS, Ladder, Outcome, to_markdown, train
from rlroute.experiments.statistics import wilson
from rlroute.registry import default_names
from rlroute.routing import Router, RoutingDecision
from tests import ROOT
from tests.strangers import install

SHORT = Ladder(steps=40, tokens=128)
TASK = TASKS["uniform"]


class Informed(Router):
    """A router that is told the clusters: the likeliest given what it sees, or one merged pair of them."""

    wrong = False

    def forward(self, x_TD, context):
        ids_T = torch.from_numpy(TASK.bayes_actions(x_TD.double().numpy()))
        ids_T = torch.where(ids_T == 0, 1, ids_T) if self.wrong else ids_T
        return RoutingDecision.token_choice(ids_T[:, None], torch.ones(len(ids_T), 1), TASK.experts)


@pytest.mark.parametrize("wrong", [False, True])
def test_an_informed_router_reaches_the_ladder_s_top_and_a_merged_pair_costs_an_eighth(wrong, monkeypatch):
    informed = Informed(RouterConfig(), clusters.router_shape(TASK, 0))
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


@pytest.mark.slow
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
    assert mutual_information(np.zeros((2, 2))) is None
    assert mutual_information(merged) == pytest.approx(2 * math.log(2) / (math.log(4) + math.log(2)))


# Counted by pairs.


def token_choice(ids_TK, experts, dropped=()):
    decision = RoutingDecision.token_choice(torch.tensor(ids_TK), torch.ones(len(ids_TK), len(ids_TK[0])), experts)
    return replace(decision, kept_R=torch.tensor([r not in dropped for r in range(len(decision.kept_R))]))


def entropy(*counts):
    return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts if n)


def nmi(rows, columns, joint):
    return 2 * (entropy(*rows) + entropy(*columns) - entropy(*joint)) / (entropy(*rows) + entropy(*columns))


LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
NONE = 3


@pytest.mark.parametrize(
    ("decision", "joint", "merged", "max_vio", "pairs", "without"),
    [
        # cluster 1 is split evenly: its main expert is the lower one
        (token_choice([[1], [1], [1], [0], [2], [2]], 3), [[0, 2, 0], [1, 1, 0], [0, 0, 2]], 0, 3 / 2 - 1, 1, 0),
        (token_choice([[1]] * 6, 3), [[0, 2, 0]] * 3, 2, 2, 1, 0),
        # two experts a token
        (
            token_choice([[0, 1], [0, 2], [1, 0], [1, 0], [2, 1], [2, 1]], 3),
            [[2, 1, 1], [2, 2, 0], [0, 2, 2]],
            1,  # experts 0, 0 and 1 are the main ones
            5 / 4 - 1,
            2,
            0,
        ),
        # two, one or no expert a token; the second token's only pair is dropped: chosen, but not run
        (
            token_choice([[0, 1], [0, NONE], [NONE, 1], [1, 2], [NONE, NONE], [NONE, NONE]], 3, dropped=(2, 9)),
            [[2, 1, 0], [0, 2, 1], [0, 0, 0]],
            1,  # cluster 2 has no expert, and so none of its own
            3 / 2 - 1,
            5 / 6,
            3 / 6,
        ),
        # experts choose: the first and the second take the second token, the third has an unused slot
        (
            RoutingDecision.expert_choice(torch.tensor([[0, 1], [2, 1], [6, 4]]), torch.ones(3, 2), 6),
            [[2, 1, 0], [0, 1, 0], [0, 0, 1]],
            0,
            2 / (5 / 3) - 1,
            5 / 6,
            2 / 6,
        ),
    ],
    ids=["one", "merged", "two", "variable", "expert choice"],
)
def test_agreement_is_that_of_the_pairs_counted_by_hand(decision, joint, merged, max_vio, pairs, without):
    assert joint_counts(LABELS, decision).tolist() == joint
    found = agreement(LABELS, decision)
    rows, columns = [sum(row) for row in joint], [sum(column) for column in zip(*joint, strict=True)]
    if columns.count(0) == 2:
        assert found["nmi"] == pytest.approx(0, abs=1e-12)
    else:
        assert found["nmi"] == pytest.approx(nmi(rows, columns, np.ravel(joint)))
    assert (found["merged"], found["pairs"], found["without"]) == (merged, *map(pytest.approx, (pairs, without)))
    assert found["max_vio"] == pytest.approx(max_vio)


@pytest.mark.parametrize(
    "nothing",
    [
        token_choice([[NONE]] * 6, 3),
        RoutingDecision.expert_choice(torch.full((3, 2), 6), torch.ones(3, 2), 6),
    ],
    ids=["token choice", "expert choice"],
)
def test_where_nothing_was_chosen_agreement_is_not_defined(nothing):
    assert agreement(LABELS, nothing) == {"merged": 3, "nmi": None, "max_vio": None, "pairs": 0.0, "without": 1.0}


def test_who_chooses_makes_no_difference_to_what_is_counted():
    """The same pairs, by token and by expert: fault 3 read the second as the experts of the first tokens."""
    by_token = token_choice([[0], [0], [1], [1], [2], [2]], 3)
    by_expert = RoutingDecision.expert_choice(torch.tensor([[0, 1], [3, 2], [4, 5]]), torch.ones(3, 2), 6)
    assert agreement(LABELS, by_token) == agreement(LABELS, by_expert)
    shuffled = torch.tensor([2, 0, 1, 0, 1, 2])
    by_expert = RoutingDecision.expert_choice(torch.tensor([[1, 3], [2, 4], [0, 5]]), torch.ones(3, 2), 6)
    assert agreement(shuffled, by_expert)["nmi"] == pytest.approx(1.0)


def test_expert_choice_and_variable_k_are_trained_and_shown_with_what_ran(monkeypatch):
    install(monkeypatch, "expert_choice_like", "threshold_like")
    rows = []
    for entry in ("expert_choice_like", "threshold_like:threshold=0.2", "threshold_like:threshold=1.5", "hash"):
        outcome = train(entry, TASK, "own", 0, SHORT)
        json.dumps(vars(outcome), allow_nan=False)
        rows.append({"task": "uniform", "gate": "own", "entry": entry, "outcomes": [vars(outcome)]})
    experts, some, nobody, hashed = (Outcome(**row["outcomes"][0]) for row in rows)
    assert experts.pairs == 1.0 and 0 < experts.without < 1 and experts.max_vio == 0.0
    assert some.pairs != 1.0 and 0 < some.overlap < 1 and 0 < some.nmi < 1
    assert (nobody.pairs, nobody.without, nobody.nmi, nobody.overlap) == (0.0, 1.0, None, None)
    held_out = clusters._Tokens(TASK, clusters.VALIDATION, 0, "validation")
    assert nobody.loss == nobody.sampled_loss == float(held_out.y_TW.square().mean(1).mean())
    text = to_markdown(rows)
    (said,) = (line for line in text.splitlines() if line.startswith("Not one expert"))
    assert "threshold_like:threshold=1.5 ran 0.00 pairs per token, and none for 100.0% of tokens" in said
    assert f"expert_choice_like ran 1.00 pairs per token, and none for {experts.without:.1%}" in said
    assert "hash" not in said and (hashed.pairs, hashed.without) == (1.0, 0.0)


def test_a_token_s_own_input_counts_where_a_router_weighs_it(monkeypatch):
    class Identity(Router):
        def forward(self, x_TD, context):
            ids_T1 = torch.full((len(x_TD), 1), TASK.experts)
            weights_T = torch.full((len(x_TD),), 2.0)
            return RoutingDecision.token_choice(ids_T1, torch.ones(len(x_TD), 1), TASK.experts, self_T=weights_T)

    router = Identity(RouterConfig(), clusters.router_shape(TASK, 0))
    layer = clusters._Layer(router, torch.zeros(TASK.experts, clusters.WIDTH, clusters.WIDTH), "own")
    tokens = clusters._Tokens(TASK, 16, 0)
    loss_T, _ = layer.losses(tokens, tokens.context(0, 0, False, progress=0.0))
    assert torch.equal(loss_T, (2 * tokens.z_TW - tokens.y_TW).square().mean(1))


def test_routers_see_how_much_of_the_training_is_done_and_the_credit_of_their_pairs(monkeypatch):
    install(monkeypatch, "threshold_like")
    router = clusters._router("threshold_like", TASK, 0)
    monkeypatch.setattr(clusters, "_router", lambda entry, task, seed: router)
    train("threshold_like", TASK, "own", 0, Ladder(steps=4, tokens=32))
    assert router.seen["progress"] == [0, 0.25, 0.5, 0.75] and all(credit > 0 for credit in router.seen["credit"])


def test_who_refuses_the_shape_is_left_out_with_its_reason_where_nobody_is_named(monkeypatch, tmp_path, capsys):
    install(monkeypatch, "picky")
    asked = []
    monkeypatch.setattr(clusters, "compare", lambda entries, *rest: asked.extend(entries) or [])
    compare_clusters((), 1, tmp_path, 1)
    left_out = ["default_moe", "picky"]
    assert asked == [name for name in default_names() if name not in left_out] and "picky" in default_names()
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        "left out: default_moe (it wishes for outputs of the experts, which site 0 does not hand out); "
        "picky (num_experts = 8 at site 1: legal are 5 behind another site)"
    )


def test_who_is_named_and_refuses_the_shape_is_refused_before_any_work(monkeypatch):
    install(monkeypatch, "picky")
    with pytest.raises(ConfigError, match="router picky: num_experts = 8"):
        clusters.compare(["hash", "picky"], [0], SHORT, 1, lambda text: None)


def test_wilson_s_interval_is_the_textbook_s():
    low, high = wilson(16, 20)
    assert (low, high) == (pytest.approx(0.5840, abs=1e-4), pytest.approx(0.9193, abs=1e-4))
    assert wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == 1.0
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ComparisonError):
            wilson(successes, n)


def test_documented_ladder_is_what_the_stored_record_says():
    ((path, shown),) = re.findall(
        r"<!-- clusters: (\S+) -->\n(.*?)<!-- end of clusters -->", (ROOT / "docs/agents.md").read_text(), re.S
    )
    rows = json.loads((ROOT / path).read_text())["rows"]
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


def test_a_run_that_diverges_is_named_and_ranks_last():
    fine = {"merged": 0, "nmi": 1.0, "max_vio": 0.0, "arrived": None}
    rows = [
        {"task": "uniform", "gate": "own", "entry": entry, "outcomes": [{"loss": loss, **fine} for loss in losses]}
        for entry, losses in {"lost": (0.1, None), "poor": (0.9, 0.8), "good": (0.2, 0.3)}.items()
    ]
    lines = [line for line in to_markdown(rows).splitlines() if line.startswith(("| lost", "| poor", "| good"))]
    assert [line.split()[1] for line in lines] == ["good", "poor", "lost"]
    assert "1 of 2 diverged" in lines[-1]


def test_what_has_not_begun_is_left_out_after_ctrl_c(monkeypatch):
    begun, over = [], threading.Event()

    def train(*given):
        begun.append(given)
        if len(begun) == 1:
            raise KeyboardInterrupt
        over.wait(1.0)  # long enough for the driver to hear of the first

    monkeypatch.setattr(clusters, "train", train)
    monkeypatch.setattr(clusters, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    with pytest.raises(KeyboardInterrupt):
        clusters.compare(("hash",), range(100), SHORT, 1, print)
    assert len(begun) < 100
