"""``rlroute sweep SPEC``: the runs that a TOML file describes. The list of runs is a pure function of the file.

A file names entries and seeds, what all runs share (``[base]``), and what varies: ``[grid]`` takes all combinations,
``[random]`` draws. A field is named by its path, ``train.lr`` or ``model.k``; ``router.balance_weight`` goes to the
entries whose router has that field. TOML has no word for nothing: ``"none"`` stands for it where a field may be none.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rlroute import seeding
from rlroute.config import DataConfig, ModelConfig, RunConfig, StartConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.launch.jobs import Job, Launch, Search, together
from rlroute.experiments.recipes.entries import none_where_legal
from rlroute.experiments.recipes.presets import build_comparison
from rlroute.experiments.recipes.sizes import Preset, find_preset
from rlroute.experiments.text import markdown
from rlroute.foreign import DEPTH, Unfit, plain, read_bytes, why
from rlroute.reading import rows_so_far
from rlroute.records import mark, storing
from rlroute.registry import router_class, run_config
from rlroute.values import flatten, from_dict

SECTIONS = ("entries", "seeds", "base", "grid", "random", "resources", "asha", "tuned", "preset")
SEARCH = "SEARCH"
"""The file that marks a store of trials, some of which were stopped early."""
RESOURCES = ("cpus", "gpus", "workers", "expert_parallel", "exchange_chunks")
LIMITS = ("low", "high", "log", "choice")
MOST_RUNS = 10_000
"""Runs of a sweep, seeds included."""
INT64 = 2**63
Choice = dict[str, Any]
"""Values by dotted path."""


@dataclass(frozen=True)
class Spec:
    """What a sweep file says.

    Attributes:
        name: the file's, without its ending.
        entries: routers, ``router:field=value,...``, or ``dense``.
        seeds: of every run.
        base: what all runs share, by dotted path.
        choices: what varies: one run per choice, entry and seed.
        preset: what the file says comes on top of; None: the defaults.
        tuned: whether entries have their tuned settings where the file says nothing.
        resources: fields of :class:`Launch`: what a run gets.
        grace, reduction: of successive halving; None where every run goes to its end.
    """

    name: str
    entries: tuple[str, ...]
    seeds: tuple[int, ...]
    base: Choice
    choices: tuple[Choice, ...]
    preset: str | None = None
    tuned: bool = True
    resources: dict[str, Any] = field(default_factory=dict)
    grace: int | None = None
    reduction: float = 3.0

    def jobs(self, command: str, start: StartConfig | None = None) -> list[Job]:
        """Return the runs, without those that are the same twice (a router field that an entry does not have changes
        nothing there).

        Args:
            command: the command line behind them, for their records.
            start: the weights from which all of them start, if they are another run's.

        Raises:
            ConfigError: a field that no entry has, or an illegal value.
        """
        configs = {entry: self._config(entry) for entry in self.entries}
        self._check_router_fields(list(configs.values()))
        jobs: dict[str, Job] = {}
        for entry, choice in itertools.product(self.entries, self.choices):
            base, mine = (
                {path: value for path, value in values.items() if _applies(path, configs[entry])}
                for values in (self.base, choice)
            )
            config = replace(_with(configs[entry], base | mine), start=start)
            label = " ".join([entry, *(f"{path.rpartition('.')[2]}={value}" for path, value in mine.items())])
            for job in together([Job(config, seed, command, label=label) for seed in self.seeds]):
                jobs.setdefault(job.id, job)
        return list(jobs.values())

    def _config(self, entry: str) -> RunConfig:
        size = find_preset(self.preset)
        tuned = self.tuned and self.preset is None
        (config,) = build_comparison([entry], size.data, size.model, size.train, tuned=tuned)
        return config

    def _check_router_fields(self, configs: Sequence[RunConfig]) -> None:
        for path in {path: None for choice in (self.base, *self.choices) for path in choice}:
            if not any(_applies(path, config) for config in configs):
                legal = sorted({f.name for c in configs if c.router is not None for f in fields(c.router)})
                raise ConfigError(f"{path}: no entry's router has it, legal are {', '.join(legal) or 'none'}")

    def launch(self, how: Launch, said: Collection[str] = ()) -> Launch:
        """Return how the runs are launched: the file's resources, but for the fields ``said`` on the command line."""
        return replace(how, **{name: value for name, value in self.resources.items() if name not in said})

    def search(self, jobs: Sequence[Job]) -> Search | None:
        """Return the successive halving that the file asks for.

        Raises:
            ConfigError: it would stop nothing, because runs are shorter.
        """
        if self.grace is None:
            return None
        steps = max(job.config.train.steps for job in jobs)
        if not self.grace < steps:
            raise ConfigError(f"[asha] grace = {self.grace}: want fewer steps than a run has, {steps}")
        return Search(steps=steps, grace=self.grace, reduction=self.reduction)


