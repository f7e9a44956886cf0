"""The MoE layer: a router decides, the shared kernel runs the decision; and the dense MLP of equal active width.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows (2F where gated), E experts, R routed pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from rlroute import seeding
from rlroute.config import ModelConfig
from rlroute.decision import RoutingDecision
from rlroute.errors import ConfigError, DecisionError
from rlroute.faults import noted
from rlroute.kernels import PLAIN, ExpertWeights, Form, expert_mlp
from rlroute.kernels.activations import activate, hidden_rows
from rlroute.model import wishes
from rlroute.model.capacity import limit
from rlroute.model.checks import named
from rlroute.model.compiling import DenseParts
from rlroute.model.free import FreeExperts
from rlroute.model.linear import KeyedLinear
from rlroute.routing import Router, RoutingContext


def _start_here(
    x_TD: Tensor, decision: RoutingDecision, weights: ExpertWeights, backend: str, activation: str, form: Form = PLAIN
) -> Callable[[], Tensor]:
    return partial(expert_mlp, x_TD, decision, weights, backend, activation, form)


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
    start: Callable[[Tensor, RoutingDecision, ExpertWeights, str, str, Form], Callable[[], Tensor]] = _start_here

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
        self,
        config: ModelConfig,
        layer: int,
        seed: int,
        held: range,
        d_expert: int,
        key: str = "experts",
        *,
        width: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        width = width or config.d_model
        self.in_EHD = nn.Parameter(torch.empty(len(held), hidden_rows(config.activation, d_expert), width))
        self.out_EDF = nn.Parameter(torch.empty(len(held), width, d_expert))
        std_out = 1 / math.sqrt(2 * config.num_layers * d_expert)
        for row, expert in enumerate(range(0) if self.in_EHD.is_meta else held):  # there is nothing to fill
            seeding.init_normal(self.in_EHD[row], width**-0.5, seed, f"layers.{layer}.{key}.in", expert)
            seeding.init_normal(self.out_EDF[row], std_out, seed, f"layers.{layer}.{key}.out", expert)
        self.in_bias_EH = nn.Parameter(torch.zeros(self.in_EHD.shape[:2])) if bias else None
        self.out_bias_ED = nn.Parameter(torch.zeros(self.out_EDF.shape[:2])) if bias else None

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights in the compute precision."""
        return ExpertWeights(self.in_EHD.to(dtype), self.out_EDF.to(dtype))

    def form(self, dtype: torch.dtype) -> Form:
        """Return the biases in the compute precision."""
        if self.in_bias_EH is None or self.out_bias_ED is None:
            return PLAIN
        return Form(self.in_bias_EH.to(dtype), self.out_bias_ED.to(dtype))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's precision where it is on, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def apply_gate_form(decision: RoutingDecision, form: str) -> RoutingDecision:
    """Return the decision with its gates as published (``own``), or each with the same value and the gradient of the
    router's gate (``unit``): 1 over the pairs of its token.

    A gate of exactly 0 keeps its value: its pair runs for its gradient alone. A free expert's pair is one like any
    other. ``self_T`` and the gates of shared experts stay as they are, and so does ``fill_TD``.
    """
    if form == "own":
        return decision
    gates_R = decision.gates_R
    weighs_R = (gates_R.detach() != 0).to(gates_R.dtype)
    unit_R = weighs_R / decision.token_sum(weighs_R).clamp(min=1)[decision.token_ids_R]
    return replace(decision, gates_R=unit_R + gates_R - gates_R.detach())


def decide(router: Router, x_TD: Tensor, context: RoutingContext, config: ModelConfig) -> RoutingDecision:
    """Return a router's decision as it is run: gates in their final form, pairs over capacity dropped.

    Routers are in float32 at least unless the configuration says otherwise: one in bfloat16 diverges (Switch, arXiv
    2101.03961, table 2).
    """
    decision = ask(router, x_TD, context, config)
    with torch.autocast(x_TD.device.type, enabled=False):
        decision = limit(decision, config, context)  # an order by gate is that of the router's own
        return apply_gate_form(decision, config.gate_form)


