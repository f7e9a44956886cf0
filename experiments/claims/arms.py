"""What several claims train: arms with the same configuration are the same runs."""

from typing import Any

from rlroute.experiments.claims.claim import Arm, arm

DENSE = arm("dense", lr=2.4e-2)
"""At the learning rate that it was tuned to, as the routers are."""
SWITCH = arm("switch:balance_weight=0.01")
STRONG_SWITCH = arm("switch:balance_weight=0.1")
UNBALANCED = arm("unbalanced")
HASH = arm("hash", lr=2e-2)
FROZEN = arm("frozen")
BIAS = arm("bias_balanced:update_rate=0.01")
QUANTILE = arm("quantile")
NOISY = arm("noisy_topk:importance_weight=0.1,load_weight=0.1")
JITTER = arm("switch:balance_weight=0.01,jitter=0.01")
SAMPLED = arm("sampled_topk:balance_weight=0.01")
Z_LOSS = arm("switch:balance_weight=0.01,z_weight=0.001")
SWITCH_64 = arm("switch:balance_weight=0.01", num_experts=64, k=1)
HASH_64 = arm("hash", num_experts=64, k=1, lr=2e-2)


def hot(entry: str, **given: Any) -> Arm:
    """Return an entry at six times the tuned learning rate, half as long, where training is unsteady."""
    return arm(entry, lr=0.1, steps=150, warmup_steps=15, **given)


def fine(grain: int, shared: int = 0) -> Arm:
    """Return switch with experts cut into so many of a width that keeps weights and active compute; with so many of a
    token's experts shared by all tokens.
    """
    cut = {"num_experts": 8 * grain, "d_expert": 128 // grain, "k": grain - shared, "num_shared_experts": shared}
    plain = {"num_experts": 16, "d_expert": 64, "k": 2, "num_shared_experts": 0}
    return Arm("switch:balance_weight=0.01", {name: value for name, value in cut.items() if value != plain[name]})
