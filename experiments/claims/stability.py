"""Claims about what keeps training steady: z-loss, precision, noise, initial scales; and what does not."""

from rlroute.experiments.claims.arms import JITTER, NOISY, SAMPLED, SWITCH, Z_LOSS, hot
from rlroute.experiments.claims.claim import Claim, arm, less, more, no_worse

SWITCH_PAPER = "Switch Transformer, Fedus et al. 2021 (arXiv 2101.03961)"
ST_MOE = "ST-MoE, Zoph et al. 2022 (arXiv 2202.08906)"
HOT = "unsteady is a learning rate of 0.1, six times the tuned one, over 150 steps"

CLAIMS = (
    Claim(
        id="6",
        statement="A router in float32 keeps training in bfloat16 from diverging.",
        source=f"{SWITCH_PAPER}, table 2",
        anchor="negative log perplexity -1.716 with the router in float32, -3.780 (diverged) without",
        tier="gpu",
        here="gpu-30m in bfloat16, the router's products in float32 or bfloat16",
        arms={
            "float32": SWITCH,
            "bfloat16": arm(SWITCH.entry, router_dtype="bfloat16"),
        },
        parts=(
            more("bits", "bfloat16", "float32", "with the router in bfloat16 the loss is higher"),
            more("loss_rise", "bfloat16", "float32", "and rises further above its least on the way"),
        ),
        seeds=(0, 1, 2),
    ),
    Claim(
        id="7",
        statement="Initial weights of a tenth of the usual scale improve the mean and the spread over seeds.",
        source=f"{SWITCH_PAPER}, table 3",
        anchor="-2.72 with spread 0.01 against -3.60 with spread 0.68 (3,500 steps, 3 seeds)",
        tier="long",
        here="all matrices but embeddings and routers; the spread is seeds' mean distance from their median (Brown and "
        "Forsythe 1974)",
        arms={"usual": SWITCH, "a tenth": arm(SWITCH.entry, init_scale=0.1)},
        parts=(
            less("bits", "a tenth", "usual", "the loss is lower"),
            less("spread", "a tenth", "usual", "and seeds are closer to one another"),
        ),
    ),
    Claim(
        id="9",
        statement="A router z-loss keeps logits small and training steady, at no cost of quality.",
        source=ST_MOE,
        anchor="3 of 3 runs stable at -1.741 with it, 4 of 6 at -1.755 without",
        tier="quick",
        here=f"weight 0.001 as there; {HOT}",
        arms={
            "plain": SWITCH,
            "z": Z_LOSS,
            "plain, unsteady": hot(SWITCH.entry),
            "z, unsteady": hot(Z_LOSS.entry),
        },
        parts=(
            less("logit_size", "z", "plain", "logits are smaller"),
            no_worse("z", "plain", "the loss is no higher"),
            less("logit_size", "z, unsteady", "plain, unsteady", "they are smaller at the high rate too"),
            less("loss_rise", "z, unsteady", "plain, unsteady", "where the training loss rises less above its least"),
        ),
    ),
    Claim(
        id="10",
        statement="Input jitter and dropout keep training steady, and cost quality.",
        source=ST_MOE,
        anchor="3 of 3 stable each; -1.777 and -1.822 against -1.755",
        tier="long",
        here="jitter of 0.01 at the router's input, dropout of 0.1 inside experts",
        arms={
            "plain": SWITCH,
            "jitter": JITTER,
            "dropout": arm(SWITCH.entry, expert_dropout=0.1),
            "plain, unsteady": arm(SWITCH.entry, lr=2.4e-2),
            "jitter, unsteady": arm(JITTER.entry, lr=2.4e-2),
            "dropout, unsteady": arm(SWITCH.entry, expert_dropout=0.1, lr=2.4e-2),
        },
        parts=(
            more("bits", "jitter", "plain", "jitter costs"),
            more("bits", "dropout", "plain", "dropout costs"),
            less("loss_rise", "jitter, unsteady", "plain, unsteady", "with jitter the loss rises less"),
            less("loss_rise", "dropout, unsteady", "plain, unsteady", "so it does with dropout"),
        ),
    ),
    Claim(
        id="33",
        statement="A z-loss of weight 0.004 is better than one of 0.001.",
        source="marin (https://github.com/marin-community/marin), issue 5600",
        anchor="1.02 and 1.06 times the speed",
        tier="quick",
        arms={"0.004": arm("switch:balance_weight=0.01,z_weight=0.004"), "0.001": Z_LOSS},
        parts=(less("bits", "0.004", "0.001", "the loss is lower"),),
    ),
    Claim(
        id="8",
        statement="Sampling experts in training is worse than taking the best; jitter of the input is as good.",
        source=f"{SWITCH_PAPER}, table 11",
        anchor="-1.570 sampled, -1.471 best, -1.468 with jitter",
        tier="quick",
        here="k = 2; sampled: drawn from the softmax without replacement; evaluation takes the best",
        arms={"best": SWITCH, "sampled": SAMPLED, "jitter": JITTER},
        parts=(
            more("bits", "sampled", "best", "sampling costs"),
            no_worse("jitter", "best", "jitter does not"),
        ),
    ),
    Claim(
        id="44",
        statement="Noise in the choice makes experts robust: a token that is denied its best expert loses less.",
        source="lecture notes on MoE, after Shazeer et al. 2017 (arXiv 1701.06538)",
        anchor="no figures",
        tier="quick",
        here="noisy top-k and sampled top-k against switch; each token's best expert is masked after training",
        arms={"best": SWITCH, "noisy": NOISY, "sampled": SAMPLED},
        parts=(
            less("without_best", "noisy", "best", "with learned Gaussian noise the loss rises less"),
            less("without_best", "sampled", "best", "so it does where experts are sampled"),
        ),
    ),
    Claim(
        id="45",
        statement="Attention experts are less stable than experts in the feed-forward layer.",
        source=f"{SWITCH_PAPER}, table 10; lecture notes on MoE",
        anchor="better in float32 (-1.524 against -1.548), diverged in bfloat16",
        tier="quick",
        here=f"16 experts of queries and outputs as well, in float32; {HOT}",
        arms={
            "feed-forward": hot(SWITCH.entry),
            "attention too": hot(SWITCH.entry, attention_experts=16),
        },
        parts=(
            more("loss_rise", "attention too", "feed-forward", "the training loss rises further above its least"),
            more("spikes", "attention too", "feed-forward", "the gradient spikes more often"),
        ),
    ),
)