def ask(router: Router, x_TD: Tensor, context: RoutingContext, config: ModelConfig) -> RoutingDecision:
    """Return a router's decision as it answers, over all experts of the site."""
    device, low = x_TD.device.type, config.router_dtype == "bfloat16"
    with torch.autocast(device, torch.bfloat16, enabled=low), named(router, context.site):
        with noted(router.config.name, context.site):
            decision = router(x_TD if x_TD.dtype == torch.float64 else x_TD.float(), context)
        _check_shared_gates(decision, router, config)
    return replace(widened(decision) if low else decision, num_free_experts=router.shape.num_free_experts)


def add_beside_pairs(out_TD: Tensor, decision: RoutingDecision, x_TD: Tensor) -> Tensor:
    """Return a layer's output with what the decision adds to its pairs: each token's own input, and its fill."""
    if decision.self_T is not None:
        out_TD = out_TD + decision.self_T[:, None].to(x_TD.dtype) * x_TD
    return out_TD if decision.fill_TD is None else out_TD + decision.fill_TD.to(x_TD.dtype)


def widened(decision: RoutingDecision) -> RoutingDecision:
    """Return a decision with what it says in bfloat16 in float32: the same values, which terms and kernels take."""
    names = [f.name for f in fields(decision)]
    narrow = {
        name: value for name in names if getattr(value := getattr(decision, name), "dtype", None) == torch.bfloat16
    }
    return replace(decision, **{name: value.float() for name, value in narrow.items()})


def _check_shared_gates(decision: RoutingDecision, router: Router, config: ModelConfig) -> None:
    gates_TS, shared = decision.shared_gates_TS, router.shape.num_shared_experts
    if gates_TS is None:
        return
    if gates_TS.shape[1] != shared:
        raise DecisionError(f"shared_gates_TS has {gates_TS.shape[1]} columns: the site has {shared} shared experts")
    if config.shared_gate != "none":
        raise DecisionError(
            f"shared_gates_TS with model.shared_gate = {config.shared_gate!r}: one of them weighs the shared experts, "
            "legal is 'none'"
        )


