"""What a judgement has found: as lines for a reader, and as plain values for a program."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.experiments.comparison.entries import Entry
from rlroute.experiments.comparison.frames import Library, to_frame
from rlroute.experiments.comparison.marks import marks
from rlroute.experiments.comparison.notes import diverged
from rlroute.experiments.comparison.registration import Registration
from rlroute.experiments.statistics import Interval, differences
from rlroute.experiments.text import si
from rlroute.experiments.verdicts import Verdict
from rlroute.schema import Amount, Name, Number, Part, RunRecord, Whole

VERSION = 1
"""Of the fields of judgement.json."""
SAME = "the candidate is the reference, configuration and code: the same runs stand for both"
KNOWN = (
    "runs were there before it was registered: margin, looks and reference may have been chosen by what they came to"
)
EXACT = "every difference is exactly 0: both entries computed the same, and nothing is left to test"


class Seen(TypedDict):
    """A look; effect and intervals in bits per byte."""

    n: Whole
    """Seeds."""
    level: Part
    """The look's share of the probability of a wrong verdict."""
    effect: Number
    """The mean difference, candidate minus reference: below 0 is better."""
    interval: list[Number | None]
    """The ends of its interval that is held against 0."""
    equivalence_interval: list[Number | None]
    """The ends of the one that is held against the margin."""
    verdict: str
    """What both say."""


class Spent(TypedDict):
    """What all runs took, those that were there before included."""

    runs: Whole
    """How many."""
    runs_there_before: Whole
    """How many had ended before the judgement was registered."""
    tokens: Whole
    """Of training."""
    training_flops: Number
    """Of all steps."""
    seconds: Amount
    """Of training and of evaluation, one run after the other."""


class Judged(TypedDict):
    """judgement.json, which ``judge`` writes into ``--out``."""

    version: Whole
    """Of these fields."""
    candidate: str
    """What the candidate is called."""
    reference: str
    """What the reference is called."""
    verdict: str
    """The last look's, or unresolved where a run diverged."""
    there_before: Whole
    """How many runs had ended before the judgement was registered, so that their results could be known."""
    said: str
    """The verdict, with these runs where there are any."""
    direction: Literal["better", "worse"] | None
    """Of the verdict; None where the interval does not leave 0 outside."""
    equivalent: bool
    """Whether the verdict says so."""
    margin: Amount
    """Differences below it do not matter, in bits per byte."""
    effect: Number | None
    """Of the last look, as the fields that follow; None where there was no look."""
    interval: list[Number | None] | None
    """The ends of its interval that is held against 0."""
    equivalence_interval: list[Number | None] | None
    """The ends of the one that is held against the margin."""
    n: Whole | None
    """Seeds."""
    differences: dict[str, Number]
    """Candidate minus reference in bits per byte, by seed, where both finished."""
    looks: list[Seen]
    """Those that were taken."""
    cost: Spent
    """Of all runs."""
    notes: list[str]
    """What has to be said beside the verdict."""
    runs: list[Name]
    """The ids of all runs, the reference's first."""
    command: str | None
    """The command line behind it."""
    registration: Registration
    """What was said before the first run."""


