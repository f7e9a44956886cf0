"""Where something was computed, as far as it can change the result."""

import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch

from rlroute import __version__
from rlroute.kernels.tiles import table_hash
from rlroute.schema import Environment


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
        kernel_backend=backend,
        kernel_tiles=table_hash() if backend == "triton" else None,
    )


@cache
def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of the code, and whether files differ from it."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ("git", "--no-optional-locks", "-C", str(folder), *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):  # an installed wheel has no repository
        return None, None


@cache
def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
