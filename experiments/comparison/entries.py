"""What may stand in one table: runs grouped into entries, and what is refused because it differs in more than the
router.

Everything here is a pure function of run records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from rlroute.config import DENSE
from rlroute.errors import ComparisonError
from rlroute.reading import site_keys
from rlroute.schema import EvalRow, RunRecord
from rlroute.values import flatten

SAME = {
    "config.schema": "records of another schema mean other things by the same names",
    "summary.data.sha256": "another corpus is another task",
    "config.made_from.core": "other sources of rlroute are another experiment",
    "config.made_from.data.sha256": "another corpus is another task",
    "config.made_from.data.valid_sha256": "the same corpus split otherwise is another task",
    "config.made_from.tokenizer": "another tokenizer is another task",
    "summary.eval_tokens_sha256": "losses on other validation tokens cannot be subtracted",
    "summary.budget.kind": "the budget is what a comparison holds equal",
    "summary.budget.amount": "the budget is what a comparison holds equal",
    "environment.kernel_backend": "kernels differ in bits and speed",
    "environment.device": "devices differ in bits and speed",
    "environment.threads": "bits and speed change with the number of threads",
    "environment.workers": "bits and speed change with the number of processes",
    "environment.expert_parallel": "bits and speed change with the number of processes",
    "environment.torch": "bits and speed change with the version",
    "environment.cpu_capability": "bits and speed change with the instruction set",
}
"""What every run of a table shares, and why."""

SAME_IN_TRAIN = (
    *("steps", "batch_size", "dtype", "param_dtype", "budget", "budget_amount"),
    *("deterministic", "compile", "loss_chunk"),
)
"""The fields of ``train`` that every run shares; the others are ways of training an entry well (tuning), printed where
they differ.
"""

CHOICES_IN_MODEL = (
    *("gate_form", "k", "num_experts", "num_shared_experts", "capacity_factor"),
    *("zero_experts", "copy_experts", "constant_experts", "expert_dropout"),
)
"""The fields of ``model`` in which entries may differ on purpose; these are printed, all others are shared, and so is
all of ``data`` but ``train_tokens``.
"""

STREAM = "data.train_sha256"
"""Of what a run was made from, what those on as many training tokens share."""

Key = TypeVar("Key", bound=Hashable)
Run = TypeVar("Run")
"""A record, or what else stands for a run."""

SAME_CONFIG = "one comparison trains every router on the same data in the same model"
SAME_WEIGHTS = "with one seed every router starts from the same weights"
SAME_BATCHES = "with one seed every router sees the same batches in the same order"


@dataclass(frozen=True)
class Entry:
    """All runs of one configuration, in the order of their seeds."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def router(self) -> str:
        """The router's name, or ``dense``."""
        return str(self.runs[0].config["router"])

    @property
    def finished(self) -> list[RunRecord]:
        """The runs that did not diverge."""
        return [run for run in self.runs if run.summary["status"] == "finished"]

    @property
    def finals(self) -> list[EvalRow]:
        """The last evaluations of the finished runs."""
        return list(self.final_by_seed.values())

    @property
    def sites(self) -> list[int | str]:
        """The keys of the routed sites, in the order of the records' lists; none in the dense model."""
        return [] if self.router == DENSE else site_keys(self.runs[0].config["config"]["model"])

    @property
    def final_by_seed(self) -> dict[int, EvalRow]:
        """The last evaluations of the finished runs."""
        return {run.config["seed"]: final for run in self.finished if (final := run.summary["final"])}

    @property
    def bits_by_seed(self) -> dict[int, float]:
        """Final validation bits per byte of the finished runs."""
        return {seed: final["bits_per_byte"] for seed, final in self.final_by_seed.items()}


def grouped(runs: Iterable[Run], key: Callable[[Run], Key]) -> dict[Key, list[Run]]:
    """Return runs by what a function says of them, in the order in which they come."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def make_entries(records: Iterable[RunRecord]) -> list[Entry]:
    """Group runs by configuration, in the order of their labels: the router's name, with those of single sites as in
    ``switch+hash@0-1``, and in brackets what sets apart several configurations of one.

    Raises:
        ComparisonError: there are no runs, or one run is there twice.
    """
    ordered = sorted(records, key=lambda record: (record.config["config_hash"], record.config["seed"]))
    groups = grouped(ordered, lambda record: record.config["config_hash"])
    if not groups:
        raise ComparisonError("there are no ended runs to compare")
    for runs in groups.values():
        for one, other in pairwise(runs):
            if one.config["seed"] == other.config["seed"]:
                raise ComparisonError(f"run {one.id} is there twice")
        for name in varying(list(map(_made, runs))):
            values = [(run.id, _made(run).get(name)) for run in runs]
            _require_equal(f"config.made_from.{name}", values, "one entry is one code and one corpus")
    said = labels({name: runs[0].config["config"] for name, runs in groups.items()})
    return sorted((Entry(said[name], tuple(runs)) for name, runs in groups.items()), key=lambda entry: entry.label)


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's plain configuration as one level: ``train.lr``, ``router.table``, and ``router@0-1.table`` of a
    router of some sites.
    """
    whole = {name: part for name, part in config.items() if name != "others"}
    others = {f"router@{other['sites']}": other for other in config.get("others", ())}
    return _dotted(whole | others)


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one level with dotted names."""
    return dict(flatten(values, joint=".", nested=lambda value: isinstance(value, Mapping)))


def of_router(name: str) -> bool:
    """Whether a field of :func:`flat_config` is a router's."""
    return name.startswith(("router.", "router@"))


