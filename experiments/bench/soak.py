"""``make soak``: twenty random kills over one sweep, which ends all the same, with the figures of one that nobody
disturbed.

A kill takes a worker in the midst of its run, or the driver, which is then started again by the same command. What was
done is drawn from a seed; when, from the clock. At most ``AHEAD`` more kills than runs have ended, so that they are
spread over the whole sweep.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import to_markdown
from rlroute.provenance import environment
from rlroute.records import ENDED, read_runs, state, write_json

KILLS, AHEAD, SEED = 20, 5, 0
OUT = Path("experiments/results/soak.json")
SPEC = """
entries = ["hash", "switch", "reinforce", "bias_balanced"]
seeds = 5

[base]
data = { spec = "synth:documents=64,length=64", seq_len = 16, eval_tokens = 128 }
model = { num_layers = 1, d_model = 16, num_heads = 2, num_experts = 4, d_expert = 8 }
train = { steps = 1000, batch_size = 4, warmup_steps = 2, eval_every = 100, log_every = 10, checkpoint_every = 100 }
"""
COMMAND = ("-m", "rlroute.experiments.cli", "sweep", "soak.toml", "--retries", "100")


def main() -> None:
    """Run the soak, write its record, and exit with 1 if anything was lost."""
    mark, began = uuid.uuid4().hex, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("killed", "calm"):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "soak.toml").write_text(SPEC)
        kills, starts = _disturb(Path(folder) / "killed", mark)
        left = _wait_for_none(mark)
        calm = subprocess.run(
            [sys.executable, *COMMAND, "--launcher", "local"], cwd=Path(folder) / "calm", capture_output=True, text=True
        )
        tables = [_table(Path(folder) / name / "runs") for name in ("killed", "calm")]
        runs = [len(read_runs(Path(folder) / name / "runs")) for name in ("killed", "calm")]
    verdict = {
        "tables_equal": tables[0] == tables[1] and calm.returncode == 0,
        "runs": runs[0],
        "runs_undisturbed": runs[1],
        "processes_left": left,
    }
    good = verdict["tables_equal"] and runs[0] == runs[1] and not left and len(kills) == KILLS
    result = {"kills": kills, "driver_starts": starts, **verdict, "seconds": round(time.monotonic() - began)}
    write_json(OUT, result | {"passed": good, "environment": environment("cpu", "cpu", 1)})
    print(json.dumps({name: value for name, value in result.items() if name != "kills"}), "kills:", len(kills))
    sys.exit(0 if good else 1)


def _disturb(folder: Path, mark: str) -> tuple[list[dict[str, Any]], int]:
    """Run the sweep to its end with kills in between; return them, and how often the driver was started."""
    draw, kills, starts, began = random.Random(SEED), list[dict[str, Any]](), 0, time.monotonic()
    whom = draw.choices(("worker", "driver"), (3, 1), k=KILLS)
    while True:
        starts += 1
        with (folder / "driver.log").open("w") as log:
            driver = subprocess.Popen(
                [sys.executable, *COMMAND],
                cwd=folder,
                env=os.environ | {"RLROUTE_SOAK": mark},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        try:
            while driver.poll() is None:
                time.sleep(draw.uniform(1.0, 4.0))
                workers = [pid for pid in marked(mark) if is_trial(pid)]
                ended = sum(state(run) in ENDED for run in (folder / "runs").glob("*"))
                if len(kills) == min(KILLS, ended + AHEAD) or not workers or driver.poll() is not None:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    victim = whom[len(kills)]
                    os.kill(driver.pid if victim == "driver" else draw.choice(workers), signal.SIGKILL)
                    kills.append({"whom": victim, "second": round(time.monotonic() - began, 1), "runs_ended": ended})
        finally:
            driver.kill()  # the soak itself was stopped
        if driver.returncode > 0:
            sys.exit(f"the sweep failed: {(folder / 'driver.log').read_text()}")
        if driver.returncode == 0:
            return kills, starts


def marked(mark: str) -> list[int]:
    """Return the processes in whose environment a mark stands, which every process hands down to those that it
    starts.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def is_trial(pid: int) -> bool:
    """Whether a process is a Ray worker that trains (its title says what it runs)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ImplicitFunc")
    return False


def _wait_for_none(mark: str) -> int:
    """Return how many marked processes are there after half a minute at most."""
    deadline = time.monotonic() + 30
    while (left := len(marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def _table(store: Path) -> str:
    lines = to_markdown(build_table(read_runs(store)), timings=False).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("- **Command**", "- **Commit**")))


if __name__ == "__main__":
    main()
