"""Top-k whose router hears from all experts at the price of k: those that do not run answer with their mean outputs.

Default MoE, Panda et al. 2025 (arXiv 2504.12463). With p the softmax over all experts, the output is the sum of p_e y_e
over the chosen and of p_e d_e over the others, d_e being a moving average of the expert's outputs: the gradient of p
has a part from every expert. The gates are p, not normalised over the chosen.

The mean is that of all pairs that the expert ran in a step, exact whatever the micro-batches and workers; the average
starts at the first one. Ours are: its decay, of which the abstract says nothing, and that the means belong to the
model, in evaluation too. With `straight_through` they are there for the gradient alone, and evaluation is plain top-k.
A free expert's mean is 0, whatever it would give.

Outputs by pair are asked of the layer, and environments have none. They cost memory, one row a pair. The sum p_e d_e is
a product of E D multiplications a token, and is counted.

Shape suffixes: T tokens, D model width, E experts, K experts per token, R routed pairs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import softmax_meaning, softmax_top_k
from rlroute.limits import BelowOne, NonNegative
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums


class DefaultMoERouter(Router):
    """Top-k by probability, and the mean outputs of the experts that were not chosen."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of Default MoE."""

        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss (Switch's alpha)."""
        ema_decay: BelowOne = 0.95
        """Decay per step of the mean outputs, which start at the first step's."""
        straight_through: bool = False
        """Let the mean outputs have a gradient and no value."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate", "load"})
    gate_meaning = softmax_meaning(normalize=False, k=2)
    wishes = frozenset({"outputs"})
    config: Config
    default_ED: Tensor
    seen_E: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", config.init_std)
        self.register_buffer("default_ED", torch.zeros(shape.num_experts, shape.d_output))
        self.register_buffer("seen_E", torch.zeros(shape.num_experts, dtype=torch.bool))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k most probable experts, and fill in for the others."""
        decision = softmax_top_k(self.scores(x_TD), self.shape.k, context, normalize=False)
        straight = self.config.straight_through
        if straight and not context.explore:
            return decision
        assert decision.probs_TE is not None
        chosen_TK = decision.expert_ids_R.view(-1, self.shape.k)
        fill_TD = decision.probs_TE.scatter(1, chosen_TK, 0.0) @ self.default_ED
        return replace(decision, fill_TD=fill_TD - fill_TD.detach() if straight else fill_TD)

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return the sum of each expert's outputs over valid tokens."""
        assert decision.outputs_RD is not None
        mask_R1 = feedback.context.mask_T[decision.token_ids_R, None]
        outputs_RD = decision.outputs_RD.detach().to(self.default_ED.dtype) * mask_R1
        return {"outputs_ED": torch.zeros_like(self.default_ED).index_add(0, decision.expert_ids_R, outputs_RD)}

    def adapt(self, sums: Sums, progress: float) -> None:
        """Move the mean outputs of the experts that ran."""
        ran_E1 = sums["load_E"][:, None]
        mean_ED = sums["outputs_ED"] / ran_E1.clamp(min=1)
        moved_ED = torch.where(
            self.seen_E[:, None], torch.lerp(mean_ED, self.default_ED, self.config.ema_decay), mean_ED
        )
        self.default_ED.copy_(torch.where(ran_E1 > 0, moved_ED, self.default_ED))
        self.seen_E |= sums["load_E"] > 0
