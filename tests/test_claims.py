"""The ledger is well formed and can be run; what decides a claim is right on numbers and records made by hand.

Shape suffixes: E experts.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from rlroute.errors import ConfigError
from rlroute.experiments.claims.claim import BASES, Claim, Part, Tier, arm
from rlroute.experiments.claims.ledger import CLAIMS, THEMES, choose
from rlroute.experiments.claims.measures import (
    MEASURES,
    better_unsure,
    bits_at_equal_time,
    crowd,
    load_swing,
    loss_rise,
    share_to_reach,
    spikes,
    sure_regret,
    values_of,
)
from rlroute.experiments.claims.outcomes import PUBLISHED, faults, read_outcomes
from rlroute.experiments.claims.page import PAGE, claims_grid, differences, page
from rlroute.experiments.claims.readings import Verdict, read, together
from rlroute.experiments.claims.run import jobs_of
from rlroute.experiments.statistics import t_interval
from rlroute.training.data import load_corpus
from rlroute.training.prepare import meta_model
from tests import ROOT
from tests.tiny import DATA

RUNNABLE = [claim for claim in CLAIMS.values() if not claim.lacks]


def test_all_43_claims_of_the_literature_stand_in_the_ledger_and_twenty_are_quick() -> None:
    assert {str(number) for number in range(1, 44)} <= CLAIMS.keys()
    assert list(CLAIMS) == sorted(CLAIMS, key=int) and sum(map(len, THEMES.values())) == len(CLAIMS)
    assert sum(claim.tier == "quick" for claim in RUNNABLE) >= 20
    assert len({claim.sha256 for claim in CLAIMS.values()}) == len(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_claim_is_whole(claim: Claim) -> None:
    assert claim.statement.endswith(".") and claim.source and claim.anchor and claim.tier in get_args(Tier)
    assert bool(claim.lacks) != bool(claim.parts) and bool(claim.arms) == bool(claim.parts)
    assert len(set(claim.seeds)) == len(claim.seeds) >= 3
    assert {name for part in claim.parts for name in part.of} == claim.arms.keys()  # nothing is trained for nothing
    for part in claim.parts:
        assert part.measure in MEASURES and part.says
        assert part.above is not None or part.below is not None
        assert part.above is None or part.below is None or part.above < part.below
        assert MEASURES[part.measure].runs == 1 or list(part.of.values()) == [1, -1]
    assert json.loads(json.dumps(claim.to_dict())) == claim.to_dict()
    assert replace(claim, anchor="other").sha256 != claim.sha256


@pytest.mark.parametrize("claim", RUNNABLE, ids=lambda claim: claim.id)
def test_every_arm_can_be_built(claim: Claim) -> None:
    corpus = load_corpus(DATA.spec, "bytes")
    made = {name: arm.on(BASES[claim.tier]) for name, arm in claim.arms.items()}
    assert len(set(made.values())) == len(made)  # two arms of a claim are not one run
    for config in made.values():
        meta_model(config, corpus)
        assert claim.tier == "gpu" or config.train.device == "cpu"


def test_claims_share_runs_and_equal_flops_are_those_of_the_arm_that_is_named() -> None:
    quick = choose((), "quick")
    jobs = jobs_of(quick)
    assert sum(len(claim.arms) * len(claim.seeds) for claim in quick) > len(jobs)
    assert all(run == job.id for run, job in jobs.items()) and len(jobs) <= 270
    assert list(jobs)[:10] == list(jobs_of([CLAIMS["26"]]))  # the clock holds them against each other
    found = CLAIMS["5"].configs()
    assert found["k = 1"].train.budget_amount == found["k = 2"].train.budget_amount
    assert {config.train.budget for config in found.values()} == {"flops"}


def test_what_is_no_claim_is_refused_by_name() -> None:
    for ids, tier in (((), None), (("1",), "quick")):
        with pytest.raises(ConfigError, match="wants ids of claims"):
            choose(ids, tier)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"claim '77': legal are 1 to"):
        choose(("1", "77"), None)
    with pytest.raises(ConfigError, match="no field 'width': legal are those of data, model and train"):
        arm("switch", width=3).on(BASES["quick"])
    assert all(not claim.lacks and claim.tier == "gpu" for claim in choose((), "gpu"))


# What values say


def part(above: float | None = None, below: float | None = None) -> Part:
    return Part("it", "bits", {"a": 1.0, "b": -1.0}, above, below)


VALUES = [0.011, 0.014, 0.012, 0.016, 0.013]


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        (part(above=0), "holds"),
        (part(below=0), "refuted"),
        (part(above=0.0132), "inconclusive"),
        (part(above=0.02), "refuted"),
        (part(above=-0.02, below=0.02), "holds"),
        (part(above=-0.01, below=0.01), "refuted"),
        (part(above=-0.02, below=0.0145), "inconclusive"),
    ],
)
def test_a_part_is_read_off_its_interval(bounds: Part, verdict: Verdict) -> None:
    assert read(VALUES, bounds) == verdict
    turned = Part("it", "bits", {}, *(None if end is None else -end for end in (bounds.below, bounds.above)))
    assert read([-value for value in VALUES], turned) == verdict


def test_two_bounds_are_two_one_sided_tests_and_refutation_is_corrected_for_the_parts() -> None:
    wide, narrow = t_interval(VALUES, 0.95), t_interval(VALUES, 0.9)
    assert wide.high and narrow.high and wide.low
    between = (wide.high + narrow.high) / 2
    assert read(VALUES, part(above=-1, below=between)) == "holds"
    assert read(VALUES, part(below=between)) == "inconclusive"
    assert read(VALUES, part(below=wide.low - 1e-6)) == "refuted"
    assert read(VALUES, part(below=wide.low - 1e-6), parts=4) == "inconclusive"


def test_no_spread_is_exact_and_one_value_says_nothing() -> None:
    assert read([0.0] * 3, part(above=-0.1, below=0.1)) == "holds"
    assert read([0.0] * 3, part(above=0)) == "inconclusive" == read([0.0] * 3, part(below=0))
    assert read([0.5] * 3, part(below=0)) == "refuted" and read([0.5], part(above=0)) == "inconclusive"


@pytest.mark.parametrize("truth", [0.0, 0.01, 0.02, -0.03])
def test_wrong_readings_are_rare(truth: float) -> None:
    draws = np.random.default_rng(0).normal(truth, 0.01, (1000, 5))
    for bounds in (part(above=0), part(below=0), part(above=-0.02, below=0.02)):
        right = (bounds.above is None or truth > bounds.above) and (bounds.below is None or truth < bounds.below)
        wrong: Verdict = "refuted" if right else "holds"
        assert np.mean([read(list(values), bounds) == wrong for values in draws]) <= 0.05 + 3 * 0.007


def test_a_claim_holds_where_all_parts_do_and_is_refuted_where_one_is() -> None:
    for parts in itertools.product(get_args(Verdict), repeat=3):
        wanted = "refuted" if "refuted" in parts else "holds" if set(parts) == {"holds"} else "inconclusive"
        assert together(parts) == wanted


# Measures, on records made by hand


def sample(**parts: Any) -> Any:
    """Return a run of which only these parts are known."""
    return SimpleNamespace(record=SimpleNamespace(**parts))


def run_of(bits: Sequence[float], seconds: Sequence[float] = (), **costs: float) -> Any:
    """Return a run with evaluations at 0, 100, 200 ... tokens."""
    times = seconds or range(len(bits))
    evals = [
        {"tokens": 100 * i, "seconds": time, "bits_per_byte": value}
        for i, (value, time) in enumerate(zip(bits, times, strict=True))
    ]
    return sample(evals=evals, summary={"final": evals[-1] if bits else None, "model": costs})


def test_tokens_to_reach_a_loss_are_interpolated() -> None:
    reach = share_to_reach("tokens")
    slow = run_of([8, 4, 3, 2.5, 2])
    assert reach(run_of([8, 3, 1.5, 1.4, 1.3]), slow) == pytest.approx((100 + 100 * 1 / 1.5) / 400)
    assert reach(slow, slow) == 1 and reach(run_of([1, 1, 1]), slow) == 0
    assert reach(run_of([8, 5, 4, 3, 2.1]), slow) is None and reach(slow, run_of([])) is None


def test_loss_at_equal_time_is_that_when_the_faster_has_ended() -> None:
    fast, slow = run_of([8, 4, 2], [0, 1, 2]), run_of([8, 3, 1], [0, 1.5, 3])
    assert bits_at_equal_time(fast, slow) == pytest.approx(2 - (3 - 2 * (2 - 1.5) / 1.5))
    assert bits_at_equal_time(slow, fast) == -bits_at_equal_time(fast, slow)  # type: ignore[operator]
    assert bits_at_equal_time(run_of([]), slow) is None


def test_rises_spikes_and_swings_are_counted() -> None:
    losses = [7, 6, 5, 6.5, 4, 4.5]
    assert loss_rise(SimpleNamespace(train=[{"loss": loss} for loss in losses])) == 1.5  # type: ignore[arg-type]
    assert loss_rise(SimpleNamespace(train=[])) is None  # type: ignore[arg-type]
    norms = [1.0] * 32 + [3.1, 2.9, 1.0, 4.0]
    assert spikes(SimpleNamespace(train=[{"grad_norm": norm} for norm in norms])) == 2 / 4  # type: ignore[arg-type]
    assert spikes(SimpleNamespace(train=[{"grad_norm": 9.0}] * 32)) is None  # type: ignore[arg-type]
    loads = [[[1, 0], [1, 0]]] * 4 + [
        [[0.5, 0.5], [1, 0]],
        [[0.7, 0.3], [1, 0]],
        [[0.5, 0.5], [0, 1]],
        [[0.5, 0.5], [0, 1]],
    ]
    record: Any = SimpleNamespace(loads=[{"load_LE": load} for load in loads])
    assert load_swing(record) == pytest.approx(1 / 3)  # of the second site: 0, 1, 0; of the first 0.2, 0.2, 0
    assert crowd({"load_LE": [[0.1, 0.6, 0.3], [0.4, 0.35, 0.25]]}) == pytest.approx(0.9)  # type: ignore[typeddict-item]


def test_regret_is_read_by_confidence() -> None:
    def record(regret: Any) -> Any:
        return SimpleNamespace(summary={"measured": {"regret": regret}})

    tenths = [0.5, 0.4, 0.3, 0.2, 0.2, 0.2, 0.2, 0.03, 0.02, 0.01]
    found = record({"nats_C": tenths, "better_C": [0.4, None, 0.5] + 7 * [0.1]})
    assert sure_regret(found) == pytest.approx(0.05) and better_unsure(found) == pytest.approx(0.45)
    assert sure_regret(record("it has none")) is None is better_unsure(record("it has none"))
    assert sure_regret(record({"nats_C": 10 * [0.0], "better_C": 10 * [None]})) is None


def test_a_part_is_a_sum_over_arms_or_a_measure_of_two() -> None:
    runs = {"a": [run_of([8, 5], training_flops=6.0)], "b": [run_of([8, 3], training_flops=2.0)], "c": [run_of([])]}
    assert values_of(MEASURES["bits"], {"a": 1, "b": -2}, runs, 0) == (5 - 2 * 3, "")
    assert values_of(MEASURES["bits"], {"a": 1, "c": -1}, runs, 0) == (None, "c")
    assert values_of(MEASURES["cost_ratio"], {"a": 1, "b": -1}, runs, 0) == (3, "")
    runs["d"] = [run_of([8, 3])]
    assert values_of(MEASURES["cost_ratio"], {"a": 1, "d": -1}, runs, 0) == (None, "a against d")
    assert not math.isnan(load_swing(SimpleNamespace(loads=[])) or 0)  # type: ignore[arg-type]


def test_a_spread_is_the_mean_distance_from_the_median_over_seeds() -> None:
    wide, narrow = [5.0, 2.0, 9.0], [3.0, 3.5, 3.25]
    runs = {"wide": [run_of([8, bits]) for bits in wide], "narrow": [run_of([8, bits]) for bits in narrow]}
    of = {"narrow": 1.0, "wide": -1.0}
    assert [values_of(MEASURES["spread"], of, runs, seed) for seed in range(3)] == [(0.25, ""), (-2.75, ""), (-4.0, "")]
    runs["wide"][1] = run_of([])
    assert [values_of(MEASURES["spread"], of, runs, seed) for seed in range(3)] == 3 * [(None, "wide")]


def test_balance_is_gained_and_lost_between_windows_of_the_training() -> None:
    even, uneven = [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]
    rows = [(10, uneven), (200, even), (300, even), (600, uneven), (900, uneven), (1000, even)]
    record: Any = SimpleNamespace(loads=[{"step": step, "load_LE": [load_E, even]} for step, load_E in rows])
    assert MEASURES["gini_gained"].of(SimpleNamespace(record=record)) == pytest.approx(0.75 / 2)  # of one site of two
    assert MEASURES["gini_lost"].of(SimpleNamespace(record=record)) == pytest.approx(0.75 / 4)
    record.loads = record.loads[1:]
    assert MEASURES["gini_gained"].of(SimpleNamespace(record=record)) is None, "nothing is known of the start"


def test_what_a_run_shows_up_to_where_it_diverged_is_no_value() -> None:
    rows = [{"loss": loss, "grad_norm": 1.0} for loss in [7, 5, 6] + 40 * [5]]
    ended, diverged = (
        {"s": [sample(train=rows, summary={"final": final})]} for final in ({"bits_per_byte": 5.0}, None)
    )
    for name, value in (("loss_rise", 1), ("spikes", 0)):
        assert values_of(MEASURES[name], {"s": 1}, ended, 0) == (value, "")
        assert values_of(MEASURES[name], {"s": 1}, diverged, 0) == (None, "s")


def test_a_page_without_outcomes_names_every_claim() -> None:
    text = page({})
    for claim in CLAIMS.values():
        assert f"### {claim.id}. {claim.statement}" in text and claim.source.partition(",")[0] in text
    assert "0 have been run" in text


def test_an_effect_says_of_what_it_is_and_stands_beside_the_figures_of_its_source() -> None:
    outcomes, grid = read_outcomes(PUBLISHED), claims_grid(read_outcomes(PUBLISHED))
    assert len(grid.lines) == len(CLAIMS) and all(bool(m.unit) != bool(m.scale) for m in MEASURES.values())
    for claim, line in zip(CLAIMS.values(), grid.lines, strict=True):
        told = dict(zip(grid.head, line, strict=True))
        assert told["claim"] == f"{claim.id}. {claim.statement}" and told["figures there"] == claim.anchor
        if claim.id in outcomes:
            first, measure = outcomes[claim.id]["parts"][0], MEASURES[claim.parts[0].measure]
            assert (told["of"], told["n"]) == (claim.parts[0].says, str(first["n"]))
            assert told["effect"].startswith(f"{first['effect']:+.4f} (")
            assert told["effect"].endswith(f") {measure.unit or measure.scale}")
    for width in range(40, 400, 20):
        shown = set(grid.head) - set(grid.left_out(width))
        assert {"claim", "here"} <= shown and ("of" in shown or "effect" not in shown)


def test_outcomes_of_several_commits_say_of_which_and_their_runs_are_counted_apart() -> None:
    outcomes = read_outcomes(PUBLISHED)
    once = {run for outcome in outcomes.values() for run in outcome["runs"]}
    assert sum(len(outcome["runs"]) for outcome in outcomes.values()) > len(once)  # they have runs in common
    plain: Any = {name: outcome | {"commit": 40 * "a"} for name, outcome in outcomes.items()}
    assert f" Made by {len(once)} runs at commit {12 * 'a'} (torch " in page(plain)
    last = list(plain)[-1]
    mixed: Any = plain | {last: plain[last] | {"commit": f"{40 * 'a'}, then {40 * 'b'}", "dirty": True}}
    text, count = page(mixed), len(outcomes[last]["runs"])
    apart = {run for name in plain if name != last for run in plain[name]["runs"]}
    both = f"{12 * 'a'}, then {12 * 'b'} (changed)"
    assert f" Made by {len(apart)} runs at commit {12 * 'a'} (torch " in text
    assert f"; {count} runs at commit {both} (torch " in text and f". {count} runs at {both}, " in text


def test_the_published_page_is_what_the_published_outcomes_give() -> None:
    outcomes = read_outcomes(PUBLISHED)
    assert list(faults(outcomes, CLAIMS)) == []
    assert differences(page(outcomes), ROOT / PAGE) == []
