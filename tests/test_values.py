"""Values that cannot be are refused by name before any work; the same value is the same run, however it was written."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch

from rlroute.config import RouterConfig, RunConfig, SitedRouter
from rlroute.errors import ConfigError
from rlroute.experiments.bench.kernels import parse_shape
from rlroute.experiments.cli import benches, games, gradients, inspection, judge, stored, training, upcycle
from rlroute.experiments.gradients.instrument import Sweep
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.play.player import Learning
from rlroute.experiments.recipes.entries import build_entry
from rlroute.limits import Above, AtLeast, Between, Limit
from rlroute.registry import run_config
from rlroute.training import loop, memory, prepare
from rlroute.training.data import load_corpus
from rlroute.values import differing, flatten
from tests import tiny
from tests.commands import TINY, contents, refused, rlroute
from tests.policies import any_router_names, default_config
from tests.tiny import DATA, MODEL

TRAIN = dataclasses.replace(tiny.TRAIN, steps=4)
SHAPE = re.compile(r"(want|wants|takes|legal are|legal is|must be|of up to) .+|sets it")
PARTS: dict[str, Any] = {"data": DATA, "model": MODEL, "train": TRAIN}
HUGE = 10**5000
NOT_FINITE = (math.nan, math.inf, -math.inf, np.float64("nan"), np.float32("inf"), HUGE, -HUGE)


def limits_of(hint: Any) -> tuple[set[type], list[Limit]]:
    """Return the plain types that an annotation allows, and its limits."""
    if typing.get_origin(hint) is Annotated:
        kinds, limits = limits_of(typing.get_args(hint)[0])
        return kinds, limits + [limit for limit in typing.get_args(hint)[1:] if isinstance(limit, Limit)]
    if typing.get_origin(hint) is None:
        return {hint}, []
    found = [limits_of(option) for option in typing.get_args(hint) if not isinstance(option, str | int)]
    return set().union(*(kinds for kinds, _ in found)), [limit for _, limits in found for limit in limits]


def numbers_of(config: Any) -> Iterator[tuple[str, set[type], list[Limit]]]:
    """Yield a dataclass's fields that hold a number."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        kinds, limits = limits_of(hint)
        if kinds & {int, float} and name in {field.name for field in dataclasses.fields(config)}:
            yield name, kinds, limits


def outside(limit: Limit) -> list[float]:
    """Return numbers just outside a limit and far from it."""
    low = [limit.bound] if isinstance(limit, Above) else [limit.bound - 1] if isinstance(limit, AtLeast) else []
    between = [limit.low - 1, limit.high + (0 if limit.below else 1)] if isinstance(limit, Between) else []
    return [*low, *between, -1e300, -(10**400)]


CONFIGS = [DATA, MODEL, TRAIN, *map(default_config, any_router_names())]


def built(config: Any, **values: Any) -> RunConfig:
    """Return a run with some values of one part changed."""
    changed = dataclasses.replace(config, **values)
    name = next((name for name, part in PARTS.items() if type(part) is type(config)), "router")
    return RunConfig(**(PARTS | {"router": None} | {name: changed}))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: getattr(config, "name", type(config).__name__))
def test_every_number_of_a_run_refuses_what_it_cannot_be(config: Any) -> None:
    """Each field by its own annotation, from Python and from a file; the message has the field, and what is legal."""
    for name, kinds, limits in numbers_of(config):
        assert limits or kinds == {float}, f"{name} has no bound: a size beyond all machines would be tried"
        bad: list[Any] = [*NOT_FINITE, "1", True, [1], {}, b"1", 1j, Decimal(1), torch.tensor(1), np.array([1, 2])]
        bad += [value for limit in limits for value in outside(limit)]
        bad += [] if type(None) in kinds else [None]
        bad += [0.5, np.float32(2.5), Fraction(3, 2)] if float not in kinds else []
        for value in bad:
            with pytest.raises(ConfigError, match=rf"\.{name} = ") as error:
                built(config, **{name: value})
            assert "\n" not in str(error.value) and len(str(error.value)) < 300
            assert SHAPE.search(str(error.value))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: getattr(config, "name", type(config).__name__))
