"""The tables of stored runs: results, progress, runs, one run's facts, the ladder, and the claims board."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlroute.experiments.comparison import ladder_text
from rlroute.experiments.comparison.ladder_file import Ladder
from rlroute.experiments.comparison.multipliers import Multiplier
from rlroute.experiments.comparison.table import Table, TableRow
from rlroute.experiments.comparison.text import columns
from rlroute.experiments.launch.progress import duration
from rlroute.experiments.report.board import Group, Seen
from rlroute.experiments.report.sheet import Cell, Sheet
from rlroute.experiments.text import NOTHING, si
from rlroute.reading import worst_vio

Number = float | None
KEYS: dict[str, Callable[[TableRow], Number]] = {
    "validation bits/byte": lambda row: None if row.bits_per_byte is None else row.bits_per_byte.mean,
    "MaxVio": lambda row: row.max_vio,
    "Gini": lambda row: row.gini,
    "min/max load": lambda row: row.min_over_max,
    "without expert": lambda row: row.without_expert,
    "dead experts": lambda row: row.dead_experts,
    "compute multiplier": lambda row: _factor(row.compute_multiplier),
    "regret": lambda row: None if row.regret is None else row.regret.mean,
    "better routes": lambda row: row.better_routes,
    "pairs/token": lambda row: row.pairs_per_token,
    "tokens/s": lambda row: row.tokens_per_second,
    "parameters active / total": lambda row: row.active_parameters,
    "FLOPs/token": lambda row: row.flops_per_token,
    "training-only FLOPs/token": lambda row: row.training_only_flops_per_token,
    "n": lambda row: row.n,
    "resolvable": lambda row: row.smallest_resolvable,
}
"""The numbers behind columns of the table that have a unit or an interval in their texts."""
KNOWN = "what is known"


def results_sheet(table: Table) -> Sheet:
    """Return the table of a comparison."""
    shown = columns(table, balance=True)
    keys = KEYS | {
        f"difference to {table.reference}": lambda row: None if row.difference is None else row.difference.mean
    }
    rows = tuple(
        tuple(
            Cell(cell(row), keys[title](row) if title in keys else None, entry=row.config_hash if not place else "")
            for place, (title, cell) in enumerate(shown.items())
        )
        for row in table.rows
    )
    return Sheet(tuple(shown), rows, left=("settings", "gate", "verdict"))


# Progress


def progress_sheet(groups: Sequence[Group], others: Sequence[Seen]) -> Sheet:
    """Return how far each entry is; of others those count that were not begun."""
    head = (
        "entry",
        "runs ended",
        "running",
        "set aside",
        "share done",
        "bits/byte",
        "MaxVio",
        "tokens/s",
        "left",
        "alarms",
    )
    return Sheet(head, tuple(_progress(group, others) for group in groups), left=("alarms",))


def _progress(group: Group, others: Sequence[Seen]) -> tuple[Cell, ...]:
    states, total = Counter(run.state for run in group.runs), asked(group, others)
    ended = states["finished"] + states["diverged"] + states["damaged"] + states["stopped early"]
    share = sum(run.share for run in group.runs) / total
    evals = [run.evals[-1] for run in group.runs if run.evals]
    left = [run.seconds_left for run in group.runs if run.state == "running"]
    longest = max((seconds for seconds in left if seconds is not None), default=None)
    return (
        Cell(group.label, entry=group.hash),
        Cell(f"{ended} of {total}", ended / total),
        Cell(str(states["running"] or ""), states["running"]),
        Cell(str(states["set aside"] or ""), states["set aside"], tone="alarm" if states["set aside"] else ""),
        Cell(f"{share:.0%}", share),
        _number(_mean([row["bits_per_byte"] for row in evals]), ".4f"),
        _number(_mean([worst_vio(row) for row in evals]), ".2f"),
        _speed(_mean([run.tokens_per_second for run in group.runs])),
        Cell(duration(longest) if longest is not None else "", longest),
        _alarms(group.runs),
    )


def asked(group: Group, others: Sequence[Seen]) -> int:
    """Return how many runs of an entry were asked for, as far as its runs say, and those that wait; at least those that
    there are.
    """
    entry, _, _ = group.runs[0].id.rpartition("-s")
    seeds = {str(run.seed) for run in group.runs}
    seeds |= {run.id.removeprefix(f"{entry}-s") for run in others if run.id.startswith(f"{entry}-s")}
    for run in group.runs:
        if run.config and (wanted := run.config.get("asked")):
            seeds |= set(map(str, wanted["seeds"]))
    return len(seeds)


# Runs


def runs_sheet(groups: Sequence[Group], others: Sequence[Seen]) -> Sheet:
    """Return every run: what has become of it, and how far it is."""
    head = ("run", "seed", "state", "step", "bits/byte", "MaxVio", "tokens/s", "alarms", "begun (UTC)", "entry")
    rows = [_run(run, group.label, group.hash) for group in groups for run in group.runs]
    rows += [_run(run, NOTHING, "") for run in others]
    return Sheet(head, tuple(rows), left=("state", "alarms", "begun (UTC)", "entry"))


def _run(run: Seen, label: str, entry: str) -> tuple[Cell, ...]:
    last, final = run.last, run.evals[-1] if run.evals else None
    steps = f" of {run.config['config']['train']['steps']:,}" if run.config else ""
    begun = run.environment.get("begun", "") if run.environment else ""
    return (
        Cell(run.id, run=run.id),
        Cell(NOTHING if run.seed is None else str(run.seed), run.seed),
        Cell(_state(run), tone="alarm" if run.reason else ""),
        Cell(f"{last['step'] if last else 0:,}{steps}", last["step"] if last else 0),
        _number(final and final["bits_per_byte"], ".4f"),
        _number(worst_vio(final) if final else None, ".2f"),
        _speed(run.tokens_per_second),
        _alarms([run]),
        Cell(begun[:16].replace("T", " ") or NOTHING),
        Cell(label, entry=entry),
    )


def _state(run: Seen) -> str:
    return ("not begun" if run.state == "empty" else run.state) + (f": {run.reason}" if run.reason else "")


def _alarms(runs: Sequence[Seen]) -> Cell:
    """Return the kinds of the alarms that stand, and of how many runs."""
    counts = Counter(kind for run in runs for kind in {alarm.kind for alarm in run.alarms})
    said = [kind if len(runs) == 1 else f"{kind} ({count} of {len(runs)})" for kind, count in sorted(counts.items())]
    return Cell(", ".join(said), tone="alarm" if said else "")


def _number(value: Number, form: str) -> Cell:
    return Cell(NOTHING if value is None else format(value, form), value)


def _speed(value: Number) -> Cell:
    return Cell(NOTHING if value is None else si(value), value)


def _mean(values: Sequence[Number]) -> Number:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# The ladder


def ladder_sheet(ladder: Ladder) -> Sheet:
    """Return the losses of a ladder's entries at each budget, and their multipliers."""
    head, lines = ladder_text.table(ladder)
    rows = [
        (None, *(bits.mean for bits in entry.bits), _factor(entry.compute), _factor(entry.time))
        for entry in ladder.entries
    ]
    return Sheet(tuple(head), tuple(tuple(map(Cell, *row)) for row in zip(lines, rows, strict=True)))


