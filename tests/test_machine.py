"""What counts of the machine is what this process may use: affinity, and the limits of its control groups."""

import os
import platform
import subprocess
import sys

import pytest

from rlroute.machine import cores, memory

V2 = "31 23 0:38 {top} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "30 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 30 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "33 30 0:30 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)
GROUPS_OF_V1 = "4:memory:{group}\n3:cpu,cpuacct:{group}\n2:pids:/elsewhere\n1:name=systemd:/\n0::/system.slice\n"


def machine(root, version, quotas, group, top="/"):
    """Write what the kernel shows of a process in ``group``, whose hierarchy's ``top`` is mounted; ``quotas`` are
    (quota, period) by folder under the mount.
    """
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n" + (V1, V2)[version - 1].format(top=top)
    )
    (root / "proc/self/cgroup").write_text((GROUPS_OF_V1, "0::{group}\n")[version - 1].format(group=group))
    for folder, (quota, period) in quotas.items():
        place = root / ("sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup")[version - 1] / folder
        place.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (place / "cpu.max").write_text(f"{quota} {period}\n")
        else:
            (place / "cpu.cfs_quota_us").write_text(f"{-1 if quota == 'max' else quota}\n")
            (place / "cpu.cfs_period_us").write_text(f"{period}\n")
    return root


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quotas", "group", "wanted"),
    [
        ({}, "/", 16),
        ({"a": ("max", 100000)}, "/a", 16),
        ({"a": (300000, 100000)}, "/a", 3),
        ({"a": (250000, 100000)}, "/a", 2),  # what is left of a core keeps no thread busy
        ({"a": (50000, 100000)}, "/a", 1),
        ({"a": (5_000_000, 100000)}, "/a", 16),  # more than there are
        ({"a": (80000, 20000)}, "/a", 4),
        ({"a": (400000, 100000), "a/b": ("max", 100000), "a/b/c": (900000, 100000)}, "/a/b/c", 4),  # from above
        ({"a": (900000, 100000), "a/b/c": (200000, 100000)}, "/a/b/c", 2),
        ({"a": (200000, 100000)}, "/b", 16),  # of another group
        ({".": (500000, 100000)}, "/", 5),  # a container sees its own group as the topmost
        ({".": (500000, 100000)}, "/../outside", 5),
    ],
)
def test_the_smallest_quota_from_a_group_upwards_counts(version, quotas, group, wanted, tmp_path):
    assert cores(machine(tmp_path, version, quotas, group)) == wanted


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_is_named_as_the_host_sees_it_where_only_its_own_part_is_mounted(version, tmp_path):
    quotas = {".": (700000, 100000), "inner": (600000, 100000)}
    group, top = "/docker/0a1b/inner", "/docker/0a1b"
    assert cores(machine(tmp_path, version, quotas, group, top)) == 6
    assert cores(machine(tmp_path / "other", version, quotas, "/somewhere", top)) == 7


def test_affinity_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert cores(machine(tmp_path, 2, {"a": (900000, 100000)}, "/a")) == 2


def test_a_system_without_affinity_and_control_groups_has_its_processors(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores(tmp_path) == 1


@pytest.mark.parametrize("damage", ["", "0::\n\n", "nonsense", "0::/a\nx"])
def test_what_the_kernel_never_wrote_is_no_quota(damage, tmp_path):
    machine(tmp_path, 2, {}, "/")
    (tmp_path / "proc/self/cgroup").write_text(damage)
    assert cores(tmp_path) == 16


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_of_memory_from_a_group_upwards_counts(version, tmp_path):
    machine(tmp_path, version, {}, "/a/b")
    file = ("sys/fs/cgroup/memory/{}/memory.limit_in_bytes", "sys/fs/cgroup/{}/memory.max")[version - 1]
    none = (str(2**63 - 4096), "max")[version - 1]
    there = memory(tmp_path)
    for limits, wanted in (
        ({}, there),
        ({"a/b": none, "a": none}, there),
        ({"a/b": 10**9}, 10**9),
        ({"a/b": none, "a": 10**8}, 10**8),
        ({"a/b": 10**7, "a": 10**8, "c": 10**6}, 10**7),
        ({".": 10**6}, 10**6),
    ):
        for folder, limit in limits.items():
            path = tmp_path / file.format(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{limit}\n")
        assert memory(tmp_path) == wanted


def test_this_machine_has_cores_and_memory(tmp_path):
    assert 1 <= cores() <= 16
    assert 2**20 < memory() <= memory(tmp_path)  # which has no groups


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.processes
def test_what_a_process_frees_is_mapped_once_and_not_at_every_step():
    """Faults of pages are counted, no time."""
    work = (
        "import resource, sys; from rlroute.machine import allocator, keep_freed_memory\n"
        "import torch\n"
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "def step(): return [torch.ones(2**23) for _ in range(3)]\n"  # 32 MiB each
        "for _ in range(6): step()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, allocator(), sep=';')\n"
    )
    faults, said = {}, {}
    for how in ("keep", "default"):
        told = subprocess.run([sys.executable, "-c", work, how], capture_output=True, text=True, check=True).stdout
        number, _, said[how] = told.strip().partition(";")
        faults[how] = int(number)
    assert said == {"keep": "glibc, freed memory is kept", "default": "default"}
    assert faults["keep"] < 0.1 * faults["default"]