def test_a_value_is_the_same_run_however_it_is_written(config: Any) -> None:
    """The id, the record and the round trip through JSON, by which Ray's workers get it, are those of plain numbers."""
    of_all = {field.name for field in dataclasses.fields(RouterConfig)} - {"name"}
    for name, kinds, _ in numbers_of(config):
        plain = getattr(config, name)
        if plain is None or isinstance(plain, tuple) or (name in of_all and config.name != "switch"):
            continue
        same: list[Any] = [np.int64(plain), np.int32(plain)]
        if isinstance(plain, float):
            same = [
                np.float64(plain),
                np.float32(plain),
                *([int(plain), Fraction(plain)] if plain.is_integer() else []),
            ]
            same += [] if plain else [-0.0, np.float64(-0.0)]
        wanted = built(config)
        for value in same:
            if float(value) != plain:  # 0.1 in float32 is another number
                continue
            run = built(config, **{name: value})
            assert run == wanted and run.run_id(0) == wanted.run_id(0)
            text = json.dumps(run.to_dict(), sort_keys=True)
            assert text == json.dumps(wanted.to_dict(), sort_keys=True)
            assert run_config(json.loads(text)).run_id(0) == wanted.run_id(0), (name, kinds)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_sequences_become_tuples_or_are_refused(kind: Any) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        name = "pairs"
        pair: tuple[Annotated[int, Between(1, 3)], ...] = (1, 3)
        anything: Any = None
        mapping: dict[str, float] | None = None

    pair: Any = kind([1, 3])
    if kind is np.array:
        with pytest.raises(ConfigError, match=r"pair = array\(\[1, 3\]\): want tuple"):
            Config(pair=pair)
    else:
        assert Config(pair=kind([np.int64(1), 3])).pair == (1, 3)
        assert hash(Config(pair=kind([1, 3]))) == hash(Config())
    with pytest.raises(ConfigError, match="mapping = 3: want"):
        Config(mapping=3)  # type: ignore[arg-type]
    assert Config(mapping={"a": 1.0}, anything=kind).anything is kind


@pytest.mark.parametrize(
    "parts",
    [{"data": {}}, {"model": None}, {"train": MODEL}, {"router": "switch"}, {"router": MODEL}, {"others": 3},
     {"router": default_config("switch"), "others": [default_config("hash")]}],
)  # fmt: skip
def test_a_part_of_another_kind_is_refused_by_name(parts: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{list(parts)[-1]} = .*: want "):
        RunConfig(**(PARTS | parts))


def test_other_routers_in_a_list_are_those_in_a_tuple() -> None:
    others = [SitedRouter(sites="0", router=default_config("hash"))]
    ways: list[Any] = [others, tuple(others)]
    runs = {RunConfig(**PARTS, router=default_config("switch"), others=way) for way in ways}
    assert len(runs) == 1


# --- seeds
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [np.int64(3), np.int32(3), np.uint8(3), 3])
def test_a_seed_of_any_whole_type_is_one_run(seed: Any, tmp_path: Path) -> None:
    config = build_entry("hash", DATA, MODEL, TRAIN)
    assert config.run_id(seed) == config.run_id(3) == Job(config, seed).id
    assert type(Job(config, seed).seed) is int
    summary = loop.train(config, seed, tmp_path)
    assert summary["seed"] == 3 and [path.name for path in tmp_path.iterdir()] == [config.run_id(3)]
    assert json.loads((tmp_path / config.run_id(3) / "config.json").read_text())["seed"] == 3


@pytest.mark.parametrize(
    "seed", [True, False, -1, np.int64(-1), 2**63, 1.0, "3", None, math.nan, 10**400, np.bool_(True)]
)
def test_what_is_no_seed_is_refused_and_nothing_written(seed: Any, tmp_path: Path) -> None:
    config = build_entry("hash", DATA, MODEL, TRAIN)
    for refuse in (lambda: config.run_id(seed), lambda: Job(config, seed), lambda: loop.train(config, seed, tmp_path)):
        with pytest.raises(ConfigError, match=r"^seed = "):
            refuse()
    assert not list(tmp_path.iterdir())


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    assert loop.train(build_entry("switch", DATA, MODEL, TRAIN), 2**63 - 1, tmp_path)["status"] == "finished"


# --- sizes beyond this machine
# --------------------------------------------------------------------------------------------------------------------

BEYOND: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "layers": ({"model": {"num_layers": 2**63}}, "model.num_layers"),
    "one layer too many": ({"model": {"num_layers": 1025}}, "1 to 1024"),
    "sequences": ({"train": {"batch_size": 2**31}}, "train.batch_size"),
    "tokens of a step": ({"train": {"batch_size": 2**20}, "data": {"seq_len": 2**20}}, "tokens a step"),
    "sequences of a run": ({"train": {"batch_size": 2**20, "steps": 2**31 - 1}}, "sequences in all"),
    "threads": ({"train": {"threads": 5000}}, "train.threads"),
    "experts in all": ({"model": {"num_layers": 1024, "num_experts": 2**14}}, "experts in all"),
    "experts": ({"model": {"num_experts": 2**14, "d_expert": 2**20, "d_model": 2**10}}, "GiB of memory"),
    "width": ({"model": {"d_model": 2**20}}, "GiB of memory"),
    "dense": ({"model": {"d_expert": 2**20, "d_model": 2**16}}, "GiB of memory"),
    "logits": ({"train": {"batch_size": 2**20}, "data": {"seq_len": 64}}, "GiB of memory"),
}


