"""``rlroute bench sweep``: what Ray costs: 24 runs on two cores, beside the same runs one after another without Ray.

Half the summed time of the runs alone is what two cores could take at best. Starting is measured as the processor time
of everything that is there once Ray stands and before a trial runs; idle memory as the proportional set size of the
same processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ComparisonError
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.launch.ray_session import session
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.entries import build_entry
from rlroute.provenance import environment
from rlroute.records import write_json

CORES, SEEDS = 2, 8
ENTRIES = ("hash", "switch", "bias_balanced")
DATA = DataConfig(eval_tokens=8192)


def bench_sweep(out: Path, command: str, steps: int = 300) -> str:
    """Measure, write the figures, and return them as text.

    Args:
        out: the JSON file.
        command: the command line behind it.
        steps: of each run; 300 as `make compare` has them, some 25 seconds of a core.

    Raises:
        StoreError: the file cannot be written.
        MissingDependencyError: Ray is not installed.
    """
    train = TrainConfig(steps=steps, eval_every=steps, checkpoint_every=steps)
    jobs = [Job(build_entry(e, DATA, ModelConfig(), train), s, command) for s in range(SEEDS) for e in ENTRIES]
    start = session_cost()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        began = time.perf_counter()
        alone = run_all(jobs, Launch(store=store / "local", launcher="local"))
        summed = time.perf_counter() - began
        began = time.perf_counter()
        swept = run_all(jobs, Launch(store=store / "ray", launcher="ray", concurrency=CORES))
        wall = time.perf_counter() - began
    losses = [[final["loss"] for run in runs if (final := run.summary["final"])] for runs in (alone, swept)]
    if losses[0] != losses[1]:
        raise ComparisonError("the runs under Ray have other losses than those without")
    result: dict[str, Any] = {
        "bench": "sweep",
        "command": command,
        "environment": environment("cpu", "cpu", 1),
        "runs": len(jobs),
        "steps": steps,
        "seconds_alone": summed,
        "seconds_under_ray": wall,
        "over_half_the_sum": wall / (summed / CORES),
        **start,
    }
    write_json(out, result)
    return to_text(result)


def to_text(result: dict[str, Any]) -> str:
    """Return the figures as sentences."""
    return (
        f"{result['runs']} runs of {result['steps']} steps: {result['seconds_alone']:.0f} s alone, "
        f"{result['seconds_under_ray']:.0f} s under Ray on {CORES} cores, {result['over_half_the_sum']:.2f} of half "
        f"the sum; losses equal.\nStarting Ray: {result['start_cpu_seconds']:.1f} CPU-seconds, "
        f"{result['start_seconds']:.1f} s; idle memory {result['idle_bytes'] / 2**30:.2f} GiB in {result['processes']} "
        "processes."
    )


def session_cost() -> dict[str, Any]:
    """Return what a Ray session costs before any trial, measured in a process of its own."""
    probe = "from rlroute.experiments.bench.sweep import idle; idle()"
    began = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    spent, size, processes = said.split()[-3:]
    return {
        "start_cpu_seconds": float(spent),
        "start_seconds": time.perf_counter() - began,
        "idle_bytes": int(size),
        "processes": int(processes),
    }


def idle() -> None:
    """Start Ray; print the processor seconds, the proportional memory and the number of all processes of this one; and
    stop it.
    """
    with session(Launch(launcher="ray", concurrency=CORES)):
        time.sleep(2.0)
        mine = _family(os.getpid())
        print(sum(map(_cpu_seconds, mine)), sum(map(_proportional_bytes, mine)), len(mine))


def _family(root: int) -> list[int]:
    """Return a process and its descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
    family = [root]
    for pid in family:  # grows while it is walked
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def _cpu_seconds(pid: int) -> float:
    """Return what a process and its children that have ended have used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
