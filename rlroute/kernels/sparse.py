"""The Triton engine: launches the kernels of ``triton_kernels.py`` and gives them gradients.

Saved for backward are the input, the products that the activation reads, and the plan; the activation is computed
again. The expert MLP composes the kernels of :mod:`rlroute.kernels.primitives` with what is between them in their
epilogues. An output bias is a weight of one more column, which reads the gate: its gradient, and its part in the
gate's, are products like any other.

Shape suffixes: T tokens, D model width, F expert width, H hidden rows (2F where the activation is gated), E experts, R
routed pairs (rows, sorted by expert), N output columns, K the summed dimension.
"""

import os
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlroute.decision import RoutingDecision
from rlroute.errors import DecisionError
from rlroute.kernels import triton_kernels as kernels
from rlroute.kernels.activations import hidden_rows
from rlroute.kernels.form import Form
from rlroute.kernels.plan import Plan, make_plan
from rlroute.kernels.tiles import INTERPRETER, Tile, chip_of, pick_tiles

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
COMBINE_COLUMNS = 1024
HAVE_TMA = ("sm_90", "sm_100", INTERPRETER)
MOST_ROWS = 2**30
"""A ragged descriptor counts no further."""
INTERPRETED_PROGRAMS = 3
"""Of a kernel whose programs go from block to block: few, so that each has several."""


def forward(
    x_TD: Tensor, decision: RoutingDecision, in_EHD: Tensor, out_EDF: Tensor, activation: str, form: Form, save: bool
) -> tuple[Tensor, ...]:
    """Run the pairs of a decision.

    Returns:
        out_TD, as :func:`rlroute.kernels.expert_mlp` defines it, and what :func:`backward` wants: the products that the
        activation reads (of no columns unless ``save``), and the tensors of the plan.

    Raises:
        DecisionError: float64, which these kernels do not sum in.
    """
    if x_TD.dtype == torch.float64:
        raise DecisionError("x_TD is float64: the triton engine takes float32, bfloat16 and float16")
    plan, gates_R = make_plan(decision), decision.gates_R.contiguous()
    launch = _Launcher(plan, x_TD, *out_EDF.shape[1:])
    hidden_RH, act_RF = launch.expert_up(x_TD, in_EHD, gates_R, out_EDF.shape[2], activation, form, save)
    y_RD = launch.rows_times_weights(
        act_RF,
        out_EDF,
        gather=False,
        transposed=False,
        tile=launch.tiles.down,
        bias=form.out_bias_ED,
        gates_R=form.outer(gates_R),
    )
    order = (plan.pairs_R, plan.tokens_R, plan.starts_E, plan.rows_R, plan.first_T)
    return launch.sum_rows(y_RD), hidden_RH, *order


