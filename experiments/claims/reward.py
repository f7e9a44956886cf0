"""Claims about routers that learn from reward, and what they cost."""

from rlroute.experiments.claims.arms import FROZEN, SWITCH
from rlroute.experiments.claims.claim import Claim, Part, arm, less, more

CLARK = "Clark et al. 2022 (arXiv 2202.01169)"
REINFORCE = "reinforce:baseline={},balance_weight=8,policy_weight=0.5"

CLAIMS = (
    Claim(
        id="14",
        statement="S-BASE is best; RL-R beats hashing with 8 experts and loses with 64.",
        source=f"{CLARK}, fitted law",
        anchor="at 15 M parameters 2.985, 3.005, 3.026 nats (8 experts), 2.757, 2.788, 2.782 (64)",
        tier="long",
        here="2 layers, k = 1",
        arms={
            f"{name}, {experts}": arm(entry, num_experts=experts, k=1, router_lr_scale=scale)
            for experts in (8, 64)
            for name, entry, scale in (
                ("s-base", "sinkhorn", 1.0),
                ("rl-r", "reinforce:balance_weight=0.1", 10.0),
                ("hash", "hash", 1.0),
            )
        },
        parts=(
            less("bits", "s-base, 8", "rl-r, 8", "with 8 experts S-BASE is better than RL-R"),
            less("bits", "s-base, 64", "hash, 64", "with 64 it is better than hashing"),
            less("bits", "rl-r, 8", "hash, 8", "with 8 RL-R is better than hashing"),
            more("bits", "rl-r, 64", "hash, 64", "with 64 it is worse"),
        ),
        seeds=(0, 1, 2),
    ),
    Claim(
        id="28",
        statement="A policy whose reward is the balance of loads balances worse than an auxiliary loss.",
        source="notes of a router-RL campaign on Qwen3-235B (2026)",
        anchor="flat at one learning rate, diverging at ten times it; the auxiliary loss falls smoothly",
        tier="quick",
        here="reinforce without an f.P loss, charged 100 times E f - 1 of its experts, so that the loss hardly counts",
        arms={
            "reward": arm("reinforce:balance_weight=0,charge_weight=100,policy_weight=0.01", router_lr_scale=10.0),
            "auxiliary": SWITCH,
        },
        parts=(more("max_vio", "reward", "auxiliary", "MaxVio is higher"),),
    ),
    Claim(
        id="48",
        statement="Routing by REINFORCE works, and is not better by what it costs.",
        source=f"lecture notes on MoE, after {CLARK}",
        anchor="RL-R lies between S-BASE and hashing",
        tier="quick",
        here=(
            "tuned running-mean baseline, and leave-one-out over two samples, which costs a second pass; frozen random "
            "routes and switch beside them"
        ),
        arms={
            "reinforce": arm(REINFORCE.format("ema"), router_lr_scale=10.0),
            "leave one out": arm(REINFORCE.format("leave_one_out"), router_lr_scale=10.0),
            "frozen": FROZEN,
            "switch": SWITCH,
        },
        parts=(
            less("bits", "reinforce", "frozen", "it is better than random routes that are never trained"),
            Part("it is not better than switch by the margin", "bits", {"reinforce": 1.0, "switch": -1.0}, above=-0.02),
            Part("nor is it with a second sample", "bits", {"leave one out": 1.0, "switch": -1.0}, above=-0.02),
            Part(
                "which gains less than twice what switch gains over random routes",
                "bits",
                {"frozen": -1.0, "leave one out": -1.0, "switch": 2.0},
                below=0.0,
            ),
            Part(
                "and costs half as much again at least",
                "cost_ratio",
                {"leave one out": 1.0, "switch": -1.0},
                above=1.5,
            ),
        ),
    ),
)