def read_spec(path: Path) -> Spec:
    """Read a sweep file.

    Raises:
        ConfigError: it is not there, not TOML, or says something that means nothing; the message names it and what is
            legal.
    """
    text = _parse(path)
    _only(text, SECTIONS, f"sweep {path}")
    sections = {name: _table(text, name) for name in ("base", "grid", "random", "resources", "asha")}
    _only(sections["resources"], RESOURCES, "[resources]")
    _only(sections["asha"], ("grace", "reduction"), "[asha]")
    base, grid, draws = _flat(sections["base"]), _grid(sections["grid"]), _random(sections["random"])
    _refuse_twice({"[base]": base, "[grid]": grid[0], "[random.fields]": draws[0]})
    preset = _preset(text.get("preset"))
    spec = Spec(
        name=path.stem,
        entries=_entries(text.get("entries", [preset.entry] if preset.entry else None)),
        seeds=_seeds(text.get("seeds", 1)),
        base=base,
        choices=tuple(a | b for a in grid for b in draws),
        preset=text.get("preset"),
        tuned=_flag(text.get("tuned", True), "tuned"),
        resources=sections["resources"],
        grace=_whole(sections["asha"].get("grace"), "[asha] grace") if "asha" in text else None,
        reduction=_number(sections["asha"].get("reduction", 3), "[asha] reduction", above=1),
    )
    from_dict(Launch, spec.resources, "[resources]").check()
    _refuse_many({"entries": len(spec.entries), "choices": len(spec.choices), "seeds": len(spec.seeds)})
    return spec


def _preset(value: Any) -> Preset:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"preset = {value!r}: want a text")
    return find_preset(value)


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = read_bytes(path, follow=True).decode("utf-8-sig")  # some editors begin a file with a mark
    except (OSError, ValueError) as error:
        raise ConfigError(f"sweep {path}: cannot be read: {why(error)}") from error
    try:
        values: dict[str, Any] = plain(tomllib.loads(text))
    except RecursionError:
        raise ConfigError(f"sweep {path}: nested deeper than {DEPTH} levels") from None
    except Unfit as error:
        raise ConfigError(f"sweep {path}: {why(error)}") from error
    except ValueError as error:
        raise ConfigError(f"sweep {path}: not TOML: {why(error)}") from error
    return values


def _refuse_many(counts: Mapping[str, int]) -> None:
    if math.prod(counts.values()) > MOST_RUNS:
        told = " x ".join(f"{count:,} {name}" for name, count in counts.items())
        raise ConfigError(f"{told} are {math.prod(counts.values()):,} runs: legal are {MOST_RUNS:,}")


def _refuse_twice(sections: Mapping[str, Choice]) -> None:
    for (one, mine), (other, theirs) in itertools.combinations(sections.items(), 2):
        if twice := sorted(mine.keys() & theirs.keys()):
            raise ConfigError(f"{twice[0]} is in {one} and in {other}: want it in one of them")


def apart(how: Launch, name: str) -> Launch:
    """Return the launch with a store of its own inside the store, marked as a search's: trials that were stopped early
    enter no table.

    Raises:
        ConfigError: nothing could stop a trial early.
        StoreError: it cannot be written.
    """
    if how.launcher == "local" or how.workers > 1:
        raise ConfigError(
            "[asha] stops trials of one worker under --launcher ray: leave it out, or --workers and --launcher local"
        )
    store = how.store / f"search-{name}"
    with storing(store):
        store.mkdir(parents=True, exist_ok=True)
        mark(store / SEARCH)
    return replace(how, store=store)


def ranking(jobs: Sequence[Job], store: Path) -> str:
    """Return the trials of a search as a table, best first: how far each came, and its last evaluation in bits per
    byte.
    """
    rows = []
    for job in jobs:
        if evals := [row for row in rows_so_far(store / job.id) if row["kind"] == "eval"]:
            rows.append((evals[-1]["bits_per_byte"], evals[-1]["step"], job))
    rows.sort(key=lambda row: row[:2])
    lines = [(f"{bits:.4f}", step, job.label, job.seed) for bits, step, job in rows]
    return markdown(("bits/byte", "at step", "trial", "seed"), lines, ">><>", tight=True)


def _with(config: RunConfig, values: Choice) -> RunConfig:
    """Return an entry's configuration with these values, and with the tokenizer that goes with its corpus unless they
    name one.
    """
    values_of = config.to_dict()
    values_of["data"]["tokenizer"] = DataConfig().tokenizer
    for path, value in values.items():
        part, _, name = path.partition(".")
        if part not in ("data", "model", "train", "router") or not name:
            raise ConfigError(f"{path}: legal are data.FIELD, model.FIELD, train.FIELD and router.FIELD")
        values_of[part] |= none_where_legal(_class_of(part, config), {name: value})
    return run_config(values_of)


