"""How many cores this process may use: what its affinity and its container's CPU quota leave of the machine's."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def cores(root: Path = Path("/")) -> int:
    """Return the cores that this process may keep busy, at least 1; of a quota of 2.5 cores, 2.

    Quotas are those of Linux's control groups, version 1 and 2 (the kernel's admin-guide/cgroup-v2.rst and
    scheduler/sched-bwc.rst): the smallest of the process' own group and those above it.

    Args:
        root: where ``proc/self`` lies.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    there = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([there, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in cores, of the control groups of this process, from its own upwards."""
    with suppress(OSError, ValueError):  # no Linux, or no control groups
        mounts = list(_mounts(root))
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for kind, names, above, mount in mounts:
                if kind == "cgroup2" and not controllers:
                    yield from _walk(mount, above, group, _of_version_2)
                if kind == "cgroup" and "cpu" in names and "cpu" in controllers.split(","):
                    yield from _walk(mount, above, group, _of_version_1)


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, Path]]:
    """Yield the file systems of control groups: kind, controllers, the group at its top, and where it is."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        here, _, there = line.partition(" - ")
        kind, _, options = there.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            above, mount = here.split(" ")[3:5]
            yield kind, options.replace(" ", ",").split(","), above, root / mount.lstrip("/")


def _walk(mount: Path, top: str, group: str, read: Callable[[Path], tuple[str, str]]) -> Iterator[float]:
    """Yield the quotas that ``read`` finds from a group up to the one that is mounted."""
    inside = PurePosixPath(group)
    below = inside.relative_to(top) if inside.is_relative_to(top) and ".." not in inside.parts else PurePosixPath()
    for part in (below, *below.parents):
        with suppress(OSError):  # the topmost group has no quota
            quota, period = read(mount / part)
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def _of_version_2(group: Path) -> tuple[str, str]:
    quota, period = (group / "cpu.max").read_text().split()
    return quota, period


def _of_version_1(group: Path) -> tuple[str, str]:
    quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    return quota, period
