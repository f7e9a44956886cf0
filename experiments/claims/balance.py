"""Claims about balance: whether it is needed, by which means, at which strength and over which scope."""

from rlroute.experiments.claims.arms import BIAS, NOISY, QUANTILE, STRONG_SWITCH, SWITCH, UNBALANCED
from rlroute.experiments.claims.claim import Claim, Part, alike, arm, less, more, no_worse

SHAZEER = "Shazeer et al. 2017 (arXiv 1701.06538), table 6"
LOSS_FREE = "Wang et al. 2024 (arXiv 2408.15664)"
RATES = {rate: arm(f"bias_balanced:update_rate={rate}") for rate in ("0.0001", "0.01", "0.3")}


def _noisy(weight: str) -> str:
    return f"noisy_topk:importance_weight={weight},load_weight={weight}"


CLAIMS = (
    Claim(
        id="1",
        statement="Without a balance loss experts collapse, and the loss is worse.",
        source=SHAZEER,
        anchor="perplexity 39.8 against 35.6, highest over mean load 17.8 against 1.14 (256 experts)",
        tier="quick",
        here="noisy top-k as there, 16 experts, k = 2, weights of both losses 0 and 0.1",
        arms={"weight 0": arm(_noisy("0")), "weight 0.1": NOISY},
        parts=(
            more("max_vio", "weight 0", "weight 0.1", "without the losses MaxVio is higher by 1 at least", by=1),
            more("bits", "weight 0", "weight 0.1", "and the loss is higher"),
        ),
    ),
    Claim(
        id="2",
        statement="Any of a wide range of balance weights works.",
        source=SHAZEER,
        anchor="perplexity 35.6 to 35.7 from 0.01 to 1",
        tier="quick",
        here="as claim 1, weights of 0.01, 0.1 and 1",
        arms={f"weight {weight}": arm(_noisy(weight)) for weight in ("0.01", "0.1", "1")},
        parts=(
            alike("weight 0.01", "weight 0.1", "a tenth of the weight gives the same loss"),
            alike("weight 1", "weight 0.1", "ten times the weight gives the same loss"),
        ),
    ),
    Claim(
        id="3",
        statement="Without a balance loss one, then two experts take all tokens.",
        source="OLMoE, Muennighoff et al. 2024 (arXiv 2409.02060)",
        anchor="of 8 experts one near 100 %, later two with half each, six starve",
        tier="quick",
        here="8 experts, k = 1, softmax top-k without any term; after the last step",
        arms={"unbalanced": arm("unbalanced", num_experts=8, k=1)},
        parts=(Part("two experts have more than nine tenths of the pairs", "crowd", {"unbalanced": 1.0}, above=0.9),),
    ),
    Claim(
        id="4",
        statement="An auxiliary loss of weight 0.01 balances and does not hurt.",
        source="Switch Transformer, Fedus et al. 2021 (arXiv 2101.03961)",
        anchor="0.01 chosen out of 0.1 to 0.00001",
        tier="quick",
        here="switch, k = 2, weights of 0, 0.01 and 0.1",
        arms={"weight 0": UNBALANCED, "weight 0.01": SWITCH, "weight 0.1": STRONG_SWITCH},
        parts=(
            less("max_vio", "weight 0.01", "weight 0", "MaxVio is lower than without, by 1 at least", by=1),
            no_worse("weight 0.01", "weight 0", "the loss is no higher than without"),
            no_worse("weight 0.01", "weight 0.1", "nor than with ten times the weight"),
        ),
    ),
    Claim(
        id="16",
        statement="Balance by a bias of the choice is better than by an auxiliary loss, and quality is no worse.",
        source=LOSS_FREE,
        anchor="MaxVio 0.04 against 0.72, perplexity 9.50 against 9.56 (1B)",
        tier="quick",
        here="rate 0.01 instead of 0.001, for 300 steps are few; auxiliary loss of weight 0.01 on softmax",
        arms={"bias": BIAS, "auxiliary": SWITCH},
        parts=(
            less("max_vio", "bias", "auxiliary", "MaxVio is lower"),
            no_worse("bias", "auxiliary", "the loss is no higher"),
        ),
    ),
    Claim(
        id="17",
        statement=(
            "A rate of the bias that is too small balances too slowly, one that is too large makes loads swing; the "
            "step by sign is no worse than that by size."
        ),
        source=f"{LOSS_FREE}, table 3 for the two steps",
        anchor="0.0001 slow, 0.01 swings (0.001 chosen); sign 9.50, size 9.51 to 9.53",
        tier="quick",
        here="rates of 0.0001, 0.01 and 0.3 (300 steps), the size relative to the mean load",
        arms={**RATES, "by size": arm("bias_balanced:update_rate=0.01,rule=magnitude")},
        parts=(
            more("max_vio", "0.0001", "0.01", "at 0.0001 MaxVio is higher than at 0.01"),
            more("load_swing", "0.3", "0.01", "at 0.3 loads change more from step to step"),
            more("bits", "0.3", "0.01", "and the loss is higher"),
            no_worse("0.01", "by size", "by sign the loss is no higher than by size"),
        ),
    ),
    Claim(
        id="18",
        statement="What balance is taken over matters, not its mechanism: over the batch it beats that in sequences.",
        source=f"{LOSS_FREE} and DeepSeek-V3 (arXiv 2412.19437), section 4.5.3",
        anchor="loss 2.258 in sequences, 2.253 over the batch, 2.253 by bias (1B)",
        tier="quick",
        here="f.P loss of weight 0.1 over the batch or in each sequence of 128 tokens; bias at rate 0.01",
        arms={
            "batch": STRONG_SWITCH,
            "sequence": arm("switch:balance_weight=0,sequence_balance_weight=0.1"),
            "bias": BIAS,
        },
        parts=(
            more("bits", "sequence", "batch", "balance in sequences costs"),
            alike("bias", "batch", "bias and loss over the batch are equivalent"),
        ),
    ),
    Claim(
        id="27",
        statement="At the same MaxVio ways of balancing differ by no more than noise.",
        source="Rect STE, a project of 2,100 runs (runsdb, 2026)",
        anchor="0.002 between methods held at one MaxVio",
        tier="quick",
        here="f.P losses on softmax and on sigmoid, their weights moved to hold a MaxVio of 0.3; bias at rate 0.01",
        arms={
            "softmax": arm("switch:balance_weight=0.01,target_max_vio=0.3,balance_rate=0.003"),
            "sigmoid": arm("topk:score=sigmoid,balance_weight=0.01,target_max_vio=0.3,balance_rate=0.003"),
            "bias": BIAS,
        },
        parts=(
            alike("softmax", "sigmoid", "the two losses have about the same MaxVio", 0.3, "max_vio"),
            alike("softmax", "bias", "and bias too", 0.3, "max_vio"),
            alike("softmax", "sigmoid", "softmax and sigmoid are equivalent"),
            alike("softmax", "bias", "loss and bias are equivalent"),
        ),
    ),
    Claim(
        id="34",
        statement="The update by sign is worse than quantile balancing, whatever its rate.",
        source="marin (https://github.com/marin-community/marin), issues 5232 and 4041",
        anchor="rates of 0.001 to 0.05 failed",
        tier="quick",
        here="rates of 0.0001, 0.01 and 0.3 against the exact quantile",
        arms={**RATES, "quantile": QUANTILE},
        parts=tuple(
            more(measure, rate, "quantile", f"at {rate} {what} is higher")
            for rate in RATES
            for measure, what in (("bits", "the loss"), ("max_vio", "MaxVio"))
        ),
    ),
)
