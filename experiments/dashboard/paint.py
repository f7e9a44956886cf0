"""How soon the dashboard shows something: a store of many long runs, the command, and a real browser.

``python -m rlroute.experiments.dashboard.paint`` makes a store of copies of published runs in a folder of its own, with
as many rows as are asked for; starts ``rlroute dashboard`` over it; and measures, each time with a browser that has
nothing of it yet: until a row of the store is painted, which the first HTML has; until the page's own table of progress
has taken its place, which follows the store; until the curves are drawn; that again when the page is opened a second
time; and how long a row that is appended takes until it is on the screen. It needs playwright, and Chromium on the
path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rlroute.experiments import RESULTS
from rlroute.extras import missing
from rlroute.reading import read_runs
from rlroute.records import write_json
from rlroute.registry import run_config
from rlroute.schema import RunRecord

EVERY = 10
"""Steps between two training rows."""
EVALUATIONS = 40
SEEDS = 10
TABLE, CURVES = "#view-progress tbody tr", "#view-curves .scatterlayer .trace"
LAST = (
    "Math.max(...[...document.querySelectorAll('#view-curves .js-plotly-plot')]"
    ".flatMap((plot) => plot.data).flatMap((trace) => trace.x ?? []))"
)
TIMED = """
new MutationObserver(() => document.querySelector("#first tbody th")?.setAttribute("elementtiming", "row"))
  .observe(document, {childList: true, subtree: true});
new PerformanceObserver((seen) => { window.painted_row ??= seen.getEntries()[0].renderTime; })
  .observe({type: "element", buffered: true});
"""
"""Tells, before the page's own scripts run, when its first row is painted, in milliseconds."""
WAIT = 120_000.0
"""Milliseconds until the browser gives up."""


@dataclass(frozen=True)
class Painted:
    """Seconds from a browser's request on."""

    first: float
    """Until a row of the store in the first HTML is painted, as the browser says (its Element Timing)."""
    table: float
    """Until the page itself has the table of progress, which then follows the store."""
    curves: float
    again: float
    """Until the curves are drawn when it opens the page a second time."""


# The store


def lay_store(store: Path, runs: int, points: int) -> Path:
    """Write copies of a published run with other seeds and settings, of which one goes on; return its folder.

    Args:
        store: the folder.
        runs: how many; ten seeds of each entry.
        points: training rows, and rows of loads, of each.
    """
    template = next(run for run in read_runs(RESULTS / "comparison.jsonl") if run.config["router"] == "switch")
    folder = store
    for number in reversed(range(runs)):
        entry, seed = divmod(number, SEEDS)
        folder = _lay_run(store, template, entry, seed, points, ended=number > 0)
    return folder


def _lay_run(store: Path, template: RunRecord, entry: int, seed: int, points: int, ended: bool) -> Path:
    config = json.loads(json.dumps(template.config["config"]))
    config["router"]["balance_weight"] = 0.01 * (1 + entry)
    config["train"] |= {"steps": points * EVERY, "log_every": EVERY, "eval_every": points * EVERY // EVALUATIONS}
    known = run_config(config)
    same = {"id": known.run_id(seed), "seed": seed, "config_hash": known.content_hash()}
    folder = store / str(same["id"])
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**template.config, **same, "config": known.to_dict()})
    write_json(folder / "environment.json", {**template.environment})
    rows = list(_rows(template, entry, seed, points))
    evals = [row for row in rows if row["kind"] == "eval"]
    _write(folder / "metrics.jsonl", rows if ended else rows[:-2])
    loads = [template.loads[place % len(template.loads)] for place in range(points)]
    _write(folder / "loads.jsonl", [{**row, "step": (place + 1) * EVERY} for place, row in enumerate(loads)])
    if ended:
        proof = {"shared": _digest("shared", seed), "backbone": _digest("backbone", seed)}
        summary: dict[str, Any] = {**template.summary, **same, "final": evals[-1], "steps": points * EVERY}
        summary |= {"tokens": rows[-1]["tokens"], "fingerprint": proof}
        summary |= {"batches": {"chain": evals[-1]["chain"], "steps": points * EVERY}}
        write_json(folder / "summary.json", summary)
    return folder


