"""Softmax top-k whose experts are drawn in training, k from the softmax without replacement; evaluation takes the best.

The exploration that Switch Transformer, Fedus et al. 2021 (arXiv 2101.03961, table 11), tries beside taking the best,
and finds worse: an expert is sampled from the router's probabilities. Its gates and its balance loss are those of
`switch`, and teach the router as there: what is drawn is no action that a reward judges.

The paper has k = 1; for k > 1 the draw is by Gumbel top-k (Kool et al. 2019, arXiv 1903.06059).
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import softmax_meaning, softmax_top_k
from rlroute.limits import NonNegative, Positive
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.sampling import perturbed


class SampledTopKRouter(Router):
    """A draw from the softmax where exploring, else its best."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of sampled top-k."""

        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss (the paper's alpha)."""
        temperature: Positive = 1.0
        """Of the distribution that is drawn from; logits are divided by it. Gates are those at 1."""
        normalize: bool = True
        """Renormalise the gates over the chosen where k > 1."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = softmax_meaning(normalize=True, k=2)
    stochastic = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.gate_meaning = softmax_meaning(config.normalize, shape.k)
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Draw k experts where exploring, else take the k most probable."""
        logits_TE, drawn_TE = self.scores(x_TD), None
        if context.explore:
            uniform_TE = context.noise("sampled_topk", (self.shape.num_experts,))
            drawn_TE = perturbed(logits_TE / self.config.temperature, uniform_TE)
        normalize = self.config.normalize
        return softmax_top_k(logits_TE, self.shape.k, context, normalize=normalize, ranked_TE=drawn_TE)
