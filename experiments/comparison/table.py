"""The table of a comparison: reduce entries to rows, with what has to be said underneath. A pure function of run
records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import sub

import torch
from torch import Tensor

from rlroute.config import DENSE
from rlroute.errors import ComparisonError
from rlroute.experiments.comparison.entries import Entry, check_comparable, make_entries
from rlroute.experiments.comparison.ladder_file import Ladder
from rlroute.experiments.comparison.marks import marks
from rlroute.experiments.comparison.multipliers import Multiplier
from rlroute.experiments.comparison.notes import (
    budget,
    deliberate,
    diverged,
    gates,
    identity,
    measured,
    provenance,
    settings,
    starts,
    training_set,
    tuning_trials,
    verdicts,
)
from rlroute.experiments.comparison.regrets import bits_of_regret, note, regrets
from rlroute.experiments.recipes.tuned import settings_of
from rlroute.experiments.statistics import (
    HOLM,
    Interval,
    differences,
    holm,
    paired_p_value,
    smallest_resolvable,
    t_interval,
)
from rlroute.experiments.text import of_interval
from rlroute.experiments.verdicts import MARGIN, Verdict, verdict
from rlroute.metrics import gini, min_over_max
from rlroute.schema import EvalRow, RunRecord


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """The figures of one entry; None where there is nothing to say. Bits per byte are greedy unless they say
    sampled.
    """

    label: str
    router: str
    gate_form: str
    causal: bool
    n: int
    diverged: int
    bits_per_byte: Interval | None
    difference: Interval | None
    sample_noise: float | None
    """How far another sample of as many validation tokens would move the difference, half a 95% interval; None in
    records that do not have the loss of each window.
    """
    verdict: Verdict | None
    """Of the difference; None of the reference."""
    p_holm: float | None
    smallest_resolvable: float | None
    max_vio: float | None
    max_vio_site: str | None
    """The key of the routed site at which it is reached."""
    gini: float | None
    """Of the loads, at the worst site: 0 is balance."""
    min_over_max: float | None
    """The lowest load over the highest, at the worst site: 1 is balance."""
    pairs_per_token: float | None
    """Pairs that ran, mean over sites; None in the dense model and in records that do not say."""
    pairs_differ: bool
    """Whether they are not k at every site."""
    without_expert: float | None
    """The share of tokens for which no expert ran, at the worst site."""
    dead_experts: float | None
    experts: int
    sampled_bits_per_byte: Interval | None
    overlap: float | None
    """Share of a token's greedy experts that are drawn too."""
    regret: Interval | None
    """How many bits per byte the best routes of equal compute through the last layer would save; None in records that
    do not say, or where there is none: see :mod:`rlroute.training.regret`.
    """
    better_routes: float | None
    """The share of other routes with a lower loss than the one taken, where all were tried."""
    compute_multiplier: Multiplier | None
    """How much more compute the reference needs for the same loss, where a ladder of the store says it."""
    tokens_per_second: float | None
    active_parameters: int
    total_parameters: int
    flops_per_token: int
    training_only_flops_per_token: int
    settings: str
    """At which it stands: see :func:`rlroute.experiments.recipes.tuned.settings_of`."""
    marks: str
    """What was measured of it that its figures do not tell."""
    config_hash: str

    @property
    def tuned(self) -> bool:
        """Whether the committed grid found its settings, or those of the entry of which it is a variant."""
        return self.settings.startswith("tuned")

    @property
    def found(self) -> bool:
        """Whether its difference holds when corrected for all comparisons (Holm)."""
        return self.p_holm is not None and self.p_holm < HOLM


@dataclass(frozen=True)
class Table:
    """Rows from best to worst, the label of the entry that differences are taken to, the margin of equivalence, and
    titled notes to print underneath.
    """

    reference: str
    margin: float
    rows: tuple[TableRow, ...]
    notes: tuple[tuple[str, str], ...]


