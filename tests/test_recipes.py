"""An entry is what it resolves to: its tuned settings, its routers by sites, and whether it takes part unnamed."""

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from rlroute.baselines.switch import SwitchRouter
from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.cli.common import Shared
from rlroute.experiments.cli.training import tune as tune_command
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.recipes.grid import Axis, Grid, best, edges, key, unbracketed, unscored
from rlroute.experiments.recipes.presets import DEFAULT, all_entries, build_comparison, fitting_entries
from rlroute.experiments.recipes.tuned import (
    GRID,
    TUNED,
    TUNING,
    TUNING_SEEDS,
    Length,
    Tuning,
    around,
    grid_around,
    grid_entry,
    read_tuning,
    settings_of,
    tuned_settings,
    tuning_of,
)
from rlroute.registry import run_config

DATA = DataConfig(spec="synth:vocab=64,documents=64,length=128", seq_len=16, eval_tokens=64)
USUAL = Length.of(TrainConfig())
FOUND = TUNED[USUAL]
MODEL = ModelConfig(d_model=16, num_heads=2, num_experts=8, d_expert=8, num_layers=3, attention_experts=4)


def tuned(entry: str) -> RunConfig:
    (config,) = build_comparison([entry], DATA, MODEL, TrainConfig(), tuned=True)
    return config


def plain(entry: str, lr: float = TrainConfig().lr) -> RunConfig:
    return build_entry(entry, DATA, MODEL, TrainConfig(lr=lr))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("hash", "hash:table=random"),
        ("switch", "switch:z_weight=0.0,jitter=0"),
        ("switch", f"switch:balance_weight={FOUND['switch']['router']['balance_weight']}"),
        ("hash", "hash:entropy_weight=0,table=random"),
    ],
)
def test_entries_that_resolve_to_one_router_get_the_same_settings(one, other):
    assert tuned(one) == tuned(other)
    assert tuned(one).content_hash() == tuned(other).content_hash()


def test_a_variant_keeps_the_settings_that_it_does_not_contradict():
    variant, own = tuned("switch:z_weight=0.001"), tuned("switch")
    assert variant.router.balance_weight == own.router.balance_weight == FOUND["switch"]["router"]["balance_weight"]
    assert (variant.router.z_weight, variant.train) == (0.001, own.train)
    said = tuned("switch:balance_weight=0.5")
    assert (said.router.balance_weight, said.train) == (0.5, own.train)
    assert tuned("hash:table=position").train == tuned("hash").train


def test_no_tuning_changes_nothing():
    assert tuned("actor_critic") == plain("actor_critic")
    (untuned,) = build_comparison(["switch"], DATA, MODEL, TrainConfig(), tuned=False)
    assert untuned == plain("switch") != tuned("switch")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        *((tuned(entry), Tuning(entry, True, USUAL)) for entry in FOUND),
        (tuned("hash:table=random"), Tuning("hash", True, USUAL)),
        (tuned("switch:z_weight=0.001"), Tuning("switch", False, USUAL)),
        (tuned("switch+hash@0"), Tuning("switch", False, USUAL)),
        (tuned("switch:balance_weight=0.5"), Tuning(None)),
        (plain("hash", lr=5e-3), Tuning(None)),
        (tuned("credit"), Tuning(None)),
    ],
)
def test_a_run_says_whose_tuned_settings_it_has(config, said):
    assert tuning_of(config.to_dict()) == said


def test_records_that_are_older_than_a_field_are_as_tuned_as_they_were():
    config = tuned("switch").to_dict()
    config["router"] = {"name": "switch"} | FOUND["switch"]["router"]
    assert tuning_of(config) == Tuning("switch", True, USUAL)


def test_the_grid_is_found_by_what_an_entry_resolves_to():
    assert [grid_entry(entry) for entry in GRID] == list(GRID)
    assert grid_entry("hash:table=random") == "hash"
    with pytest.raises(ConfigError, match="no tuning grid for 'hash:table=balanced': legal are dense, hash, froz"):
        grid_entry("hash:table=balanced")


# Tuning


TOY = Grid(
    {"train": {"lr": 2.0}, "router": {"kind": "a", "x": 5, "y": 5}},
    (
        Axis(("train.lr",), (1.0, 2.0, 3.0)),
        Axis(("router.kind",), ("a", "b")),
        Axis(("router.x", "router.y"), (1, 5, 9)),
    ),
)


def walk(grid, score, untried=unscored):
    scores, order = {}, []
    while missing := untried(grid, scores):
        order += missing
        scores |= {key(trial): score(trial) for trial in missing}
    return scores, order


def bowl(trial):
    router = trial["router"]
    return abs(trial["train"]["lr"] - 3) + (router["kind"] == "a") + abs(router["x"] - 6)


