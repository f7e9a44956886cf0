"""Claims about who sees whom: later tokens, other sequences of a batch, places in a sequence, text and noise."""

from rlroute.experiments.claims.arms import SWITCH
from rlroute.experiments.claims.claim import Claim, Part, arm, more

CLAIMS = (
    Claim(
        id="22",
        statement="In a causal language model token choice beats expert choice, which wins only by looking ahead.",
        source="OLMoE, Muennighoff et al. 2024 (arXiv 2409.02060); Wang et al. 2024 (arXiv 2408.15664)",
        anchor="HellaSwag 58 against 53; a leak of up to 50 bits a token",
        tier="quick",
        here="honest is the loss on the last tokens of prefixes, behind which there is nothing to see",
        arms={"expert choice": arm("expert_choice"), "switch": SWITCH},
        parts=(
            Part(
                "routes of expert choice change with later tokens", "later_routes", {"expert choice": 1.0}, above=0.01
            ),
            more("prefix_bits", "expert choice", "switch", "where it sees none, it is worse"),
        ),
    ),
    Claim(
        id="25",
        statement="Under a capacity, later tokens of a sequence are dropped more often.",
        source="OpenMoE, Xue et al. 2024 (arXiv 2402.01739)",
        anchor="drops towards the end",
        tier="quick",
        here="switch, k = 2, capacity 1.25 of each sequence's own, earlier tokens first",
        arms={"capacity": arm("switch:balance_weight=0.01", capacity_factor=1.25, capacity_rows="sequence")},
        parts=(
            Part("more are dropped in the last quarter than in the first", "drop_trend", {"capacity": 1.0}, above=0.0),
        ),
    ),
    Claim(
        id="46",
        statement="Drops tie a prompt to its batch: with other prompts beside it, other tokens of it are dropped.",
        source="lecture notes on MoE",
        anchor="a guess about GPT-4's randomness at temperature 0",
        tier="quick",
        here="capacity 1.25 that all sequences of a batch share, and none",
        arms={"shared capacity": arm("switch:balance_weight=0.01", capacity_factor=1.25), "none": SWITCH},
        parts=(more("others_drop", "shared capacity", "none", "drops change with the other sequences"),),
    ),
    Claim(
        id="42",
        statement="Benchmarks on random tokens overstate how uneven loads are.",
        source="arXiv 2605.20982 (2026)",
        anchor="Gini up to 2.35 times",
        tier="quick",
        here="the same trained switch on uniformly drawn tokens and on text",
        arms={"switch": SWITCH},
        parts=(Part("Gini is higher on random tokens", "noise_gini", {"switch": 1.0}, above=0.0),),
    ),
)
