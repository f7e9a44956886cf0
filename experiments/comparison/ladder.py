"""Scale as an axis: entries and a reference trained at several budgets of compute and several widths, and what that
says of them: the reference's loss law, every entry's compute multiplier, and whether the order holds.

A budget is training FLOPs, the same for every entry and width (:func:`.budget.with_budget`), so that at each one every
entry has the widths to choose from. The expert's width grows with the model's; all else stays. Runs are those of
``compare``, by the same launcher and in the same store; what is there is used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ComparisonError, ConfigError
from rlroute.experiments.comparison.budget import training_flops
from rlroute.experiments.comparison.entries import check_comparable, labels, make_entries
from rlroute.experiments.comparison.ladder_file import Climb, Ladder, Rungs, key_of, paired
from rlroute.experiments.comparison.multipliers import Laws, compare_curves, curve, fit_laws
from rlroute.experiments.launch.jobs import Job, Launch, together
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.entries import bring_in
from rlroute.experiments.recipes.presets import build_comparison
from rlroute.experiments.statistics import t_interval
from rlroute.experiments.verdicts import Seeds
from rlroute.limits import Positive, Size, checked
from rlroute.schema import RunRecord

BUDGETS = (0.25, 0.5, 1.0)
"""Shares of what the reference's training takes at the model's own width and ``--train.steps``."""


def climb(
    entries: Sequence[str],
    against: str = "switch",
    *,
    budgets: Sequence[float] = (),
    widths: Sequence[int] = (),
    seeds: int = 3,
    tuned: bool = True,
    data: DataConfig | None = None,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    how: Launch | None = None,
    said: Collection[str] = (),
    command: str | None = None,
) -> Ladder:
    """Train entries and a reference at all budgets and widths, and return their ladder.

    Args:
        entries: as of ``compare``, or routers' files.
        against: the reference.
        budgets: shares of the reference's training FLOPs at the model's width, at least three; by default ``BUDGETS``.
        widths: of the model; by default half, once and three halves of its own.
        seeds: each run is trained with seeds 0 to seeds - 1.
        tuned: use each entry's tuned settings, the same at all rungs.
        data, model, train: what all share; the defaults of ``compare`` where nothing is said.
        how: where the runs are stored and how they are launched.
        said: fields of ``train`` that were set on purpose.
        command: the command line behind it, for the records.

    Raises:
        ConfigError, DataError, StoreError: bad input, before any work.
        ComparisonError: a run failed or diverged, or the runs of a rung are not comparable.
    """
    data, model, train, how = data or DataConfig(), model or ModelConfig(), train or TrainConfig(), how or Launch()
    seeds, budgets = checked(seeds, Seeds, "--seeds"), _rungs(tuple(budgets) or BUDGETS)
    widths = tuple(widths) or (model.d_model // 2, model.d_model, 3 * model.d_model // 2)
    _refuse(widths, train)
    names = list(dict.fromkeys(bring_in(entry) for entry in (against, *entries)))
    if len(names) == 1:
        raise ConfigError(f"a ladder of {names[0]} alone: want an entry besides the reference")
    (base,) = build_comparison([names[0]], data, model, train, tuned=tuned, said=said)
    whole = training_flops(base)
    cells = {
        (share, width): [
            replace(c, train=replace(c.train, budget="flops", budget_amount=share * whole))
            for c in build_comparison(names, data, at_width(model, width), train, tuned=tuned, said=said)
        ]
        for share in budgets
        for width in widths
    }
    jobs = [
        Job(config, seed, command, label=f"{name} {share:g}x at {width}")
        for seed in range(seeds)
        for (share, width), configs in cells.items()
        for name, config in zip(names, configs, strict=True)
    ]
    records = run_all(together(jobs), how)
    return _measure(records, cells, np.array(budgets) * whole, widths, seeds, command)


def _rungs(budgets: Sequence[float]) -> tuple[float, ...]:
    found = tuple(sorted(checked(share, Positive, "--budgets") for share in budgets))
    if len(set(found)) != len(found) or len(found) < 3:
        raise ConfigError(f"--budgets {' '.join(f'{share:g}' for share in budgets)}: want three or more, all different")
    return found


def _refuse(widths: Sequence[int], train: TrainConfig) -> None:
    for width in widths:
        checked(width, Size, "--widths")
    if len(set(widths)) != len(widths):
        raise ConfigError(f"--widths {' '.join(map(str, widths))}: want each once")
    if train.budget != "tokens":
        raise ConfigError(f"train.budget = {train.budget!r}: a ladder sets it to flops itself, legal is 'tokens'")


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """Return a model of another width, whose experts are as much wider."""
    return replace(model, d_model=width, d_expert=max(1, round(model.d_expert * width / model.d_model)))


# From records to the ladder


def _measure(
    records: Sequence[RunRecord],
    cells: Mapping[tuple[float, int], Sequence[RunConfig]],
    compute_J: np.ndarray,
    widths: Sequence[int],
    seeds: int,
    command: str | None,
) -> Ladder:
    by_hash: dict[str, dict[int, RunRecord]] = {}
    for run in records:
        by_hash.setdefault(run.config["config_hash"], {})[run.config["seed"]] = run
    grid = [[by_hash[c.content_hash()] for c in configs] for configs in cells.values()]
    for cell in grid:
        check_comparable(make_entries([run for runs in cell for run in runs.values()]))
    first = [runs[0].config["config"] for runs in grid[0]]
    named = labels({str(index): config for index, config in enumerate(first)})
    shape = (len(compute_J), len(widths), len(first), seeds)
    bits, speed = (
        np.array([[[of(runs[seed]) for seed in range(seeds)] for runs in cell] for cell in grid])
        .reshape(shape)
        .transpose(2, 0, 1, 3)
        for of in (_bits, _speed)
    )
    rungs = Rungs(tuple(named.values()), compute_J, tuple(widths), bits, speed, tuple(range(seeds)))
    return reduce(rungs, [key_of(config) for config in first], [run.id for run in records], command)


def _bits(run: RunRecord) -> float:
    final = run.summary["final"]
    if final is None:
        raise ComparisonError(f"run {run.id} diverged: a ladder wants all its runs; another learning rate may help")
    return final["bits_per_byte"]


def _speed(run: RunRecord) -> float:
    return run.summary["model"]["training_flops"] / max(run.summary["seconds"]["train"], 1e-3)


def reduce(rungs: Rungs, keys: Sequence[str], runs: Sequence[str], command: str | None) -> Ladder:
    """Return what losses and speeds say: laws, multipliers, order."""
    entries = tuple(_entry(rungs, index, key) for index, key in enumerate(keys))
    order = tuple(
        tuple(entry.label for entry in sorted(entries, key=lambda entry: entry.bits[budget].mean))
        for budget in range(len(rungs.compute_J))
    )
    return Ladder(rungs, entries, order, tuple(runs), command)


def _entry(rungs: Rungs, index: int, key: str) -> Climb:
    compute_J, bits_JWS, base_JWS = rungs.compute_J, rungs.bits_EJWS[index], rungs.bits_EJWS[0]
    even_1S = np.full((1, len(rungs.seeds)), 1 / len(rungs.seeds))
    (loss_J,), (at_J,) = curve(bits_JWS, even_1S)
    (base_J,) = curve(base_JWS, even_1S)[1]
    widths, base_widths = (tuple(rungs.widths[w] for w in at) for at in (at_J, base_J))
    mine, theirs = rungs.bits(index, widths), rungs.bits(0, base_widths)
    log_speed_S = np.log(rungs.speed_EJWS[index] / rungs.speed_EJWS[0]).mean((0, 1))
    is_reference = index == 0
    return Climb(
        label=rungs.labels[index],
        key=key,
        bits=tuple(t_interval(bits_S.tolist()) for bits_S in mine),
        widths=widths,
        differences=() if is_reference else paired(mine, theirs),
        law=_law(fit_laws(compute_J, loss_J[None])),
        compute=None if is_reference else compare_curves(compute_J, base_JWS, bits_JWS),
        time=None if is_reference else compare_curves(compute_J, base_JWS, bits_JWS, log_speed_S),
    )


def _law(laws: Laws) -> dict[str, float] | None:
    if laws.scale[0] <= 0:
        return None
    values = {"floor": laws.floor[0], "scale": laws.scale[0], "exponent": laws.exponent[0], "unit": laws.unit}
    return {name: float(value) for name, value in values.items()}
