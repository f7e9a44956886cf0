"""Which of many runs may stand in one table: the largest group of comparable ones, and why the others are left out.

Everything here is a pure function of run records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlroute.experiments.comparison.entries import agreed, grouped, kind, router_label, shared
from rlroute.schema import RunRecord

SHOWN = 3
"""How many fields and ids a reason names."""
Reasons = dict[str, list[RunRecord]]
"""Runs by the reason for which they are left out."""


def largest_group(records: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """Return the largest group of comparable runs, and one line for each lot of others: who they are, and why.

    Runs are parted by what all runs of a table share. Of a part go those that disagree with most others about what one
    seed means, and then what keeps it from being whole: every entry with every seed. The largest group is that with
    most runs, but one entry alone is no comparison and comes after any two; of equal ones the newest, then the first
    by ids.
    """
    parts = grouped(sorted(records, key=lambda record: record.id), kind)
    if not parts:
        return [], []
    groups = [_whole(part) for part in parts.values()]
    runs, reasons = max(groups, key=lambda group: _size(group[0]))
    chosen = shared(runs[0])
    for part in parts.values():
        if (theirs := shared(part[0])) != chosen:
            reasons.setdefault(_difference(theirs, chosen), []).extend(part)
    return runs, [f"{_named(others)}: {reason}" for reason, others in sorted(reasons.items())]


def _size(runs: Sequence[RunRecord]) -> tuple[bool, int, str]:
    entries = {run.config["config_hash"] for run in runs}
    return len(entries) > 1, len(runs), max(map(_begun, runs))


def _begun(run: RunRecord) -> str:
    return str(run.environment.get("begun", ""))


def _difference(theirs: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    names = [name for name in (*theirs, *chosen) if theirs.get(name) != chosen.get(name)]
    said = [f"{name} is {theirs.get(name)!r}, in the table {chosen.get(name)!r}" for name in dict.fromkeys(names)]
    return "; ".join(said[:SHOWN]) + (f"; and {len(said) - SHOWN} fields more" if len(said) > SHOWN else "")


def _named(runs: Sequence[RunRecord]) -> str:
    labels = ", ".join(sorted({router_label(run.config["config"]) for run in runs}))
    ids = [run.id for run in runs]
    return f"{len(ids)} of {labels} ({', '.join(ids[:SHOWN])}{', ...' if len(ids) > SHOWN else ''})"


def _whole(part: Sequence[RunRecord]) -> tuple[list[RunRecord], Reasons]:
    """Return the largest whole group of runs that share what all of a table do, and the others by their reasons."""
    runs, reasons = _agreeing(part)
    seeds_of: dict[str, set[int]] = {}
    for run in runs:
        seeds_of.setdefault(run.config["config_hash"], set()).add(run.config["seed"])
    seeds = _common_seeds([frozenset(seeds) for seeds in seeds_of.values()])
    kept = []
    for run in runs:
        lacking = sorted(seeds - seeds_of[run.config["config_hash"]])
        if not lacking and run.config["seed"] in seeds:
            kept.append(run)
        elif lacking:
            reasons.setdefault(f"the entry has no seed {', '.join(map(str, lacking))}", []).append(run)
        else:
            reasons.setdefault(f"other entries have no seed {run.config['seed']}", []).append(run)
    return kept, reasons


def _common_seeds(sets: Sequence[frozenset[int]]) -> frozenset[int]:
    """Return the seeds that make the most runs if every entry that has them all takes part with these alone.

    Args:
        sets: the seeds of each entry; what is tried are these, and what any two have in common.
    """
    distinct = set(sets)
    tried = distinct | {one & other for one in distinct for other in distinct} - {frozenset()}

    def worth(seeds: frozenset[int]) -> tuple[bool, int, int, list[int]]:
        entries = sum(seeds <= own for own in sets)
        return entries > 1, entries * len(seeds), entries, sorted((-seed for seed in seeds), reverse=True)

    return max(tried, key=worth)


def _agreeing(part: Sequence[RunRecord]) -> tuple[list[RunRecord], Reasons]:
    """Part runs into those that agree with most about all that they both say, and the others."""
    newest = sorted(part, key=_begun, reverse=True)
    said: dict[tuple[Any, ...], Counter[str]] = {}
    for run in newest:
        for name, value in agreed(run).items():
            said.setdefault(name, Counter())[_text(value)] += 1
    usual = {name: values.most_common(1)[0][0] for name, values in said.items()}
    kept: list[RunRecord] = []
    reasons: Reasons = {}
    for run in part:
        odd = {name: text for name, value in agreed(run).items() if (text := _text(value)) != usual[name]}
        if odd:
            name, text = next(iter(odd.items()))
            reasons.setdefault(f"{name[0]} is {text:.40}, of most others {usual[name]:.40}", []).append(run)
        else:
            kept.append(run)
    return kept, reasons


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