def build_table(
    records: Sequence[RunRecord],
    reference: str | None = None,
    left_out: Sequence[str] = (),
    margin: float = MARGIN,
    ladder: Ladder | None = None,
) -> Table:
    """Return the table of ``records``, whatever their order.

    Args:
        records: finished and diverged runs.
        reference: label of the entry to take differences to; by default ``switch``, or the first by name where it is
            missing.
        left_out: what other runs there are, and why they are not here; said under the table.
        margin: the difference below which entries are equivalent, in bits per byte, above 0.
        ladder: the one of the run store, which has compute multipliers.

    Raises:
        ComparisonError: the runs are not comparable (the message names field, runs and values), or there is no such
            reference.
    """
    entries = make_entries(records)
    check_comparable(entries)
    base = _reference(entries, reference)
    adjusted = holm(_p_values(entries, base))
    rows = sorted((_row(entry, base, adjusted, margin, ladder) for entry in entries), key=_rank)
    return Table(base.label, margin, tuple(rows), tuple(_notes(entries, base, rows, adjusted, left_out, margin)))


def _reference(entries: Sequence[Entry], name: str | None) -> Entry:
    if name is None:
        return next((entry for entry in entries if entry.router == "switch"), entries[0])
    named = [entry for entry in entries if entry.label == name]
    named = named or [entry for entry in entries if entry.label.partition(" ")[0] == name]
    if len(named) == 1:
        return named[0]
    raise ComparisonError(
        f"reference {name!r} is not in the table: legal are {', '.join(entry.label for entry in entries)}"
    )


# What is computed


