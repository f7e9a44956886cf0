"""Claims about rules: what is fixed against what is learned, scores and gates, thresholds, gradients for the router."""

from rlroute.experiments.claims.arms import BIAS, DENSE, FROZEN, HASH, HASH_64, SWITCH, SWITCH_64
from rlroute.experiments.claims.claim import Claim, Part, alike, arm, less, more

HASH_PAPER = "Hash layers, Roller et al. 2021 (arXiv 2106.04426)"
MARIN = "marin (https://github.com/marin-community/marin)"
LONG_ARMS = {"hash": arm("hash"), "switch": arm("switch:balance_weight=0.01"), "gshard": arm("gshard")}

CLAIMS = (
    Claim(
        id="11",
        statement="With many experts hashing token ids is as good as Switch, or better.",
        source=HASH_PAPER,
        anchor="perplexity 23.16 against 23.65 (64 experts), 22.89 against 23.52 (128)",
        tier="quick",
        here="64 experts, k = 1",
        arms={"hash": HASH_64, "switch": SWITCH_64},
        parts=(less("bits", "hash", "switch", "the loss is lower"),),
    ),
    Claim(
        id="12",
        statement="A random and a balanced table of hashes are equal; hashing by position fails.",
        source=f"{HASH_PAPER}, table 3",
        anchor="perplexity 23.22 random, 23.16 balanced, 25.07 position, 24.90 dense",
        tier="quick",
        here="16 experts, k = 2",
        arms={
            "random": HASH,
            "balanced": arm("hash:table=balanced", lr=2e-2),
            "position": arm("hash:table=position", lr=2e-2),
            "dense": DENSE,
        },
        parts=(
            alike("random", "balanced", "random and balanced are equivalent"),
            more("bits", "position", "random", "position is worse than random"),
            more("bits", "position", "dense", "and worse than the dense model"),
        ),
    ),
    Claim(
        id="13",
        statement="In a modern setting learned routing beats hashing.",
        source="DeepSeekMoE, Dai et al. 2024 (arXiv 2401.06066), table 1",
        anchor="Pile loss 1.932 hash, 1.881 Switch, 1.867 GShard (2B, 100B tokens)",
        tier="long",
        here="2 layers, 32 experts, k = 2, 4,800 steps of 2,048 tokens",
        arms=LONG_ARMS,
        parts=(
            less("bits", "switch", "hash", "switch is better than hash"),
            less("bits", "gshard", "hash", "gshard is better than hash"),
        ),
        seeds=(0, 1, 2),
    ),
    Claim(
        id="29",
        statement="Routers that see the content are equivalent within a margin; those that learn nothing are worse.",
        source="arXiv 2604.14419 (2026)",
        anchor="five cosine routers 33.93 to 34.72 perplexity, within 1; hash and fixed random 1.1 to 2.2 worse",
        tier="quick",
        here="softmax, sigmoid and a normalised input, f.P loss of weight 0.01; margin 0.02 bits per byte",
        arms={
            "softmax": SWITCH,
            "sigmoid": arm("topk:score=sigmoid,balance_weight=0.01"),
            "normalised": arm("topk:norm_input=true,balance_weight=0.01"),
            "frozen": FROZEN,
            "hash": HASH,
        },
        parts=(
            alike("sigmoid", "softmax", "sigmoid is equivalent to softmax"),
            alike("normalised", "softmax", "so is a normalised input"),
            more("bits", "frozen", "softmax", "a frozen random router is worse"),
            more("bits", "hash", "softmax", "so is hashing"),
        ),
    ),
    Claim(
        id="30",
        statement="A random linear router that is never trained costs quality.",
        source=f"{MARIN}, issue 5502",
        anchor="+0.091 nats, 0.655 times the speed",
        tier="quick",
        here="16 experts, k = 2; its gates are 1/k",
        arms={"frozen": FROZEN, "switch": SWITCH},
        parts=(more("bits", "frozen", "switch", "the loss is higher than with switch"),),
    ),
    Claim(
        id="31",
        statement="The square root of softplus is as good a score as the sigmoid.",
        source=f"{MARIN}, issue 5486",
        anchor="+0.005 and +0.003",
        tier="quick",
        here="both balanced by a bias at rate 0.01",
        arms={"sqrt softplus": arm("topk:score=sqrt_softplus,bias_rate=0.01"), "sigmoid": BIAS},
        parts=(alike("sqrt softplus", "sigmoid", "they are equivalent"),),
    ),
    Claim(
        id="32",
        statement="Sigmoid gates that add up to 2 or 3 are best, at k = 4.",
        source=f"{MARIN}, issue 5797",
        anchor="-0.0051 at 2.5, +0.0018 at 1",
        tier="long",
        here="32 experts, k = 4, balanced by a bias",
        arms={
            "1": arm("topk:score=sigmoid,bias_rate=0.001", k=4),
            "2.5": arm("topk:score=sigmoid,bias_rate=0.001,route_scale=2.5", k=4),
        },
        parts=(less("bits", "2.5", "1", "a sum of 2.5 is better than one of 1"),),
    ),
    Claim(
        id="35",
        statement="Expert Threshold beats token choice.",
        source="arXiv 2603.11535 (2026)",
        anchor="-0.067 nats, 1.6 times fewer tokens (2.4B)",
        tier="quick",
        here="16 experts, 2 a token on average",
        arms={"threshold": arm("threshold"), "switch": SWITCH},
        parts=(less("bits", "threshold", "switch", "the loss is lower"),),
    ),
    Claim(
        id="36",
        statement="A gradient from all experts saves tokens.",
        source="Default MoE, Panda et al. 2025 (arXiv 2504.12463)",
        anchor="9 % fewer tokens to a perplexity",
        tier="quick",
        here="against the same top-k, whose gates are not normalised either",
        arms={"default": arm("default_moe"), "top-k": arm("switch:balance_weight=0.01,normalize=false")},
        parts=(
            less("bits", "default", "top-k", "the loss is lower"),
            Part("it takes fewer tokens to the other's", "tokens_to_reach", {"default": 1.0, "top-k": -1.0}, below=1.0),
        ),
    ),
    Claim(
        id="37",
        statement="A router that is held orthogonal converges faster than one with a balance loss.",
        source="SimBal, 2025 (arXiv 2506.14038)",
        anchor="36 % faster",
        tier="quick",
        here="orthogonal start and weight 0.1, without an f.P loss",
        arms={"simbal": arm("switch:balance_weight=0,simbal_weight=0.1,orthogonal=true"), "switch": SWITCH},
        parts=(
            less("bits", "simbal", "switch", "the loss is lower"),
            Part("it takes fewer tokens to the other's", "tokens_to_reach", {"simbal": 1.0, "switch": -1.0}, below=1.0),
        ),
    ),
    Claim(
        id="38",
        statement="Routes distilled from a trained model and frozen beat routes that are learned from scratch.",
        source="Grouter, 2026 (arXiv 2603.06626)",
        anchor="4.28 times the use of data",
        tier="gpu",
        lacks="a router that is distilled from another run and decides in evaluation too, as replay does not",
    ),
)