def router_label(config: Mapping[str, Any]) -> str:
    """Return the names of a plain configuration's routers, with the sites of all but the first."""
    others = [f"{other['name']}@{other['sites']}" for other in config.get("others", ())]
    return "+".join([config["router"]["name"], *others])


def labels(configs: Mapping[str, Mapping[str, Any]], *, whole: bool = False) -> dict[str, str]:
    """Return what plain configurations are called: their routers, the run that they start from unless it is the same of
    all, and in brackets the fields in which those of the same routers differ: the routers' own where they tell them
    apart, unless the ``whole`` is wanted.
    """
    origins = {name: f" from {config['start']['run']}" if "start" in config else "" for name, config in configs.items()}
    several = len(set(origins.values())) > 1
    named = {name: router_label(config) + several * origins[name] for name, config in configs.items()}
    alike: dict[str, list[dict[str, Any]]] = {}
    for name, config in configs.items():
        alike.setdefault(named[name], []).append(flat_config(config))
    fields = {label: _telling(flats, whole) for label, flats in alike.items()}
    said = {}
    for name, config in configs.items():
        label, own = named[name], flat_config(config)
        differing = ", ".join(f"{_short(field)}={own.get(field)}" for field in fields[label])
        said[name] = f"{label} ({differing})" if differing else label
    return said


def _telling(flats: Sequence[Mapping[str, Any]], whole: bool) -> list[str]:
    """Return the fields that tell configurations apart."""
    differing = varying(flats)
    mine = list(filter(of_router, differing))
    distinct = {json.dumps(flat, sort_keys=True) for flat in flats}
    enough = len({json.dumps([flat.get(field) for field in mine]) for flat in flats}) == len(distinct)
    return mine if enough and not whole else differing


def _short(name: str) -> str:
    """Return a field's name in a label: ``table``, ``@0-1.table`` or ``train.lr``."""
    return name.removeprefix("router.") if name.startswith("router.") else name.removeprefix("router")


def varying(flats: Sequence[Mapping[str, Any]]) -> list[str]:
    names = sorted(set().union(*flats))
    return [name for name in names if len({json.dumps(flat.get(name), sort_keys=True) for flat in flats}) > 1]


# What is refused


def check_comparable(entries: Sequence[Entry], deliberate: Collection[str] = ()) -> None:
    """Refuse runs that differ in more than their router, but for what is printed as a deliberate difference.

    Args:
        entries: whose runs.
        deliberate: further fields in which they may differ, as ``model.d_expert``.

    Raises:
        ComparisonError: naming the field, the two runs and the two values.
    """
    runs = [run for entry in entries for run in entry.runs]
    all_share = [(run.id, shared(run)) for run in runs]
    names = dict.fromkeys((*SAME, *sorted(set().union(*(values for _, values in all_share)))))
    for name in [name for name in names if name.removeprefix("config.") not in deliberate]:
        values = [(run_id, values.get(name)) for run_id, values in all_share]
        _require_equal(name, values, SAME.get(name, SAME_CONFIG))
    for name in sorted(name for name in set().union(*map(_made, runs)) if name.startswith("routers.")):
        values = [(run.id, _made(run)[name]) for run in runs if name in _made(run)]
        _require_equal(f"config.made_from.{name}", values, "a router is one code")
    # Diverged runs count here: their seeds were trained too.
    seeds = [(entry.label, [run.config["seed"] for run in entry.runs]) for entry in entries]
    _require_equal("seeds", seeds, "differences are taken seed by seed")
    for seed in seeds[0][1]:
        _check_identity([run for run in runs if run.config["seed"] == seed])


def shared(run: RunRecord) -> dict[str, Any]:
    """Return what all runs of a table share, by field; a field that a record lacks, or that is None, is left out."""
    flat = flat_config(run.config["config"])
    values = {path: _at(run, path) for path in SAME} | {f"config.{n}": flat[n] for n in flat if _shared_in_config(n)}
    return {name: value for name, value in values.items() if value is not None}


def kind(run: RunRecord) -> str:
    """Return the same as a text, equal for runs that share it all."""
    return json.dumps(shared(run), sort_keys=True, default=str)