def _rows(template: RunRecord, entry: int, seed: int, points: int) -> Iterator[dict[str, Any]]:
    every = points // EVALUATIONS
    for place in range(points):
        step = (place + 1) * EVERY
        when = {"step": step, "tokens": step * 1024, "seconds": step * 0.05}
        row = template.train[place % len(template.train)]
        loss = 2 + 5 / (1 + place / 40) + 0.01 * entry + 0.003 * ((seed * 7 + place) % 11)
        yield {**row, **when, "loss": loss}
        if (place + 1) % every == 0:
            final = template.evals[-1]
            bits = final["bits_per_byte"] / final["loss"]
            yield {**final, **when, "loss": loss, "bits_per_byte": loss * bits, "chain": _digest("chain", seed, step)}


def _write(path: Path, rows: list[Mapping[str, Any]] | list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


# The browser


@contextmanager
def served(store: Path) -> Iterator[tuple[str, float]]:
    """Start the command, and yield its address and the seconds until it said so."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "rlroute", "dashboard", str(store), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        yield line.rpartition(" at ")[2].strip(), time.monotonic() - begun
    finally:
        process.terminate()
        process.wait()


def paint(chromium: Any, address: str) -> Painted:
    """Open the page in a browser that has not seen it, and wait for what it shows."""
    browser = chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.add_init_script(TIMED)
    begun = time.monotonic()
    page.goto(address, wait_until="commit")
    page.wait_for_selector(TABLE, timeout=WAIT)
    table = time.monotonic() - begun
    page.wait_for_selector(CURVES, timeout=WAIT)
    curves = time.monotonic() - begun
    first = page.evaluate("window.painted_row") / 1000
    begun = time.monotonic()
    page.goto(address, wait_until="commit")
    page.wait_for_selector(CURVES, timeout=WAIT)
    again = time.monotonic() - begun
    browser.close()
    return Painted(first, table, curves, again)


def append(chromium: Any, address: str, folder: Path, times: int) -> list[float]:
    """Append rows to a run that goes on; return the seconds until each is on the screen."""
    browser = chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector(CURVES, timeout=WAIT)
    found, path = [], folder / "metrics.jsonl"
    row = next(row for row in map(json.loads, reversed(path.read_text().splitlines())) if row["kind"] == "train")
    for _ in range(times):
        row |= {"step": row["step"] + EVERY, "tokens": row["tokens"] + 10**6}
        begun = time.monotonic()
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        while page.evaluate(LAST) < row["tokens"] and time.monotonic() - begun < WAIT / 1000:
            time.sleep(0.05)
        found.append(time.monotonic() - begun)
    browser.close()
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, plain in (("runs", 200), ("points", 2000), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=plain)
    asked = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise missing("a browser", "playwright") from error
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        last = lay_store(Path(folder) / "runs", asked.runs, asked.points)
        with served(last.parent) as (address, ready):
            print(f"{asked.runs} runs of {asked.points} rows: the command listens after {ready:.1f} s", flush=True)
            seen = [paint(driver.chromium, address) for _ in range(asked.repeats)]
            for name in ("first", "table", "curves", "again"):
                values = sorted(getattr(one, name) for one in seen)
                print(
                    f"{name}: {median(values):.2f} s ({values[0]:.2f} to {values[-1]:.2f}, n = {len(values)})",
                    flush=True,
                )
            waits = sorted(append(driver.chromium, address, last, asked.repeats))
            print(f"an appended row: {median(waits):.2f} s ({waits[0]:.2f} to {waits[-1]:.2f}, n = {len(waits)})")


if __name__ == "__main__":
    main()
