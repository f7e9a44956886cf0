"""All claims of the ledger, by id: 1 to 43 of the literature, then those of lecture notes on mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence

from rlroute.errors import ConfigError
from rlroute.experiments.claims import balance, dynamics, experts, order, reward, routers, stability
from rlroute.experiments.claims.claim import Claim, Tier

THEMES = {
    "Balance": balance.CLAIMS,
    "Experts and dense models": experts.CLAIMS,
    "Rules of routing": routers.CLAIMS,
    "Reward": reward.CLAIMS,
    "Stability and noise": stability.CLAIMS,
    "Order and batches": order.CLAIMS,
    "Over training": dynamics.CLAIMS,
}
CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in sorted((claim for theme in THEMES.values() for claim in theme), key=lambda claim: int(claim.id))
}
"""By id, in their order."""


def choose(ids: Sequence[str], tier: Tier | None) -> list[Claim]:
    """Return the claims that are named, or those of a tier that can be run.

    Raises:
        ConfigError: there is no such claim, or neither ids nor a tier, or both.
    """
    if bool(ids) == (tier is not None):
        raise ConfigError("rlroute claims run wants ids of claims (rlroute claims list), or --tier quick, long or gpu")
    if unknown := [name for name in ids if name not in CLAIMS]:
        raise ConfigError(f"claim {unknown[0]!r}: legal are 1 to {max(map(int, CLAIMS))}")
    if tier is not None:
        return [claim for claim in CLAIMS.values() if claim.tier == tier and not claim.lacks]
    return [CLAIMS[name] for name in dict.fromkeys(ids)]