def _factor(found: Multiplier | None) -> Number:
    return None if found is None else found.value


def notes_sheet(ladder: Ladder) -> Sheet:
    """Return what has to be said beside it: laws, differences, the order."""
    rows = tuple((Cell(title), Cell(text)) for title, text in ladder_text.notes(ladder))
    return Sheet(("about", KNOWN), rows, left=(KNOWN,), kind="facts")


# Claims


def claims_sheet(grid: Mapping[str, Any]) -> Sheet:
    """Return the claims board from titles (``head``), cells (``lines``), and the numbers behind these (``keys``)."""
    tones = {"holds": "better", "refuted": "worse", "inconclusive": "equivalent"}
    rows = tuple(
        tuple(Cell(text, key, tone=tones.get(text, "")) for text, key in zip(line, keys, strict=True))
        for line, keys in zip(grid["lines"], grid["keys"], strict=True)
    )
    left = tuple(title for title in grid["head"] if title not in ("#", "n"))
    return Sheet(tuple(grid["head"]), rows, left=left, kind="claims")


# One run


def facts_sheet(run: Seen) -> Sheet:
    """Return what one run is, where it happened, and the command to repeat it."""
    rows = tuple((Cell(name), Cell(text)) for name, text in facts(run).items() if text)
    return Sheet((run.id, KNOWN), rows, left=(KNOWN,), kind="facts")


