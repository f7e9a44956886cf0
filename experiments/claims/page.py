"""docs/claims.md: every claim with its verdict beside the figures of its source, out of stored outcomes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path

from rlroute.errors import StoreError
from rlroute.experiments.claims.claim import BASES, RULE, Claim, Part, Tier
from rlroute.experiments.claims.ledger import CLAIMS, THEMES
from rlroute.experiments.claims.measures import MEASURES
from rlroute.experiments.claims.outcomes import Outcome, PartOutcome
from rlroute.experiments.terminal import Grid
from rlroute.experiments.text import NOTHING, markdown, si, three_digits
from rlroute.foreign import shown, why

TIERS: dict[Tier, str] = {"quick": "minutes on two cores", "long": "hours on two cores", "gpu": "a GPU"}
NOT_RUN, CHANGED = "not run", "changed since it was run"
PAGE = Path("docs/claims.md")
SPARE = ("source", "figures there", "tier", "n", "effect", "of")
"""What a terminal that is too narrow does without, in this order: an effect says nothing without what it is of."""
HEAD = """# Claims, and what they come to here

Made by `rlroute claims table` from `experiments/results/claims.jsonl`; `--check` fails where this page is not what the
outcomes give. Each claim is somebody's, with the figures printed there. What decides it here (settings, seeds, measure,
bounds) is data in `experiments/claims/`, written and hashed before the first run. *holds*, *refuted* and *inconclusive*
speak of these small models, this corpus and these budgets, and of nothing else: a claim that is refuted here may hold
where it was made. The direction decides unless a part says a number; the source's figures are for the eye.

```
rlroute claims list                     # all, with tier and published verdict
rlroute claims run 16 17                # train what these need (once, however many share it), and decide them
rlroute claims run --tier quick         # all that minutes on two cores decide; resumes after a kill
rlroute claims run 16 17 --check        # and hold what comes out against what is published
rlroute claims table --check            # whether this page is what the stored outcomes give
```

`claims run` registers each claim in the store (`claim-ID.json`: the claim, its arms' whole configurations, SHA-256 of
code and data, the runs that were there before) before the first run, and every run says under which plans it was
trained. What is refused by name: a registration that was changed after the first run, a claim that was changed since, a
run that is missing or edited, runs that differ in initial weights, batches or settings beyond what the claim says. A
value that is not defined for one seed (a run diverged) decides nothing. It writes `claims.jsonl` into `--out`: effect,
interval, value of every seed, cost, run ids, hashes.

`claims run --check` holds every outcome against the published one, and ends with a line for each difference and exit
code 1. Where both say that they were made by the same core of rlroute on the same kind of processor (name and
instruction set), with the same threads, PyTorch and NumPy, that is every verdict, effect, interval, value, n and cost,
bit for bit. Elsewhere figures are others, and a verdict at the edge of its interval may be: held are every verdict and
n, and every effect, which has to lie in the published interval (or within 1 % of the published effect). The command
says which of the two it was, and why.
Nobody can repeat what a clock measured: parts marked *timed* ({timed}),
what is decided by them, and the seconds of training are not held, and the command says so. `claims table --check
--results FILE` leaves the same aside, and the commit.
"""
KEY = (
    "Of: a claim's first part; effect, n: what was found of it, the mean over so many seeds and its 95 % t interval; "
    "paired by seed where arms are compared; the other parts are below. Figures there: those of the source. Cost: "
    "training FLOPs, and seconds of training and evaluation, of all runs of the claim, one core each, those included "
    "that other claims share."
)


def page(outcomes: Mapping[str, Outcome]) -> str:
    """Return the page."""
    count = {verdict: 0 for verdict in ("holds", "refuted", "inconclusive")}
    for outcome in outcomes.values():
        count[outcome["verdict"]] += 1
    said = f"{count['holds']} hold, {count['refuted']} are refuted, {count['inconclusive']} are inconclusive"
    blocks = [
        HEAD.format(timed=_timed()),
        f"Of {len(CLAIMS)} claims {len(outcomes)} have been run: {said}.{_where(outcomes)}\n",
        markdown(*summary(outcomes), sides="><<<<<><<"),
        f"\n{KEY}\n\nThe rule: {RULE}.\n\n{_bases()}\n",
    ]
    for title, claims in THEMES.items():
        blocks.append(f"## {title}\n")
        blocks += [_block(claim, outcomes.get(claim.id)) for claim in claims]
    return "\n".join(blocks).rstrip("\n") + "\n"


def differences(text: str, path: Path) -> list[str]:
    """Return where a page is not the one that outcomes give: its first line that differs.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        there = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise StoreError(f"page {path}: cannot be read: {why(error)}") from error
    for number, (one, other) in enumerate(zip_longest(there, text.splitlines()), 1):
        if one != other:
            return [f"{path}, line {number}: it says {shown(one)}, the outcomes give {shown(other)}"]
    return []


