"""Claims about the experts themselves: against dense models, how many, how fine, how many shared."""

from rlroute.experiments.claims.arms import DENSE, HASH_64, SWITCH, SWITCH_64, fine
from rlroute.experiments.claims.claim import Claim, Part, arm, less, more, no_worse

OLMOE = "OLMoE, Muennighoff et al. 2024 (arXiv 2409.02060)"
DEEPSEEK_MOE = "DeepSeekMoE, Dai et al. 2024 (arXiv 2401.06066)"
MOE_LAB = "moe-lab (https://github.com/vuiseng9/moe-lab), one run an arm"
GRAIN = (
    "experts cut into 1, 2, 4 and 8: 8 of width 128, k = 1, to 64 of width 16, k = 8; weights and active compute equal"
)
SHARED = "32 experts of width 32, k + shared = 4"

CLAIMS = (
    Claim(
        id="5",
        statement="One expert a token is as good as two at equal compute.",
        source="Switch Transformer, Fedus et al. 2021 (arXiv 2101.03961), table 1",
        anchor="-1.561 at 1,000 examples a second against -1.572 at 860 (capacity 1)",
        tier="quick",
        here="switch with k = 1 for as many steps as the training FLOPs of k = 2 pay for",
        arms={"k = 1": arm("switch:balance_weight=0.01", k=1), "k = 2": SWITCH},
        parts=(no_worse("k = 1", "k = 2", "the loss is no higher"),),
        equal_flops="k = 2",
    ),
    Claim(
        id="15",
        statement="Adding experts moves the loss far more than the choice of the router does.",
        source="Clark et al. 2022 (arXiv 2202.01169), fitted law at 15 M parameters, 64 experts",
        anchor="0.43 nats by experts, 0.03 by the router",
        tier="quick",
        here="64 experts, k = 1; dense of the same active width; switch and hash",
        arms={"dense": arm("dense", k=1, num_experts=64, lr=2.4e-2), "switch": SWITCH_64, "hash": HASH_64},
        parts=(
            more("bits", "dense", "switch", "experts help"),
            Part(
                "by more than hash is ahead of switch",
                "bits",
                {"dense": 1.0, "switch": -2.0, "hash": 1.0},
                above=0.0,
            ),
            Part("and by more than it is behind", "bits", {"dense": 1.0, "hash": -1.0}, above=0.0),
        ),
    ),
    Claim(
        id="19",
        statement="The shared expert cannot be removed: no routed expert does its work.",
        source=DEEPSEEK_MOE,
        anchor="Pile loss 1.808, 2.414 without it",
        tier="quick",
        here=f"{SHARED}, one of them shared; removed after training, beside denying each token its best routed expert",
        arms={"one shared": fine(4, shared=1)},
        parts=(
            Part(
                "without it the loss rises by more than a tenth of a bit",
                "without_shared",
                {"one shared": 1.0},
                above=0.1,
            ),
        ),
    ),
    Claim(
        id="20",
        statement="A shared expert helps at equal active compute.",
        source=f"{DEEPSEEK_MOE}; {OLMOE} finds the contrary",
        anchor="1.808 with one, three of four tasks better; OLMoE: slightly worse",
        tier="quick",
        here=f"{SHARED}: none or one shared",
        arms={"none": fine(4), "one": fine(4, shared=1)},
        parts=(less("bits", "one", "none", "the loss is lower with one"),),
    ),
    Claim(
        id="39",
        statement="More shared experts are not better at equal active compute.",
        source=MOE_LAB,
        anchor="loss 1.0727, 1.0769, 1.0741 and 1.1096 for 0, 1, 2 and 3 shared",
        tier="quick",
        here=f"{SHARED}: none, one or three shared",
        arms={"none": fine(4), "one": fine(4, shared=1), "three": fine(4, shared=3)},
        parts=(
            no_worse("none", "one", "without any the loss is no higher than with one"),
            no_worse("none", "three", "nor than with three"),
            more("bits", "three", "one", "three are worse than one"),
        ),
    ),
    Claim(
        id="21",
        statement="Finer experts help, by less the finer they are.",
        source=f"{OLMOE}; Krajewski et al. 2024 (arXiv 2402.07871)",
        anchor="8 to 32 experts about 10 %, 32 to 64 another 1 to 2 % (HellaSwag, MMLU)",
        tier="quick",
        here=GRAIN,
        arms={str(grain): fine(grain) for grain in (1, 2, 4, 8)},
        parts=(
            less("bits", "2", "1", "cut in two they are better"),
            less("bits", "4", "2", "cut in four better still"),
            Part(
                "the last cut gains less than the first",
                "bits",
                {"1": 1.0, "2": -1.0, "4": -1.0, "8": 1.0},
                above=0.0,
            ),
        ),
    ),
    Claim(
        id="40",
        statement="Granularity helps, saturating.",
        source=MOE_LAB,
        anchor="loss 1.1411, 1.0793, 1.0744 and 1.0709 (the first at k = 1, where its router hardly learns)",
        tier="quick",
        here=GRAIN,
        arms={str(grain): fine(grain) for grain in (1, 2, 8)},
        parts=(
            less("bits", "8", "1", "the finest are better than the coarsest"),
            Part(
                "the first cut gains more than the other two",
                "bits",
                {"1": 1.0, "2": -2.0, "8": 1.0},
                above=0.0,
            ),
        ),
    ),
    Claim(
        id="26",
        statement="A mixture reaches a dense model's loss with a third of the tokens, in half of the time.",
        source=OLMOE,
        anchor="about 3 times fewer tokens, about 2 times less time",
        tier="quick",
        here="16 experts, k = 2, against dense of equal active compute; the direction decides",
        arms={"switch": SWITCH, "dense": DENSE},
        parts=(
            Part("it needs fewer tokens", "tokens_to_reach", {"switch": 1.0, "dense": -1.0}, below=1.0),
            Part("and less time", "seconds_to_reach", {"switch": 1.0, "dense": -1.0}, below=1.0),
        ),
    ),
    Claim(
        id="47",
        statement="With more parameters at equal active compute the loss is lower, and so it is at equal time.",
        source="lecture notes on MoE, after Fedus et al. 2021 (arXiv 2101.03961)",
        anchor="up to 7 times faster than T5-Base",
        tier="quick",
        here="16 experts, k = 2, against dense of equal active compute; time as it was on these cores",
        arms={"switch": SWITCH, "dense": DENSE},
        parts=(
            less("bits", "switch", "dense", "at equal tokens the mixture is better"),
            Part("so it is at equal time", "bits_at_equal_time", {"switch": 1.0, "dense": -1.0}, below=0.0),
        ),
    ),
)