def backward(
    dout_TD: Tensor,
    x_TD: Tensor,
    in_EHD: Tensor,
    out_EDF: Tensor,
    gates_R: Tensor,
    activation: str,
    form: Form,
    kept: tuple[Tensor, ...],
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, of both projections, of the gates and of both biases; None for what is not wanted.

    Args:
        dout_TD: the gradient of what :func:`forward` returned.
        x_TD, in_EHD, out_EDF, gates_R, activation, form: what it was given.
        kept: what else it returned.
        wanted: of which of the six a gradient is asked for.
    """
    hidden_RH, pairs_R, tokens_R, starts_E, rows_R, first_T = kept
    plan = Plan(len(x_TD), len(in_EHD), pairs_R, tokens_R, starts_E, rows_R, first_T)
    dout_TD, gates_R = dout_TD.contiguous(), gates_R.contiguous()
    launch = _Launcher(plan, x_TD, *out_EDF.shape[1:])
    dhidden_RH, act_RF, dgates_R = launch.expert_down_backward(dout_TD, out_EDF, gates_R, hidden_RH, activation, form)
    # Each is made, and what only it needs given back, before the next.
    dw_out_EDF = launch.rows_times_rows(dout_TD, act_RF, gather_left=True) if wanted[2] else None
    del act_RF
    din_bias_EH = dout_bias_ED = None
    if wanted[4]:
        din_bias_EH = launch.rows_times_rows(dhidden_RH, x_TD.new_ones(len(x_TD), 1), gather_left=False)[:, :, 0]
    gates_R1 = gates_R[plan.pairs_R, None].to(x_TD.dtype)
    if form.gate_at_input:
        dhidden_RH *= gates_R1
    if wanted[5]:
        dout_bias_ED = launch.rows_times_rows(dout_TD, form.outer(gates_R1), gather_left=True)[:, :, 0]
    if form.out_bias_ED is not None and wanted[3] and not form.gate_at_input:
        bias_E1D = form.out_bias_ED[:, None]
        dgates_R = dgates_R + launch.rows_times_weights(
            dout_TD, bias_E1D, gather=True, transposed=False, tile=launch.tiles.rows, dtype=torch.float32
        ).squeeze(1)
    return (
        launch.sum_of_products(dhidden_RH, in_EHD) if wanted[0] else None,
        launch.rows_times_rows(dhidden_RH, x_TD, gather_left=False) if wanted[1] else None,
        dw_out_EDF,
        launch.to_pairs(dgates_R, gates_R) if wanted[3] else None,
        din_bias_EH,
        dout_bias_ED,
    )


def gather_linear(x_TK: Tensor, plan: Plan, weights_ENK: Tensor) -> Tensor:
    """Return y_RN as :func:`rlroute.kernels.gather_linear` defines it."""
    y_RN: Tensor = _GatherLinear.apply(x_TK, weights_ENK, plan)  # type: ignore[no-untyped-call]
    return y_RN


def linear_combine(y_RK: Tensor, plan: Plan, weights_ENK: Tensor, gates_R: Tensor) -> Tensor:
    """Return out_TN as :func:`rlroute.kernels.linear_combine` defines it."""
    gates_R = gates_R.contiguous()
    out_TN: Tensor = _LinearCombine.apply(y_RK, weights_ENK, gates_R, plan)  # type: ignore[no-untyped-call]
    return out_TN


def sum_rows(y_RD: Tensor, plan: Plan) -> Tensor:
    """Return out_TD as :func:`rlroute.kernels.sum_rows` defines it."""
    return _Launcher(plan, y_RD, y_RD.shape[1], y_RD.shape[1]).sum_rows(y_RD)


class _Launcher:
    """Launches kernels over one plan with the tiles pinned for it.

    Args:
        plan: the order of the rows.
        like: a tensor of the compute precision on the device.
        width: model width D, by which (with ``inner``) tiles are looked up.
        inner: expert width F.
    """

    def __init__(self, plan: Plan, like: Tensor, width: int, inner: int) -> None:
        self.plan = plan
        self.rows = len(plan.pairs_R)
        self.chip = INTERPRETER if INTERPRETING else chip_of(like.device)
        precision = "float32" if like.dtype == torch.float32 else "bfloat16"
        self.tiles = pick_tiles(self.chip, precision, self.rows / plan.num_experts, width, inner)
        self.upcast = INTERPRETING and like.dtype != torch.float32

    def new_rows(self, like: Tensor, columns: int) -> Tensor:
        """Return an output with one row per pair; the rows that do not run are never read."""
        return like.new_empty(self.rows, columns)

    def _describable(self, rows: Tensor) -> bool:
        """Say whether the accelerator can reach a tensor's rows."""
        aligned = rows.shape[-1] * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0
        return self.chip in HAVE_TMA and aligned and rows.numel() > 0

    def _weights(self, weights: Tensor, parts: int, transposed: bool, tile: Tile) -> Tensor | TensorDescriptor:
        """Return the descriptor of the matrices of all experts, ``parts`` each; where there is none, the weights."""
        if not self._describable(weights):
            return weights
        experts, rows, columns = weights.shape
        matrices = weights.view(experts * parts, rows // parts, columns)
        block = [1, tile.BK, tile.BN] if transposed else [parts, tile.BN, tile.BK]
        return TensorDescriptor.from_tensor(matrices, block)

    def _over_tiles(self, kernel: Any, tile: Tile, columns: int, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel in which a program makes one block of one tile."""
        experts_G, rows_G, _ = self.plan.tiles(tile.BM)
        if len(experts_G) == 0:
            return
        kernel[(len(experts_G) * triton.cdiv(columns, tile.BN),)](
            *arguments,
            **constants,
            tile_experts=experts_G,
            tile_rows=rows_G,
            tokens=self.plan.tokens_R,
            pairs=self.plan.pairs_R,
            starts=self.plan.starts_E,
            UPCAST=self.upcast,
            **tile._asdict(),
        )

    def rows_times_weights(
        self,
        inputs: Tensor,
        weights: Tensor,
        *,
        gather: bool,
        transposed: bool,
        tile: Tile,
        bias: Tensor | None = None,
        gates_R: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return each row, or its token's, times its expert's weights, and its gate times its expert's bias."""
        columns, summed = (weights.shape[2], weights.shape[1]) if transposed else (weights.shape[1], weights.shape[2])
        outputs = self.new_rows(inputs.new_empty(0, dtype=dtype), columns)
        experts_G, rows_G, count = self.plan.tiles(tile.BM)
        if len(experts_G) == 0:
            return outputs
        described = self._weights(weights, 1, transposed, tile)
        blocks = len(experts_G) * triton.cdiv(columns, tile.BN)
        source, target = inputs, outputs
        by_descriptor = not gather and described is not weights and self._sorted(inputs, outputs)
        if by_descriptor:
            source = TensorDescriptor.from_tensor(inputs, [tile.BM, tile.BK])
            target = create_ragged_descriptor(outputs, [tile.BM, tile.BN // 2])
        kernels.rows_times_weights[(min(blocks, self._programs()) if by_descriptor else blocks,)](
            source, described, target, bias, gates_R, self.plan.tokens_R, self.plan.pairs_R, self.plan.starts_E,
            experts_G, rows_G, count,
            N=columns, K=summed, GATHER=gather, TRANSPOSED=transposed, TMA=described is not weights,
            SORTED=by_descriptor, UPCAST=self.upcast, **tile._asdict(),
        )  # fmt: skip
        return outputs

    def _sorted(self, *rows: Tensor) -> bool:
        """Say whether rows in the order of experts go by descriptor."""
        return self.rows < MOST_ROWS and all(map(self._describable, rows))

    def _programs(self) -> int:
        """Return how many programs of a kernel that goes from block to block run at a time."""
        if INTERPRETING:
            return INTERPRETED_PROGRAMS
        return torch.cuda.get_device_properties(self.plan.starts_E.device).multi_processor_count

    def _between(self, activation: str, form: Form, inner: int) -> dict[str, Any]:
        """Return what the kernels on both sides of the activation are told of what is there."""
        kept_RF = form.kept(self.plan.pairs_R, inner)
        return {
            "bias": form.in_bias_EH,
            "kept": None if kept_RF is None else kept_RF.view(torch.uint8),
            "scale": form.scale,
            "F": inner,
            "ACTIVATION": activation,
            "PARTS": hidden_rows(activation, 1),
            "GATE_AT_INPUT": form.gate_at_input,
        }

    def expert_up(
        self, x_TD: Tensor, in_EHD: Tensor, gates_R: Tensor, inner: int, activation: str, form: Form, save: bool
    ) -> tuple[Tensor, Tensor]:
        hidden_RH = self.new_rows(x_TD, in_EHD.shape[1]) if save else x_TD.new_empty(0, in_EHD.shape[1])
        act_RF = self.new_rows(x_TD, inner)
        described = self._weights(in_EHD, in_EHD.shape[1] // inner, False, self.tiles.up)
        self._over_tiles(
            kernels.expert_up, self.tiles.up, inner, x_TD, described,
            gates=gates_R, hidden=hidden_RH, activated=act_RF, K=x_TD.shape[1], SAVE_HIDDEN=save,
            TMA=described is not in_EHD, **self._between(activation, form, inner),
        )  # fmt: skip
        return hidden_RH, act_RF

    def expert_down_backward(
        self,
        dout_TD: Tensor,
        out_EDF: Tensor,
        gates_R: Tensor,
        hidden_RH: Tensor,
        activation: str,
        form: Form,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inner, tile = out_EDF.shape[2], self.tiles.back.fitting(activation, form.plain)
        dhidden_RH, act_RF = torch.empty_like(hidden_RH), self.new_rows(dout_TD, inner)
        parts_CR = torch.empty(triton.cdiv(inner, tile.BN), self.rows, device=dout_TD.device)
        described = self._weights(out_EDF, 1, True, tile)
        self._over_tiles(
            kernels.expert_down_backward, tile, inner, dout_TD, described,
            gates=gates_R, hidden=hidden_RH, dhidden=dhidden_RH, activated=act_RF, dgate_parts=parts_CR,
            num_rows=self.rows, K=dout_TD.shape[1], TMA=described is not out_EDF,
            **self._between(activation, form, inner),
        )  # fmt: skip
        return dhidden_RH, act_RF, parts_CR.sum(0)

    def rows_times_rows(self, left: Tensor, right: Tensor, *, gather_left: bool) -> Tensor:
        tile, m, n = self.tiles.weights, left.shape[1], right.shape[1]
        outputs = left.new_empty(self.plan.num_experts, m, n)
        fullest_first_E = self.plan.starts_E.diff().argsort(descending=True, stable=True)
        by_descriptor = self._sorted(right if gather_left else left)
        if by_descriptor and gather_left:
            right = create_ragged_descriptor(right, [tile.BK, tile.BN])
        elif by_descriptor:
            left = create_ragged_descriptor(left, [tile.BK, tile.BM])
        kernels.rows_times_rows[(self.plan.num_experts * triton.cdiv(m, tile.BM) * triton.cdiv(n, tile.BN),)](
            left, right, outputs, self.plan.tokens_R, self.plan.starts_E, fullest_first_E,
            M=m, N=n, GATHER_LEFT=gather_left, SORTED=by_descriptor, UPCAST=self.upcast, **tile._asdict(),
        )  # fmt: skip
        return outputs

    def sum_rows(self, inputs: Tensor) -> Tensor:
        """Return each token's sum of its rows."""
        columns = inputs.shape[1]
        outputs = inputs.new_empty(self.plan.num_tokens, columns)
        block = min(triton.next_power_of_2(columns), COMBINE_COLUMNS)
        grid = (self.plan.num_tokens, triton.cdiv(columns, block))
        kernels.sum_rows_of_tokens[grid](self.plan.rows_R, self.plan.first_T, inputs, outputs, D=columns, BD=block)
        return outputs

    def sum_of_products(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return each token's sum of its rows times their experts' weights: the gradient of what was gathered."""
        tile = self.tiles.rows
        return self.sum_rows(self.rows_times_weights(rows, weights, gather=False, transposed=True, tile=tile))

    def to_pairs(self, values_R: Tensor, gates_R: Tensor) -> Tensor:
        """Return a value per row as a value per pair, as gates are; 0 for pairs that do not run."""
        runs_R = torch.arange(self.rows, device=values_R.device) < self.plan.starts_E[-1]
        pairs_R = torch.zeros_like(gates_R)
        pairs_R[self.plan.pairs_R] = torch.where(runs_R, values_R, 0.0).to(gates_R.dtype)
        return pairs_R


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weights_ENK: Tensor, plan: Plan) -> Tensor:
        launch = _Launcher(plan, x_TK, weights_ENK.shape[2], weights_ENK.shape[1])
        ctx.save_for_backward(x_TK, weights_ENK)
        ctx.launch = launch
        y_RN: Tensor = launch.rows_times_weights(
            x_TK, weights_ENK, gather=True, transposed=False, tile=launch.tiles.rows
        )
        return y_RN.masked_fill_(_idle(plan), 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weights_ENK = ctx.saved_tensors
        launch, dy_RN = ctx.launch, dy_RN.contiguous()
        return (
            launch.sum_of_products(dy_RN, weights_ENK) if ctx.needs_input_grad[0] else None,
            launch.rows_times_rows(dy_RN, x_TK, gather_left=False) if ctx.needs_input_grad[1] else None,
            None,
        )


class _LinearCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RK: Tensor, weights_ENK: Tensor, gates_R: Tensor, plan: Plan) -> Tensor:
        launch = _Launcher(plan, y_RK, weights_ENK.shape[1], weights_ENK.shape[2])
        ctx.save_for_backward(y_RK, weights_ENK, gates_R)
        ctx.launch = launch
        gated_RK = y_RK * gates_R[plan.pairs_R, None].to(y_RK.dtype)
        z_RN = launch.rows_times_weights(gated_RK, weights_ENK, gather=False, transposed=False, tile=launch.tiles.down)
        return launch.sum_rows(z_RN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TN: Tensor) -> tuple[Tensor | None, ...]:
        y_RK, weights_ENK, gates_R = ctx.saved_tensors
        launch, dout_TN = ctx.launch, dout_TN.contiguous()
        plan = launch.plan
        gates_R1 = gates_R[plan.pairs_R, None].to(y_RK.dtype)
        dy_RK = launch.rows_times_weights(dout_TN, weights_ENK, gather=True, transposed=True, tile=launch.tiles.back)
        dy_RK.masked_fill_(_idle(plan), 0.0)
        dgates_R = (dy_RK.float() * y_RK.float()).sum(1)
        return (
            dy_RK * gates_R1,
            launch.rows_times_rows(dout_TN, y_RK * gates_R1, gather_left=True) if ctx.needs_input_grad[1] else None,
            launch.to_pairs(dgates_R, gates_R) if ctx.needs_input_grad[2] else None,
            None,
        )


def _idle(plan: Plan) -> Tensor:
    """Say of each row, as a column, whether it does not run."""
    return (torch.arange(len(plan.pairs_R), device=plan.starts_E.device) >= plan.starts_E[-1])[:, None]
