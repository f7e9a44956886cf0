"""Presets: they are what they are called, they can be trained as they stand, and what is said goes before them."""

from dataclasses import replace

import pytest

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.recipes.sizes import PRESETS, SIZES, with_preset
from rlroute.training.prepare import check, expected_costs
from tests.commands import refused, rlroute

NOTHING_SAID: dict[str, set[str]] = {"data": set(), "model": set(), "train": set()}
GIVEN = (DataConfig(seq_len=64), ModelConfig(k=1), TrainConfig(lr=0.5, steps=7))


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_active_parameters_of_its_name_and_can_be_trained(name: str) -> None:
    preset = PRESETS[name]
    config = build_entry("switch", preset.data, preset.model, replace(preset.train, device="cpu", dtype="float32"))
    (corpus,) = check({replace(config, model=replace(config.model, num_layers=1)): [0]}).values()
    costs = expected_costs(config, corpus)
    active = costs.per_token([preset.model.k] * len(costs.pair_flops_L))["active_parameters"]
    assert active == pytest.approx(1e6 * int(name.removeprefix("gpu-").removesuffix("m")), rel=0.03)
    assert preset.train.device == "cuda" and preset.train.dtype == "bfloat16"


def test_what_is_said_goes_before_a_preset() -> None:
    said = NOTHING_SAID | {"train": {"lr"}, "model": {"k"}}
    got = with_preset("gpu-30m", *GIVEN, said)
    wanted = PRESETS["gpu-30m"]
    assert got.data == wanted.data
    assert got.model == replace(wanted.model, k=1) and got.train == replace(wanted.train, lr=0.5)
    assert with_preset("gpu-30m", *GIVEN, NOTHING_SAID) == wanted
    same = with_preset(None, *GIVEN, NOTHING_SAID)
    assert (same.data, same.model, same.train) == GIVEN


def test_a_batch_that_the_preset_s_micro_batches_do_not_divide_is_refused_by_their_name() -> None:
    said = NOTHING_SAID | {"train": {"batch_size"}}
    given = (*GIVEN[:2], TrainConfig(batch_size=3))
    with pytest.raises(
        ConfigError, match=r"batch_size = 3: preset 'gpu-30m' has train\.micro_batches = 2, which must divi"
    ):
        with_preset("gpu-30m", *given, said)
    both = {"train": {"batch_size", "micro_batches"}}
    assert with_preset("gpu-30m", *given, NOTHING_SAID | both).train.micro_batches == 1


def test_another_preset_is_refused_by_every_command_that_takes_one() -> None:
    with pytest.raises(
        ConfigError,
        match="legal are gpu-30m, gpu-124m, gpu-350m, and those that `rlroute presets` lists",
    ):
        with_preset("gpu-1t", *GIVEN, NOTHING_SAID)
    for command in (("train", "switch"), ("compare", "switch"), ("bench", "step")):
        assert "legal are gpu-30m, gpu-124m" in refused(rlroute(*command, "--preset", "gpu-1t"))
    assert "--preset gpu-30m does not apply" in refused(rlroute("compare", "--task", "clusters", "--preset", "gpu-30m"))


def test_the_command_line_goes_before_a_preset() -> None:
    said = refused(rlroute("compare", "switch", "--preset", "gpu-30m", "--train.device", "cpu", "--model.k", "33"))
    assert "model.k = 33: legal are 1 to model.num_experts = 32" in said
