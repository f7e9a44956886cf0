"""What a run's routers were measured to do that its table's figures do not tell by themselves: pure functions of a
summary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, zip_longest
from operator import and_
from typing import Any

from rlroute.schema import Measured, RunRecord

SHARE_OF_ROUTER, SHARE_OF_MODEL = 0.01, 0.001
"""Measured FLOPs differ from booked ones where they do by more than both shares."""
MODES = ("evaluation", "training")
TRAINING = " in training"


def marks(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return what to mark an entry with, and the figures behind it: those of the first run that shows it."""
    found: dict[str, str] = {}
    for run in runs:
        measured = run.summary.get("measured")
        if measured is not None:
            for mark, said in _marks(measured, run.config["config"]["model"]["k"], run.summary["model"]):
                found.setdefault(mark, said)
    # What is so in evaluation need not be said of training.
    return {mark: said for mark, said in found.items() if mark.removesuffix(TRAINING) not in found.keys() - {mark}}


def _marks(measured: Measured, k: int, model: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield from _leaks(measured)
    for mode in MODES:
        where = _where(mode)
        if (most := max(_mode(measured, mode)["pairs_L"], default=0)) >= k + 0.005:
            yield f"runs {most:.2f} experts where k = {k}{where}", "pairs per token at the worst site"
    yield from _flops(measured, model["flops_per_token"])


def _leaks(measured: Measured) -> Iterable[tuple[str, str]]:
    """Say what a token depends on that it may not, worst first: an earlier mark stands for the later ones."""
    causal_L, two_L = measured["causal_L"], measured.get("two_rules_L", [])
    for mode in MODES:
        where = _where(mode)
        # What a router says of its greedy route it need not say of a rule that only training has.
        mine_L = [said and not (mode == "training" and two) for said, two in zip_longest(causal_L, two_L)]
        said_L = accumulate(mine_L, and_)  # behind a router that is not causal, nobody can be
        if not _mode(measured, mode)["repeats"]:
            yield f"not repeatable{where}", f"the same tokens are routed otherwise a second time in {mode}"
            continue  # whatever it depends on cannot be told
        later, others = _mode(measured, mode)["later"], _mode(measured, mode)["others"]
        undeclared = [share for share, said in zip(later["routes_L"], said_L, strict=True) if said]
        if worst := max(undeclared, default=0):
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
        elif mode == "evaluation" and not all(measured["causal_L"]):
            yield "measured causal", "no route changes with later tokens, though it says that it is not causal"
        if others and (worst := max([*others["routes_L"], *others["drops_L"], others["outputs"]])):
            yield f"mixes sequences{where}", f"other sequences change {worst:.1%} of routes, drops or outputs in {mode}"


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
        yield "FLOPs not countable", f"its router runs {', '.join(foreign)}"
    if any(flops["elementwise_L"]):
        yield "elementwise router", "its router's elementwise work is more than a norm's, and counted in its FLOPs"