def facts(run: Seen) -> dict[str, str]:
    """Return the provenance of a run, by title; an empty text where nothing is known."""
    config: Mapping[str, Any] = run.config or {}
    env: Mapping[str, Any] = run.environment or {}
    made, summary = config.get("made_from") or {}, run.summary
    last = run.last
    command = config.get("command")
    commit = env.get("commit")
    return {
        "state": _state(run),
        "alarms": "; ".join(map(str, run.alarms)),
        "router": str(config.get("router", "")),
        "seed": str(config.get("seed", "")),
        "command": command or "",
        "to repeat": repeat(run),
        "configuration": f"hash {config['config_hash']}" if config else "",
        "commit": f"{commit}{', with uncommitted changes' if env.get('dirty') else ''}" if commit else "",
        "rlroute": f"{env['rlroute']}, core sha256 {made.get('core', 'not recorded')}" if env else "",
        "versions": f"Python {env['python']}, torch {env['torch']}, NumPy {env['numpy']}" if env else "",
        "machine": f"{env['device']} ({env['device_name']}), {env['platform']}, {env['threads']} thread(s)"
        if env
        else "",
        "kernel": str(env.get("kernel_backend", "")),
        "begun (UTC)": str(env.get("begun", "")),
        "ended (UTC)": str(summary.get("ended", "")) if summary else "",
        "steps": f"{last['step']:,} steps, {last['tokens']:,} tokens, {last['seconds']:,.1f} s of training"
        if last
        else "",
        "corpus": f"{summary['data']['spec']}, sha256 {summary['data']['sha256']}" if summary else "",
        "initial weights": f"sha256 {summary['fingerprint']['shared']}" if summary else "",
        "batches": f"{summary['batches']['steps']:,}, hash chain {summary['batches']['chain']}" if summary else "",
        "parameters": _parameters(run),
        "notes": "; ".join(env.get("notes", ())),
    }


def repeat(run: Seen) -> str:
    """Return the commands that make a run again: at its commit, what was typed, into a store of its own."""
    config, env = run.config, run.environment
    if not config or not config.get("command"):
        return ""
    commit = env.get("commit") if env else None
    return (f"git checkout {commit} && " if commit else "") + str(config["command"])


def _parameters(run: Seen) -> str:
    if run.summary is None:
        return ""
    model = run.summary["model"]
    active, total = si(model["active_parameters"]), si(model["total_parameters"])
    return f"{active} active of {total}, {si(model['flops_per_token'])} FLOPs a token forward"


def evals_sheet(run: Seen) -> Sheet:
    """Return the evaluations of one run."""
    head = ("step", "tokens", "bits/byte", "MaxVio", "dead experts", "dropped pairs")
    rows = tuple(
        (
            _number(row["step"], ",d"),
            _number(row["tokens"], ",d"),
            _number(row["bits_per_byte"], ".4f"),
            _number(worst_vio(row), ".3f"),
            _number(sum(row["dead_L"]), "d"),
            _number(row["drop_rate"], ".2%"),
        )
        for row in run.evals
    )
    return Sheet(head, rows)


def config_text(run: Seen) -> str:
    """Return the configuration of a run as JSON."""
    return json.dumps(run.config and run.config["config"], indent=1, sort_keys=True, ensure_ascii=False)
