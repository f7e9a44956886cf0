"""``make soak``: random kills over sweeps, which end all the same, with the figures of those that nobody disturbed.

A kill takes the driver, the process of a run (trial), one of a group's workers, or of Ray itself the raylet, the
control store (GCS) or a cluster's node; by KILL, by TERM, or by STOP and CONT 45 seconds later. Whom and how is drawn
from a seed; when, from the clock. What ends a command is answered by the same command. Only processes that this script
has started, which carry its mark in their environment, are killed.
"""

from __future__ import annotations

import argparse
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlroute.experiments.bench.victims import MARK, VICTIMS, Nodes, marked, nodes
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.comparison.text import to_markdown
from rlroute.provenance import environment
from rlroute.reading import read_runs
from rlroute.records import write_json

OUT = Path("experiments/results/soak.json")
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
STOPPED_SECONDS = 45.0
HANG_SECONDS = 60.0
"""Within so long after a blow the command has ended, or a run has written something if it need not; else it hangs."""
SEEDS = 2
"""So many more are swept whenever all runs have ended and there are kills left."""
SPEC = """
entries = ["hash", "switch", "reinforce", "bias_balanced"]
seeds = SEEDS

[base]
data = { spec = "synth:documents=64,length=64", seq_len = 16, eval_tokens = 128 }
model = { num_layers = 1, d_model = 16, num_heads = 2, num_experts = 4, d_expert = 8 }

[base.train]
steps = STEPS
batch_size = 4
micro_batches = 2
warmup_steps = 2
eval_every = 100
log_every = 10
checkpoint_every = 50
"""
GROUPS = "[resources]\nworkers = 2\nexpert_parallel = 2\ncpus = 0.5\n"
SCENES = {"driver": "runs", "trial": "runs", "raylet": "runs", "GCS": "runs", "group worker": "groups", "node": "nodes"}
"""In which sweep there is such a victim: of runs, of groups of workers, or on a cluster of two nodes."""
FATAL = ("driver", "raylet", "GCS")
"""Without whom the command ends; with the others a run goes on."""
COMMAND = (sys.executable, "-m", "rlroute", "sweep", "soak.toml")
PATIENT = ("--retries", "100")


class Failed(Exception):
    """A sweep ended otherwise than it may."""


