"""Expert-parallel dispatch: pairs travel to the ranks that hold their experts, through the shared kernel there, and
back.

The decision is sorted by expert, and so by owner. First the counts are exchanged, then the rows; the owner runs them as
a decision over its own experts with gates of 1, and the rows come home, where they are gated and summed per token in a
fixed order. Dropped and unused pairs stay at home. Where gates weigh inputs, rows are gated before they leave; where
activations are dropped, each row's key travels with it.

With several chunks a part of the rows is computed while the next is in the air.

Shape suffixes: T tokens, D model width, E experts, F experts held by one rank, R pairs, N pairs that run (rows, sorted
by expert), M rows received, P ranks (expert shards), C chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlroute.kernels import PLAIN, ExpertWeights, Form, Plan, combine, expert_mlp, make_plan, sum_rows
from rlroute.parallel.exchange import Flight, Traffic, depart, land
from rlroute.routing import RoutingDecision


class ExpertParallel:
    """Runs decisions over all experts of a group of ranks, each of which holds one shard of them.

    Args:
        group: the process group of the shards.
        chunks: parts in which the rows travel; 0: in one, and nothing else is computed meanwhile.
    """

    def __init__(self, group: dist.ProcessGroup, chunks: int = 1) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)
        self.chunks, self.overlaps = max(1, chunks), chunks > 0
        self.traffic = Traffic()

    def start(
        self,
        x_TD: Tensor,
        decision: RoutingDecision,
        weights: ExpertWeights,
        backend: str,
        activation: str,
        form: Form = PLAIN,
    ) -> Callable[[], Tensor]:
        """Send the first rows on their way; return a function that does the rest and returns out_TD.

        Arguments and out_TD are those of :func:`rlroute.kernels.expert_mlp`; ``weights`` are of this rank's shard.
        """
        plan = make_plan(decision)
        sent_PCF = self._cut(plan)
        received_PCF = self._exchange_counts(sent_PCF)
        # Here the host waits for the device: it must know how many rows go to each rank and come from it.
        sent_PC, received_PC = sent_PCF.sum(2).tolist(), received_PCF.sum(2).tolist()
        flights = [
            (self._flight(sent_PC, received_PC, chunk), self._flight(received_PC, sent_PC, chunk))
            for chunk in range(self.chunks)
        ]
        rows_ND = _Gather.apply(x_TD, plan, sum(map(sum, sent_PC)), backend)  # type: ignore[no-untyped-call]
        gates_R, pairs_N = decision.gates_R, plan.pairs_R[: len(rows_ND)]
        if form.gate_at_input:
            rows_ND = (rows_ND * gates_R.index_select(0, pairs_N)[:, None]).to(rows_ND.dtype)
            gates_R = torch.ones_like(gates_R)
        going = self._by_chunk(rows_ND, sent_PC)
        first = depart(going[0], flights[0][0])
        forms = self._forms(form, pairs_N, sent_PC, received_PC)

        def finish() -> Tensor:
            airborne, home = first, []
            for chunk, (out, back) in enumerate(flights):
                rows_MD = land(airborne, out)
                if chunk + 1 < self.chunks:  # before this chunk's product, so that the next one travels meanwhile
                    airborne = depart(going[chunk + 1], flights[chunk + 1][0])
                y_MD = expert_mlp(rows_MD, _own(received_PCF[:, chunk]), weights, backend, activation, forms[chunk])
                home.append(depart(y_MD, back))
            landed = [land(y_ND, back) for y_ND, (_, back) in zip(home, flights, strict=True)]
            y_ND = self._in_order(
                landed, sent_PC
            )  # the plan's order, so that a token's sum has the same bits for all chunks
            return combine(y_ND, plan, gates_R, backend)

        if self.overlaps:
            return finish
        done_TD = finish()  # all of it now: what overlapping is worth is measured against this
        return lambda: done_TD

    def _cut(self, plan: Plan) -> Tensor:
        """Count the rows of each expert in each chunk of its owner's rows; int64 of shape (P, C, F)."""
        bounds_PF = plan.starts_E[:-1].view(self.ranks, -1)
        first_P1, last_P1 = bounds_PF[:, :1], plan.starts_E[1:].view(self.ranks, -1)[:, -1:]
        cuts_PC = first_P1 + (last_P1 - first_P1) * torch.arange(self.chunks + 1, device=first_P1.device) // self.chunks
        lo_PC1, hi_PC1 = cuts_PC[:, :-1, None], cuts_PC[:, 1:, None]
        starts_P1F, ends_P1F = bounds_PF[:, None], plan.starts_E[1:].view(self.ranks, 1, -1)
        return (torch.minimum(ends_P1F, hi_PC1) - torch.maximum(starts_P1F, lo_PC1)).clamp(min=0)

    def _exchange_counts(self, sent_PCF: Tensor) -> Tensor:
        start = time.perf_counter()
        received_PCF = torch.empty_like(sent_PCF)
        dist.all_to_all_single(received_PCF, sent_PCF, group=self.group)
        self.traffic.seconds += time.perf_counter() - start
        return received_PCF

    def _forms(self, form: Form, pairs_N: Tensor, sent_PC: list[list[int]], received_PC: list[list[int]]) -> list[Form]:
        """Return what the owners do with each chunk's rows."""
        if form.keys_R is None:
            return [replace(form, gate_at_input=False)] * self.chunks
        forms = []
        for chunk, keys_N in enumerate(self._by_chunk(form.keys_R[pairs_N], sent_PC)):
            flight = self._flight(sent_PC, received_PC, chunk)
            flight.depart(keys_N, back=False)
            forms.append(replace(form, gate_at_input=False, keys_R=flight.land()))
        return forms

    def _flight(self, sent_PC: list[list[int]], received_PC: list[list[int]], chunk: int) -> Flight:
        return Flight(self.group, [c[chunk] for c in sent_PC], [c[chunk] for c in received_PC], self.traffic)

    def _by_chunk(self, rows_ND: Tensor, sent_PC: list[list[int]]) -> list[Tensor]:
        """Return the rows of each chunk; rows are sorted by owner, and cut into chunks within each owner's."""
        if self.chunks == 1:
            return [rows_ND]
        pieces = torch.split(rows_ND, [size for sizes in sent_PC for size in sizes])
        return [torch.cat(pieces[chunk :: self.chunks]) for chunk in range(self.chunks)]

    def _in_order(self, chunks: list[Tensor], sent_PC: list[list[int]]) -> Tensor:
        """Undo :meth:`_by_chunk`."""
        if self.chunks == 1:
            return chunks[0]
        pieces_C = [torch.split(rows, [sizes[chunk] for sizes in sent_PC]) for chunk, rows in enumerate(chunks)]
        return torch.cat([pieces[rank] for rank in range(self.ranks) for pieces in pieces_C])


def _own(received_PF: Tensor) -> RoutingDecision:
    """Return received rows as a decision over the experts held here: one pair a row, gates of 1."""
    ranks, experts = received_PF.shape
    device = received_PF.device
    ids_M = torch.arange(experts, device=device).repeat(ranks).repeat_interleave(received_PF.reshape(-1))
    # Gates stay at home: they need not travel, and their gradients need only the rows that come home anyway.
    return RoutingDecision.token_choice(ids_M[:, None], torch.ones(len(ids_M), 1, device=device), experts)


class _Gather(torch.autograd.Function):
    """The rows that run, in the plan's order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: Plan, rows: int, backend: str) -> Tensor:
        ctx.plan, ctx.backend = plan, backend
        return x_TD.index_select(0, plan.tokens_R[:rows])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_ND: Tensor) -> tuple[Tensor | None, ...]:
        return sum_rows(drows_ND.contiguous(), ctx.plan, ctx.backend), None, None, None
