"""Claims about what happens on the way: when routes settle, when balance relaxes, where routers are right."""

from rlroute.experiments.claims.arms import SWITCH
from rlroute.experiments.claims.claim import Claim, Part, arm

KEPT = {"checkpoint_every": 30}

CLAIMS = (
    Claim(
        id="23",
        statement="Routes settle early in training.",
        source="OLMoE, Muennighoff et al. 2024 (arXiv 2409.02060), section 5.1",
        anchor="60 % of the final top 8 of 64 after 1 % of training",
        tier="quick",
        here="switch, 2 of 16 experts, after a tenth of 300 steps, where warm-up ends; by chance it is an eighth",
        arms={"switch": arm("switch:balance_weight=0.01", **KEPT)},
        parts=(
            Part(
                "half of the final choices are made after a tenth of the steps",
                "settled_early",
                {"switch": 1.0},
                above=0.5,
            ),
        ),
    ),
    Claim(
        id="24",
        statement="With BASE, routes keep fluctuating.",
        source="StableMoE, Dai et al. 2022 (arXiv 2204.08396)",
        anchor="40.9, 29.1 and 15.4 % of tokens change after 20, 50 and 80 % of training",
        tier="quick",
        here="one of 16 experts, 300 steps; greedy routes of validation tokens at each tenth",
        arms={"base": arm("base", k=1, **KEPT)},
        parts=(
            Part(
                "after four fifths of the steps a tenth of the tokens still change",
                "unsettled_late",
                {"base": 1.0},
                above=0.1,
            ),
        ),
    ),
    Claim(
        id="41",
        statement="Routers are near the best routes on confident tokens, and only there.",
        source="arXiv 2605.07260 (2026)",
        anchor="regret by decile of confidence, four models of 7B to 30B",
        tier="quick",
        here=(
            "exact regret of switch, 119 other sets of 2 of 16 experts for 128 validation tokens each; near is a tenth "
            "of the others' regret, and there two routes in five are better (half, if the router knew nothing)"
        ),
        arms={"switch": SWITCH},
        parts=(
            Part("regret is a tenth of that of unsure tokens", "sure_regret", {"switch": 1.0}, below=0.1),
            Part("where two in five routes are better", "better_unsure", {"switch": 1.0}, above=0.4),
        ),
    ),
    Claim(
        id="43",
        statement="Balance rises, holds, and then relaxes over training.",
        source="arXiv 2604.04230 (2026)",
        anchor="an effective congestion of 14, then 36 to 39, then 9 (OLMoE's checkpoints)",
        tier="long",
        here="the Gini coefficient of the loads in training, in place of a fitted congestion; windows by the source's "
        "phases: the first hundredth of the steps, from an eighth to a third of them, the last tenth",
        arms={"switch": SWITCH},
        parts=(
            Part("loads become more even", "gini_gained", {"switch": 1.0}, above=0.0),
            Part("and less so again", "gini_lost", {"switch": 1.0}, above=0.0),
        ),
    ),
)
