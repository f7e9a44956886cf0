"""One function through which every router's tokens reach their experts, and the choice of the engine behind it.

The expert is SwiGLU (Shazeer 2020, arXiv 2002.05202): expert e maps a row x to W_down,e (silu(W_gate,e x) * (W_up,e x)).

Shape suffixes: T tokens, D model width, F expert width, H = 2F (gate rows, then up rows), E experts, R routed pairs.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlroute.errors import ConfigError, DecisionError, MissingDependencyError
from rlroute.kernels.cpu import sorted_expert_mlp
from rlroute.kernels.reference import reference_expert_mlp
from rlroute.routing import RoutingDecision

ENGINES = ("cpu", "triton", "reference")


class ExpertWeights(NamedTuple):
    """The weights of E experts: ``in_EHD`` holds each expert's gate rows above its up rows, ``out_EDF`` its down projection."""

    in_EHD: Tensor
    out_EDF: Tensor


def resolve_backend(requested: str, device: str) -> str:
    """Return the engine that ``requested`` means on ``device``: ``auto`` is ``cpu`` on the CPU and ``triton`` on CUDA.

    Raises:
        ConfigError: the engine does not exist, or does not run on that device.
        MissingDependencyError: it is Triton's, which is not installed.
    """
    if requested == "auto":
        requested = "cpu" if device == "cpu" else "triton"
    if requested not in ENGINES:
        raise ConfigError(f"kernel {requested!r}: legal are 'auto', {', '.join(map(repr, ENGINES))}")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if (requested == "cpu" and device != "cpu") or (requested == "triton" and device == "cpu" and not interpreting):
        raise ConfigError(
            f"kernel {requested!r} does not run on device {device!r}: legal there are 'auto', 'reference'"
        )
    if requested == "triton" and importlib.util.find_spec("triton") is None:
        raise MissingDependencyError("kernel 'triton' needs the package triton (extra 'triton')")
    return requested


def _engine(backend: str) -> Callable[[Tensor, RoutingDecision, Tensor, Tensor], Tensor]:
    if backend == "triton":
        from rlroute.kernels.sparse import triton_expert_mlp  # triton is not there on every machine

        return triton_expert_mlp
    return sorted_expert_mlp if backend == "cpu" else reference_expert_mlp


def expert_mlp(x_TD: Tensor, decision: RoutingDecision, weights: ExpertWeights, backend: str = "cpu") -> Tensor:
    """Run the kept pairs of ``decision`` and sum each token's gated expert outputs.

    Differentiable in ``x_TD``, both weight tensors and ``decision.gates_R``. The gradient of a gate is <dL/dout_t, y_r>, y_r being
    the pair's ungated expert output; pairs that were dropped or unused get 0.

    Args:
        x_TD: hidden states of shape (T, D).
        decision: which pairs to run; gates in the dtype of ``x_TD`` or in float32.
        weights: tensors of the dtype and on the device of ``x_TD``.
        backend: a name from :func:`resolve_backend`.

    Returns:
        out_TD; tokens without pairs get zeros.

    Raises:
        DecisionError: shapes, dtypes or devices disagree, or an expert id lies outside 0 to E.
    """
    _check(x_TD, decision, weights)
    return _engine(backend)(x_TD, decision, weights.in_EHD, weights.out_EDF)


def _check(x_TD: Tensor, decision: RoutingDecision, weights: ExpertWeights) -> None:
    """Compare what the host knows; no value is read, so no device is waited for."""
    experts, hidden, width = weights.in_EHD.shape
    if weights.out_EDF.shape != (experts, width, hidden // 2):
        raise DecisionError(
            f"in_EHD is {(experts, hidden, width)}, out_EDF {tuple(weights.out_EDF.shape)}: want (E, D, H / 2)"
        )
    if x_TD.shape != (decision.num_tokens, width):
        raise DecisionError(f"x_TD is {tuple(x_TD.shape)}: want {(decision.num_tokens, width)} by decision and weights")
    if decision.num_experts != experts:
        raise DecisionError(f"the decision is over {decision.num_experts} experts, the weights hold {experts}")
    pairs = len(decision.token_ids_R)
    for name in ("expert_ids_R", "kept_R", "gates_R"):
        if getattr(decision, name).shape != (pairs,):
            raise DecisionError(f"{name} is {tuple(getattr(decision, name).shape)}: want ({pairs},) as token_ids_R")
    if decision.gates_R.dtype not in (x_TD.dtype, torch.float32):
        raise DecisionError(f"gates_R is {decision.gates_R.dtype}: legal are float32 and {x_TD.dtype} as x_TD")
    for name, tensor in (("in_EHD", weights.in_EHD), ("out_EDF", weights.out_EDF)):
        if tensor.dtype != x_TD.dtype or tensor.device != x_TD.device:
            raise DecisionError(f"{name} is {tensor.dtype} on {tensor.device}, x_TD {x_TD.dtype} on {x_TD.device}")
