"""The MoE layer: a router decides, the shared kernel runs the decision; and the dense MLP of equal active width.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows (2F where gated), E experts, R routed pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from rlroute import seeding
from rlroute.config import ModelConfig
from rlroute.decision import RoutingDecision
from rlroute.errors import ConfigError, DecisionError
from rlroute.faults import noted
from rlroute.kernels import ExpertWeights, expert_mlp
from rlroute.kernels.activations import activate, hidden_rows
from rlroute.model.capacity import limit
from rlroute.model.checks import named
from rlroute.model.compiling import DenseParts
from rlroute.model.free import FreeExperts
from rlroute.routing import Router, RoutingContext


def _start_here(
    x_TD: Tensor, decision: RoutingDecision, weights: ExpertWeights, backend: str, activation: str
) -> Callable[[], Tensor]:
    return partial(expert_mlp, x_TD, decision, weights, backend, activation)


@dataclass(frozen=True)
class Placement:
    """Where the experts are, and how pairs reach them: the seam between the MoE layer and expert parallelism.

    Attributes:
        shards: the experts are cut into this many equal, consecutive shards.
        shard: the one that this process holds.
        start: begins to run a decision over *all* experts with the weights held here; the arguments are those of
            :func:`rlroute.kernels.expert_mlp`. Returns a function that returns its result, so that something else can
            be computed while rows travel.
    """

    shards: int = 1
    shard: int = 0
    start: Callable[[Tensor, RoutingDecision, ExpertWeights, str, str], Callable[[], Tensor]] = _start_here

    def held(self, num_experts: int) -> range:
        """Return the experts held here.

        Raises:
            ConfigError: they cannot be cut evenly.
        """
        if num_experts % self.shards:
            raise ConfigError(
                f"model.num_experts = {num_experts}: must be a multiple of the {self.shards} expert shards"
            )
        each = num_experts // self.shards
        return range(self.shard * each, (self.shard + 1) * each)


HERE = Placement()
"""All experts in this process."""


class Experts(nn.Module):
    """The experts held here. Each one's initial weights derive from its own key, whatever process holds it."""

    def __init__(
        self, config: ModelConfig, layer: int, seed: int, held: range, d_expert: int, key: str = "experts"
    ) -> None:
        super().__init__()
        self.in_EHD = nn.Parameter(torch.empty(len(held), hidden_rows(config.activation, d_expert), config.d_model))
        self.out_EDF = nn.Parameter(torch.empty(len(held), config.d_model, d_expert))
        std_out = 1 / math.sqrt(2 * config.num_layers * d_expert)
        for row, expert in enumerate(held):
            seeding.init_normal(self.in_EHD[row], config.d_model**-0.5, seed, f"layers.{layer}.{key}.in", expert)
            seeding.init_normal(self.out_EDF[row], std_out, seed, f"layers.{layer}.{key}.out", expert)

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights in the compute precision."""
        return ExpertWeights(self.in_EHD.to(dtype), self.out_EDF.to(dtype))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's precision where it is on, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def apply_gate_form(decision: RoutingDecision, form: str) -> RoutingDecision:
    """Return the decision with its gates as published (``own``), or each with the same value and the gradient of the
    router's gate (``unit``): 1 over the pairs of its token.

    A gate of exactly 0 keeps its value: its pair runs for its gradient alone. A free expert's pair is one like any
    other. ``self_T`` and the gates of shared
    experts stay as they are.
    """
    if form == "own":
        return decision
    gates_R = decision.gates_R
    weighs_R = (gates_R.detach() != 0).to(gates_R.dtype)
    unit_R = weighs_R / decision.token_sum(weighs_R).clamp(min=1)[decision.token_ids_R]
    return replace(decision, gates_R=unit_R + gates_R - gates_R.detach())


def decide(router: Router, x_TD: Tensor, context: RoutingContext, config: ModelConfig) -> RoutingDecision:
    """Return a router's decision as it is run: gates in their final form, pairs over capacity dropped.

    Routers are in float32 at least: one in bfloat16 diverges (Switch, arXiv 2101.03961, table 2).
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        with named(router, context.site), noted(router.config.name, context.site):
            decision = router(x_TD if x_TD.dtype == torch.float64 else x_TD.float(), context)
            gates_TS, shared = decision.shared_gates_TS, router.shape.num_shared_experts
            if gates_TS is not None and gates_TS.shape[1] != shared:
                raise DecisionError(
                    f"shared_gates_TS has {gates_TS.shape[1]} columns: the site has {shared} shared experts"
                )
        decision = replace(decision, num_free_experts=router.shape.num_free_experts)
        decision = limit(decision, config, context)  # an order by gate is that of the router's own
        return apply_gate_form(decision, config.gate_form)


