"""The command ``check``."""

from __future__ import annotations

import sys
from collections import Counter

import tyro

from rlroute.errors import ConfigError


def check(router: tyro.conf.Positional[str]) -> None:
    """Hold one router to the laws of the contract, in each of its configurations, on one core; exit 1 if one fails.

    Args:
        router: its name or its file, also with fields as in `router:field=value,...`.
    """
    from rlroute.experiments.laws.check import check_router
    from rlroute.experiments.recipes.entries import bring_in, router_of
    from rlroute.registry import router_file

    router = bring_in(router)
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
