"""Routers by range of sites: who decides where, how a configuration says it, and what is refused.

Shape suffixes: L routed sites, E experts.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlroute.config import NEWER, DataConfig, ModelConfig, RunConfig, SitedRouter, TrainConfig
from rlroute.errors import ConfigError
from rlroute.registry import router_class, run_config
from rlroute.routing import Site
from rlroute.training.data import load_corpus
from rlroute.training.loop import train
from rlroute.training.prepare import build_model, check, meta_model

DATA = DataConfig(spec="synth:vocab=32,documents=40", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(num_layers=3, d_model=16, num_heads=2, num_experts=4, k=2, d_expert=8, attention_experts=4)
TRAIN = TrainConfig(steps=3, batch_size=4, warmup_steps=1, eval_every=3, log_every=1)
SITES: list[Site] = ["0.attention", 0, "1.attention", 1, "2.attention", 2]


def config_of(*others: tuple[str, str], **fields: Any) -> RunConfig:
    """Return a run of switch with other routers at some sites."""
    sited = tuple(SitedRouter(sites=sites, router=router_class(name).Config()) for sites, name in others)
    values: dict[str, Any] = {"data": DATA, "model": MODEL, "train": TRAIN, "router": router_class("switch").Config()}
    return RunConfig(**(values | {"others": sited} | fields))


WHO = {
    "0": "hash,hash,switch,switch,switch,switch",
    "1-2": "switch,switch,hash,hash,hash,hash",
    "mlp": "switch,hash,switch,hash,switch,hash",
    "attention": "hash,switch,hash,switch,hash,switch",
    "mlp2": "switch,switch,switch,switch,switch,hash",
    "attention0-1": "hash,switch,hash,switch,switch,switch",
    "0-99": ",".join(["hash"] * 6),
}


@pytest.mark.parametrize("sites", WHO)
def test_a_router_sits_where_its_pattern_says(sites: str) -> None:
    config = config_of((sites, "hash"))
    want = WHO[sites].split(",")
    assert [config.router_at(site).name for site in SITES] == want
    model = meta_model(config, load_corpus(DATA.spec))
    assert [(r.shape.site, r.config.name) for r in model.routers] == list(zip(SITES, want, strict=True))


def test_the_first_that_serves_a_site_decides_there() -> None:
    config = config_of(("mlp", "hash"), ("0-1", "uniform"))
    names = [config.router_at(site).name for site in SITES]
    assert names == ["uniform", "hash", "uniform", "hash", "switch", "hash"]
    assert config.router_name == "switch+hash+uniform"


def test_a_configuration_comes_back_from_json_and_names_its_run() -> None:
    config, plain = config_of(("0-1", "hash"), ("attention", "uniform")), config_of()
    values = json.loads(json.dumps(config.to_dict()))
    again = run_config(values)
    assert again == config and again.run_id(2) == config.run_id(2)
    assert config.run_id(2) == f"switch+hash+uniform-{config.content_hash()}-s2"
    hashes = {c.content_hash() for c in (config, plain, config_of(("0-1", "hash")), config_of(("0-2", "hash")))}
    assert len(hashes) == 4, "which router sits where is part of a run's identity"
    assert "others" not in plain.to_dict(), "a run of one router keeps its name"
    parts = plain.to_dict()
    assert not NEWER & (parts["model"].keys() | parts["data"].keys()), "and one without what runs could not be then"
    later = replace(plain, data=replace(plain.data, order="epochs"))
    assert run_config(later.to_dict()) == later and later.content_hash() not in hashes
    tied = replace(plain, model=replace(plain.model, tie_embeddings=True))
    assert run_config(tied.to_dict()) == tied and tied.content_hash() not in hashes


@pytest.mark.parametrize("sites", ["", "first", "1-", "-1", "mlp-attention", "0,1", "attn", "0..2", " 0"])
def test_patterns_of_another_form_are_refused_by_name(sites: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"sites {sites!r}: want layers as in '3' or '0-2'")):
        config_of((sites, "hash"))


@pytest.mark.parametrize("sites", ["3", "2-1", "attention7", "4-9"])
def test_patterns_that_no_site_has_are_refused_before_any_work(sites: str) -> None:
    with pytest.raises(ConfigError, match=rf"sites '{sites}': the model has 0\.attention, 0, 1\.attention, 1"):
        check({config_of(("mlp", "uniform"), (sites, "hash")): [0]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"router": {"name": "dense"}, "others": [{"sites": "0", "name": "hash"}]},
            "routers at sites 0: the dense model",
        ),
        ({"others": [{"sites": "0", "name": "dense"}]}, "the dense model is no router for some sites"),
        ({"others": [{"sites": "0", "name": "hsah"}]}, "unknown router 'hsah'"),
        ({"others": [{"sites": "0", "name": "hash", "tabel": 1}]}, "router hash has no field 'tabel'"),
        ({"others": [{"name": "hash"}]}, "sites '': want layers"),
        ({"others": [{"sites": 3, "name": "hash"}]}, "sites 3: want layers"),
        ({"others": ["hash"]}, "others = 'hash': want a mapping of fields"),
        ({"others": "hash"}, "others = 'hash': want a list"),
    ],
)
def test_bad_routers_of_some_sites_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_config({"router": {"name": "switch"}} | values)
    assert str(error.value).startswith(message)


def test_each_router_learns_at_its_sites_and_is_in_the_record(tmp_path: Path) -> None:
    config = config_of(("attention", "reinforce"), ("2", "bias_balanced"))
    summary = train(config, 0, tmp_path)
    assert summary["router"] == "switch+reinforce+bias_balanced"
    assert summary["learns_from"] == ["gate", "load", "reward"]
    for meaning in ("softmax over all experts, renormalised over the chosen", "1/k"):
        assert meaning in summary["gate"]["meaning"].split("; ")
    assert summary["final"] and summary["final"]["sampled"], "one router of several draws"
    rows = [json.loads(line) for line in next(tmp_path.glob("*/metrics.jsonl")).read_text().splitlines()]
    weights = rows[0]["weights"]
    assert [w > 0 for w in weights["policy"]] == [True, False, True, False, True, False]
    assert weights["balance"] == pytest.approx([0.01] * 5 + [0.0])


def test_a_router_at_some_sites_changes_no_initial_weight_of_the_others() -> None:
    corpus = load_corpus(DATA.spec)
    mixed, plain = (build_model(config, corpus, 0) for config in (config_of(("0-1", "hash")), config_of()))
    kept = dict(plain.named_parameters())
    assert all(bool((p == kept[name]).all()) for name, p in mixed.named_parameters() if p.requires_grad)
