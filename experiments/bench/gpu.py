"""``make gpu``: everything that wants a CUDA device, in one command of at most ten minutes, without the command line's
packages.

``python3 -m rlroute.experiments.bench.gpu`` runs the card's tests, the benches with every installed peer, a comparison
of four routers and the dense model, and whole training steps, each in a process group of its own with a time limit, and
leaves tables, JSON and a summary in one folder. A step that fails or runs out of time does not hold up the others: what
it had written stays, and no process of it does. ``make gpu ONLY=kernels,layer`` runs some of the steps. It needs torch,
triton, numpy, safetensors, scipy and pytest; the comparison needs pydantic too, and says so before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.experiments.bench import run as benches
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import to_markdown
from rlroute.experiments.launch import runs
from rlroute.experiments.launch.jobs import Job, Launch, together
from rlroute.experiments.recipes.presets import build_comparison
from rlroute.experiments.recipes.sizes import PRESETS as SIZES
from rlroute.extras import missing
from rlroute.kernels import resolve_backend
from rlroute.provenance import environment
from rlroute.records import write_atomically, write_compact, write_json

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"tests": 100, "kernels": 190, "layer": 60, "comparison": 120, "step": 110}
"""Seconds of each step; 9 minutes 40 seconds together."""
TESTS_AT_A_TIME = "8"
"""Most of a test's time is its kernels' compilation, on the CPU."""
READS_RECORDS = "pydantic"
"""The package without which a comparison would be trained, and no table made of it."""
ENTRIES = ("dense", "switch", "bias_balanced", "hash", "reinforce")
COMMAND = "make gpu"


def run_tests(out: Path, device: str, quick: bool) -> None:
    """Run the tests that need a card."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "tests/test_gpu.py"]
    if find_spec("xdist"):
        command += ["-n", TESTS_AT_A_TIME]
    with open(out / "tests.txt", "w") as file:  # as it comes: what a test that hangs had said stays
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    print((out / "tests.txt").read_text()[-2000:])
    if code:
        raise SystemExit(code)


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
    records = runs.run_all(together(jobs), Launch(store=out / "runs", launcher="local"))
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


def run_step(out: Path, device: str, quick: bool) -> None:
    """Run the bench of whole training steps until shortly before the limit."""
    data, model, train = _recipe(device, quick)
    variants, what = ["eager"], ""
    if not quick:
        what = "gpu-124m"
        size, variants = SIZES[what], ["eager", "compiled"]
        data, model, train = replace(size.data, spec="stdlib", tokenizer="bytes"), size.model, size.train
    amount: dict[str, Any] = {"rounds": 2 if quick else 10, "minutes": (LIMITS["step"] - 60) / 60, "command": COMMAND}
    wanted = benches.Wanted(names=("switch",), out=out / "step.json", **amount)
    print(benches.step(wanted, data, model, train, variants, what))


STEPS = {
    "tests": run_tests,
    "kernels": run_kernels,
    "layer": run_layer,
    "comparison": run_comparison,
    "step": run_step,
}


def run_all(out: Path, device: str, quick: bool, only: list[str]) -> int:
    """Run the steps, each in its own processes; write summary.json after each; return how many failed."""
    out.mkdir(parents=True, exist_ok=True)
    if _blind():
        print(f"== {_blind()}; the other steps go on", flush=True)
    _, _, train = _recipe(device, quick)
    where = environment(train.device, resolve_backend("auto", device), train.threads)
    steps: dict[str, Any] = {}
    # Liger-Kernel's autotuner takes minutes; without it each of its kernels has one fixed configuration.
    paths = [path for path in (os.environ.get("PYTHONPATH"), str(ROOT)) if path]
    own = os.environ | {"LIGER_FUSED_MOE_AUTOTUNE": "0", "PYTHONPATH": os.pathsep.join(paths)}
    for name in only:
        limit = LIMITS[name]
        print(f"== {name} (at most {limit} s)", flush=True)
        command = [sys.executable, "-m", __spec__.name, "--step", name, "--out", str(out), "--device", device]
        start = time.monotonic()
        code = run_within(limit, [*command, "--quick"] if quick else command, own)
        outcome = f"stopped after {limit} s" if code is None else f"failed with exit code {code}" if code else "passed"
        steps[name] = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
        print(f"== {name}: {outcome}, {steps[name]['seconds']} s", flush=True)
        write_json(out / "summary.json", {"command": COMMAND, "environment": where, "steps": steps})
    return sum(step["outcome"] != "passed" for step in steps.values())


def run_within(limit: float, command: list[str], environment: dict[str, str]) -> int | None:
    """Run a command and return its exit code; after ``limit`` seconds end it, with all that it started: None."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _steps(text: str) -> list[str]:
    """Read steps separated by commas; all where there is none."""
    unknown = [name for name in filter(None, text.split(",")) if name not in STEPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: legal are {', '.join(STEPS)}")
    return [name for name in STEPS if not text or name in text.split(",")]


def main() -> None:
    """Run all steps, or one."""
    parser = argparse.ArgumentParser(
        prog="python3 -m rlroute.experiments.bench.gpu", description="Run what wants a CUDA device."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "gpu", help="where results go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command itself")
    parser.add_argument("--only", type=_steps, default=list(STEPS), metavar="STEP,...", help="these steps")
    parser.add_argument("--step", choices=STEPS, help="this step alone, in this process")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device is there")
    if arguments.step:
        STEPS[arguments.step](arguments.out, arguments.device, arguments.quick)
    else:
        failed = run_all(arguments.out, arguments.device, arguments.quick, arguments.only)
        print(json.loads((arguments.out / "summary.json").read_text())["steps"])
        sys.exit(f"error: {failed} of {len(arguments.only)} steps did not pass" if failed else 0)


if __name__ == "__main__":
    main()
