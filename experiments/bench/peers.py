"""The shared kernel's peers, each behind one signature, for ``rlroute bench kernels``: adapters only, none of their
code.

Every contender computes sum_j gate_tj * (silu(W_gate x_t) * (W_up x_t)) W_down for the same tokens, experts, gates and
weights.

Shape suffixes: T tokens, D model width, F expert width, H = 2F, E experts, K experts per token, R pairs, C rows of the
fullest expert.
"""

import importlib.util
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


def liger(problem: Problem) -> Tensor:
    """Liger-Kernel's fused MoE (github.com/linkedin/Liger-Kernel): Triton, gate rows above up rows."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    ids_TK = problem.ids_TK.to(torch.int32)
    out_TD: Tensor = LigerFusedMoEFunction.apply(problem.x_TD, *problem.weights, ids_TK, problem.gates_TK)
    return out_TD


def scattermoe(problem: Problem) -> Tensor:
    """ScatterMoE (arXiv 2403.08245): Triton, rows scattered and gathered inside its products; weights stored (E, in,
    out).
    """
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    experts, k = len(problem.weights.in_EHD), problem.ids_TK.shape[1]
    order = flatten_sort_count(problem.ids_TK, num_experts=experts)
    in_EDH, out_EFD = (weights.transpose(1, 2) for weights in problem.weights)
    hidden_RH = parallel_linear(problem.x_TD, in_EDH, k, *order, grouped_out=True)
    out_TD: Tensor = parallel_linear(_swiglu(hidden_RH), out_EFD, 1, *order, gates=problem.gates_TK, grouped_in=True)
    return out_TD


def moe_ops(problem: Problem) -> Tensor:
    """moe-ops: Triton permute, grouped GEMM by TMA, unpermute."""
    from moe_ops import grouped_gemm, permute, unpermute

    (tokens, k), experts = problem.ids_TK.shape, len(problem.weights.in_EHD)
    x_RD, rows, offsets = permute(problem.x_TD, problem.ids_TK.to(torch.int32), E=experts)
    hidden_RH = grouped_gemm(x_RD, problem.weights.in_EHD, offsets)
    y_RD = grouped_gemm(_swiglu(hidden_RH), problem.weights.out_EDF, offsets)
    out_TD: Tensor = unpermute(y_RD, rows, problem.gates_TK.float(), tokens, k)
    return out_TD


def sonicmoe(problem: Problem) -> Tensor:
    """SonicMoE (arXiv 2512.14080): CuTe; weights given as (H, D, E) and (D, F, E), gate rows above up rows."""
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    (tokens, k), experts = problem.ids_TK.shape, len(problem.weights.in_EHD)
    device = problem.x_TD.device
    out_TD: Tensor = moe_general_routing_inputs(
        x=problem.x_TD,
        router_scores=problem.gates_TK.reshape(-1),
        token_indices=torch.arange(tokens, device=device, dtype=torch.int32).repeat_interleave(k),
        expert_indices=problem.ids_TK.reshape(-1).to(torch.int32),
        w1=problem.weights.in_EHD.permute(1, 2, 0),
        b1=None,
        w2=problem.weights.out_EDF.permute(1, 2, 0),
        b2=None,
        E=experts,
        stream_id=torch.cuda.current_stream(device).cuda_stream,
        activation_type=ActivationType.SWIGLU,
        concat_layout=True,
    )[0]
    return out_TD


EVERYWHERE = {"dense": dense, "rlroute": ours, "loop": loop, "grouped_mm": grouped_mm, "padded_bmm": padded_bmm}
ON_CUDA = {"liger_kernel": liger, "scattermoe": scattermoe, "moe_ops": moe_ops, "sonicmoe": sonicmoe}
"""By the name of the package that must be installed."""


def contenders(cuda: bool) -> dict[str, Contender]:
    """Return every contender that is installed, the dense denominator and ours first.

    A peer that is not there is left out; the result's list of contenders says so.
    """
    there = {name: work for name, work in ON_CUDA.items() if cuda and importlib.util.find_spec(name)}
    found: dict[str, Contender] = {name: partial(partial, work) for name, work in (EVERYWHERE | there).items()}
    for implementation in ("eager", "grouped_mm"):
        try:
            found[f"transformers_{implementation}"] = transformers_experts(implementation)
        except ImportError:
            break
    return found
