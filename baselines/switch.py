"""Softmax top-k with the f.P balance loss, router z-loss and input jitter.

Switch Transformer, Fedus et al. 2021 (arXiv 2101.03961); z-loss of ST-MoE, Zoph et al. 2022 (arXiv 2202.08906).

For k > 1 the gates are renormalised over the chosen, as in GShard (arXiv 2006.16668) and Mixtral.
"""

from dataclasses import dataclass

from torch import Tensor

from rlroute.balance import device_balance, load_balance, router_z
from rlroute.baselines._softmax_topk import softmax_top_k
from rlroute.config import RouterConfig
from rlroute.limits import BelowOne, NonNegative
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Term


class SwitchRouter(Router):
    """Top-k by probability, kept balanced by E * sum_i f_i P_i."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of the Switch router."""

        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss (the paper's alpha)."""
        device_balance_weight: NonNegative = 0.0
        """Weight of the same loss over the devices that hold the experts; 1 and without effect where one holds all."""
        z_weight: NonNegative = 0.0
        """Weight of the router z-loss; ST-MoE uses 1e-3."""
        jitter: BelowOne = 0.0
        """In training the router's own copy of its input is multiplied by U(1 - jitter, 1 + jitter); the paper uses 1e-2."""
        normalize: bool = True
        """Renormalise the gates over the chosen where k > 1."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts, renormalised over the chosen for k > 1"

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.scores = LinearScores(shape, "scores", config.init_std)

    @property
    def batch_dependent(self) -> bool:
        """The f.P losses mix the tokens of a micro-batch."""
        return self.config.balance_weight > 0 or self.config.device_balance_weight > 0

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Take the k most probable experts, of a jittered input in training."""
        if context.explore and self.config.jitter:
            uniform_TD = context.noise("switch.jitter", (x_TD.shape[1],)).to(x_TD.dtype)
            x_TD = x_TD * (1 + self.config.jitter * (2 * uniform_TD - 1))
        return softmax_top_k(self.scores, x_TD, self.shape.k, normalize=self.config.normalize)

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the balance losses and the z-loss."""
        assert decision.probs_TE is not None and decision.logits_TE is not None
        balance = feedback.share * load_balance(decision.probs_TE, decision, feedback.context)
        terms = {
            "balance": Term(balance, self.config.balance_weight),
            "z": Term(feedback.mean(router_z(decision.logits_TE)), self.config.z_weight),
        }
        if self.config.device_balance_weight:
            devices = feedback.share * device_balance(decision.probs_TE, decision, feedback.context)
            terms["device_balance"] = Term(devices, self.config.device_balance_weight)
        return terms
