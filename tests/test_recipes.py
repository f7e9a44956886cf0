"""An entry is what it resolves to: its tuned settings, its routers by sites, and whether it takes part unnamed."""

from dataclasses import asdict

import pytest

from rlroute.baselines.switch import SwitchRouter
from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.cli.common import fitting_entries
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.recipes.presets import build_comparison, default_entries
from rlroute.experiments.recipes.tuned import GRID, TUNED, Tuning, grid_entry, tuning_of
from rlroute.registry import run_config

DATA = DataConfig(spec="synth:vocab=64,documents=64,length=128", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(d_model=16, num_heads=2, num_experts=8, d_expert=8, num_layers=3, attention_experts=4)


def tuned(entry: str) -> RunConfig:
    (config,) = build_comparison([entry], DATA, MODEL, TrainConfig(), tuned=True)
    return config


def plain(entry: str) -> RunConfig:
    return build_entry(entry, DATA, MODEL, TrainConfig())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("hash", "hash:table=random"),
        ("switch", "switch:z_weight=0.0,jitter=0"),
        ("switch", "switch:balance_weight=0.03"),
        ("hash:table=position", "hash:entropy_weight=0,table=position"),
    ],
)
def test_entries_that_resolve_to_one_router_get_the_same_settings(one, other):
    assert tuned(one) == tuned(other)
    assert tuned(one).content_hash() == tuned(other).content_hash()


def test_a_variant_keeps_the_settings_that_it_does_not_contradict():
    variant, own = tuned("switch:z_weight=0.001"), tuned("switch")
    assert variant.router.balance_weight == own.router.balance_weight == TUNED["switch"]["router"]["balance_weight"]
    assert (variant.router.z_weight, variant.train) == (0.001, own.train)
    said = tuned("switch:balance_weight=0.5")
    assert (said.router.balance_weight, said.train) == (0.5, own.train)


def test_no_tuning_changes_nothing():
    assert tuned("actor_critic") == plain("actor_critic")
    (untuned,) = build_comparison(["switch"], DATA, MODEL, TrainConfig(), tuned=False)
    assert untuned == plain("switch") != tuned("switch")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        *((tuned(entry), Tuning(entry, True)) for entry in TUNED),
        (tuned("hash:table=random"), Tuning("hash", True)),
        (tuned("switch:z_weight=0.001"), Tuning("switch", False)),
        (tuned("switch+hash@0"), Tuning("switch", False)),
        (tuned("switch:balance_weight=0.5"), Tuning(None, False)),
        (plain("hash"), Tuning(None, False)),
        (tuned("credit"), Tuning(None, False)),
    ],
)
def test_a_run_says_whose_tuned_settings_it_has(config, said):
    assert tuning_of(config.to_dict()) == said


def test_records_that_are_older_than_a_field_are_as_tuned_as_they_were():
    config = tuned("switch").to_dict()
    config["router"] = {"name": "switch", "balance_weight": 0.03}
    assert tuning_of(config) == Tuning("switch", True)


def test_the_grid_is_found_by_what_an_entry_resolves_to():
    assert [grid_entry(entry) for entry in GRID] == list(GRID)
    assert grid_entry("hash:table=random") == "hash"
    with pytest.raises(
        ConfigError, match="no tuning grid for 'hash:table=balanced': legal are dense, hash, hash:table=pos"
    ):
        grid_entry("hash:table=balanced")


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
    assert config.train.lr == TUNED["hash"]["train"]["lr"]
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


def test_a_router_that_refuses_the_shapes_is_left_out_in_one_line(monkeypatch, capsys):
    entries = default_entries()
    assert fitting_entries(entries, DATA, MODEL) == tuple(entries)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(SwitchRouter, "refuses", classmethod(lambda cls, config, shape: f"k = {shape.k}: legal is 1"))
    assert fitting_entries(entries, DATA, MODEL) == tuple(entry for entry in entries if entry != "switch")
    assert capsys.readouterr().err == "left out: switch (k = 2: legal is 1)\n"