@dataclass(frozen=True)
class Look:
    """What was seen after so many seeds.

    Attributes:
        against_0: the mean difference, with the interval that is held against 0.
        within: the same, with the one that is held against the margin.
        level: the look's share of the probability of a wrong verdict.
        verdict: what both say.
    """

    against_0: Interval
    within: Interval
    level: float
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.against_0.n} seeds: {self.against_0.mean:+.4f} ({_ends(self.against_0)}), {self.verdict}"

    def to_dict(self) -> Seen:
        """Return plain values."""
        return {
            "n": self.against_0.n,
            "level": self.level,
            "effect": self.against_0.mean,
            "interval": _pair(self.against_0),
            "equivalence_interval": _pair(self.within),
            "verdict": str(self.verdict),
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Judgement:
    """A judgement, which ends with the first look that resolves it, with the last one, or with a run that diverged.

    Attributes:
        registration: what was said before the first run.
        file: where.
        command: the command line behind it.
        candidate, reference: the entries' runs.
        looks: those that were taken.
    """

    registration: Registration
    file: Path
    command: str | None = None
    candidate: Entry | None = None
    reference: Entry | None = None
    looks: tuple[Look, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The last look's; unresolved where a run diverged."""
        unresolved = Verdict(None, False, self.registration["plan"]["margin"])
        return unresolved if self.diverged or not self.looks else self.looks[-1].verdict

    @property
    def there_before(self) -> int:
        """How many of its runs had ended before it was registered, so that their results could be known."""
        return len({run.id for run in self.runs} & set(self.registration["plan"]["there_before"]))

    @property
    def said(self) -> str:
        """The verdict, with the runs that were there before it was registered, where there are any."""
        known = f" ({self.there_before} of {len(self.runs)} runs were there before it was registered)"
        return f"{self.verdict}{known if self.there_before else ''}"

    @property
    def entries(self) -> dict[str, Entry]:
        """The entries by what they are called; one where both are the same."""
        plan = self.registration["plan"]
        found = {plan["reference"]["label"]: self.reference, plan["candidate"]["label"]: self.candidate}
        return {label: entry for label, entry in found.items() if entry is not None}

    @property
    def runs(self) -> list[RunRecord]:
        """All runs, each once."""
        return [run for entry in self.entries.values() for run in entry.runs]

    @property
    def diverged(self) -> list[str]:
        """Which entries diverged, and where."""
        return [
            diverged(Entry(label, entry.runs))
            for label, entry in self.entries.items()
            if len(entry.finished) < len(entry.runs)
        ]

    @property
    def differences(self) -> dict[int, float]:
        """Candidate minus reference by seed, where both finished."""
        if self.candidate is None or self.reference is None:
            return {}
        one, other = self.candidate.bits_by_seed, self.reference.bits_by_seed
        seeds = sorted(one.keys() & other.keys())
        return dict(zip(seeds, differences({s: one[s] for s in seeds}, {s: other[s] for s in seeds}), strict=True))

    @property
    def cost(self) -> Spent:
        """What all runs took, those that were there before included: runs, tokens, training FLOPs, seconds of training
        and of evaluation.
        """
        seconds = (sum(run.summary["seconds"].values()) for run in self.runs)
        return {
            "runs": len(self.runs),
            "runs_there_before": self.there_before,
            "tokens": sum(run.summary["tokens"] for run in self.runs),
            "training_flops": sum(run.summary["model"].get("training_flops", 0) for run in self.runs),
            "seconds": math.fsum(seconds),
        }

    @property
    def notes(self) -> list[str]:
        """What has to be said beside the verdict."""
        plan = self.registration["plan"]
        said = [f"diverged: {line}" for line in self.diverged]
        if self.there_before:
            said.append(KNOWN)
        if plan["candidate"]["config"] == plan["reference"]["config"]:
            said.append(SAME)
        elif self.looks and not any(self.differences.values()):
            said.append(EXACT)
        for label, entry in self.entries.items():
            said += [f"measured: {label} {mark} ({figures})" for mark, figures in marks(entry.runs).items()]
        return said

    def to_dict(self) -> Judged:
        """Return plain values: what judgement.json holds."""
        plan, last = self.registration["plan"], self.looks[-1].to_dict() if self.looks else None
        return {
            "version": VERSION,
            "candidate": plan["candidate"]["label"],
            "reference": plan["reference"]["label"],
            "verdict": str(self.verdict),
            "there_before": self.there_before,
            "said": self.said,
            "direction": self.verdict.direction,
            "equivalent": self.verdict.equivalent,
            "margin": plan["margin"],
            "effect": last and last["effect"],
            "interval": last and last["interval"],
            "equivalence_interval": last and last["equivalence_interval"],
            "n": last and last["n"],
            "differences": {str(seed): difference for seed, difference in self.differences.items()},
            "looks": [look.to_dict() for look in self.looks],
            "cost": self.cost,
            "notes": self.notes,
            "runs": [run.id for run in self.runs],
            "command": self.command,
            "registration": self.registration,
        }

    def frame(self, library: Library | None = None) -> Any:
        """Return a row for each seed that both entries finished: their bits per byte, and the difference.

        Args:
            library: polars or pandas; whichever is installed, polars first, if nothing is said.

        Raises:
            MissingDependencyError: it is not installed.
        """
        one, other = (entry.bits_by_seed if entry else {} for entry in (self.candidate, self.reference))
        rows = [
            {"seed": seed, "candidate": one[seed], "reference": other[seed], "difference": difference}
            for seed, difference in self.differences.items()
        ]
        return to_frame(rows, library)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join(f"{title:<13} {text}" if title else text for title, text in self._lines())

    def _lines(self) -> Iterable[tuple[str, str]]:
        plan = self.registration["plan"]
        yield "", f"{plan['candidate']['label']} against {plan['reference']['label']}: {self.said}"
        if self.looks:
            last = self.looks[-1]
            confidence = f"{1 - plan['level']:.0%} over all looks"
            yield (
                "effect",
                f"{last.against_0.mean:+.4f} bits per byte (below 0 is better), n = {last.against_0.n} seeds",
            )
            yield "interval", f"{_ends(last.against_0)}, {confidence}"
            yield "equivalence", f"{_ends(last.within)}, each end {confidence}, margin {plan['margin']:g}"
        yield "cost", _cost(self.cost)
        yield "registration", f"SHA-256 {self.registration['sha256']} in {self.file}"
        for note in self.notes:
            yield "note", note


def _pair(interval: Interval) -> list[float | None]:
    """Return the ends of an interval as a list."""
    return [interval.low, interval.high]


def _ends(interval: Interval) -> str:
    return f"{interval.low:+.4f} to {interval.high:+.4f}"


def _cost(cost: Spent) -> str:
    before = f" ({cost['runs_there_before']} there before)" if cost["runs_there_before"] else ""
    return (
        f"{cost['runs']} runs{before}, {si(cost['tokens'])} tokens, {si(cost['training_flops'])} training FLOPs, "
        f"{cost['seconds']:,.0f} s of training and evaluation"
    )