def agreed(run: RunRecord) -> dict[tuple[Any, ...], Any]:
    """Return what runs agree on of which both say it: values by field, and by whose it is."""
    seed, own = run.config["seed"], run.config["config_hash"]
    said: dict[tuple[Any, ...], Any] = {("id", own, seed): run.id}
    tokens = train_tokens(run)
    for name, value in _made(run).items():
        whose = () if name.startswith("routers.") else (own,)  # a router is one code, whose ever entry it is in
        said[(f"config.made_from.{name}", *((tokens,) if name == STREAM else whose))] = value
    said["fingerprint.backbone", seed, source(run)] = run.summary["fingerprint"]["backbone"]
    for shape in by_shape([run]):
        said["fingerprint.shared", seed, *shape] = run.summary["fingerprint"]["shared"]
    return said | {(f"batches.chain at step {step}", seed, tokens): chain for step, chain in _chains(run).items()}


def _at(record: RunRecord, path: str) -> Any:
    head, *rest = path.split(".")
    value = getattr(record, head)
    for name in rest:
        value = None if value is None else value.get(name)  # of a record older than the field, None
    return value


def _made(run: RunRecord) -> dict[str, Any]:
    """Return what a run was made from as one level, ``routers.hash.sha256``; of schema 1, its routers where it says."""
    return _dotted(run.config.get("made_from") or {"routers": run.environment.get("routers", {})})


def _shared_in_config(name: str) -> bool:
    part, _, field = name.partition(".")
    return (
        (part == "data" and field != "train_tokens")
        or (part == "model" and field not in CHOICES_IN_MODEL)
        or (part == "train" and field in SAME_IN_TRAIN)
    )


def _require_equal(field: str, values: Sequence[tuple[str, Any]], reason: str) -> None:
    """Refuse the first of the named values that is not equal to the first of all."""
    (one, wanted), *others = values
    for other, value in others:
        if value != wanted:
            raise ComparisonError(f"{field} differs: {one} has {wanted!r}, {other} has {value!r}; {reason}")


def _check_identity(runs: Sequence[RunRecord]) -> None:
    """Check the runs of one seed: the same initial weights, the same batches in the same order."""
    # An attention of experts is no part of the backbone.
    for alike in grouped(runs, lambda run: (source(run), _attention_experts(run))).values():
        fingerprints = [(run.id, run.summary["fingerprint"]["backbone"]) for run in alike]
        _require_equal("fingerprint.backbone", fingerprints, SAME_WEIGHTS)
    for alike in by_shape(runs).values():
        shared = [(run.id, run.summary["fingerprint"]["shared"]) for run in alike]
        _require_equal("fingerprint.shared", shared, SAME_WEIGHTS)
    for alike in grouped(runs, train_tokens).values():
        streams = [(run.id, _made(run).get(STREAM)) for run in alike]
        _require_equal(f"config.made_from.{STREAM}", streams, "as many training tokens are the same ones")
        for step in sorted(set().union(*map(_chains, alike))):
            chains = [(run.id, _chains(run)[step]) for run in alike if step in _chains(run)]
            _require_equal(f"batches.chain at step {step}", chains, SAME_BATCHES)
        _check_overlap(alike)


def _check_overlap(runs: Sequence[RunRecord]) -> None:
    """A finished run of another length than the longest proves its batches only where both were hashed at the same
    step.
    """
    longest = max(runs, key=lambda run: run.summary["batches"]["steps"])
    for run in runs:
        if run.summary["status"] == "finished" and not _chains(run).keys() & _chains(longest).keys():
            values = [(r.id, sorted(_chains(r))) for r in (longest, run)]
            _require_equal("batches.steps", values, "without a common step their batches cannot be compared")


def source(run: RunRecord) -> str:
    """Return the checkpoint that a run starts from, as a table names it; empty where its weights are the seed's."""
    start = run.config["config"].get("start")
    return f"{start['run']} at step {start['step']} (sha256 {start['sha256'][:12]})" if start else ""


def train_tokens(run: RunRecord) -> int | None:
    """Return how many of the training tokens a run was trained on; None: all."""
    data: Mapping[str, Any] = run.config["config"]["data"]
    return data.get("train_tokens")


def by_shape(runs: Iterable[RunRecord]) -> dict[tuple[int | str | None, ...], list[RunRecord]]:
    """Group the MoE runs whose shared parameters have the same shapes, and come from the same weights in the same way;
    dense layers are as wide as what a token runs, unless they have a width of their own.
    """
    groups: dict[tuple[int | str | None, ...], list[RunRecord]] = {}
    for run in runs:
        model = run.config["config"]["model"]
        if run.config["router"] != DENSE:
            shared = model.get("num_shared_experts", 0)
            dense = (model["num_dense_layers"] or model.get("moe_every", 1) > 1) and model.get("d_dense") is None
            width = model["k"] + shared if dense else None
            start = json.dumps(run.config["config"].get("start"), sort_keys=True)
            in_common = (model.get("d_expert"), _attention_experts(run))  # to all runs of a table
            shape = (model["num_experts"], shared, model.get("constant_experts", 0), width, start, *in_common)
            groups.setdefault(shape, []).append(run)
    return groups


def _attention_experts(run: RunRecord) -> int:
    return int(run.config["config"]["model"].get("attention_experts", 0))


def _chains(run: RunRecord) -> dict[int, str]:
    batches = run.summary["batches"]
    return {row["step"]: row["chain"] for row in run.evals} | {batches["steps"]: batches["chain"]}
