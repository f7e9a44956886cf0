"""From stored runs to what they say of a claim.

Every run that it needs must be there and sound, and differ from the others in what the claim says and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from rlroute.errors import ComparisonError
from rlroute.experiments.claims.claim import Claim, Part
from rlroute.experiments.claims.measures import MEASURES, values_of
from rlroute.experiments.claims.outcomes import Cost, Outcome, PartOutcome, interval_of
from rlroute.experiments.claims.probes import Sample
from rlroute.experiments.claims.readings import read, together
from rlroute.experiments.claims.registration import Registration
from rlroute.experiments.comparison.entries import Entry, check_comparable
from rlroute.experiments.verify.store import refuse_unsound
from rlroute.reading import read_run
from rlroute.schema import RunRecord


def collect(claim: Claim, store: Path) -> dict[str, list[RunRecord]]:
    """Return the runs of each arm, in the order of the seeds.

    Raises:
        ComparisonError: one is missing, was edited, or differs in more than the claim says.
        StoreError: one cannot be read.
    """
    runs: dict[str, list[RunRecord]] = {}
    for name, config in claim.configs().items():
        for seed in claim.seeds:
            folder = store / config.run_id(seed)
            if not (folder / "summary.json").exists():
                raise ComparisonError(
                    f"claim {claim.id}: seed {seed} of {name} is missing: {folder} holds no ended run"
                )
            runs.setdefault(name, []).append(read_run(folder))
    everyone = list({run.id: run for of_arm in runs.values() for run in of_arm}.values())
    refuse_unsound(everyone, f"claim {claim.id}: ")
    for part in claim.parts:  # what is subtracted must be comparable
        check_comparable([Entry(name, tuple(runs[name])) for name in part.of], claim.deliberate(part.of))
    return runs


def measure(claim: Claim, runs: Mapping[str, list[RunRecord]], store: Path) -> list[PartOutcome]:
    """Return what runs, by arm and in the order of the seeds, say of each part of a claim."""
    samples = {name: [Sample(run, store) for run in of_arm] for name, of_arm in runs.items()}
    return [_measure(part, claim, samples) for part in claim.parts]


def _measure(part: Part, claim: Claim, samples: Mapping[str, list[Sample]]) -> PartOutcome:
    by_seed, undefined = dict[str, float](), list[str]()
    for index, seed in enumerate(claim.seeds):
        value, lacking = values_of(MEASURES[part.measure], part.of, samples, index)
        if value is None or not math.isfinite(value):
            undefined.append(f"{lacking}, seed {seed}")
        else:
            by_seed[str(seed)] = value
    values = list(by_seed.values())
    effect, interval = interval_of(values)
    # The seeds that are left would leave out the worst: they decide nothing.
    verdict = read([] if undefined else values, part, len(claim.parts))
    said: Any = asdict(part) | {"of": dict(part.of), "unit": MEASURES[part.measure].unit}
    said |= {"effect": effect, "interval": interval, "n": len(values), "verdict": verdict}
    return cast(PartOutcome, said | {"values": by_seed, "undefined": undefined})


def outcome(claim: Claim, registration: Registration, store: Path) -> Outcome:
    """Return what a store's runs say of a claim.

    Raises:
        ComparisonError, StoreError: as :func:`collect` does.
    """
    runs = collect(claim, store)
    parts = measure(claim, runs, store)
    distinct = list({run.id: run for of_arm in runs.values() for run in of_arm}.values())
    here = distinct[0].environment
    return {
        "claim": claim.id,
        "sha256": claim.sha256,
        "verdict": together(part["verdict"] for part in parts),
        "parts": parts,
        "seeds": list(claim.seeds),
        "cost": cost(distinct),
        "runs": [run.id for run in distinct],
        "registration": registration["sha256"],
        "registered": registration["registered"],
        "there_before": len(registration["plan"]["there_before"]),
        "diverged": [run.id for run in distinct if run.summary["status"] == "diverged"],
        "core": distinct[0].config["made_from"]["core"],
        "commit": ", ".join(sorted({run.environment["commit"] or "unknown" for run in distinct})),
        "dirty": any(run.environment["dirty"] for run in distinct),
        "torch": here["torch"],
        "numpy": here["numpy"],
        "cpu_capability": here["cpu_capability"],
        "threads": here["threads"],
        "device": here["device"],
        "device_name": here["device_name"],
    }


def cost(runs: list[RunRecord]) -> Cost:
    """Return what runs took: how many, tokens, training FLOPs, seconds of training and evaluation."""
    return {
        "runs": len(runs),
        "tokens": sum(run.summary["tokens"] for run in runs),
        "training_flops": sum(run.summary["model"].get("training_flops", 0) for run in runs),
        "seconds": round(math.fsum(sum(run.summary["seconds"].values()) for run in runs), 1),
    }
