"""What a comparison holds equal: tokens, training FLOPs, or time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlroute.config import Budget, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.comparison.entries import router_label


def find_reference(configs: Sequence[RunConfig], label: str | None) -> RunConfig:
    """Return the configuration that the table's ``label`` means (its first word names the routers); ``switch`` or the
    first by default.

    Raises:
        ConfigError: there is none, found before any work.
    """
    names = [router_label(config.to_dict()) for config in configs]
    name = label.partition(" ")[0] if label else "switch" if "switch" in names else min(names)
    if name not in names:
        raise ConfigError(f"reference {label!r} is not among the entries: {', '.join(sorted(set(names)))}")
    return configs[names.index(name)]


def refuse_two(budget: Budget, train: TrainConfig) -> None:
    """Refuse what a comparison holds equal beside a budget of the runs' own.

    Raises:
        ConfigError: naming both.
    """
    if budget != "tokens" and train.budget != "tokens":
        raise ConfigError(f"--budget {budget} with --train.budget {train.budget}: want one of them")


def with_budget(
    configs: Sequence[RunConfig], budget: Budget, reference: RunConfig, seconds: float | None
) -> list[RunConfig]:
    """Return the configurations under a budget: their tokens, the reference's training FLOPs, or so many seconds.

    Raises:
        ConfigError: seconds without budget time or the reverse.
    """
    if (budget == "time") != (seconds is not None):
        raise ConfigError(f"--seconds {seconds} with --budget {budget}: time needs it, the others take none")
    if budget == "tokens":
        return list(configs)
    amount = seconds if seconds is not None else training_flops(reference)
    return [replace(c, train=replace(c.train, budget=budget, budget_amount=amount)) for c in configs]


def training_flops(config: RunConfig) -> float:
    """Return the training FLOPs that a configuration spends in its steps, with k experts for every token."""
    from rlroute.training.data import corpus_of
    from rlroute.training.prepare import expected_costs, flops_per_step

    costs = expected_costs(config, corpus_of(config.data))
    return float(config.train.steps * flops_per_step(config, costs))