def test_a_grid_is_walked_axis_by_axis_around_the_best_trial_so_far():
    scores, order = walk(TOY, bowl)
    assert len(order) == len(scores) == TOY.trials == 6
    assert [trial["train"]["lr"] for trial in order] == [1.0, 2.0, 3.0, 3.0, 3.0, 3.0]
    assert best(TOY, scores) == {"train": {"lr": 3.0}, "router": {"kind": "b", "x": 5, "y": 5}}
    assert min(map(bowl, order)) == bowl(best(TOY, scores))


def test_an_optimum_at_the_edge_of_a_grid_is_said_and_words_have_no_edge():
    scores, _ = walk(TOY, bowl)
    assert edges(TOY, best(TOY, scores)) == ["train.lr"]
    assert edges(TOY, TOY.start) == []
    assert edges(TOY, {"train": {"lr": 2.0}, "router": {"kind": "a", "x": 1, "y": 1}}) == ["router.x"]
    off = Grid({"router": {"x": 0.0}}, (Axis(("router.x",), (0.0, 1.0)),))
    assert edges(off, off.start) == [], "nothing lies below 0"


def test_trials_that_diverge_come_last_and_where_all_do_the_start_stays():
    scores, _ = walk(TOY, lambda trial: None if trial["train"]["lr"] > 1 else 7.0)
    assert best(TOY, scores)["train"]["lr"] == 1.0
    scores, order = walk(TOY, lambda trial: None)
    assert len(order) == TOY.trials and best(TOY, scores) == TOY.start == best(TOY, {})


@pytest.mark.parametrize(
    ("score", "tried"),
    [
        (lambda lr: abs(lr - 3), [3, 2, 4]),
        (lambda lr: abs(lr - 5), [3, 2, 4, 5, 6]),
        (lambda lr: lr, [3, 2, 4, 1]),  # and beyond 1 there is nothing
        (lambda lr: None if lr > 2 else lr, [3, 2, 4, 1]),
        (lambda lr: None, [3, 2, 4]),
    ],
)
def test_an_axis_is_tried_from_the_start_on_until_the_best_lies_between_two_others(score, tried):
    grid = Grid({"train": {"lr": 3}}, (Axis(("train.lr",), (1, 2, 3, 4, 5, 6)),))
    _, order = walk(grid, lambda trial: score(trial["train"]["lr"]), unbracketed)
    assert [trial["train"]["lr"] for trial in order] == sorted(tried[:3]) + tried[3:]


def test_every_grid_has_the_same_number_of_trials_and_the_default_comparison_has_grids():
    assert set(DEFAULT) | {"quantile", "frozen"} == set(GRID)
    assert {grid.trials for grid in GRID.values()} == {11}
    assert len(TUNING_SEEDS) == 3 and not {0, 1, 2, 3, 4, 5, 6, 7} & set(TUNING_SEEDS)


@pytest.mark.parametrize("entry", GRID)
def test_every_point_of_the_grid_is_legal_and_bracketed(entry):
    grid = GRID[entry]
    for point in [grid.start, *unscored(grid, {})]:
        build_entry(entry, DATA, MODEL, TrainConfig(), lambda router, point=point: point)
    assert edges(grid, grid.start) == []
    _, order = walk(grid, lambda trial: 1.0)
    assert len(set(map(key, order))) == grid.trials
    words = [axis for axis in grid.axes if isinstance(axis.values[0], str)]
    assert all(list(axis.values) == sorted(axis.values) for axis in grid.axes if axis not in words)


