"""How the tests run, and small factories shared by the tests of routers and of what routers are made of.

Shape suffixes: T tokens (rows of all routing samples), D model width, V vocabulary, M routing samples.
"""

import os
import subprocess
import time
from collections.abc import Callable, Generator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest import mock

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined

from rlroute import learning
from rlroute.balance import regularisers
from rlroute.model.capacity import drop_over_capacity
from rlroute.routing import Feedback, Router, RouterShape, RoutingContext, RoutingDecision, Sums, Term

pytest.register_assert_rewrite("tests.router_laws")

D, V = 6, 11
HANG = 900
"""Seconds: the bound of every wait, which only a hang reaches, however slow the machine is."""
for bound in ("gcs_server_port_wait_time_s", "gcs_server_request_timeout_seconds", "worker_register_timeout_seconds"):
    os.environ.setdefault(f"RAY_{bound}", str(HANG))
Met = TypeVar("Met")


def until(condition: Callable[[], Met], every: float = 0.02) -> Met:
    """Wait until a condition is met, looking at it so often (in seconds), and return what it says."""
    deadline = time.monotonic() + HANG
    while not (met := condition()):
        assert time.monotonic() < deadline, f"not met in {HANG} s"
        time.sleep(every)
    return met


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make fast`."""
    parser.addoption("--fast", action="store_true", help="one case of each test that starts no process")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put files whose tests start processes first: they take longest. If that is asked for, keep what is fast alone."""
    costly = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in costly)
    if config.getoption("--fast"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        kept = [item for item in first.values() if not item.get_closest_marker("processes")][::-1]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Let no test start a process that is not marked so, which keeps `make fast` fast; git's, which records ask, are
    let be.
    """
    if item.get_closest_marker("processes"):
        return (yield)
    start = subprocess.Popen.__init__

    def of_python(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        program = args if isinstance(args, str | os.PathLike) else args[0]
        assert not Path(program).name.startswith("python"), f"mark {item.nodeid} with pytest.mark.processes"
        start(self, args, *rest, **options)

    def of_multiprocessing(self: Any) -> None:
        raise AssertionError(f"mark {item.nodeid} with pytest.mark.processes")

    with (
        mock.patch.object(subprocess.Popen, "__init__", of_python),
        mock.patch.object(BaseProcess, "start", of_multiprocessing),
    ):
        return (yield)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return fixed standard normal draws in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_shape(experts: int = 8, k: int = 2, **fields: Any) -> RouterShape:
    """Return a layer of 6 features and 11 tokens whose counts are known and skewed."""
    counts_V = torch.arange(1, V + 1) ** 2
    defaults: dict[str, Any] = {"d_model": D, "site": 1, "vocab_size": V, "seed": 0, "token_counts_V": counts_V}
    return RouterShape(num_experts=experts, k=k, **(defaults | fields))


def make_context(tokens: int = 12, length: int = 4, samples: int = 1, **fields: Any) -> RoutingContext:
    """Return the context of ``tokens`` tokens in sequences of ``length``, in training, repeated for each routing
    sample.
    """
    rows_T = torch.arange(tokens).repeat(samples)
    defaults: dict[str, Any] = {
        "seed": 0,
        "site": 1,
        "step": 0,
        "token_ids_T": 7 * rows_T % V,
        "position_T": rows_T % length,
        "sequence_T": 100 + rows_T // length,
        "mask_T": torch.ones_like(rows_T, dtype=torch.bool),
        "explore": True,
        "num_samples": samples,
    }
    return RoutingContext(**(defaults | fields))


def make_feedback(context: RoutingContext, loss_T: Tensor | None = None, num_valid: int | None = None) -> Feedback:
    """Return feedback on all rows of a context; losses are 2 nats and the step is this micro-batch unless said
    otherwise.
    """
    rows, samples = len(context.mask_T), context.num_samples
    loss_T = torch.full((rows,), 2.0, dtype=torch.float64) if loss_T is None else loss_T
    valid = int(context.mask_T.sum()) // samples if num_valid is None else num_valid
    return Feedback(context=context, loss_MT=loss_T.view(samples, -1), num_valid=valid)


def capped(
    decision: RoutingDecision, capacity: int, order: Literal["position", "gate"] = "position"
) -> RoutingDecision:
    """Return the decision with at most so many pairs of each expert, all rows competing."""
    return drop_over_capacity(decision, capacity, decision.num_tokens, order=order)


def terms_of(router: Router, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
    """Return the terms of a router's configuration, and its own."""
    return regularisers(router.terms, decision, feedback) | router.objective(decision, feedback)


def sums_of(router: Router, decision: RoutingDecision, feedback: Feedback) -> Sums:
    """Return a micro-batch's sums, as a step of one micro-batch and one site hands them to ``adapt``."""
    sums = learning.count(decision, feedback) | router.observe(decision, feedback)
    return Sums(sums, [sums])
