"""The shared kernel's peers, each behind one signature, for ``rlroute bench kernels``: adapters only, none of their code.

Every contender computes sum_j gate_tj * (silu(W_gate x_t) * (W_up x_t)) W_down for the same tokens, experts, gates and weights.

Shape suffixes: T tokens, D model width, F expert width, H = 2F, E experts, K experts per token, R pairs, C rows of the fullest expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from rlroute.kernels import ExpertWeights, expert_mlp, resolve_backend
from rlroute.routing import RoutingDecision


@dataclass(frozen=True, eq=False)
class Problem:
    """One expert-MLP problem; the tensors that have gradients are leaves."""

    x_TD: Tensor
    ids_TK: Tensor
    gates_TK: Tensor
    weights: ExpertWeights
    dense: tuple[Tensor, Tensor]
    """The weights (2kF, D) and (D, kF) of a dense MLP of the same FLOPs."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Everything that gets a gradient."""
        return (self.x_TD, self.gates_TK, *self.weights, *self.dense)


Call = Callable[[], Tensor]
Contender = Callable[[Problem], Call]
"""Prepares what is not part of the work (modules, say) and returns the work."""


def ours(problem: Problem) -> Tensor:
    """The shared kernel with the engine that ``auto`` means on the device."""
    decision = RoutingDecision.token_choice(problem.ids_TK, problem.gates_TK, len(problem.weights.in_EHD))
    backend = resolve_backend("auto", problem.x_TD.device.type)
    return expert_mlp(problem.x_TD, decision, problem.weights, backend)


def loop(problem: Problem) -> Tensor:
    """The reference loop over experts."""
    decision = RoutingDecision.token_choice(problem.ids_TK, problem.gates_TK, len(problem.weights.in_EHD))
    return expert_mlp(problem.x_TD, decision, problem.weights, "reference")


def dense(problem: Problem) -> Tensor:
    """A dense MLP of the same FLOPs: what the products alone cost."""
    return _swiglu(problem.x_TD @ problem.dense[0].t()) @ problem.dense[1].t()


def grouped_mm(problem: Problem) -> Tensor:
    """torch.nn.functional.grouped_mm between a sort and an index_add."""
    k = problem.ids_TK.shape[1]
    order_R = torch.argsort(problem.ids_TK.reshape(-1), stable=True)
    tokens_R = order_R // k
    counts_E = torch.bincount(problem.ids_TK.reshape(-1), minlength=len(problem.weights.in_EHD))
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden_RH = functional.grouped_mm(problem.x_TD[tokens_R], problem.weights.in_EHD.transpose(1, 2), offs=ends_E)
    y_RD = functional.grouped_mm(_swiglu(hidden_RH), problem.weights.out_EDF.transpose(1, 2), offs=ends_E)
    y_RD = y_RD * problem.gates_TK.reshape(-1)[order_R, None]
    return torch.zeros_like(problem.x_TD).index_add(0, tokens_R, y_RD)


def padded_bmm(problem: Problem) -> Tensor:
    """A batched product over experts, each padded to the fullest one."""
    (experts, _, width), k = problem.weights.in_EHD.shape, problem.ids_TK.shape[1]
    ids_R = problem.ids_TK.reshape(-1)
    order_R = torch.argsort(ids_R, stable=True)
    counts_E = torch.bincount(ids_R, minlength=experts)
    sorted_R = ids_R[order_R]
    slots_R = torch.arange(len(ids_R), device=ids_R.device) - (counts_E.cumsum(0) - counts_E)[sorted_R]
    capacity = int(counts_E.max())
    flat_R = sorted_R * capacity + slots_R
    buffer = problem.x_TD.new_zeros(experts * capacity, width).index_copy(0, flat_R, problem.x_TD[order_R // k])
    hidden_ECH = torch.bmm(buffer.view(experts, capacity, width), problem.weights.in_EHD.transpose(1, 2))
    y_ECD = torch.bmm(_swiglu(hidden_ECH), problem.weights.out_EDF.transpose(1, 2))
    y_RD = y_ECD.flatten(0, 1)[flat_R] * problem.gates_TK.reshape(-1)[order_R, None]
    return torch.zeros_like(problem.x_TD).index_add(0, order_R // k, y_RD)


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return functional.silu(gate) * up


def transformers_experts(implementation: str) -> Contender:
    """Hugging Face transformers' experts of the Qwen3-MoE model, with one of its implementations.

    Raises:
        ImportError: transformers is not installed, or too old to have them.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def prepare(problem: Problem) -> Call:
        experts, hidden, width = problem.weights.in_EHD.shape
        config = Qwen3MoeConfig(num_experts=experts, hidden_size=width, moe_intermediate_size=hidden // 2)
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        parameters = {"gate_up_proj": problem.weights.in_EHD, "down_proj": problem.weights.out_EDF}
        arguments = (problem.x_TD, problem.ids_TK, problem.gates_TK)
        return partial(torch.func.functional_call, module, parameters, arguments)

    return prepare


def contenders() -> dict[str, Contender]:
    """Return every contender that is installed, ours and the dense denominator first."""
    own = {"dense": dense, "rlroute": ours, "loop": loop, "grouped_mm": grouped_mm, "padded_bmm": padded_bmm}
    found: dict[str, Contender] = {name: partial(partial, work) for name, work in own.items()}
    for implementation in ("eager", "grouped_mm"):
        try:
            found[f"transformers_{implementation}"] = transformers_experts(implementation)
        except ImportError:  # a peer that is not there is left out, and the result's list of contenders says so
            break
    return found
