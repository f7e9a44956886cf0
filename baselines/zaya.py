"""An MLP router on a narrow state of the token that adds up over the layers, with a bias that only the choice sees.

ZAYA1, Zyphra 2025 (arXiv 2511.17127): s_l = W_l x + b_l + a_l * s_(l-1), a_l elementwise and at first 1; logits are a
three-layer GELU MLP of the normalised s_l, gates the probabilities of the chosen, not normalised. By its public code.

ZAYA1 routes to k = 1 of 16 experts and one class more, which skips the layer: `--model.zero-experts 1`. Without it the
classes are the experts. The state is that of the last site before with a router of this kind and width, however many
experts it has; a first site has none. The public code updates no bias: here it moves by the sign of the load's error,
as in loss-free balancing (Wang et al. 2024, arXiv 2408.15664), over all classes alike. It starts that of the skip at
-1, with which it is not chosen at first: `free_bias`.

Shape suffixes: T tokens, D model width, E experts, K experts per token, R width of the state.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute.config import RouterConfig
from rlroute.limits import Between, NonNegative, Size
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums

STATE = "zaya.state_TR"


class ZayaRouter(Router):
    """Top-k by biased probability of an MLP on a state that layers hand on."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of ZAYA1's router."""

        width: Size = 32
        """R, the state's width; ZAYA1: 256, an eighth of its model's."""
        update_rate: NonNegative = 0.001
        """How far a bias moves per step towards less loaded experts."""
        free_bias: Annotated[float, Between(-1, 1)] = 0.0
        """At which the biases of free experts start."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial weights of the MLP's last layer; of the others R^-0.5, of W D^-0.5."""

    learns_from = frozenset({"gate", "load"})
    gate_meaning = "softmax over all experts, unbiased"
    config: Config
    bias_E: Tensor

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.down = LinearScores(shape, "down", shape.d_model**-0.5, config.width, bias=True)
        self.carry_R = nn.Parameter(torch.ones(config.width)) if shape.site_index else None
        self.scores = StateScores(shape, config.width, config.init_std)
        bias_E = torch.zeros(shape.num_experts)
        bias_E[shape.num_real_experts :] = config.free_bias
        self.register_buffer("bias_E", bias_E)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Add to the state, select by biased probabilities, gate by unbiased ones."""
        before_TR = context.latest(lambda decision: decision.memo.get(STATE), self.config.width)
        state_TR = self.down(x_TD)
        if self.carry_R is not None and before_TR is not None:
            state_TR = state_TR + self.carry_R * before_TR
        logits_TE = self.scores(state_TR)
        probs_TE = logits_TE.softmax(1)
        ids_TK = context.choose(probs_TE + self.bias_E, self.shape.k)
        return RoutingDecision.token_choice(
            ids_TK,
            probs_TE.gather(1, ids_TK),
            self.shape.num_experts,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            memo={STATE: state_TR},
        )

    def adapt(self, sums: Sums, progress: float) -> None:
        """Raise the bias of experts that less than the mean chose, lower that of the others."""
        demand_E = sums["demand_E"].to(self.bias_E.dtype)
        self.bias_E += self.config.update_rate * torch.sign(demand_E.mean() - demand_E)


class StateScores(nn.Module):
    """Logits of a state: RMSNorm and three layers with GELU between them."""

    def __init__(self, shape: RouterShape, width: int, std: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.first, self.second = (
            LinearScores(shape, name, width**-0.5, width, features=width, bias=True) for name in ("first", "second")
        )
        self.last = LinearScores(shape, "last", std, features=width)

    def forward(self, state_TR: Tensor) -> Tensor:
        """Return logits of shape (T, E)."""
        hidden_TR = functional.gelu(self.first(self.norm(state_TR)))
        logits_TE: Tensor = self.last(functional.gelu(self.second(hidden_TR)))
        return logits_TE