def main() -> None:
    """Run the soak, write its record, and exit with 1 if anything was lost."""
    asked, began = arguments(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends what it has started
    draw = random.Random(asked.seed)
    blows = drawn(draw, asked)
    scenes = []
    for name in dict.fromkeys(SCENES[victim] for victim, _ in blows):
        mine = [blow for blow in blows if SCENES[blow[0]] == name]
        print(f"{name}: {len(mine)} kills", file=sys.stderr, flush=True)
        scenes.append(play(name, mine, draw, asked.steps))
        print(f"{name}: {'good' if scenes[-1]['good'] else 'not good'}", file=sys.stderr, flush=True)
    kills = [kill for scene in scenes for kill in scene["kills"]]
    passed = len(kills) == asked.kills and all(scene["good"] for scene in scenes)
    counts = Counter(f"{kill['whom']} {kill['signal']}" for kill in kills)
    slowest = max((kill["seconds_to_go_on"] for kill in kills), default=0.0)
    result = {"passed": passed, "kills": len(kills), "counts": dict(sorted(counts.items())), "slowest": slowest}
    result |= {"hung": sum(kill["seconds_to_go_on"] > HANG_SECONDS for kill in kills), "seed": asked.seed}
    result |= {"seconds": round(time.monotonic() - began), "scenes": scenes}
    write_json(asked.out, result | {"environment": environment("cpu", "cpu", 1)})
    print(json.dumps({name: value for name, value in result.items() if name != "scenes"}))
    sys.exit(0 if passed else 1)


def drawn(draw: random.Random, asked: argparse.Namespace) -> list[tuple[str, str]]:
    """Return who is killed, and how."""
    return [(draw.choice(asked.victims), draw.choice(asked.signals)) for _ in range(asked.kills)]


def arguments() -> argparse.Namespace:
    """Return what is asked for on the command line."""

    def some_of(legal: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := sorted(set(text.split(",")) - set(legal)):
                raise argparse.ArgumentTypeError(f"{unknown[0]!r}: legal are {', '.join(legal)}")
            return text.split(",")

        return parse

    parser = argparse.ArgumentParser(prog="soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", type=some_of(list(SCENES)), default=list(SCENES), help="comma-separated")
    parser.add_argument("--signals", type=some_of(list(SIGNALS)), default=list(SIGNALS), help="comma-separated")
    parser.add_argument("--steps", type=int, default=2000, help="of a run")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def play(name: str, blows: list[tuple[str, str]], draw: random.Random, steps: int) -> dict[str, Any]:
    """Run one sweep with kills in between, and once more without; return what came of it.

    Args:
        name: runs, groups or nodes.
        blows: victims and signals.
        draw: of the moments.
        steps: of a run.
    """
    mark, groups, kills = uuid.uuid4().hex, GROUPS if name == "groups" else "", list[dict[str, Any]]()
    try:
        with tempfile.TemporaryDirectory() as folder:
            killed, calm = Path(folder) / "killed", Path(folder) / "calm"
            with nodes(mark) if name == "nodes" else contextlib.nullcontext() as cluster:
                scene = Scene(killed, SPEC.replace("STEPS", str(steps)) + groups, mark, draw, cluster, kills)
                scene.disturb(blows)
            left = _wait_for_none(mark)
            calm.mkdir()
            (calm / "soak.toml").write_text((killed / "soak.toml").read_text())
            alone = () if groups else ("--launcher", "local")
            quiet = subprocess.run([*COMMAND, *alone], cwd=calm, capture_output=True, text=True)
            if quiet.returncode:
                raise Failed(f"the undisturbed sweep failed with {quiet.returncode}: {quiet.stderr}")
            tables = [_table(part / "runs") for part in (killed, calm)]
            runs = [len(read_runs(part / "runs")) for part in (killed, calm)]
    except Failed as error:  # what the other scenes come to is to be known too
        print(error, file=sys.stderr, flush=True)
        return {"scene": name, "good": False, "failed": str(error), "kills": kills}
    equal = tables[0] == tables[1]
    hung = any(kill["seconds_to_go_on"] > HANG_SECONDS for kill in scene.kills)
    return {
        "scene": name,
        "good": equal and runs[0] == runs[1] and not left and not hung and len(scene.kills) == len(blows),
        "tables_equal": equal,
        "runs": runs[0],
        "runs_undisturbed": runs[1],
        "processes_left": left,
        "commands": scene.starts,
        "endings": dict(Counter(scene.endings)),
        "kills": scene.kills,
    }


@dataclass
class Scene:
    """One sweep that is given again until it ends.

    Attributes:
        folder: its working directory, which is made.
        spec: the sweep, with SEEDS in the place of their number.
        mark: stands in the environment of all its processes.
        draw: of the moments.
        cluster: nodes to run on, None for a Ray of its own.
        kills: what was done, and how long it took until something went on.
        starts: how often the command was given.
        endings: how it ended each time.
    """

    folder: Path
    spec: str
    mark: str
    draw: random.Random
    cluster: Nodes | None = None
    kills: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0
    endings: list[str] = field(default_factory=list)

    def disturb(self, blows: list[tuple[str, str]]) -> None:
        """Run the sweep to its end, with kills in between; and on with more seeds until all kills are done."""
        began, seeds = time.monotonic(), SEEDS
        self.folder.mkdir()
        while True:
            (self.folder / "soak.toml").write_text(self.spec.replace("SEEDS", str(seeds)))
            with self._command() as driver:
                at_start = self._progress()
                while driver.poll() is None:
                    time.sleep(self.draw.uniform(1.0, 4.0))
                    if len(self.kills) < len(blows) and self._progress() != at_start and driver.poll() is None:
                        self._strike(*blows[len(self.kills)], driver, began)
            if self.endings[-1] == "ended" and len(self.kills) == len(blows):
                return
            seeds += SEEDS * (self.endings[-1] == "ended")

    @contextmanager
    def _command(self) -> Iterator[subprocess.Popen[bytes]]:
        """Give the command; note how it has ended, which must be in one of the ways that are foreseen."""
        self.starts += 1
        where = ("--address", self.cluster.address) if self.cluster else ()
        command = [*COMMAND, *PATIENT, *where]
        with (self.folder / "driver.log").open("w+") as log:
            mine = os.environ | {MARK: self.mark}
            driver = subprocess.Popen(command, cwd=self.folder, env=mine, stdout=subprocess.DEVNULL, stderr=log)
            try:
                yield driver
            finally:
                driver.kill()  # the soak itself was stopped
            log.seek(0)
            self.endings.append(ending(driver.wait(), log.read()))

    def _strike(self, whom: str, how: str, driver: subprocess.Popen[bytes], began: float) -> None:
        """Kill somebody, if there is such a process now; note how long it takes until the command ends or goes on."""
        victims = [pid for pid in marked(self.mark) if whom in VICTIMS and VICTIMS[whom](pid)]
        if whom == "driver":
            victims = [driver.pid]
        if whom == "node" and self.cluster:
            victims = self.cluster.raylets()
        if not victims:
            return
        second, victim, before = time.monotonic() - began, self.draw.choice(victims), self._progress()
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, SIGNALS[how])
            if how == "STOP":
                time.sleep(STOPPED_SECONDS)
                before = self._progress()
                os.kill(victim, signal.SIGCONT)
        if self.cluster:
            self.cluster.mend()
        struck = time.monotonic()
        ends = whom in FATAL and how != "STOP"
        while driver.poll() is None and time.monotonic() - struck < 5 * HANG_SECONDS:
            if not ends and self._progress() != before:
                break
            time.sleep(0.1)
        kill = {"whom": whom, "signal": how, "second": round(second, 1)}
        self.kills.append(kill | {"seconds_to_go_on": round(time.monotonic() - struck, 1)})
        print(self.kills[-1], file=sys.stderr, flush=True)

    def _progress(self) -> dict[str, int]:
        """Return how much has been written of each run."""
        return {str(file): file.stat().st_size for file in self.folder.glob("runs/*/metrics.jsonl")}


def ending(code: int, said: str) -> str:
    """Name the way in which a command has ended.

    Raises:
        Failed: it is none of those that a kill may bring about.
    """
    if code == 0:
        return "ended"
    if code in (-signal.SIGKILL, 128 + signal.SIGTERM):
        return "killed"
    if code == 2 and "Ray was lost" in said and "Traceback" not in said:
        return "Ray was lost"
    raise Failed(f"the sweep failed with {code}: {said}")


def _wait_for_none(mark: str) -> int:
    """Return how many marked processes are there after a minute at most."""
    deadline = time.monotonic() + HANG_SECONDS
    while (left := len(marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def _table(store: Path) -> str:
    lines = to_markdown(build_table(read_runs(store)), timings=False).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("- **Command**", "- **Commit**")))


if __name__ == "__main__":
    main()
