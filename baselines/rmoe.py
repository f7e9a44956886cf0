"""A recurrent router: a GRU, the same at all layers, runs over a token's layers and makes each one's scores.

RMoE, Qiu et al. 2024 (arXiv 2408.06793): p_l = W_l x, h_l = GRU(p_l, h_(l-1)), z_l = U_l h_l; softmax, top-k. W_l and
U_l belong to the layer, the GRU to all: that of the first site with this configuration.

h starts as 0 and is that of the last site before with a router of this kind and width, however many experts it has. The
GRU (Cho et al. 2014, arXiv 1406.1078) resets behind its product, as PyTorch's does, and has biases on the input's side
alone. In a model of one routed site there is no state, and there are no weights that would read it.

Shape suffixes: T tokens, D model width, E experts, R width of the state.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlroute.config import RouterConfig
from rlroute.gates import softmax_meaning, softmax_top_k
from rlroute.limits import NonNegative, Size
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision

STATE = "rmoe.state_TR"


class RMoERouter(Router):
    """Top-k by probability of a state that a GRU carries over the layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of RMoE."""

        width: Size = 32
        """R, the state's width (the paper's p)."""
        balance_weight: NonNegative = 0.01
        """Weight of the f.P loss; Switch's value (arXiv 2101.03961)."""
        normalize: bool = True
        """Renormalise the gates over the chosen where k > 1."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial weights U; of W D^-0.5, of the GRU R^-0.5."""

    learns_from = frozenset({"gate"})
    gate_meaning = softmax_meaning(normalize=True, k=2)
    common = ("cell",)
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.gate_meaning = softmax_meaning(config.normalize, shape.k)
        self.down = LinearScores(shape, "down", shape.d_model**-0.5, config.width)
        self.cell = Cell(shape, config.width)
        self.scores = LinearScores(shape, "scores", config.init_std, features=config.width)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Move the state on and take the k experts that are most probable by it."""
        before_TR = context.latest(lambda decision: decision.memo.get(STATE), self.config.width)
        state_TR = self.cell(self.down(x_TD), before_TR)
        decision = softmax_top_k(self.scores(state_TR), self.shape.k, context, normalize=self.config.normalize)
        return replace(decision, memo={STATE: state_TR})


class Cell(nn.Module):
    """A gated recurrent unit whose input is as wide as its state."""

    def __init__(self, shape: RouterShape, width: int) -> None:
        super().__init__()
        std = width**-0.5
        self.of_input = LinearScores(shape, "cell.input", std, 3 * width, features=width, bias=True)
        recurrent = shape.num_sites > 1
        self.of_state = LinearScores(shape, "cell.state", std, 3 * width, features=width) if recurrent else None

    def forward(self, p_TR: Tensor, before_TR: Tensor | None) -> Tensor:
        """Return the next state, shape (T, R); where there is none before, that from 0."""
        reset_TR, keep_TR, new_TR = self.of_input(p_TR).chunk(3, dim=1)
        if before_TR is None or self.of_state is None:
            first_TR: Tensor = (1 - keep_TR.sigmoid()) * new_TR.tanh()
            return first_TR
        reset_of_TR, keep_of_TR, new_of_TR = self.of_state(before_TR).chunk(3, dim=1)
        keep_TR = (keep_TR + keep_of_TR).sigmoid()
        new_TR = torch.tanh(new_TR + (reset_TR + reset_of_TR).sigmoid() * new_of_TR)
        next_TR: Tensor = (1 - keep_TR) * new_TR + keep_TR * before_TR
        return next_TR
