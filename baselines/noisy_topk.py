"""Top-k of logits with learned Gaussian noise, kept balanced by importance and load losses.

Noisy top-k gating, Shazeer et al. 2017 (arXiv 1701.06538).

Both weight matrices start at zero as in the paper: at first the noise alone chooses, and loads start balanced.

The deviation of the noise is softplus(x W_noise) alone, as in the paper: the ``noise_epsilon`` of 1e-2 that
implementations add to it (tensor2tensor and what follows it) is not there.

For k = 1 the gate is the expert's share of the softmax over all: over the chosen one alone it would be a constant.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from rlroute.config import RouterConfig
from rlroute.errors import ConfigError
from rlroute.limits import NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.sampling import staying_probability
from rlroute.seeding import normal


class NoisyTopKRouter(Router):
    """H = x W_g + N(0, 1) * softplus(x W_noise); the gates are the softmax over the k largest H."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of noisy top-k gating."""

        importance_weight: NonNegative = 0.1
        """Weight of CV^2 of the summed gates."""
        load_weight: NonNegative = 0.1
        """Weight of CV^2 of the smooth load, of the noise that it draws itself."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.load_std is not None:
                raise ConfigError(f"noisy_topk.load_std = {self.load_std}: legal is none, it draws noise of its own")

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over the chosen noisy logits"
    stochastic = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 0.0)
        self.noise = LinearScores(shape, "noise", 0.0)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k largest noisy logits; the clean ones where not exploring."""
        clean_TE = self.scores(x_TD)
        noisy_TE, memo = clean_TE, {}
        if context.explore:
            std_TE = functional.softplus(self.noise(x_TD))
            noisy_TE = clean_TE + std_TE * normal(context.noise("noisy_topk", (self.shape.num_experts,))).to(x_TD.dtype)
            memo = {"noisy_TE": noisy_TE, "std_TE": std_TE}
        ids_TK = context.choose(noisy_TE, self.shape.k)
        gates_TK = noisy_TE.gather(1, ids_TK).softmax(1)
        if self.shape.k == 1:  # softmax over one is constant: the paper's form would teach k = 1 by the load loss alone
            gates_TK = noisy_TE.softmax(1).gather(1, ids_TK)
        return RoutingDecision.token_choice(
            ids_TK, gates_TK, self.shape.num_experts, logits_TE=clean_TE, probs_TE=clean_TE.softmax(1), memo=memo
        )

    def chosen_probability(self, decision: RoutingDecision) -> Tensor:
        """Return how probable each expert is by the noise that was drawn; shape (T, E)."""
        noisy_TE, std_TE, clean_TE = decision.memo["noisy_TE"], decision.memo["std_TE"], decision.logits_TE
        assert clean_TE is not None
        return staying_probability(clean_TE, noisy_TE, std_TE, self.shape.k)