def _class_of(part: str, config: RunConfig) -> type:
    return {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}.get(part) or type(config.router)


def _applies(path: str, config: RunConfig) -> bool:
    """Whether an entry has the field: all have those of data, model and train; its first router those that it takes."""
    part, _, name = path.partition(".")
    if part != "router":
        return True
    router = config.router
    if router is None or name not in {f.name for f in fields(router)}:
        return False
    return name not in router.term_weights or router_class(router.name).carries(name)


def _flat(values: Mapping[str, Any], leaves: Sequence[str] = ()) -> Choice:
    """Return nested tables as values by dotted path; a table that has one of ``leaves`` is a value itself."""

    def nested(value: Any) -> bool:
        return isinstance(value, dict) and not value.keys() & set(leaves)

    return dict(flatten(values, joint=".", nested=nested))


def _grid(section: Mapping[str, Any]) -> list[Choice]:
    axes = _flat(section)
    for path, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"[grid] {path} = {values!r}: want a list of values")
    _refuse_many({path: len(values) for path, values in axes.items()})
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _random(section: Mapping[str, Any]) -> list[Choice]:
    """Draw the trials: each value from a key of its own, so that another trial or field moves none."""
    if not section:
        return [{}]
    _only(section, ("trials", "seed", "fields"), "[random]")
    trials = _whole(section.get("trials"), "[random] trials")
    _refuse_many({"trials": trials})
    named = _flat(_table(section, "fields"), leaves=LIMITS)
    ranges = {path: _range(path, value) for path, value in named.items()}
    seed = _whole(section.get("seed", 0), "[random] seed", least=0)
    return [
        {path: _draw(limits, seeding.numpy_generator("sweep", seed, trial, path)) for path, limits in ranges.items()}
        for trial in range(trials)
    ]


def _range(path: str, limits: Any) -> dict[str, Any]:
    where = f"[random.fields] {path}"
    if not isinstance(limits, dict) or not (limits.keys() >= {"low", "high"} or limits.keys() == {"choice"}):
        raise ConfigError(
            f"{where} = {limits!r}: want {{ low, high }}, with log = true if you like, or {{ choice = [...] }}"
        )
    if "choice" in limits:
        if not isinstance(limits["choice"], list) or not limits["choice"]:
            raise ConfigError(f"{where}: choice = {limits['choice']!r}: want a list of values")
        return limits
    _only(limits, ("low", "high", "log"), where)
    _flag(limits.get("log", False), f"{where}: log")
    low, high = (_number(limits[name], f"{where} {name}") for name in ("low", "high"))
    if not low < high or (limits.get("log") and low <= 0):
        raise ConfigError(f"{where} = {low:g} to {high:g}: want low below high, and above 0 where log = true")
    whole = isinstance(limits["low"], int) and isinstance(limits["high"], int)
    if not math.isfinite(high - low) or (whole and not -INT64 <= limits["low"] < limits["high"] < INT64):
        raise ConfigError(f"{where} = {low:g} to {high:g}: want a range that 64 bits hold")
    return limits


def _draw(limits: Mapping[str, Any], generator: Any) -> Any:
    if "choice" in limits:
        return limits["choice"][int(generator.integers(len(limits["choice"])))]
    low, high = limits["low"], limits["high"]
    whole = isinstance(low, int) and isinstance(high, int)
    if limits.get("log"):
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
        return round(value) if whole else float(f"{value:.6g}")
    return int(generator.integers(low, high + 1)) if whole else float(f"{generator.uniform(low, high):.6g}")


def _entries(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"entries = {value!r}: want a list of routers, router:field=value,... or dense")
    return tuple(value)


def _seeds(value: Any) -> tuple[int, ...]:
    count = value if isinstance(value, int) and not isinstance(value, bool) else 0
    _refuse_many({"seeds": count})
    seeds = list(range(count)) or value
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"seeds = {value!r}: want a number of seeds or a list of them")
    return tuple(seeds)


def _whole(value: Any, where: str, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ConfigError(f"{where} = {value!r}: want a whole number from {least}")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where} = {value!r}: want true or false")
    return value


def _number(value: Any, where: str, above: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
        raise ConfigError(f"{where} = {value!r}: want a number" + (f" above {above:g}" if above > -math.inf else ""))
    return float(value)


def _table(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{name} = {value!r}: want a table, [{name}]")
    return value


def _only(values: Mapping[str, Any], legal: Sequence[str], where: str) -> None:
    unknown = sorted(set(values) - set(legal))
    if unknown:
        raise ConfigError(f"{where} has {unknown[0]!r}: legal are {', '.join(legal)}")
