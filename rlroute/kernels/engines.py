"""One function through which every router's tokens reach their experts, and the choice of the engine behind it.

Expert e maps a row x to W_out,e a(W_in,e x), or with biases to W_out,e a(W_in,e x + b_in,e) + b_out,e. The activation a
is one of ``rlroute.kernels.activations``: SwiGLU by default, whose W_in holds gate rows above up rows.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows of an expert (2F where it is gated), E experts, R
routed pairs.
"""

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from rlroute.decision import RoutingDecision
from rlroute.errors import ConfigError, DecisionError
from rlroute.extras import missing
from rlroute.kernels import operator
from rlroute.kernels.activations import hidden_rows
from rlroute.kernels.form import PLAIN, Form
from rlroute.kernels.reference import reference_expert_mlp

ENGINES = ("cpu", "triton", "reference")
CHECK_VALUES = "RLROUTE_CHECK_VALUES"
"""The environment variable that, set to 1, has every call look at ids and gates too; on a GPU that waits for the
device.
"""


class ExpertWeights(NamedTuple):
    """The weights of E experts: ``in_EHD`` (gate rows above up rows for a gated activation) and ``out_EDF``."""

    in_EHD: Tensor
    out_EDF: Tensor


def choose_backend(requested: str, device: str) -> str:
    """Return the engine that ``requested`` means on ``device``: ``auto`` is ``cpu`` on the CPU and ``triton`` on CUDA.

    Raises:
        ConfigError: the engine does not exist, or does not run on that device.
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
    return requested


def resolve_backend(requested: str, device: str) -> str:
    """Return what :func:`choose_backend` does, for use in this process.

    Raises:
        ConfigError: the engine does not exist, or does not run on that device.
        MissingDependencyError: it is Triton's, which is not installed.
    """
    backend = choose_backend(requested, device)
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise missing("kernel 'triton'", "triton")
    return backend


def expert_mlp(
    x_TD: Tensor,
    decision: RoutingDecision,
    weights: ExpertWeights,
    backend: str = "cpu",
    activation: str = "swiglu",
    form: Form = PLAIN,
) -> Tensor:
    """Run the kept pairs of ``decision`` and sum each token's gated expert outputs.

    Differentiable in ``x_TD``, weights, biases and ``decision.gates_R``. The gradient of a gate is <dL/dout_t, y_r>,
    y_r being the pair's ungated expert output, whatever the gate's value (but where it weighs the input); pairs that
    were dropped or unused get 0. A router whose gates are constants asks for it with ``gates.requires_grad_()`` and
    finds it in ``decision.gates_R.grad``.

    Args:
        x_TD: hidden states of shape (T, D).
        decision: which pairs to run; gates in the dtype of ``x_TD`` or in float32.
        weights: tensors of the dtype and on the device of ``x_TD``.
        backend: a name from :func:`resolve_backend`.
        activation: one of ``rlroute.kernels.activations``.
        form: biases, where the gate is, and what is dropped.

    Returns:
        out_TD; tokens without pairs get zeros.

    Raises:
        ConfigError: there is no such activation.
        DecisionError: shapes, dtypes, devices or memory layouts disagree. Values are looked at where the environment
            variable ``RLROUTE_CHECK_VALUES`` is 1 (expert ids by the CPU engine always): ids out of range, gates that
            are not finite.
    """
    _check(x_TD, decision, weights, activation, form)
    if os.environ.get(CHECK_VALUES) == "1":
        check_values(decision)
    if backend == "reference":
        return reference_expert_mlp(x_TD, decision, *weights, activation, form)
    return operator.run(x_TD, decision, *weights, backend, activation, form)


def _check(x_TD: Tensor, decision: RoutingDecision, weights: ExpertWeights, activation: str, form: Form) -> None:
    """Compare what the host knows; no value is read, so no device is waited for."""
    there = weights._asdict() | form.biases
    experts, width, inner = weights.out_EDF.shape
    want = (experts, hidden_rows(activation, inner), width)
    if weights.in_EHD.shape != want:
        raise DecisionError(
            f"in_EHD is {tuple(weights.in_EHD.shape)}: "
            f"want {want} for {activation} and out_EDF {(experts, width, inner)}"
        )
    for name, rows in (("in_bias_EH", want[1]), ("out_bias_ED", width)):
        if name in there and there[name].shape != (experts, rows):
            raise DecisionError(f"{name} is {tuple(there[name].shape)}: want {(experts, rows)}")
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
    for name, tensor in there.items():
        if tensor.dtype != x_TD.dtype:
            raise DecisionError(f"{name} is {tensor.dtype}, x_TD {x_TD.dtype}: want one dtype")
    pairs_of = {name: getattr(decision, name) for name in ("token_ids_R", "expert_ids_R", "kept_R", "gates_R")}
    for name, tensor in (there | pairs_of).items():
        if tensor.device != x_TD.device:
            raise DecisionError(f"{name} is on {tensor.device}, x_TD on {x_TD.device}: want one device")
    for name, tensor in ({"x_TD": x_TD} | there).items():
        if not tensor.is_contiguous():
            raise DecisionError(
                f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}: want contiguous"
            )


def check_values(decision: RoutingDecision, finite: bool = True) -> None:
    """Look at every value that a kernel would trust.

    Args:
        decision: whose.
        finite: whether gates have to be; those of a model that has diverged are not.

    Raises:
        DecisionError: an id out of range, or a gate of a pair that runs that is not finite.
    """
    experts_R = decision.expert_ids_R
    for name, ids, most in (
        ("expert_ids_R", experts_R, decision.num_experts),
        ("token_ids_R", decision.token_ids_R, decision.num_tokens - 1),
    ):
        bad = ids[(ids < 0) | (ids > most)]
        if len(bad):
            raise DecisionError(f"{name} holds {int(bad[0])}: legal are 0 to {most}")
    if not finite:
        return
    runs_R = decision.kept_R & (experts_R < decision.num_experts)
    bad = torch.nonzero(runs_R & ~torch.isfinite(decision.gates_R))
    if len(bad):
        pair = int(bad[0])
        raise DecisionError(f"gates_R[{pair}] is {float(decision.gates_R[pair])}: want finite gates")
