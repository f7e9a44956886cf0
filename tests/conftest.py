"""How the tests run, and what several of them share."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined

from rlroute import loading, registry, sources
from rlroute.experiments.bench import victims
from rlroute.experiments.launch import progress
from rlroute.experiments.laws.steps import D, V, draw, make_context, make_feedback, make_shape, sums_of, terms_of
from rlroute.model.capacity import drop_over_capacity
from rlroute.routing import RoutingDecision
from rlroute.training import audit, regret

__all__ = ["D", "V", "draw", "make_context", "make_feedback", "make_shape", "sums_of", "terms_of"]  # also for tests
pytest.register_assert_rewrite("rlroute.experiments.laws.contract", "tests.commands", "tests.runs")

audit.PLACES = 4  # of 32: most of a tiny run's time would be its audit; test_audit.py has them all
regret.TOKENS = regret.SETS = 32  # likewise; test_regret.py has them all

HANG = 900
"""Seconds: the bound of every wait, which only a hang reaches, however slow the machine is."""
for bound in ("gcs_server_port_wait_time_s", "gcs_server_request_timeout_seconds", "worker_register_timeout_seconds"):
    os.environ.setdefault(f"RAY_{bound}", str(HANG))
progress.LOG_SECONDS = HANG  # no line stands between others because the machine is slow
Met = TypeVar("Met")


def until(condition: Callable[[], Met], every: float = 0.02) -> Met:
    """Wait until a condition is met, looking at it so often (in seconds), and return what it says."""
    deadline = time.monotonic() + HANG
    while not (met := condition()):
        assert time.monotonic() < deadline, f"not met in {HANG} s"
        time.sleep(every)
    return met


WHOLE_COMMANDS = frozenset(
    f"test_{name}.py"
    for name in [
        "audit",
        "blocks",
        "check",
        "checkpoint",
        "claims_run",
        "cli",
        "defects",
        "export",
        "extras",
        "faults",
        "finetune",
        "hash_file",
        "identity",
        "import",
        "include",
        "inspect",
        "judge",
        "ladder",
        "parity",
        "play",
        "presets",
        "published_tables",
        "python",
        "reading",
        "regret",
        "replay",
        "sink",
        "start",
        "third_party",
        "token_table",
        "tokenizer",
        "together",
        "training",
        "triton",
        "upcycling",
        "verify",
    ]
)
"""Files whose tests mostly run whole commands, train to the end, interpret kernels or build published models: too long
for `make fast`.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make fast`."""
    parser.addoption("--fast", action="store_true", help="one case of each quick test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put files whose tests start processes first, then those of whole commands: they take longest, and no process is
    left with one at the end. If that is asked for, keep what is fast alone.
    """
    costly = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: (item.path not in costly, item.path.name not in WHOLE_COMMANDS))
    if config.getoption("--fast"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        quick = [item for item in first.values() if item.path.name not in WHOLE_COMMANDS]
        kept = [item for item in quick if not item.get_closest_marker("processes")][::-1]
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


def capped(
    decision: RoutingDecision, capacity: int, order: Literal["position", "gate"] = "position"
) -> RoutingDecision:
    """Return the decision with at most so many pairs of each expert, all rows competing."""
    return drop_over_capacity(decision, capacity, decision.num_tokens, order=order)


def forget(folder: Path) -> None:
    """Know nothing of the code in a folder, as a new process does."""
    for name, module in list(sys.modules.items()):
        if str(folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]
    for path in [path for path in sources._first if folder in path.parents]:
        del sources._first[path]


@pytest.fixture
def routers(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Forget the router files that a test brings in."""
    monkeypatch.delenv(registry.INCLUDE, raising=False)
    registry._sources.cache_clear()
    yield
    monkeypatch.undo()
    os.environ.pop(registry.INCLUDE, None)
    registry._sources.cache_clear()
    for name in [name for name in sys.modules if name.startswith(f"{loading.PREFIX}.")]:
        del sys.modules[name]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """A folder for distributions that this process sees until the test ends."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    registry._sources.cache_clear()
    yield folder
    registry._sources.cache_clear()
    forget(tmp_path)


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Mark all processes that a test starts; return a function that lists those that are left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("RLROUTE_TEST_MARK", mark)
    return lambda: [pid for pid in victims.marked(mark) if pid != os.getpid()]