def line(outcome: Outcome, published: Outcome | None) -> str:
    """Return what was found of a claim in a line, and what is published."""
    beside = "" if published is None else f" (published: {published['verdict']})"
    parts = "; ".join(f"{part['says']}: {effect(part)}, {part['verdict']}" for part in outcome["parts"])
    return f"{outcome['claim']}. {CLAIMS[outcome['claim']].statement} {outcome['verdict']}{beside}\n    {parts}"


def claims_grid(outcomes: Mapping[str, Outcome], tier: str | None = None) -> Grid:
    """Return the list as a terminal shows it, of a tier or all."""
    (_, *head), lines = summary(outcomes)
    lines = [[f"{number}. {claim}", *others] for number, claim, *others in lines if tier in (None, others[0])]
    return Grid(head, lines, left=[title for title in head if title != "n"], spare=SPARE)


def summary(outcomes: Mapping[str, Outcome]) -> tuple[list[str], list[list[str]]]:
    """Return titles and lines of the list: of each claim its number, itself, and what it came to here."""
    lines = []
    for claim in CLAIMS.values():
        outcome = outcomes.get(claim.id)
        of, tells = (claim.parts[0].says if claim.parts else NOTHING), [NOTHING, NOTHING]
        if outcome is not None and outcome["parts"]:
            first = outcome["parts"][0]
            of, tells = first["says"], [effect(first), str(first["n"])]
        lines.append(
            [claim.id, claim.statement, claim.tier, state(claim, outcome), of, *tells, claim.anchor, claim.source]
        )
    return ["#", "claim", "tier", "here", "of", "effect", "n", "figures there", "source"], lines


def state(claim: Claim, outcome: Outcome | None) -> str:
    """Return a claim's verdict, or why it has none."""
    if outcome is not None:
        return outcome["verdict"] if outcome["sha256"] == claim.sha256 else CHANGED
    return "cannot be run yet" if claim.lacks else NOT_RUN


def _timed() -> str:
    """Return in which claims a clock is."""
    parts = {c.id: [n for n, part in enumerate(c.parts, 1) if MEASURES[part.measure].timed] for c in CLAIMS.values()}
    said = [f"claim {name}, part {' and '.join(map(str, numbers))}" for name, numbers in parts.items() if numbers]
    return "; ".join(said) or "none"


def _where(outcomes: Mapping[str, Outcome]) -> str:
    """Return at which commits and on what the runs were made."""
    if not outcomes:
        return ""
    runs: dict[str, set[str]] = {}  # a run that claims have in common is counted at each commit where it was trained
    for o in outcomes.values():
        where = f"at commit {_commit(o)} (torch {o['torch']}, {o['cpu_capability']}, {o['threads']} thread a run)"
        runs.setdefault(where, set()).update(o["runs"])
    return f" Made by {'; '.join(f'{len(ids)} runs {where}' for where, ids in runs.items())}."


def _commit(outcome: Outcome) -> str:
    return re.sub(r"([0-9a-f]{12})[0-9a-f]+", r"\1", outcome["commit"]) + " (changed)" * outcome["dirty"]