def _row(entry: Entry, base: Entry, adjusted: Mapping[str, float], margin: float, ladder: Ladder | None) -> TableRow:
    runs, finals, first = entry.finished, entry.finals, entry.runs[0]
    bits = list(entry.bits_by_seed.values())
    diffs = [] if entry is base else paired(entry, base)
    vios = _by_site(entry, [final["max_vio_L"] for final in finals])
    ginis, spans = (
        _by_site(entry, [_of_loads(measure, final) for final in finals]) for measure in (gini, min_over_max)
    )
    regret, shares = bits_of_regret(runs), [found["better"] for found in regrets(runs)]
    pairs = _by_site(entry, [final["pairs_L"] for final in finals if "pairs_L" in final])
    without = _by_site(entry, [final["without_L"] for final in finals if "without_L" in final])
    speeds = [speed for run in runs if (speed := run.summary["tokens_per_second"]) is not None]
    sampled = [final["sampled"]["bits_per_byte"] for final in finals if final["sampled"]]
    overlaps = [share for f in finals if f["sampled"] for share in f["sampled"]["overlap_L"] if share is not None]
    k = first.config["config"]["model"]["k"]
    return TableRow(
        label=entry.label,
        router=entry.router,
        gate_form="none" if entry.router == DENSE else first.summary["gate"]["form"],
        causal=first.summary["causal"],
        n=len(runs),
        diverged=len(entry.runs) - len(runs),
        bits_per_byte=t_interval(bits) if bits else None,
        difference=t_interval(diffs) if diffs else None,
        sample_noise=None if entry is base else sample_noise(entry, base),
        verdict=None if entry is base else verdict(diffs, margin),
        p_holm=adjusted.get(entry.label),
        smallest_resolvable=smallest_resolvable(diffs),
        max_vio=max(vios.values(), default=None),
        max_vio_site=max(vios, key=lambda site: vios[site], default=None),
        gini=max(ginis.values(), default=None),
        min_over_max=min(spans.values(), default=None),
        pairs_per_token=_mean(list(pairs.values())),
        pairs_differ=any(abs(number - k) >= 0.005 for number in pairs.values()),
        without_expert=max(without.values(), default=None),
        dead_experts=_mean([sum(final["dead_L"]) for final in finals]) if entry.sites else None,
        experts=sum(len(load_E) for load_E in finals[0]["load_LE"]) if finals else 0,
        sampled_bits_per_byte=t_interval(sampled) if sampled else None,
        overlap=_mean(overlaps),
        regret=t_interval(regret) if regret else None,
        better_routes=_mean([share for share in shares if share is not None]),
        compute_multiplier=ladder.multiplier(first.config["config"], base.runs[0].config["config"]) if ladder else None,
        tokens_per_second=_mean(speeds),
        active_parameters=first.summary["model"]["active_parameters"],
        total_parameters=first.summary["model"]["total_parameters"],
        flops_per_token=first.summary["model"]["flops_per_token"],
        training_only_flops_per_token=first.summary["model"]["training_only_flops_per_token"],
        settings=settings_of(first.config["config"]),
        marks=", ".join(marks(entry.runs)),
        config_hash=first.config["config_hash"],
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _by_site(entry: Entry, runs: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """Return means over runs by site, of the sites that have values: nothing chosen has no MaxVio."""
    means = (_mean([value for value in values if value is not None]) for values in zip(*runs, strict=True))
    return {str(site): mean for site, mean in zip(entry.sites, means, strict=bool(runs)) if mean is not None}


def _of_loads(measure: Callable[[Tensor], Tensor], final: EvalRow) -> list[float | None]:
    """Return a measure of the loads by site; None where nothing was chosen."""
    return [float(measure(torch.tensor(load_E))) if any(load_E) else None for load_E in final["load_LE"]]


def paired(entry: Entry, base: Entry) -> list[float]:
    """Return the differences over the seeds that both finished."""
    both = entry.bits_by_seed.keys() & base.bits_by_seed.keys()
    return differences(*({seed: e.bits_by_seed[seed] for seed in both} for e in (entry, base)))


def sample_noise(entry: Entry, base: Entry) -> float | None:
    """Return how far another sample of as many validation windows would move the difference of two entries' losses, in
    bits per byte: half the 95 % t interval of the windows' mean difference, each the mean over the seeds that both
    finished. Intervals over seeds hold the windows fixed, and leave it out.
    """
    both = entry.final_by_seed.keys() & base.final_by_seed.keys()
    pairs = [(entry.final_by_seed[seed], base.final_by_seed[seed]) for seed in sorted(both)]
    if not pairs or not all("nats_W" in final for pair in pairs for final in pair):
        return None
    by_window = zip(*(map(sub, one["nats_W"], other["nats_W"]) for one, other in pairs), strict=True)
    half = t_interval([math.fsum(window) / len(pairs) for window in by_window]).half_width
    # All finals are of the same text: of as many bytes a window.
    one = pairs[0][0]
    return None if half is None else half * one["bits_per_byte"] * len(one["nats_W"]) / math.fsum(one["nats_W"])


def _p_values(entries: Sequence[Entry], base: Entry) -> dict[str, float]:
    found = {entry.label: paired_p_value(paired(entry, base)) for entry in entries if entry is not base}
    return {label: p for label, p in found.items() if p is not None}


def _without(row: TableRow) -> str:
    return f"{row.label} {row.without_expert:.2%}"


def _rank(row: TableRow) -> tuple[float, str]:
    return (math.inf if row.bits_per_byte is None else row.bits_per_byte.mean, row.label)


# What stands under the table


def _notes(
    entries: Sequence[Entry],
    base: Entry,
    rows: Sequence[TableRow],
    adjusted: Mapping[str, float],
    left_out: Sequence[str],
    margin: float,
) -> Iterable[tuple[str, str]]:
    runs = [run for entry in entries for run in entry.runs]
    yield "Left out", "; ".join(left_out)
    yield "No comparison", tuning_trials(runs)
    yield "Diverged", "; ".join(diverged(entry) for entry in entries if len(entry.finished) < len(entry.runs))
    yield (
        "Sampled",
        "; ".join(
            f"{row.label} {of_interval(row.sampled_bits_per_byte)} bits/byte when its experts are drawn as in training"
            + (f" ({row.overlap:.0%} of them the greedy ones)" if row.overlap is not None else "")
            for row in rows
            if row.sampled_bits_per_byte
        ),
    )
    yield "Regret", note(entries)
    yield "Measured", "; ".join(measured(entries))
    yield "Training tokens", "; ".join(training_set(entries))
    yield "Tokens without an expert", "; ".join(_without(row) for row in rows if row.without_expert)
    yield "Settings", settings({row.label: row.settings for row in rows})
    yield "Verdicts", verdicts(base.label, margin) if len(rows) > 1 else ""
    noise = ", ".join(f"{row.label} ± {row.sample_noise:.4f}" for row in rows if row.sample_noise is not None)
    yield (
        f"Sample of validation tokens (in no interval above: how far another one would move a difference to "
        f"{base.label}, 95%)",
        noise,
    )
    holm_p = ", ".join(f"{row.label} {adjusted[row.label]:.3g}" for row in rows if row.label in adjusted)
    yield f"Holm-adjusted p (secondary; paired t-tests against {base.label})", holm_p
    yield "Starts from", "; ".join(starts(entries))
    yield "Deliberate differences", "; ".join(deliberate(entries))
    yield "Gate form own", "; ".join(gates(entries))
    yield (
        "Gate unit",
        "value 1/k, gradient of the router's own gate" if any(row.gate_form == "unit" for row in rows) else "",
    )
    yield "Budget", budget(runs)
    yield from identity(runs)
    yield from provenance(runs)
