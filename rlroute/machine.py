"""What of the machine this process may use: the cores and the memory that its affinity and its container leave.

Containers limit by Linux's control groups, version 1 and 2 (the kernel's admin-guide/cgroup-v2.rst and
admin-guide/cgroup-v1/memory.rst, scheduler/sched-bwc.rst): the smallest limit of the process' own group and those above
it counts.
"""

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")
"""Where ``proc/self`` lies."""
Limit = Callable[[Path], float]


KEEPING = {-3: 2**30, -1: 2**31 - 1}
"""Of glibc's malloc: tensors below 1 GiB (M_MMAP_THRESHOLD) are no mappings of their own, and 2 GiB of what is freed
(M_TRIM_THRESHOLD) stay.
"""
_keeping = False


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees, where it is glibc: else each step's large tensors are mapped
    afresh, page by page. What is kept is given back by ``malloc_trim``.
    """
    global _keeping
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        _keeping = all(mallopt(name, value) for name, value in KEEPING.items())


def allocator() -> str:
    """Return how this process allocates memory, as records say it."""
    return "glibc, freed memory is kept" if _keeping else "default"


def cores(root: Path = ROOT) -> int:
    """Return the cores that this process may keep busy, at least 1; of a quota of 2.5 cores, 2."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    there = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([there, *_limits(root, "cpu", _quota_of_version_2, _quota_of_version_1)])))


def memory(root: Path = ROOT) -> int:
    """Return the bytes of memory that this process may use."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min([there, *_limits(root, "memory", _memory_of_version_2, _memory_of_version_1)]))


def _limits(root: Path, controller: str, version_2: Limit, version_1: Limit) -> Iterator[float]:
    """Yield the limits of the control groups of this process, from its own upwards.

    Args:
        root: where ``proc/self`` lies.
        controller: what is limited.
        version_2: returns the limit of a group, given its folder, under version 2.
        version_1: under version 1.
    """
    with suppress(OSError, ValueError):  # no Linux, or no control groups
        mounts = list(_mounts(root))
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for kind, names, above, mount in mounts:
                if kind == "cgroup2" and not controllers:
                    yield from _walk(mount, above, group, version_2)
                if kind == "cgroup" and controller in names and controller in controllers.split(","):
                    yield from _walk(mount, above, group, version_1)


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, Path]]:
    """Yield the file systems of control groups: kind, controllers, the group at its top, and where it is."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        here, _, there = line.partition(" - ")
        kind, _, options = there.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            above, mount = here.split(" ")[3:5]
            yield kind, options.replace(" ", ",").split(","), above, root / mount.lstrip("/")


def _walk(mount: Path, top: str, group: str, read: Limit) -> Iterator[float]:
    """Yield the limits that ``read`` finds from a group up to the one that is mounted."""
    inside = PurePosixPath(group)
    below = inside.relative_to(top) if inside.is_relative_to(top) and ".." not in inside.parts else PurePosixPath()
    for part in (below, *below.parents):
        with suppress(OSError):  # the topmost group has no limit
            yield read(mount / part)


def _quota_of_version_2(group: Path) -> float:
    quota, period = (group / "cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_of_version_1(group: Path) -> float:
    quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return math.inf if quota < 0 else quota / period


def _memory_of_version_2(group: Path) -> float:
    return float((group / "memory.max").read_text().replace("max", "inf"))


def _memory_of_version_1(group: Path) -> float:
    return int((group / "memory.limit_in_bytes").read_text())  # without a limit, of more than there can be
