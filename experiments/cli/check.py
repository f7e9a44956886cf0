"""The command ``check``."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import tyro

from rlroute.errors import ConfigError


def check(router: tyro.conf.Positional[str]) -> None:
    """Hold one router to the laws of the contract, in each of its configurations, on one core; exit 1 if one fails.

    Args:
        router: its name, `router:field=value,...`, or its file.
    """
    from rlroute.experiments.laws.check import check_router
    from rlroute.experiments.recipes.entries import router_of
    from rlroute.registry import include, router_file

    if router.endswith(".py"):
        include(router)
        router = Path(router).stem
    config = router_of(router)
    if config is None:
        raise ConfigError("the dense model has no router: want the name or the file of one")
    print(f"{router} ({router_file(config.name)})")
    outcomes: Counter[str] = Counter()
    for verdict in check_router(config):
        print(verdict, flush=True)
        outcomes[verdict.outcome] += 1
    tried = len(verdict.passed) + len(verdict.failed) + len(verdict.refused)
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()), f"in {tried} configurations")
    if outcomes["FAIL"]:
        sys.exit(1)