@pytest.mark.parametrize("entry", ["hash", "dense"])
@pytest.mark.parametrize("case", BEYOND)
def test_sizes_that_cannot_be_are_refused_before_anything_of_that_size_is_made(
    case: str, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = BEYOND[case]
    if (case, entry) == ("experts", "dense"):
        pytest.skip("the dense model has the width of k of them")

    def never(*arguments: Any) -> None:
        raise AssertionError("a model is built")

    for name in ("meta_model", "build_model", "sample_batch"):
        monkeypatch.setattr(prepare, name, never)
    monkeypatch.setattr(loop, "build_model", never)
    parts = {name: dataclasses.replace(part, **changes.get(name, {})) for name, part in PARTS.items()}
    for refuse in (
        lambda: prepare.check({build_entry(entry, *parts.values()): [0]}),
        lambda: loop.train(build_entry(entry, *parts.values()), 0, tmp_path),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            refuse()
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", ["dense", "hash", "switch", "reinforce:baseline=value"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_shared_experts": 2},
        {"activation": "gelu"},
        {"num_dense_layers": 1},
        {"moe_every": 2, "d_dense": 300},
        {"d_latent": 16, "num_shared_experts": 1},
        {"attention_experts": 4},
    ],
    ids=str,
)
def test_the_least_that_a_model_needs_is_below_what_it_has_and_near_it(entry: str, fields: dict[str, Any]) -> None:
    model = dataclasses.replace(MODEL, num_layers=3, d_model=64, d_expert=64, num_experts=8, **fields)
    config = build_entry(entry, DATA, model, TRAIN)
    corpus = load_corpus(DATA.spec)
    has = sum(p.numel() for p in prepare.meta_model(config, corpus).parameters())
    least = memory.least_parameters(config, corpus.vocab_size)
    assert least <= has and (least > 0.6 * has or "attention_experts" in fields)


def test_one_byte_more_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_entry("hash", DATA, MODEL, TRAIN)
    monkeypatch.setattr(memory, "memory_here", lambda device: memory.least_bytes(config, 257))
    memory.check_memory(config, 257)
    with pytest.raises(ConfigError, match="at least"):
        memory.check_memory(config, 258)


def test_shards_of_experts_need_less_and_more_micro_batches_too() -> None:
    config = build_entry("hash", DATA, MODEL, TRAIN)
    cut = build_entry("hash", DATA, MODEL, dataclasses.replace(TRAIN, micro_batches=4))
    assert memory.least_bytes(config, 257, 4) < memory.least_bytes(config, 257)
    assert memory.least_bytes(cut, 257) < memory.least_bytes(config, 257)


# --- options of the command line
# --------------------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "train": (training.train, ("hash", *TINY)),
    "compare": (training.compare, ("hash", *TINY, "--launcher", "local")),
    "compare --task clusters": (training.compare, ("hash", "--task", "clusters")),
    "judge": (judge.judge, ("hash", *TINY, "--launcher", "local")),
    "upcycle": (upcycle.upcycle, ("dense",)),
    "sweep": (training.sweep, ("sweep.toml",)),
    "table": (stored.table, ()),
    "report": (stored.report, ()),
    "verify": (stored.verify, ()),
    "tune": (training.tune, ("hash",)),
    "play": (games.play, ()),
    "export-tokens": (stored.export_tokens, ("hash",)),
    "export-clusters": (stored.export_clusters, ("hash",)),
    "gradients": (gradients.gradients, ("switch",)),
    "inspect drops": (inspection.inspect, ("switch",)),
    "bench kernels": (benches.Kernels, ()),
    "bench layer": (benches.Layer, ()),
    "bench step": (benches.Step, ()),
    "bench parallel": (benches.Parallel, ()),
    "bench envs": (benches.Envs, ()),
}
NUMBERS_IN_TEXT = {"experts", "k", "layers", "tokens", "train_steps"}
"""Of ``gradients``: numbers parted by commas."""


