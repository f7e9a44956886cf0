"""Alarms: each condition of its own, once until it is over, at the same thresholds for whoever looks."""

from dataclasses import asdict, replace

import pytest

from rlroute.alarms import THRESHOLDS, Thresholds, Watch, alarms
from rlroute.config import ModelConfig

EXPERTS, K = 16, 2
MODEL = asdict(ModelConfig(num_layers=2, num_experts=EXPERTS, k=K))
EVEN = [1 / EXPERTS] * EXPERTS


def evaluation(step, dead=(0, 0), vio=(0.1, 0.1), experts=EXPERTS):
    loads = [[1 / experts] * experts] * 2
    return {"kind": "eval", "step": step, "dead_L": list(dead), "max_vio_L": list(vio), "load_LE": loads}


def step(number, logits=(1.0, 1.0), seconds=None):
    return {"kind": "train", "step": number, "seconds": number if seconds is None else seconds, "logits_L": [*logits]}


def seen(*rows, idle=None, thresholds=THRESHOLDS):
    """Kind, site, first step and end of each alarm."""
    found = alarms("run-s0", MODEL, rows, idle, thresholds)
    return [(alarm.kind, alarm.site, alarm.step, alarm.until) for alarm in found]


def test_a_healthy_run_has_none():
    rows = [row for n in range(1, 9) for row in (step(n, (19.9, None)), evaluation(n, dead=(1, 0), vio=(3.49, None)))]
    assert seen(*rows, idle=179) == []


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([evaluation(n, dead=(0, 2)) for n in range(1, 5)], "dead experts"),
        ([evaluation(n, vio=(0, 3.5)) for n in range(1, 5)], "collapse"),
        ([step(n, (1, 20)) for n in range(1, 5)], "router logits"),
    ],
)
def test_three_rows_in_a_row_raise_it_at_its_site_once(rows, kind):
    watch = Watch("run-s0", MODEL)
    said = [watch.see(row) for row in rows]
    assert [len(new) for new in said] == [0, 0, 1, 0]
    assert [(alarm.kind, alarm.site, alarm.step) for alarm in said[2]] == [(kind, "1", 1)]
    assert watch.standing == list(watch.found.values()) == alarms("run-s0", MODEL, rows)
    assert seen(*rows[:2]) == []


def test_rows_in_between_that_are_well_begin_the_count_anew():
    bad, well = (lambda n: evaluation(n, dead=(4, 0))), evaluation
    assert seen(bad(1), bad(2), well(3), bad(4), bad(5)) == []
    assert seen(bad(1), bad(2), step(2), bad(3)) == [("dead experts", "0", 1, None)]  # of another kind


def test_what_is_over_says_since_when_and_is_not_said_again():
    bad = [evaluation(n, dead=(4, 0)) for n in range(1, 4)]
    over = [*bad, evaluation(4)]
    assert seen(*over) == [("dead experts", "0", 1, 4)]
    watch = Watch("run-s0", MODEL)
    assert sum(len(watch.see(row)) for row in [*over, *(replace_step(row, 10) for row in bad)]) == 1
    assert [(alarm.step, alarm.until) for alarm in watch.found.values()] == [(1, None)]


def replace_step(row, more):
    return row | {"step": row["step"] + more}


@pytest.mark.parametrize("experts", [1, 2, 4, 16, 256])
def test_collapse_is_measured_by_what_k_experts_a_token_allow(experts):
    """With all pairs on k experts MaxVio is E / k - 1; where k are all there are, nothing can collapse."""
    most = experts / K - 1
    model = MODEL | {"num_experts": experts, "k": min(K, experts)}

    def found(share):
        rows = [evaluation(n, vio=(share * most, 0), experts=experts) for n in (1, 2, 3)]
        return [alarm.kind for alarm in alarms("run-s0", model, rows)]

    assert found(1.0) == found(0.51) == (["collapse"] if experts > K else [])
    assert found(0.49) == []


@pytest.mark.parametrize(("experts", "fewest"), [(2, 1), (8, 1), (9, 2), (16, 2), (256, 32)])
def test_an_eighth_of_the_experts_but_at_least_one(experts, fewest):
    rows = [[evaluation(n, dead=(d, 0), experts=experts) for n in (1, 2, 3)] for d in (fewest - 1, fewest)]
    assert [bool(alarms("run-s0", MODEL, some)) for some in rows] == [False, True]


def test_a_stall_is_long_by_the_run_s_own_pace_and_each_is_said():
    quick, slow = [step(n, seconds=n) for n in (1, 2)], [step(n, seconds=100 * n) for n in (1, 2)]
    assert seen(*quick, idle=179) == [] and seen(*slow, idle=999) == []
    assert seen(*quick, idle=180) == seen(*slow, idle=1000) == [("stalled", None, 2, None)]
    assert seen(idle=599) == [] and seen(idle=600) == [("stalled", None, 0, None)]
    watch = Watch("run-s0", MODEL)
    said = [watch.see(quick[0]), watch.idle(100), watch.idle(200), watch.idle(201), watch.see(quick[1])]
    said += [watch.idle(10), watch.idle(200)]
    assert [len(new) for new in said] == [0, 0, 1, 0, 0, 0, 1]
    assert [(alarm.step, alarm.until) for alarm in watch.found.values()] == [(2, None)]


def test_a_sentence_names_run_site_value_and_threshold():
    (dead,) = alarms("run-s0", MODEL, [evaluation(n, dead=(0, 5)) for n in (40, 80, 120)])
    assert str(dead) == (
        "run-s0, site 1: 5 of 16 experts are dead, each below 5% of its fair share (alarm from 2 on, since step 40)"
    )
    assert (dead.value, dead.threshold) == (5, 2)
    (stall,) = alarms("run-s0", MODEL, [step(7)], idle=200)
    assert str(stall) == "run-s0: no row for 200 s (alarm from 180 on, since step 7)"
    assert str(replace(stall, until=8)).endswith("since step 7, over at step 8)")


def test_thresholds_are_what_is_asked_for():
    mine = Thresholds(in_a_row=1, dead=0.5, collapse=0.9, logits=10, stall_seconds=5)
    rows = [step(1, (10, 9.9)), evaluation(1, dead=(8, 7), vio=(6.3, 6.2))]
    assert seen(*rows, thresholds=mine) == [
        ("router logits", "0", 1, None),
        ("dead experts", "0", 1, None),
        ("collapse", "0", 1, None),
    ]
    assert seen(step(1, seconds=0.1), idle=5, thresholds=mine) == [("stalled", None, 1, None)]


def test_old_rows_and_models_without_sites_raise_nothing():
    plain = {"kind": "train", "step": 1, "seconds": 1.0}
    empty = {"kind": "eval", "step": 1, "dead_L": [], "max_vio_L": [], "load_LE": []}
    assert seen(*[plain, empty] * 4) == []
