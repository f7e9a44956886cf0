"""A router that does harm as long as a file is there, and the sweeps that it takes part in."""

import contextlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.commands import ran

MISHAP = '''
"""Chooses at random, and does harm as long as a file named harm is there.

Nobody et al. 2026 (no paper).
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from rlroute.baselines.uniform import UniformRouter
from rlroute.config import RouterConfig


class MishapRouter(UniformRouter):
    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        fault: str = "none"

    def forward(self, x_TD, context):
        harm = Path(f"harm-{self.fault}")
        if context.explore and context.step == 6 and harm.exists():
            if self.fault == "once":
                harm.unlink()
            if self.fault == "wait":
                while harm.exists():
                    time.sleep(0.02)
                return super().forward(x_TD, context)
            if self.fault == "raise":
                raise ValueError("this router went wrong")
            if self.fault == "hang":
                time.sleep(1000)
            if self.fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.fault == "memory":
                held = []
                while len(held) < 100:  # 6 GiB at most
                    held.append(b"1" * 2**26)
                    time.sleep(0.02)
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x_TD, context)

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.fault = config.fault
'''
BASE = """
[base]
data = { spec = "synth:documents=64,length=64", seq_len = 16, eval_tokens = 128 }
model = { num_layers = 1, d_model = 16, num_heads = 2, num_experts = 4, d_expert = 8 }

[base.train]
batch_size = 4
micro_batches = 2
warmup_steps = 2
log_every = 1
"""


def spec_of(folder: Path, entries: Iterable[str], steps: int, every: int, more: str = "", seeds: int = 2) -> str:
    """Write the sweep file and return its name."""
    lengths = f"steps = {steps}\neval_every = {every}\ncheckpoint_every = {every}\n"
    (folder / "sweep.toml").write_text(f"entries = {list(entries)}\nseeds = {seeds}\n{BASE}{lengths}\n{more}")
    return "sweep.toml"


def undisturbed(folder: Path) -> Path:
    """Train a folder's sweep in this process; return the store."""
    calm = folder / "calm"
    calm.mkdir()
    with contextlib.chdir(calm):
        ran("sweep", folder / "sweep.toml", "--launcher", "local")
    return calm / "runs"


def ended(process: subprocess.Popen[str]) -> bool:
    """Whether a command has ended, in whatever way."""
    return process.poll() is not None
