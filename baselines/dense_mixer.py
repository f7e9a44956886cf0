"""Top-k whose router hears from all experts: a sparse forward, and for the router the gradient as if every expert had
been chosen.

DenseMixer, Yao et al. 2025 (https://openreview.net/forum?id=4HGIIekCx3; https://github.com/yaof20/DenseMixer): the
gradient goes straight through the choice. With p the softmax over all experts and N the sum of the chosen p, the output
is sum_e g_e y_e, where g_e is p_e / N for the chosen and 0 for the others, and the gradient of these 0 is that of
p_e / N with N held, as in the released code. (Its comments have another form, in which N is differentiated through
them too.) An expert that was not chosen learns nothing, nor does the token's hidden state from it.

So in training every expert runs for every token, and only evaluation is sparse: what ran is counted. Demand, and so
what the balance loss reads, is of the chosen alone. A capacity, where there is one, goes to the chosen first.

Shape suffixes: T tokens, D model width, E experts (ranked, in E slots), R routed pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlroute.config import RouterConfig
from rlroute.gates import softmax_meaning, softmax_top_k
from rlroute.limits import NonNegative
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision


class DenseMixerRouter(Router):
    """Top-k by probability, with the gradient of the dense mixture."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of DenseMixer."""

        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss; the paper keeps that of the model which it trains on."""
        normalize: bool = True
        """Renormalise the gates over the chosen where k > 1."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = softmax_meaning(normalize=True, k=2)
    two_rules = True
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.gate_meaning = softmax_meaning(config.normalize, shape.k)
        self.scores = LinearScores(shape, "scores", config.init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k most probable experts; in training run the others too, for the gradients of their gates."""
        logits_TE, k, experts = self.scores(x_TD), self.shape.k, self.shape.num_experts
        if not context.explore:
            return softmax_top_k(logits_TE, k, context, normalize=self.config.normalize)
        probs_TE = logits_TE.softmax(1)
        ids_TE = context.choose(logits_TE, experts)
        chosen_TE = (torch.arange(experts, device=ids_TE.device) < k).expand_as(ids_TE)  # the first k of the ranking
        gates_TE = probs_TE.gather(1, ids_TE)
        if self.config.normalize and k > 1:
            total_T1 = gates_TE[:, :k].sum(1, keepdim=True)
            gates_TE = gates_TE / torch.where(chosen_TE, total_T1, total_T1.detach())
        gates_TE = gates_TE - gates_TE.detach().masked_fill(chosen_TE, 0.0)
        return RoutingDecision.token_choice(
            ids_TE, gates_TE, experts, logits_TE=logits_TE, probs_TE=probs_TE, chosen_R=chosen_TE.reshape(-1)
        )
