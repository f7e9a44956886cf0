"""Compute multipliers are what a known law says, their intervals cover it, and nothing is extrapolated.

Shape suffixes: E entries, J budgets, W widths, S seeds, R draws.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from rlroute.errors import ComparisonError, ConfigError, StoreError
from rlroute.experiments.comparison import ladder
from rlroute.experiments.comparison.ladder import climb, reduce
from rlroute.experiments.comparison.ladder_file import FILE, Ladder, Rungs, key_of, read_ladder
from rlroute.experiments.comparison.ladder_text import to_markdown
from rlroute.experiments.comparison.multipliers import (
    SOFT,
    Multiplier,
    compare_curves,
    fit_laws,
    seed_draws,
)
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import columns, to_csv
from rlroute.experiments.launch.jobs import Launch
from rlroute.experiments.report.ladder_page import render
from rlroute.reading import read_runs
from tests import tiny

COMPUTE_J = np.array([1e9, 3e9, 9e9])
WIDTHS = np.log([0.6, 1.0, 1.7])


def law(compute: float, log_width: float = 0.0, shape: float = 0.05) -> float:
    """Return the loss at a compute, of a model whose best width grows with it."""
    return float(1.2 + 1.2 * (compute / 1e9) ** -0.3 + shape * (log_width - 0.3 * math.log(compute / 3e9)) ** 2)


def losses(multiplier: float, noise_JWS: Any = 0.0) -> np.ndarray:
    """Return losses of an entry that does with C what the reference does with so many times C."""
    exact = [[law(multiplier * compute, width) for width in WIDTHS] for compute in COMPUTE_J]
    return np.array(exact)[..., None] + np.broadcast_to(
        noise_JWS, (3, 3, np.shape(noise_JWS)[-1] if np.ndim(noise_JWS) else 3)
    )


def noise(draw: np.random.Generator, seeds: int, common_S: np.ndarray, spread: float = 0.01) -> np.ndarray:
    return common_S + spread * draw.normal(size=(3, 3, seeds))


# Multipliers


@pytest.mark.parametrize(
    "true", [1.3, pytest.param(1.0, marks=pytest.mark.slow), pytest.param(0.7, marks=pytest.mark.slow)]
)
def test_the_interval_covers_a_known_multiplier(true: float) -> None:
    draw, covered, draws = np.random.default_rng(3), 0, 500
    for _ in range(draws):
        common_S = 0.015 * draw.normal(size=3)  # a seed's weights and data are those of all entries
        reference, entry = losses(1.0, noise(draw, 3, common_S)), losses(true, noise(draw, 3, common_S))
        found = compare_curves(COMPUTE_J, reference, entry)
        assert found.low is not None and found.high is not None and found.value is not None
        covered += found.low <= true <= found.high
    assert covered >= 0.93 * draws


@pytest.mark.parametrize("true", [1.0, 1.5, 0.6, 3.0])
def test_without_noise_the_multiplier_is_the_true_one(true: float) -> None:
    found = compare_curves(COMPUTE_J, losses(1.0), losses(true))
    assert found.value == pytest.approx(true, rel=0.03)
    assert found.low == pytest.approx(found.value) and found.high == pytest.approx(found.value)
    back = compare_curves(COMPUTE_J, losses(true), losses(1.0))
    assert found.value is not None and back.value == pytest.approx(1 / found.value)


def test_beyond_the_rungs_it_is_a_bound() -> None:
    better, worse = (compare_curves(COMPUTE_J, losses(1.0), losses(true)) for true in (30.0, 1 / 30))
    assert better.value == pytest.approx(9.0) and better.low is None and str(better) == "≥ 9.00"
    assert worse.value == pytest.approx(1 / 9) and str(worse) == "≤ 0.11"
    draw = np.random.default_rng(0)
    wide = compare_curves(COMPUTE_J, losses(1.0), losses(5.0, noise(draw, 3, np.zeros(3), 0.15)))
    assert wide.high == pytest.approx(9.0) and "to ≥ 9.00)" in str(wide)
    assert not better.separated and str(Multiplier(1.2, 1.1, 1.3, 3, 9.0)) == "1.20 (1.10 to 1.30)"
    assert Multiplier(1.2, 1.1, 1.3, 3, 9.0).separated and not Multiplier(1.2, 0.9, 1.5, 3, 9.0).separated


def test_losses_that_do_not_fall_have_no_law_and_one_seed_no_interval() -> None:
    rising = losses(1.0)[::-1]
    found = compare_curves(COMPUTE_J, losses(1.0), rising)
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 3)
    assert str(compare_curves(COMPUTE_J, rising, losses(1.0))) == "no law"
    one = compare_curves(COMPUTE_J, losses(1.0)[..., :1], losses(1.3)[..., :1])
    assert one.value == pytest.approx(1.3, rel=0.03) and one.low is None and one.n == 1


def test_neither_the_order_of_seeds_nor_that_of_widths_matters() -> None:
    draw = np.random.default_rng(1)
    reference, entry = losses(1.0, noise(draw, 3, np.zeros(3))), losses(1.2, noise(draw, 3, np.zeros(3)))
    found = compare_curves(COMPUTE_J, reference, entry)
    for turn in (np.s_[:, :, ::-1], np.s_[:, ::-1]):
        other = compare_curves(COMPUTE_J, reference[turn], entry[turn])
        assert [other.value, other.low, other.high] == pytest.approx([found.value, found.low, found.high])


def test_the_time_multiplier_is_that_of_compute_times_the_speeds() -> None:
    log_speed_S = np.log([0.5, 0.5, 0.5])
    compute, time = (compare_curves(COMPUTE_J, losses(1.0), losses(1.3), speed) for speed in (None, log_speed_S))
    assert compute.value is not None and time.value == pytest.approx(compute.value / 2)
    uneven = compare_curves(COMPUTE_J, losses(1.0), losses(1.3), np.log([0.4, 0.5, 0.625]))
    assert uneven.value is not None and uneven.low is not None and uneven.high is not None
    assert uneven.value == pytest.approx(time.value)
    assert uneven.low < uneven.value < uneven.high, "speeds have a spread too"


# Laws and draws


def test_a_law_fits_as_well_as_a_solver_finds() -> None:
    draw, compute_J = np.random.default_rng(5), np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    for _ in range(5):
        floor, scale, exponent = draw.uniform([0.5, 0.5, 0.1], [2.0, 2.0, 1.0])
        loss_J = floor + scale * compute_J**-exponent + 0.01 * draw.normal(size=5)
        loss_J[2] += 0.1  # one that went wrong

        def residuals(values: np.ndarray, loss_J: np.ndarray = loss_J) -> np.ndarray:
            found: np.ndarray = values[0] + values[1] * compute_J ** -values[2] - loss_J
            return found

        bounds = ([0, 0, 0.02], [np.inf, np.inf, 3.0])
        solved = optimize.least_squares(residuals, [1.0, 1.0, 0.3], bounds=bounds, loss="soft_l1", f_scale=SOFT)
        mine = fit_laws(compute_J, loss_J[None])
        cost = SOFT**2 * (np.sqrt(1 + ((mine_loss(mine, compute_J) - loss_J) / SOFT) ** 2) - 1).sum()
        assert cost <= solved.cost * 1.05
        assert abs(mine_loss(mine, compute_J) - (floor + scale * compute_J**-exponent)).max() < 0.05, "robust"


def mine_loss(found: Any, compute_J: np.ndarray) -> np.ndarray:
    return np.concatenate([found.loss(compute) for compute in compute_J])


def test_all_draws_of_few_seeds_are_there_with_their_probabilities() -> None:
    share_RS, chance_R = seed_draws(3)
    assert share_RS[0].tolist() == pytest.approx([1 / 3] * 3) and chance_R[0] == 0
    counted = Counter(tuple(np.bincount(draw, minlength=3).tolist()) for draw in product(range(3), repeat=3))
    mine = {
        tuple(np.rint(3 * share_S).astype(int).tolist()): p
        for share_S, p in zip(share_RS[1:], chance_R[1:], strict=True)
    }
    assert mine == {counts: pytest.approx(ways / 27) for counts, ways in counted.items()}
    many_RS, chances_R = seed_draws(8)
    assert chances_R.sum() == pytest.approx(1) and many_RS[1:].sum(1) == pytest.approx(1) and len(many_RS) == 1000


# The ladder


def rungs(*multipliers: float) -> Rungs:
    bits = np.stack([losses(m) for m in multipliers])
    labels = tuple(f"entry {m:g}" for m in multipliers)
    return Rungs(labels, COMPUTE_J, (24, 40, 68), bits, np.ones_like(bits), (0, 1, 2))


def test_what_the_losses_say_is_said() -> None:
    found = reduce(rungs(1.0, 1.3, 0.5), ["a", "b", "c"], ["run"], "a command")
    assert found.order_holds and found.order[0] == ("entry 1.3", "entry 1", "entry 0.5")
    reference, better, worse = found.entries
    assert reference.compute is None and better.compute is not None and worse.compute is not None
    assert better.compute.value == pytest.approx(1.3, rel=0.03) and worse.time is not None
    assert [d.mean < 0 for d in better.differences] == [True] * 3 and reference.widths == (24, 40, 68)
    assert reference.law is not None and reference.law["exponent"] > 0
    text = to_markdown(found)
    assert "at the edge of those tried for entry 1, entry 1.3, entry 0.5" in text
    assert "holds across budgets" in text and "| entry 1 | 2.4" in text and "a command" in text
    page = render(found)
    assert (
        "Compute multipliers against entry 1" in page and "<script>" not in page.split("<main>")[1].split("</main>")[0]
    )
    assert json.loads(json.dumps(found.to_dict()))["order_holds"]


def test_a_change_of_the_order_is_told_from_noise() -> None:
    def found(*added: float) -> Ladder:
        crossing = rungs(1.0, 1.3, 1.6)
        crossing.bits_EJWS[1, 2] += np.array(added)  # by seed, at the largest budget
        return reduce(crossing, ["a", "b", "c"], [], None)

    beyond, within = found(0.3, 0.3, 0.3), found(0.9, 0.0, 0.0)
    assert not beyond.order_holds and not within.order_holds
    assert beyond.crossings == [["entry 1", "entry 1.3"]] and not within.crossings
    assert "changes beyond the noise (entry 1 and entry 1.3) across budgets" in to_markdown(beyond)
    assert "changes, by no more than noise, across budgets" in to_markdown(within)
    assert beyond.to_dict()["crossings"] == beyond.crossings


SETTINGS: dict[str, Any] = {"seeds": 2, "data": tiny.DATA, "model": tiny.MODEL, "train": tiny.TRAIN, "tuned": False}


def test_a_ladder_of_runs_resumes_and_is_known_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Launch(store=tmp_path, launcher="local")
    given = SETTINGS | {"budgets": (2.0, 1.0, 4.0), "widths": (16,), "how": how}
    found = climb(["hash"], **given)
    assert found.rungs.bits_EJWS.shape == found.rungs.speed_EJWS.shape == (2, 3, 1, 2) and len(found.runs) == 12
    ratios = found.rungs.compute_J / found.rungs.compute_J[0]
    assert ratios.tolist() == pytest.approx([1, 2, 4]) and found.rungs.labels == ("switch", "hash")
    records = {run.id: run for run in read_runs(tmp_path)}
    steps = {run.summary["steps"] for run in records.values() if run.config["router"] == "switch"}
    assert sorted(steps) == [12, 24, 48]
    again = climb(["hash"], **given)
    assert again.to_dict() == found.to_dict(), "what is there is used"
    (tmp_path / FILE).write_text(json.dumps(found.to_dict()))
    runs = [run for run in records.values() if run.summary["steps"] in (12, 13)]
    table = build_table(runs, ladder=read_ladder(tmp_path))
    rows = {row.label: row for row in table.rows}
    assert rows["hash"].compute_multiplier == found.entries[1].compute and rows["switch"].compute_multiplier is None
    assert "compute multiplier" in columns(table) and "compute_multiplier_value" in to_csv(table)
    assert "compute multiplier" not in columns(build_table(runs, reference="hash", ladder=read_ladder(tmp_path)))
    assert "compute multiplier" not in columns(build_table(runs))
    key = key_of(runs[0].config["config"])
    assert key in {entry.key for entry in found.entries}


def test_a_file_that_is_no_ladder_is_refused(tmp_path: Path) -> None:
    assert read_ladder(tmp_path) is None
    whole = reduce(rungs(1.0, 1.3), ["a", "b"], ["run"], None).to_dict()
    (tmp_path / FILE).write_text(json.dumps(whole))
    found = read_ladder(tmp_path)
    assert found is not None and found.to_dict() == whole
    first, second = whole["entries"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"version": 2}, "version"),
        ({"entries": []}, "length"),
        ({"entries": [first, second | {"compute": {"value": 1.0}}]}, "entries/1/compute"),
        ({"entries": [first, second | {"bits": second["bits"][1:]}]}, "length"),
        ({"entries": [first, second | {"law": second["law"] | {"unit": 0.0}}]}, "entries/1/law/unit"),
        ({"bits_per_byte_EJWS": [[[[1.0, 2.0], [3.0]]]]}, "shape"),
        ({"entries": [first, second | {"widths": [24, 40, 41]}]}, "best width is none"),
        ({"order": whole["order"][1:]}, "length"),
        ({"compute": [1e9, "much", 9e9]}, "compute/1"),
    ]
    for text, said in [("no", "JSON"), *((json.dumps(whole | change), said) for change, said in wrong)]:
        (tmp_path / FILE).write_text(text)
        with pytest.raises(StoreError, match=f"ladder.json.*{said}") as refused:
            read_ladder(tmp_path)
        assert "\n" not in str(refused.value)


def test_a_reference_alone_is_no_ladder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="want an entry besides"):
        climb(["switch"], **SETTINGS, how=Launch(store=tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budgets": (1.0, 2.0)}, "--budgets 1 2: want three or more"),
        ({"budgets": (1.0, 1.0, 2.0)}, "all different"),
        ({"budgets": (0.0, 1.0, 2.0)}, "--budgets"),
        ({"widths": (16, 16)}, "--widths 16 16: want each once"),
        ({"widths": (0,)}, "--widths"),
        ({"widths": (15,)}, "model.d_model = 15"),
        ({"seeds": 0}, "--seeds"),
        ({"train": replace(tiny.TRAIN, budget="time", budget_amount=1.0)}, "legal is 'tokens'"),
        ({"budgets": (0.01, 1.0, 2.0), "widths": (16,)}, "budget"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_any_work(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        climb(["hash"], **(SETTINGS | {"how": Launch(store=tmp_path / "runs", launcher="local")} | change))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_diverged_is_named(tmp_path: Path) -> None:
    run = next(iter(read_runs(Path("experiments/results/comparison.jsonl"))))
    lost: Any = run.summary | {"final": None}
    object.__setattr__(run, "summary", lost)
    with pytest.raises(ComparisonError, match="diverged"):
        ladder._bits(run)