def add_own_input(out_TD: Tensor, decision: RoutingDecision, x_TD: Tensor) -> Tensor:
    """Return a layer's output with each token's own input, weighted as the decision says."""
    return out_TD if decision.self_T is None else out_TD + decision.self_T[:, None].to(x_TD.dtype) * x_TD


class MoELayer(DenseParts):
    """Route, run the experts that were chosen and those that all tokens share, and add what free experts give."""

    def __init__(
        self, config: ModelConfig, router: Router, layer: int, seed: int, backend: str, placement: Placement = HERE
    ) -> None:
        super().__init__()
        self.config, self.backend, self.start = config, backend, placement.start
        self.router = router
        self.experts = Experts(config, layer, seed, placement.held(config.num_experts), config.d_expert)
        shared = config.num_shared_experts * config.d_expert
        self.shared = DenseMLP(config, layer, seed, shared, "shared") if shared else None
        self.free = FreeExperts(config, layer, seed) if config.num_free_experts else None

    @property
    def pair_parameters(self) -> int:
        """The weights that a pair runs."""
        return self.experts.in_EHD[0].numel() + self.experts.out_EDF[0].numel()

    def pair_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a pair."""
        return 2 * self.pair_parameters

    def forward(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingDecision]:
        """Return the gated sum of expert outputs, shape (T, D), and the decision that was run."""
        dtype = compute_dtype(x_TD)
        decision = decide(self.router, x_TD, context, self.config)
        with torch.autocast(x_TD.device.type, enabled=False):
            weights = self.experts.weights(dtype)
            finish = self.start(x_TD.to(dtype), decision.real(), weights, self.backend, self.config.activation)
        gates = [] if decision.shared_gates_TS is None else [decision.shared_gates_TS]
        shared_TD = None if self.shared is None else self.part(MoELayer.run_shared, x_TD, *gates)
        with torch.autocast(x_TD.device.type, enabled=False):
            out_TD = finish()
            out_TD = out_TD if self.free is None else out_TD + self.free(x_TD.to(dtype), decision)
        out_TD = out_TD if shared_TD is None else out_TD + shared_TD
        return add_own_input(out_TD, decision, x_TD.to(dtype)), decision

    def run_shared(self, x_TD: Tensor, gates_TS: Tensor | None = None) -> Tensor:
        """Return what the experts that every token runs give, shape (T, D)."""
        assert self.shared is not None
        shared_TD: Tensor = self.shared(x_TD, gates_TS)
        return shared_TD


class DenseMLP(nn.Module):
    """One MLP that every token runs."""

    def __init__(self, config: ModelConfig, layer: int, seed: int, width: int, key: str = "experts") -> None:
        super().__init__()
        self.activation = config.activation
        self.experts = Experts(config, layer, seed, range(1), width, key)

    def forward(self, x_TD: Tensor, gates_TS: Tensor | None = None) -> Tensor:
        """Return the MLP's output, shape (T, D).

        Args:
            x_TD: hidden states.
            gates_TS: weights of S equal parts of the hidden width, which are then S experts.
        """
        act_TF = activate(nn.functional.linear(x_TD, self.experts.in_EHD.squeeze(0)), self.activation)
        if gates_TS is not None:
            act_TSF = act_TF.view(*gates_TS.shape, -1)
            act_TF = (act_TSF * gates_TS[..., None].to(act_TF.dtype)).flatten(1)
        return nn.functional.linear(act_TF, self.experts.out_EDF.squeeze(0))