@pytest.mark.parametrize("path", sorted(TUNING.glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_tuning_is_what_the_grid_gives(path):
    stored = json.loads(path.read_text())
    seeds, length = stored["seeds"], Length.of(stored["train"])
    assert seeds and seeds == list(TUNING_SEEDS)[: len(seeds)]
    assert length != USUAL or (len(seeds) == 3 and TUNED[length].keys() == GRID.keys())
    for entry, scores in read_tuning()[length].items():
        grid, untried = GRID[entry], unscored
        if stored["around"]:
            grid, untried = grid_around(entry, Length(**stored["around"])), unbracketed
        again, _ = walk(grid, lambda trial, scores=scores: scores[key(trial)], untried)
        assert again == scores
        assert TUNED[length][entry] == best(grid, again)
        assert edges(grid, TUNED[length][entry]) == [], f"{entry}: better settings may lie beyond"


def test_a_run_takes_what_was_found_for_the_nearest_length_and_says_so(monkeypatch):
    def at(lr):
        return {"train": {"lr": lr, "router_lr_scale": 1.0}, "router": {"balance_weight": 0.01}}

    short, long = Length(500, 8), Length(2000, 16)
    found = {short: {"switch": at(1e-3), "hash": {"train": {"lr": 5e-3}}}, long: {"switch": at(4e-3)}}
    monkeypatch.setattr("rlroute.experiments.recipes.tuned.TUNED", found)

    def trained(entry, steps, batch_size):
        train = TrainConfig(steps=steps, batch_size=batch_size)
        (config,) = build_comparison([entry], DATA, MODEL, train, tuned=True)
        return config.train.lr, settings_of(config.to_dict())

    assert trained("switch", 500, 8) == (1e-3, "tuned")
    assert trained("switch", 400, 8) == (1e-3, "tuned at 500 steps of 8")
    assert trained("switch", 9600, 16) == (4e-3, "tuned at 2,000 steps of 16")
    assert trained("switch", 4000, 8) == (4e-3, "tuned at 2,000 steps of 16"), "as many sequences"
    assert trained("switch:z_weight=0.1", 2000, 16) == (4e-3, "tuned for switch")
    assert trained("switch:z_weight=0.1", 100, 8) == (1e-3, "tuned for switch at 500 steps of 8")
    assert trained("hash", 2000, 16) == (5e-3, "tuned at 500 steps of 8"), "never tuned for that length"
    assert trained("dense", 500, 8)[1] == "grid start"
    assert tuned_settings("dense", TrainConfig()) == GRID["dense"].start


def test_tuning_walks_the_grid_stores_every_seed_and_says_what_lies_at_an_edge(monkeypatch, tmp_path, capsys):
    """With runs that are not trained: their scores are a bowl in the learning rate."""
    made, largest = [], GRID["dense"].axes[0].values[-1]

    def run_all(jobs, how):
        made.extend(jobs)
        return [
            SimpleNamespace(
                id=job.id,
                config={"seed": job.seed},
                summary={"final": {"bits_per_byte": 2 + (job.config.train.lr - 1) ** 2 + (job.seed - 1001) / 8}},
            )
            for job in jobs
        ]

    monkeypatch.setattr("rlroute.experiments.comparison.tune.run_all", run_all)
    monkeypatch.setattr(sys, "argv", ["rlroute", "tune", "switch", "dense"])
    tune_command(("switch", "dense", "switch:jitter=0"), tmp_path / "t.json")
    stored = json.loads((tmp_path / "t.json").read_text())
    assert len(stored["trials"]) == 22 and len(made) == 66
    for row in stored["trials"]:
        lr = row["overrides"]["train"]["lr"]
        assert row["bits_per_byte"] == pytest.approx(2 + (lr - 1) ** 2)
        assert row["by_seed"] == {str(s): pytest.approx(2 + (lr - 1) ** 2 + (s - 1001) / 8) for s in TUNING_SEEDS}
    tune_command(("dense", "switch"), tmp_path / "t.json")  # what is there is not run again
    assert len(made) == 66
    without = [row for row in stored["trials"] if row["overrides"]["train"]["lr"] != largest or row["entry"] == "dense"]
    (tmp_path / "t.json").write_text(json.dumps(stored | {"trials": without}))
    tune_command(("switch",), tmp_path / "t.json")  # what is not there is, and others' trials stay
    assert len(made) == 66 + 3 * (22 - len(without)) > 66
    again = json.loads((tmp_path / "t.json").read_text())["trials"]
    assert sorted(again, key=str) == sorted(stored["trials"], key=str)
    shorter = Shared(train=TrainConfig(steps=7))
    with pytest.raises(ConfigError, match=r"t\.json holds trials with train\.steps = 500, not 7: name another file"):
        tune_command(("switch",), tmp_path / "t.json", shared=shorter)
    for text in ("[]", json.dumps(stored | {"trials": [stored["trials"][0] | {"bits_per_byte": "2"}]})):
        (tmp_path / "else.json").write_text(text)
        with pytest.raises(ConfigError, match=r"else\.json is there, and holds no trials"):
            tune_command(("switch",), tmp_path / "else.json")
    said = capsys.readouterr()
    assert f"dense: {{'train': {{'lr': {largest}}}}}" in said.out
    assert "dense: train.lr is at the edge of its grid" in said.err
    (tmp_path / "else.json").unlink()
    assert best(GRID["dense"], read_tuning(tmp_path)[USUAL]["dense"])["train"]["lr"] == largest
    made.clear()
    one_seed = Shared(data=DATA, model=MODEL, train=TrainConfig(steps=7, batch_size=4))
    tune_command(("dense",), tmp_path / "one.json", seeds=1, shared=one_seed)
    assert {(job.seed, job.config.data.spec, job.config.model.d_model, job.config.train.steps) for job in made} == {
        (TUNING_SEEDS[0], DATA.spec, 16, 7)
    }
    stored = json.loads((tmp_path / "one.json").read_text())
    assert stored["seeds"] == [TUNING_SEEDS[0]] and stored["data"]["spec"] == DATA.spec
    assert list(read_tuning(tmp_path)) == [Length(7, 4), USUAL]


@pytest.mark.parametrize(
    ("least", "rates"), [(1.6e-2, (6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2)), (4e-3, (6e-3, 8e-3, 1.2e-2, 4e-3, 2e-3))]
)
def test_tuning_around_another_length_tries_rates_alone_beside_what_else_was_found(least, rates, monkeypatch, tmp_path):
    found = {"train": {"lr": 8e-3, "router_lr_scale": 0.3}, "router": {"balance_weight": 0.1}}
    monkeypatch.setattr("rlroute.experiments.recipes.tuned.TUNED", {Length(50, 8): {"switch": found}, USUAL: FOUND})
    monkeypatch.setattr(
        "rlroute.experiments.comparison.tune.run_all",
        lambda jobs, how: [
            SimpleNamespace(
                id=job.id,
                config={"seed": job.seed},
                summary={"final": {"bits_per_byte": abs(job.config.train.lr - least)}},
            )
            for job in jobs
        ],
    )
    shorter = Shared(train=TrainConfig(steps=40, batch_size=8))
    tune_command(("switch",), tmp_path / "t.json", seeds=1, around=True, shared=shorter)
    stored = json.loads((tmp_path / "t.json").read_text())
    assert stored["around"] == {"steps": 50, "batch_size": 8}
    assert [row["overrides"] for row in stored["trials"]] == [
        found | {"train": {"lr": lr, "router_lr_scale": 0.3}} for lr in rates
    ]
    assert around(["hash"], Length(40, 8)) == USUAL != Length(50, 8) == around(["switch"], USUAL)
    with pytest.raises(ConfigError, match="no length other than 500 steps of 8 for which switch, hash were tuned"):
        around(["switch", "hash"], USUAL)


# Routers by sites


def test_an_entry_says_which_router_decides_where():
    config = plain("switch:z_weight=1e-3+hash:table=position@attention0-1+uniform@2")
    where = {site: config.router_at(site).name for site in (0, 1, 2, "0.attention", "1.attention", "2.attention")}
    expected = {
        0: "switch",
        1: "switch",
        2: "uniform",
        "0.attention": "hash",
        "1.attention": "hash",
        "2.attention": "uniform",
    }
    assert where == expected
    assert config.router_at("1.attention").table == "position"
    assert config.router.z_weight == 1e-3
    assert run_config(config.to_dict()) == config


def test_routers_of_sites_have_their_own_tuned_settings():
    config = tuned("hash+switch@mlp")
    assert config.train.lr == FOUND["hash"]["train"]["lr"]
    assert config.others[0].router == tuned("switch").router


def test_a_number_may_hold_a_plus():
    assert asdict(plain("switch:z_weight=1e+0").router)["z_weight"] == 1.0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("switch+hash", "'hash' names no sites: want ROUTER"),
        ("switch+hash:table=position", "'hash:table=position' names no sites"),
        ("hash@0", "'hash@0' comes first and decides wherever no other does"),
        ("switch+hash@", "sites '': want layers"),
        ("switch+hash@0..1", r"sites '0\.\.1': want layers"),
        ("switch+hash@0+uniform@0", "two routers at sites '0': want one"),
        ("switch+nash@0", "unknown router 'nash'"),
        ("switch+dense@0", "the dense model decides nothing at some sites"),
        ("dense+hash@0", "the dense model has none elsewhere"),
    ],
)
def test_malformed_sites_are_refused_by_name(entry, message):
    with pytest.raises(ConfigError, match=message):
        plain(entry)


# Who takes part where nobody is named


def test_named_all_is_every_router_with_the_dense_model_and_the_control():
    assert {"dense", "hash:table=position", "uniform", "credit", *GRID} <= set(all_entries())
    assert set(DEFAULT) < set(all_entries())


def test_a_router_that_refuses_the_shapes_is_left_out_in_one_line(monkeypatch, capsys):
    entries = all_entries()
    assert fitting_entries(entries, DATA, MODEL) == tuple(entries)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(SwitchRouter, "refuses", classmethod(lambda cls, config, shape: f"k = {shape.k}: legal is 1"))
    assert fitting_entries(entries, DATA, MODEL) == tuple(entry for entry in entries if entry != "switch")
    assert capsys.readouterr().err == "left out: switch (k = 2: legal is 1)\n"
