"""How benches measure: contenders called in turn, in a new order each round, on one device; ratios from the same
rounds.

A machine that is disturbed disturbs all contenders of a round; on the CPU the time is the process's CPU time, which
other processes disturb less than the clock. What cannot run, or computes something else, is recorded with its reason
and holds up nobody.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlroute.errors import ConfigError
from rlroute.experiments.text import NOTHING, markdown, with_ends
from rlroute.kernels import resolve_backend
from rlroute.kernels.tiles import table_hash
from rlroute.provenance import environment
from rlroute.records import storing, write_json

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, tells of its starts and stops
Call = Callable[[], Any]
CACHE, HEAD_START = 2**28, 6_000_000
"""Bytes that put everything else out of a card's cache; clock ticks, some 3 ms, in which the host launches a call."""
HOPELESS, TRIAL = 4.0, 3
"""A contender that took more than 4 times as long as ours in each of its first 3 rounds is not called again."""


@dataclass
class Contest:
    """The measured seconds of each contender by round, and why the others have none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    calls: Mapping[str, Call],
    ours: str,
    rounds: int,
    cuda: bool,
    *,
    clock: Callable[[Call], float] | None = None,
    warm: int = 1,
    until: float = math.inf,
) -> Contest:
    """Time each call once a round, after some rounds that warm up.

    Args:
        calls: the contenders' work.
        ours: the one whose failure is an error.
        rounds: how often.
        cuda: whether the work is on a GPU, which is then timed by its own events.
        clock: calls one and returns its seconds, in place of these.
        warm: rounds that warm up.
        until: no round is begun after this time (``time.monotonic``), once two were timed, which have an interval.
    """
    clock = clock or (_cuda_seconds if cuda else _cpu_seconds)
    contest, order = Contest({name: [] for name in calls}), random.Random(0)
    for turn in range(warm + rounds):
        if turn >= warm + 2 and time.monotonic() > until:
            break
        # In a new order each round: what a call finds in caches and allocator is what the one before it left there.
        for name in order.sample(list(contest.seconds), len(contest.seconds)):
            values = contest.seconds[name]
            if len(values) == TRIAL and _hopeless(values, contest.seconds[ours]):
                continue
            with set_apart(contest, name, ours):
                elapsed = clock(calls[name])
                if turn >= warm:
                    values.append(elapsed)
    return contest


def _hopeless(values: Sequence[float], ours: Sequence[float]) -> bool:
    return all(a > HOPELESS * b for a, b in zip(values, ours, strict=False))


@contextmanager
def set_apart(contest: Contest, name: str, ours: str) -> Iterator[None]:
    """Set a contender that fails inside apart, with its reason; ours must not fail."""
    try:
        yield
    except Exception as error:
        if name == ours:
            raise
        contest.seconds.pop(name, None)
        contest.failed[name] = reason(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what it held when it ran out of memory


def reason(error: Exception) -> str:
    """Return the first line of an error, with its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _cpu_seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _cuda_seconds(call: Call) -> float:
    """Return the device's own time of a call that finds its cache cold and its launches queued: the host is kept out of
    it, as it is where steps follow one another.
    """
    torch.empty(CACHE, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def median(values: Sequence[float]) -> float:
    """Return the upper median."""
    return sorted(values)[len(values) // 2]


def ratio(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float | None]:
    """Return the geometric mean over the rounds that both have of seconds over the base's, with its 95 % Student-t
    interval; one round has none.
    """
    from scipy.stats import t

    logs = [math.log(a / b) for a, b in zip(seconds, base, strict=False)]
    mean, n = sum(logs) / len(logs), len(logs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / max(n - 1, 1) / n)
    if n < 2:
        return {"mean": math.exp(mean), "low": None, "high": None}
    half = float(t.ppf(0.975, n - 1)) * spread
    return {"mean": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def peak_bytes(call: Call, cuda: bool) -> int:
    """Return the most bytes that one call holds beyond what was there before it."""
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":  # one per allocation and per release, in order
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def figures(contest: Contest, ours: str, base: str, **per_second: float) -> dict[str, Any]:
    """Return each contender's median seconds, amounts per second and ratios; of those that failed, why.

    Args:
        contest: what was measured.
        ours: the contender whose speed over each other is wanted: ``speed_of_ours``, above 1 where ours is faster.
        base: the contender that times are given over: ``time_over_base``.
        per_second: amounts of work in one call, by name.
    """
    rows: dict[str, Any] = {name: {"failed": why} for name, why in contest.failed.items()}
    for name, values in contest.seconds.items():
        middle = median(values)
        rows[name] = {
            "rounds": len(values),
            "seconds": middle,
            **{f"{unit}_per_second": amount / middle for unit, amount in per_second.items()},
            "time_over_base": ratio(values, contest.seconds[base]),
            "speed_of_ours": ratio(values, contest.seconds[ours]),
        }
    return rows


def choose(wanted: Sequence[str], legal: Sequence[str], what: str) -> list[str]:
    """Return what is wanted, or all there is.

    Raises:
        ConfigError: something else is wanted.
    """
    unknown = [name for name in wanted if name not in legal]
    if unknown:
        raise ConfigError(f"{what} {unknown[0]!r}: legal are {', '.join(legal)}")
    return [name for name in legal if not wanted or name in wanted]


def run_bench(
    rows: Iterator[dict[str, Any]], out: Path, *, kind: str, device: str, rounds: int, minutes: float, command: str
) -> dict[str, Any]:
    """Draw rows until they end or the time is up, print each, and write all so far after each; return what was written.

    Args:
        rows: a generator of measured rows.
        out: the JSON file.
        kind: which bench.
        device: ``cpu`` or ``cuda``.
        rounds: rounds a row.
        minutes: no new row is begun after so many.
        command: the command line behind it.

    Raises:
        StoreError: the file cannot be written, found before any work.
    """
    here = environment(device, resolve_backend("auto", device), torch.get_num_threads())
    where = {**here, "triton": _triton(), "tile_table": table_hash()}
    result: dict[str, Any] = {"bench": kind, "command": command, "rounds": rounds, "environment": where, "rows": []}
    with storing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    start = time.monotonic()
    for row in rows:
        result["rows"].append(row)
        print(row_text(row), flush=True)
        write_json(out, result)
        if time.monotonic() - start > 60 * minutes:
            print(f"{minutes:g} minutes are over: stopped after {len(result['rows'])} rows")
            break
    return result


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def row_text(row: Mapping[str, Any]) -> str:
    """Return a row as one line: times over the base, failures by name."""
    parts = []
    for name, values in row["contenders"].items():
        parts.append(
            f"{name} failed ({values['failed']})"
            if "failed" in values
            else f"{name} {values['time_over_base']['mean']:.2f}"
        )
    return f"{row['what']}: time over {row['base']}: {', '.join(parts)}"


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return a result as two tables: times over the base, and the speed of ours over each contender; a pure function of
    the file.
    """
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    where = result["environment"]
    head = (
        f"{where['device_name']}, torch {where['torch']}, triton {where['triton']}, {where['threads']} thread(s), tile "
        f"table {where['tile_table']}, {result['rounds']} rounds, commit {where['commit']}; `{result['command']}`"
    )
    base = ", ".join(sorted({row["base"] for row in rows}))
    times = _table(rows, names, lambda v: f"{v['time_over_base']['mean']:.2f}")
    speeds = _table(rows, names, lambda v: with_ends(**v["speed_of_ours"]))
    ours = ", ".join(sorted({row["ours"] for row in rows}))
    text = f"{head}\n\nTime over {base}:\n\n{times}\n\nSpeed of {ours} over each, with its 95 % interval:\n\n{speeds}\n"
    if any("all_to_all_share" in values for row in rows for values in row["contenders"].values()):
        shares = _table(rows, names, lambda v: f"{v['all_to_all_share']:.1%}" if "all_to_all_share" in v else NOTHING)
        text += f"\nShare of the time in sending and waiting:\n\n{shares}\n"
    return text


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], cell: Callable[[Any], str]) -> str:
    def text(values: Mapping[str, Any] | None) -> str:
        return NOTHING if values is None else "failed" if "failed" in values else cell(values)

    lines = [[row["what"], *(text(row["contenders"].get(name)) for name in names)] for row in rows]
    return markdown(["", *names], lines, "<" * (1 + len(names)), tight=True)
