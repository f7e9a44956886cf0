"""Where something was computed, and what it was made from, as far as they can change the result."""

import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlroute import __version__
from rlroute.commit import commit_of
from rlroute.config import RunConfig
from rlroute.kernels.tiles import table_hash
from rlroute.machine import allocator
from rlroute.registry import router_code
from rlroute.schema import Environment, MadeFrom
from rlroute.sources import core_sha256


def environment(device: str, backend: str, threads: int) -> Environment:
    """Describe this process.

    Args:
        device: ``cpu`` or ``cuda``: where it computes.
        backend: the expert engine.
        threads: CPU threads that it computes with.
    """
    commit, dirty = _commit()
    return Environment(
        rlroute=__version__,
        commit=commit,
        dirty=dirty,
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        platform=platform.platform(),
        device=device,
        device_name=torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=threads,
        allocator=allocator(),
        kernel_backend=backend,
        kernel_tiles=table_hash() if backend == "triton" else None,
    )


def made_from(config: RunConfig, data: Mapping[str, Any]) -> MadeFrom:
    """Return what a run is made from besides its configuration: two runs of one id are one run only if this is equal.

    Args:
        config: the run's.
        data: the provenance of its corpus (:class:`rlroute.training.data.Corpus`).

    Raises:
        ConfigError, StoreError: a router, or a file that it reads, cannot be read; or a file of code was changed since
            this process loaded it.
    """
    return {
        "core": core_sha256(),
        "routers": {name: router_code(name) for name in config.router_names},
        "reads": {
            f"{at}.{name}": sha for at, router in config.by_place.items() for name, sha in router.reads().items()
        },
        "data": {name: data[name] for name in ("sha256", "train_sha256", "valid_sha256")},
        "tokenizer": data["tokenizer_sha256"],
    }


def utc_now() -> str:
    """Return the time in UTC, to the second, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of rlroute, which is loaded once, and whether the code here differs from it."""
    return commit_of()


@cache
def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