def options_of(command: Any) -> Iterator[tuple[str, set[type]]]:
    """Yield the numeric options of a command, through the dataclasses that it takes, and the types of each."""
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        kinds, _ = limits_of(hint)
        nested = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        for kind in nested:
            below = "" if kind.__name__ in ("Launch", "Shared", "From") else f"{name}."
            yield from ((f"{below}{inner}", kinds) for inner, kinds in options_of(kind))
        if not nested and kinds & {int, float}:
            yield name, kinds


CASES = [
    (command, name, kinds)
    for command, (call, _) in COMMANDS.items()
    for name, kinds in options_of(call)
    if command == "train" or "." not in name or name in ("data.seq_len", "model.k", "train.lr")  # the same dataclasses
]


def test_there_are_options_to_be_tried() -> None:
    assert len(CASES) > 60 and {command for command, *_ in CASES} == set(COMMANDS)


def tries() -> Iterator[Any]:
    """Yield every option with every bad value; one of them, another each time, is not slow."""
    for at, (command, name, kinds) in enumerate(CASES):
        values = ["-1", *(["nan", "inf", "-inf", "1e999"] if float in kinds else ["1" + "0" * 30])]
        for place, value in enumerate(values):
            slow = [] if place == at % len(values) else [pytest.mark.slow]
            yield pytest.param(command, name, value, marks=slow, id=f"{command} {name} {value:.5}")


@pytest.mark.parametrize(("command", "name", "value"), list(tries()))
def test_every_numeric_option_refuses_what_it_cannot_be(
    command: str, name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative, not finite, or beyond all machines: one line with the option and what is legal, and nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.toml").write_text('entries = ["hash"]\n[base]\ndata.spec = "synth:documents=64,length=64"\n')
    before = contents(tmp_path)
    option = f"--{name.replace('_', '-')}"
    said = refused(rlroute(*command.split(), *COMMANDS[command][1], f"{option}={value}"))
    assert name in said or option in said
    assert SHAPE.search(said), said
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "value"), [*product(sorted(NUMBERS_IN_TEXT), ["-1", "", "1,1", "9" * 5000, "10000000000", "x"])]
)
def test_lists_of_numbers_are_refused_alike(name: str, value: str) -> None:
    said = refused(rlroute("gradients", "switch", f"--{name.replace('_', '-')}={value}"))
    assert f"--{name.replace('_', '-')}" in said and SHAPE.search(said)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1,2,3",
        "1,2,3,4,0",
        "-1,2,3,4,1",
        "²,2,3,4,1",
        "9" * 5000 + ",1,1,1,1",
        "999999999,999999999,1,1,1",
        "1,1,1,2,3",
    ],
)
def test_shapes_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="shape") as error:
        parse_shape(text)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("kind", [Launch, Learning, Sweep])
def test_from_python_they_are_refused_by_the_same_names(kind: Any) -> None:
    needed = {"entries": ("hash",)} if kind is Sweep else {}
    for name, kinds, _ in numbers_of(kind(**needed)):
        for value in (-1, math.nan, math.inf, "1", True):
            wrong = (value,) if name in NUMBERS_IN_TEXT and kind is Sweep else value
            with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} = "):
                made = kind(**(needed | {name: wrong}))
                made.check()
        assert kinds


def test_plain_values_differ_where_a_leaf_does_or_where_one_has_none() -> None:
    one = {"lr": 1, "of": {"a": None, "b": [1, 2]}, "same": {"x": [3, {"y": 4}]}}
    other = {"lr": 2, "of": {"b": [1, 5, 6]}, "same": {"x": [3, {"y": 4}]}, "more": False}
    expected = [("lr", 1, 2), ("of/a", None, None), ("of/b/1", 2, 5), ("of/b/2", None, 6), ("more", None, False)]
    assert list(differing(one, other)) == expected
    assert not list(differing(one, json.loads(json.dumps(one)))) and not list(differing({}, {}))
    whole = dict(flatten(one, "run", joint=".", nested=lambda value: isinstance(value, dict)))
    assert whole == {"run.lr": 1, "run.of.a": None, "run.of.b": [1, 2], "run.same.x": [3, {"y": 4}]}


@pytest.mark.parametrize("path", ["9" * 300, "a/" * 3000], ids=["a name too long", "a path too long"])
@pytest.mark.parametrize(
    "command",
    [
        "runs",
        "table",
        "verify",
        "sweep",
        "export x --store",
        "train hash --store",
        "play TokenBandit-v0 --table",
        "bench scale --out",
    ],
)
def test_a_path_that_cannot_be_looked_for_is_refused(command: str, path: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(rlroute(*command.split(), path))
    assert "File name too long" in said and len(said) < 300 and not contents(tmp_path)
