"""All-to-all of rows with uneven splits: differentiable, and split into departure and landing so that work fits in
between.

Departure and landing are two autograd functions around one :class:`Flight`; in backward the gradient takes off where
the rows landed and lands where they took off. ``torch.distributed.nn`` is deprecated and functional collectives leak
what nobody waits for, so the flight is our own; it is a dozen lines over ``all_to_all_single``.

Shape suffixes: N rows sent, M rows received, D columns, P ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What this rank has exchanged.

    Attributes:
        bytes: of rows sent to other ranks, forward and backward.
        seconds: that this process spent in sending and waiting, waiting for slower ranks and for their counts included.
            With NCCL it does not wait, the device does: they say nothing there.
    """

    bytes: int = 0
    seconds: float = 0.0


class Flight:
    """Rows on their way to the ranks of a group.

    Args:
        group: the process group.
        sent, received: rows to and from each of its ranks, in their order.
        traffic: where it is booked.
    """

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int], traffic: Traffic) -> None:
        self.group, self.sent, self.received, self.traffic = group, sent, received, traffic
        self.rank = dist.get_rank(group)

    def depart(self, rows_ND: Tensor, back: bool) -> Tensor:
        """Send rows (or, ``back``, gradients of received ones) and return where the others' will be once :meth:`land`
        has returned.
        """
        start = time.perf_counter()
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        self.source = rows_ND.contiguous()  # kept alive until it has left
        self.target = rows_ND.new_empty(sum(received), *rows_ND.shape[1:])
        self.work = dist.all_to_all_single(self.target, self.source, received, sent, group=self.group, async_op=True)
        row_bytes = rows_ND.element_size() * rows_ND[:1].numel()
        self.traffic.bytes += (sum(sent) - sent[self.rank]) * row_bytes
        self.traffic.seconds += time.perf_counter() - start
        return self.target

    def land(self) -> Tensor:
        """Wait for the rows and return them."""
        start = time.perf_counter()
        self.work.wait()
        target = self.target
        del self.work, self.source, self.target
        self.traffic.seconds += time.perf_counter() - start
        return target


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.depart(rows_ND, back=False)

    @staticmethod
    def backward(ctx: Any, on_its_way: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.land()
        return rows_MD.view_as(rows_MD)

    @staticmethod
    def backward(ctx: Any, drows_MD: Tensor) -> tuple[Tensor, None]:
        ctx.flight.depart(drows_MD, back=True)
        return drows_MD, None  # of the right shape, and read by nobody: what counts is in the air


def depart(rows_ND: Tensor, flight: Flight) -> Tensor:
    """Send rows on their way; return a tensor that nothing but :func:`land` may read."""
    rows_MD: Tensor = _Depart.apply(rows_ND, flight)  # type: ignore[no-untyped-call]
    return rows_MD


def land(rows_MD: Tensor, flight: Flight) -> Tensor:
    """Return the received rows."""
    landed_MD: Tensor = _Land.apply(rows_MD, flight)  # type: ignore[no-untyped-call]
    return landed_MD