class MoELayer(DenseParts):
    """Route, run the experts that were chosen and those that all tokens share, and add what free experts give."""

    def __init__(
        self, config: ModelConfig, router: Router, layer: int, seed: int, backend: str, placement: Placement = HERE
    ) -> None:
        super().__init__()
        self.config, self.backend, self.start = config, backend, placement.start
        self.router = router
        held, width, latent = placement.held(config.num_experts), config.d_model, config.d_latent
        self.experts = Experts(
            config, layer, seed, held, config.d_expert, width=latent or width, bias=config.expert_bias
        )
        shared = config.num_shared_experts * config.d_expert
        self.shared = DenseMLP(config, layer, seed, shared, "shared") if shared else None
        self.free = FreeExperts(config, layer, seed) if config.num_free_experts else None

        def keyed(name: str, d_in: int, d_out: int) -> KeyedLinear:
            return KeyedLinear(d_in, d_out, d_in**-0.5, seed, f"layers.{layer}.{name}")

        self.shared_gate = None if config.shared_gate == "none" else keyed("shared_gate", width, 1)
        self.down = None if latent is None else keyed("latent.down", width, latent)
        self.up = None if latent is None else keyed("latent.up", latent, width)

    @property
    def sites(self) -> list["MoELayer"]:
        """Itself."""
        return [self]

    @property
    def pair_weights(self) -> list[nn.Parameter]:
        """The weights of the experts held here."""
        return list(self.experts.parameters())

    @property
    def pair_parameters(self) -> int:
        """The weights that a pair runs."""
        return sum(parameter[0].numel() for parameter in self.pair_weights)

    def pair_flops(self, seq_len: int) -> int:
        """Forward FLOPs of a pair; biases are added, which does not count."""
        return 2 * (self.experts.in_EHD[0].numel() + self.experts.out_EDF[0].numel())

    def forward(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingDecision]:
        """Return the gated sum of expert outputs, shape (T, D), and the decision that was run."""
        decision = decide(self.router, x_TD, context, self.config)
        return cast("tuple[Tensor, RoutingDecision]", self.forgetting(self.run, x_TD, decision, context))

    def run(self, x_TD: Tensor, decision: RoutingDecision, context: RoutingContext) -> tuple[Tensor, RoutingDecision]:
        """Return the gated sum of the outputs of the experts that a decision runs, and of those that all tokens share,
        shape (T, D), and the decision with what the router wishes for.
        """
        finish = self.start_experts(x_TD, decision, context)
        shared_TD = self.of_shared(x_TD, decision)
        out_TD, decision = finish()
        if "weights" in self.router.wishes:
            decision = replace(decision, gate_EFD=self.experts.in_EHD[:, : self.config.d_expert])
        return self.add_rest(out_TD, x_TD, decision, shared_TD), decision

    def of_shared(self, x_TD: Tensor, decision: RoutingDecision) -> Tensor | None:
        """Return what the experts that all tokens share give, shape (T, D); None where there are none."""
        gates = [] if decision.shared_gates_TS is None else [decision.shared_gates_TS]
        return None if self.shared is None else self.part(MoELayer.run_shared, x_TD, *gates)

    def add_rest(self, out_TD: Tensor, x_TD: Tensor, decision: RoutingDecision, shared_TD: Tensor | None) -> Tensor:
        """Return the gated sums of the pairs with all that is added to them, shape (T, D): what free and shared experts
        give, and what the decision adds.
        """
        if self.free is not None:
            with torch.autocast(x_TD.device.type, enabled=False):
                out_TD = out_TD + self.free(x_TD.to(compute_dtype(x_TD)), decision)
        out_TD = out_TD if shared_TD is None else out_TD + shared_TD
        return add_beside_pairs(out_TD, decision, x_TD.to(compute_dtype(x_TD)))

    def start_experts(
        self, x_TD: Tensor, decision: RoutingDecision, context: RoutingContext
    ) -> Callable[[], tuple[Tensor, RoutingDecision]]:
        """Begin to run the pairs of a decision; return a function that returns their gated sums, shape (T, D), and the
        decision with what the router wishes for.
        """
        dtype, device, by_pair = compute_dtype(x_TD), x_TD.device.type, "outputs" in self.router.wishes
        x_TD = x_TD if self.down is None else self.down(x_TD)
        with torch.autocast(device, enabled=False):
            weights, form = self.experts.weights(dtype), self._form(decision, context, dtype)
            run = (x_TD.to(dtype), decision.real())
            run = wishes.by_pair(*run) if by_pair else run
            finish = self.start(*run, weights, self.backend, self.config.activation, form)

        def finish_wide() -> tuple[Tensor, RoutingDecision]:
            with torch.autocast(device, enabled=False):
                out_TD, made = finish(), decision
                if by_pair:
                    out_TD, made = wishes.combine(out_TD, decision)
            return out_TD if self.up is None else self.up(out_TD), made

        return finish_wide

    def _form(self, decision: RoutingDecision, context: RoutingContext, dtype: torch.dtype) -> Form:
        """Return what the experts do in this forward."""
        at_input, dropout, keys_R = self.config.gate_at == "input", self.config.expert_dropout, None
        if dropout and context.training:
            rows = (context.sample_T, context.sequence_T, context.position_T)
            key = seeding.derive_key(context.seed, "expert dropout", context.site, context.step)
            keys_R = seeding.row_keys(key, (*(row_T[decision.token_ids_R] for row_T in rows), decision.expert_ids_R))
        return replace(self.experts.form(dtype), gate_at_input=at_input, dropout=dropout, keys_R=keys_R)

    def run_shared(self, x_TD: Tensor, gates_TS: Tensor | None = None) -> Tensor:
        """Return what the experts that every token runs give, shape (T, D)."""
        assert self.shared is not None
        if self.shared_gate is not None:
            gates_TS = self.shared_gate(x_TD).sigmoid()  # one for all of them together
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