def _bases() -> str:
    said = []
    for tier, base in BASES.items():
        data, model, train = base
        said.append(
            f"{tier} ({TIERS[tier]}): {train.steps:,} steps of {train.batch_size * data.seq_len:,} tokens of "
            f"`{data.spec}`, {model.num_layers} layer(s) of width {model.d_model}, {model.num_experts} experts of "
            f"{model.d_expert}, k = {model.k}, learning rate {train.lr:g}"
        )
    return "Where a claim says nothing else: " + "; ".join(said) + "."


def _block(claim: Claim, outcome: Outcome | None) -> str:
    """Return what is said of a claim: statement, source, setting, parts."""
    lines = [
        f"### {claim.id}. {claim.statement}\n",
        f"- **Source**: {claim.source}: {claim.anchor}.",
        f"- **Tier**: {claim.tier}, {TIERS[claim.tier]}." + (f" rlroute lacks {claim.lacks}." if claim.lacks else ""),
    ]
    if claim.here:
        lines.append(f"- **Here**: {claim.here}.")
    if claim.arms:
        seeds = f"{len(claim.seeds)} seeds of each"
        equal = f"; all get the training FLOPs of {claim.equal_flops}" if claim.equal_flops else ""
        lines.append(f"- **Arms**: {'; '.join(_arms(claim))}; {seeds}{equal}.")
    lines.append(f"- **Verdict**: {state(claim, outcome)}." + ("" if outcome is None else f" {_paid(outcome)}"))
    if claim.parts:
        found = [None] * len(claim.parts) if outcome is None else outcome["parts"]
        rows = [_part(part, said) for part, said in zip(claim.parts, found, strict=True)]
        lines.append("\n" + markdown(["part", "measure", "bounds", "effect", "n", "reads"], rows, "<<<<><"))
    return "\n".join(lines) + "\n"


def _arms(claim: Claim) -> Iterable[str]:
    for name, arm in claim.arms.items():
        given = "".join(f", {field} {value}" for field, value in arm.given.items())
        yield f"{name} = `{arm.entry}`{given}"


def _part(part: Part, said: PartOutcome | None) -> list[str]:
    measure = MEASURES[part.measure]
    effect_of = NOTHING if said is None else effect(said)
    lacking = f" (undefined: {'; '.join(said['undefined'])})" if said and said["undefined"] else ""
    timed = ", timed" if measure.timed else ""
    return [
        part.says,
        f"{measure.what}: {_combined(part, measure.runs)}{timed}",
        bounds(part),
        effect_of + lacking,
        NOTHING if said is None else str(said["n"]),
        NOT_RUN if said is None else said["verdict"],
    ]


def _combined(part: Part, runs: int) -> str:
    """Return how arms count in a part."""
    if runs == 2:
        return " held against ".join(part.of)
    terms = [
        f"{'-' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} x '}{name}"
        for name, weight in part.of.items()
    ]
    return " ".join(terms).removeprefix("+ ")


def bounds(part: Part) -> str:
    """Return between what a part has the true value."""
    ends = [("above", part.above), ("below", part.below)]
    return ", ".join(f"{word} {value + 0:g}" for word, value in ends if value is not None)  # -0 is 0


def effect(said: PartOutcome) -> str:
    """Return a part's effect with its interval and unit, or what it is a number of."""
    if said["effect"] is None:
        return NOTHING
    ends = said["interval"]
    text = f"{said['effect']:+.4f}" + ("" if ends is None else f" ({ends[0]:+.4f} to {ends[1]:+.4f})")
    measure = MEASURES.get(said["measure"])
    return f"{text} {said['unit'] or (measure.scale if measure else '')}".rstrip()


def _paid(outcome: Outcome) -> str:
    """Return what a claim's runs took, and what else has to be said of them."""
    cost = outcome["cost"]
    text = f"{cost['runs']} runs at {_commit(outcome)}, {si(cost['training_flops'])}FLOPs"
    text += f", {three_digits(cost['seconds'])} s."
    if outcome["there_before"]:
        text += f" {outcome['there_before']} of them had ended before it was registered."
    return text + (f" Diverged: {', '.join(outcome['diverged'])}." if outcome["diverged"] else "")
