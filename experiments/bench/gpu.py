"""``make gpu``: everything that wants a CUDA device, in one command of at most ten minutes, without the command line's
packages.

``python3 -m rlroute.experiments.bench.gpu`` runs the card's tests, the benches with every installed peer, and a
comparison of four routers and the dense model, each in a process of its own with a time limit, and leaves tables, JSON
and a summary in one folder. A step that fails or runs out of time does not hold up the others; what it had written
stays. It needs torch, triton, numpy, safetensors, scipy and pytest; the comparison needs pydantic too, and says so
before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.experiments.bench import run as benches
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import to_markdown
from rlroute.experiments.launch import runs
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.recipes.presets import build_comparison
from rlroute.extras import missing
from rlroute.kernels import resolve_backend
from rlroute.provenance import environment
from rlroute.records import write_atomically, write_compact, write_json

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"tests": 150, "kernels": 200, "layer": 60, "comparison": 170}
"""Seconds of each step; 9 minutes 40 seconds together."""
READS_RECORDS = "pydantic"
"""The package without which a comparison would be trained, and no table made of it."""
ENTRIES = ("dense", "switch", "bias_balanced", "hash", "reinforce")
COMMAND = "make gpu"


def run_tests(out: Path, device: str, quick: bool) -> None:
    """Run the tests that need a card."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    write_atomically(out / "tests.txt", done.stdout + done.stderr)
    print(done.stdout[-2000:])
    if done.returncode:
        raise SystemExit(done.returncode)


def run_kernels(out: Path, device: str, quick: bool) -> None:
    """Run the kernel bench until shortly before the limit."""
    shapes = ("64,32,16,4,2",) if quick else ()
    minutes = (LIMITS["kernels"] - 40) / 60
    amount: dict[str, Any] = {"rounds": 2 if quick else 15, "minutes": minutes, "command": COMMAND}
    print(benches.kernels(benches.Wanted(device=device, shapes=shapes, out=out / "kernels.json", **amount)))


def run_layer(out: Path, device: str, quick: bool) -> None:
    """Run the layer bench until shortly before the limit."""
    shapes = ("64,32,16,4,2",) if quick else ()
    amount: dict[str, Any] = {"rounds": 2 if quick else 10, "minutes": (LIMITS["layer"] - 25) / 60, "command": COMMAND}
    print(benches.layer(benches.Wanted(device=device, shapes=shapes, out=out / "layer.json", **amount)))


def run_comparison(out: Path, device: str, quick: bool) -> None:
    """Train four routers and the dense model side by side, two seeds each."""
    if _blind():
        sys.exit(f"error: {_blind()}")
    data, model, train = _recipe(device, quick)
    jobs = [
        Job(config, seed, COMMAND)
        for seed in range(2)
        for config in build_comparison(ENTRIES, data, model, train, tuned=False)
    ]
    records = runs.run_all(jobs, Launch(store=out / "runs", launcher="local"))
    write_compact(records, out / "comparison.jsonl")
    table = to_markdown(build_table(records))
    write_atomically(out / "comparison.md", table)
    print(table)


def _blind() -> str | None:
    """Return why no table could be made; None where it can."""
    there = find_spec(READS_RECORDS) is not None
    return None if there else str(missing("the comparison", READS_RECORDS))


def _recipe(device: str, quick: bool) -> tuple[DataConfig, ModelConfig, TrainConfig]:
    if quick:
        return (
            DataConfig(spec="stdlib", seq_len=16, eval_tokens=256),
            ModelConfig(num_layers=1, d_model=16, num_heads=2, num_experts=4, d_expert=8),
            TrainConfig(steps=4, batch_size=4, log_every=2, eval_every=4, checkpoint_every=4, warmup_steps=1),
        )
    return (
        DataConfig(spec="stdlib", seq_len=256, eval_tokens=131_072),
        ModelConfig(num_layers=4, d_model=512, num_heads=8, num_experts=32, k=2, d_expert=512),
        TrainConfig(
            steps=300, batch_size=32, lr=2e-3, eval_every=150, checkpoint_every=300, device="cuda", dtype="bfloat16"
        ),
    )


STEPS = {"tests": run_tests, "kernels": run_kernels, "layer": run_layer, "comparison": run_comparison}


def run_all(out: Path, device: str, quick: bool) -> int:
    """Run every step in its own process; write summary.json; return how many failed."""
    out.mkdir(parents=True, exist_ok=True)
    if _blind():
        print(f"== {_blind()}; the other steps go on", flush=True)
    _, _, train = _recipe(device, quick)
    where = environment(train.device, resolve_backend("auto", device), train.threads)
    steps: dict[str, Any] = {}
    # Liger-Kernel's autotuner takes minutes; without it each of its kernels has one fixed configuration.
    paths = [path for path in (os.environ.get("PYTHONPATH"), str(ROOT)) if path]
    own = os.environ | {"LIGER_FUSED_MOE_AUTOTUNE": "0", "PYTHONPATH": os.pathsep.join(paths)}
    for name, limit in LIMITS.items():
        print(f"== {name} (at most {limit} s)", flush=True)
        command = [sys.executable, "-m", __spec__.name, "--step", name, "--out", str(out), "--device", device]
        start = time.monotonic()
        try:
            code = subprocess.run([*command, "--quick"] if quick else command, env=own, timeout=limit).returncode
            outcome = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit} s"
        steps[name] = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
        print(f"== {name}: {outcome}, {steps[name]['seconds']} s", flush=True)
        write_json(out / "summary.json", {"command": COMMAND, "environment": where, "steps": steps})
    return sum(step["outcome"] != "passed" for step in steps.values())


def main() -> None:
    """Run all steps, or one."""
    parser = argparse.ArgumentParser(
        prog="python3 -m rlroute.experiments.bench.gpu", description="Run what wants a CUDA device."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "gpu", help="where results go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command itself")
    parser.add_argument("--step", choices=STEPS, help="this step alone, in this process")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device is there")
    if arguments.step:
        STEPS[arguments.step](arguments.out, arguments.device, arguments.quick)
    else:
        failed = run_all(arguments.out, arguments.device, arguments.quick)
        print(json.loads((arguments.out / "summary.json").read_text())["steps"])
        sys.exit(f"error: {failed} of {len(LIMITS)} steps did not pass" if failed else 0)


if __name__ == "__main__":
    main()
