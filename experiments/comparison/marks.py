"""What a run's routers were measured to do that its table's figures do not tell by themselves: pure functions of a
record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, zip_longest
from operator import and_
from typing import Any

from rlroute.schema import EvalRow, Measured, RunRecord, TrainRow

SHARE_OF_ROUTER, SHARE_OF_MODEL = 0.01, 0.001
"""Measured FLOPs differ from booked ones where they do by more than both shares."""
MODES = ("evaluation", "training")
TRAINING, EARLIER = " in training", " as of step "


def marks(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return what to mark an entry with, and the figures behind it: those of the first run that shows it."""
    found: dict[str, str] = {}
    for run in runs:
        measured = run.summary.get("measured")
        if measured is not None:
            for mark, said in _marks(measured, run):
                found.setdefault(mark, said)
    return {mark: said for mark, said in found.items() if not found.keys() & _broader(mark)}


def _broader(mark: str) -> set[str]:
    """Return the marks beside which one need not be said: what is so in evaluation, of training; what is so at the end,
    of earlier steps.
    """
    return {mark.replace(TRAINING, ""), (last := mark.partition(EARLIER)[0]), last.removesuffix(TRAINING)} - {mark}


def _marks(measured: Measured, run: RunRecord) -> Iterable[tuple[str, str]]:
    yield from _leaks(measured)
    rows: dict[str, Sequence[EvalRow | TrainRow]] = {"evaluation": run.evals, "training": run.train}
    for mode in MODES:
        yield from _pairs(_mode(measured, mode)["pairs_L"], rows[mode], run.config["config"]["model"]["k"], mode)
    yield from _flops(measured, run.summary["model"]["flops_per_token"])


def _pairs(
    pairs_L: Sequence[float], rows: Sequence[EvalRow | TrainRow], k: int, mode: str
) -> Iterable[tuple[str, str]]:
    """Say how many pairs ran at most, in the audit or in any row."""
    most_N = [max(row.get("pairs_L", ()), default=0) for row in rows]
    most = max([max(pairs_L, default=0), *most_N])
    if most >= k + 0.005:
        over = sum(pairs >= k + 0.005 for pairs in most_N)
        said = f"pairs per token at the worst site; more than k in {over} of {len(rows)} rows of {mode}"
        yield f"runs {most:.2f} experts where k = {k}{_where(mode)}", said


def _leaks(measured: Measured) -> Iterable[tuple[str, str]]:
    """Say what a token depends on that it may not, worst first: an earlier mark stands for the later ones."""
    causal_L, two_L = measured["causal_L"], measured.get("two_rules_L", [])
    for mode in MODES:
        where = _where(mode)
        # What a router says of its greedy route it need not say of a rule that only training has.
        mine_L = [said and not (mode == "training" and two) for said, two in zip_longest(causal_L, two_L)]
        said_L = list(accumulate(mine_L, and_))  # behind a router that is not causal, nobody can be
        if not _mode(measured, mode)["repeats"]:
            yield f"not repeatable{where}", f"the same tokens are routed otherwise a second time in {mode}"
            continue  # whatever it depends on cannot be told
        later, others = _mode(measured, mode)["later"], _mode(measured, mode)["others"]
        if worst := max(_where_said(later["routes_L"], said_L), default=0):
            yield (
                f"reads later tokens{where}",
                f"{worst:.1%} of routes change with later tokens in {mode}, though it says that it is causal",
            )
        elif worst := max(later["routes_L"], default=0):
            outputs = f"{later['outputs']:.1%} of outputs"
            yield f"non-causal{where}", f"{worst:.1%} of routes and {outputs} change with later tokens in {mode}"
        elif worst := max(later["drops_L"], default=0):
            yield f"capacity not causal{where}", f"later tokens change what {worst:.1%} of tokens drop in {mode}"
        elif worst := later["outputs"]:
            yield f"outputs read later tokens{where}", f"{worst:.1%} of outputs change with later tokens in {mode}"
        elif mode == "evaluation" and not all(measured["causal_L"]) and not any(chain(*later.get("routes_ML", ()))):
            yield "measured causal", "no route changes with later tokens, though it says that it is not causal"
        if others and (worst := max([*others["routes_L"], *others["drops_L"], others["outputs"]])):
            yield f"mixes sequences{where}", f"other sequences change {worst:.1%} of routes, drops or outputs in {mode}"
        yield from _earlier(_mode(measured, mode), said_L, where)


def _earlier(found: Any, said_L: Sequence[bool], where: str) -> Iterable[tuple[str, str]]:
    """Say whom the routes of a mode depend on as of earlier steps."""
    later_ML, others_ML = found["later"].get("routes_ML", ()), (found["others"] or {}).get("routes_ML", ())
    for step, later_L, others_L in zip_longest(found.get("steps_M", ()), later_ML, others_ML, fillvalue=()):
        when = f"{where}{EARLIER}{step}"
        if worst := max(_where_said(later_L, said_L), default=0):
            said = "of routes change with later tokens, though it says that it is causal"
            yield f"reads later tokens{when}", f"{worst:.1%} {said}"
        elif worst := max(later_L, default=0):
            yield f"non-causal{when}", f"{worst:.1%} of routes change with later tokens"
        if worst := max(others_L, default=0):
            yield f"mixes sequences{when}", f"other sequences change {worst:.1%} of routes"


def _where_said(shares_L: Sequence[float], said_L: Sequence[bool]) -> list[float]:
    """Return the shares of the sites that are said to be causal."""
    return [share for share, said in zip(shares_L, said_L, strict=True) if said]


def _where(mode: str) -> str:
    return "" if mode == "evaluation" else TRAINING


def _mode(measured: Measured, mode: str) -> Any:
    return measured["training" if mode == "training" else "evaluation"]


def _flops(measured: Measured, flops_per_token: int) -> Iterable[tuple[str, str]]:
    flops = measured["flops"]
    for booked, ran, declared in zip(flops["booked_L"], flops["measured_L"], flops["declared_L"], strict=True):
        for mode, one, other in (
            ("a greedy forward", booked["greedy"], ran["greedy"]),
            ("a training step", booked["training"], ran["training"]),
        ):
            if abs(one - other) > max(SHARE_OF_ROUTER * one, SHARE_OF_MODEL * flops_per_token):
                yield "FLOPs not as booked", f"its router was booked {one:,} per token of {mode} and ran {other:,}"
        if declared is not None and abs(declared - ran["greedy"]) > SHARE_OF_ROUTER * ran["greedy"]:
            kind = "understates" if declared < ran["greedy"] else "overstates"
            said = f"its router says {declared:,} per token, {ran['greedy']:,} were measured and booked"
            yield f"{kind} its FLOPs", said
    if foreign := sorted({name for names in flops["foreign_L"] for name in names}):
        yield "FLOPs not countable", f"its router runs {', '.join(foreign)}, behind which nothing is counted"
    if any(flops["elementwise_L"]):
        yield "elementwise router", "its router's elementwise work is more than a norm's, and counted in its FLOPs"
