"""What a trained model's routers really do, measured on validation tokens at the end of a run: how many pairs run, whom
a token's route and output depend on, what the routers compute, and what the best routes would have saved
(:mod:`.regret`); and what they say of themselves.

Tokens are changed, and what should not depend on them is compared with what it was: the rows before a change in the
same sequence, and all rows of other sequences. Each routed site is handed the unchanged rows bit by bit as they were
before, however other tokens were routed: a matrix product over other rows may round otherwise, and a near tie would
then flip. So a choice that changes is the router's doing (or the capacity's). Gates, which may be sums in another
order, are compared to 100 units in the last place, and outputs to half of their digits.

A router's context tells it the step, and so that the run is at its end. So the routers, and nothing but them, decide
once more on all that they were given as if it were the first step, and as if it were the middle one.

Nothing is changed by it: neither the model nor a record nor a generator.

Shape suffixes: T rows (of all routing samples), B sequences, S sequence length, D model width, E experts, L routed
sites, M earlier moments.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlroute import seeding
from rlroute.decision import RoutingDecision
from rlroute.model import Transformer
from rlroute.model.accounting import Costs
from rlroute.model.checks import checked
from rlroute.model.compiling import set_compiled
from rlroute.model.moe import ask
from rlroute.model.work import Work, measure
from rlroute.routing import Router, RoutingContext
from rlroute.schema import Dependence, Measured, MeasuredFlops, MeasuredMode, RouterFlops
from rlroute.training.batches import EVAL_SEQUENCES, Batch
from rlroute.training.regret import regret
from rlroute.training.step import Device, forward, make_context

UNSEEN = EVAL_SEQUENCES // 2
"""Ids of the audit's sequences begin so far behind those of training, or of evaluation: no router has met them."""
CHANGES = ("later", "next", "last", "swapped")
"""How tokens behind a position are changed: all of them, the next one, the last one, or for another sequence's."""
PLACES, ROUNDS = 32, 8
"""So many times a token's successor is changed, in at most so many rounds of all changes: who reads it now and then is
found.
"""


# One forward and what it shows


@dataclass(eq=False)
class Trace:
    """What a forward showed, by routed site: what its router was given, what it answered (first as of now, then as of
    each earlier moment), and what ran of it; and the hidden states that the logits are made of.
    """

    x_L: list[Tensor] = field(default_factory=list)
    contexts_L: list[RoutingContext] = field(default_factory=list)
    chosen_ML: list[list[RoutingDecision]] = field(default_factory=lambda: [[]])
    ran_L: list[RoutingDecision] = field(default_factory=list)
    out_TD: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Audit:
    """The passes over a model in one mode.

    Args:
        model: the trained model.
        batch: of a micro-batch's size, as training and evaluation have it.
        device: where it runs.
        keys: of the contexts: seed, step, ``explore`` and so on.
        samples: routing samples.
        moments: earlier steps, each with the share of the budget that was spent then.
    """

    model: Transformer
    batch: Batch
    device: Device
    keys: dict[str, Any]
    samples: int
    moments: Mapping[int, float]

    def run(self, tokens_BS: np.ndarray, pinned_T: Tensor | None = None, as_in: Trace | None = None) -> Trace:
        """Run the model on tokens; where rows are pinned, each site gets these as they were in another trace."""
        trace, batch = Trace(), replace(self.batch, tokens_BS=tokens_BS)
        context = make_context(batch, self.device, samples=self.samples, **self.keys)

        def enter(part: Any, args: tuple[Tensor, RoutingContext]) -> None:
            rows_TD = args[0].detach().view(-1, args[0].shape[-1])
            if pinned_T is not None and as_in is not None:
                with torch.no_grad():
                    rows_TD[pinned_T] = as_in.x_L[len(trace.x_L)][pinned_T]
            trace.x_L.extend([rows_TD.clone()] * len(part.sites))

        def decided(router: Any, args: tuple[Tensor, RoutingContext], decision: RoutingDecision) -> None:
            earlier = {site: made.detach() for site, made in args[1].earlier.items()}
            trace.contexts_L.append(replace(args[1], earlier=earlier))
            trace.chosen_ML[0].append(decision.detach())

        def leave(module: Any, args: tuple[Tensor], normed_BSD: Tensor) -> None:
            trace.out_TD = normed_BSD.detach().flatten(0, 1)

        _seed_global(self.device)  # a router that draws from it, against the contract, draws alike in all passes
        with ExitStack() as hooks, checked(self.model.routers), torch.set_grad_enabled(self.keys["explore"]):
            for part in (part for block in self.model.blocks for part in block.routed_parts):
                hooks.callback(part.register_forward_pre_hook(enter).remove)
            for router in self.model.routers:
                hooks.callback(router.register_forward_hook(decided).remove)
            hooks.callback(self.model.norm.register_forward_hook(leave).remove)
            _, ran = forward(self.model, batch, context, self.device)
        trace.ran_L = [decision.detach() for decision in ran]
        trace.chosen_ML += [self._decide(trace, step=step, progress=spent) for step, spent in self.moments.items()]
        return trace

    def _decide(self, trace: Trace, **moment: Any) -> list[RoutingDecision]:
        """Return what the routers decide on all that a trace gave them, once their context says another moment."""
        _seed_global(self.device)
        with checked(self.model.routers), torch.set_grad_enabled(self.keys["explore"]):
            return [
                ask(site.router, x_TD, replace(context, **moment), site.config).detach()
                for site, x_TD, context in zip(self.model.routed, trace.x_L, trace.contexts_L, strict=True)
            ]

    def depends(self, base: Trace, changes: Sequence[tuple[np.ndarray, np.ndarray]]) -> Dependence:
        """Return which share of the rows that should not have changed did, over several changes.

        Args:
            base: the unchanged trace.
            changes: tokens, and which (B, S) of their places may not change.
        """
        sites = len(self.model.routed)
        sums, rows = np.zeros((2 + len(base.chosen_ML), max(1, sites))), 0
        for tokens_BS, still_BS in changes:
            still_T = torch.from_numpy(still_BS.reshape(-1)).repeat(self.samples).to(self.device.name)
            trace = self.run(tokens_BS, still_T, base)
            rows += int(still_T.sum())
            for site in range(sites):
                sums[0, site] += int((_drops_differ(base.ran_L[site], trace.ran_L[site]) & still_T).sum())
                for row, (was_L, is_L) in enumerate(zip(base.chosen_ML, trace.chosen_ML, strict=True), 2):
                    sums[row, site] += int((_routes_differ(was_L[site], is_L[site]) & still_T).sum())
            assert base.out_TD is not None and trace.out_TD is not None
            half_of_the_digits = torch.finfo(self.device.dtype).eps ** 0.5
            sums[1, 0] += int((_far(base.out_TD, trace.out_TD, half_of_the_digits) & still_T).sum())
        drops_L, (outputs, *_), *routes_ML = (sums / max(1, rows)).round(9).tolist()
        routes_L, *earlier_ML = (routes_L[:sites] for routes_L in routes_ML)
        return {"routes_L": routes_L, "routes_ML": earlier_ML, "drops_L": drops_L[:sites], "outputs": outputs}


def _far(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Say of each row whether it differs by more than a share of its largest number."""
    scale_T = torch.maximum(a.abs().amax(1), b.abs().amax(1))
    return (a - b).abs().amax(1) > tolerance * scale_T


def _routes_differ(a: RoutingDecision, b: RoutingDecision) -> Tensor:
    """Say of each row whether its pairs, their gates, or what is added beside them differ."""
    pairs_a, pairs_b = (d.table(torch.ones_like(d.expert_ids_R)) for d in (a, b))
    differ_T = (pairs_a != pairs_b).any(1)
    used = ((d.table(d.gates_R * d.used_R), d.self_T, d.shared_gates_TS, d.fill_TD) for d in (a, b))
    for one, other in zip(*used, strict=True):
        if one is not None and other is not None and one.numel():
            one, other = (value.view(len(differ_T), -1) for value in (one, other))
            differ_T = differ_T | _far(one, other, 100 * torch.finfo(one.dtype).eps)
    return differ_T


def _drops_differ(a: RoutingDecision, b: RoutingDecision) -> Tensor:
    """Say of each row whether other pairs of it were dropped."""
    dropped = (d.table((~d.kept_R & d.used_R).long()) for d in (a, b))
    return torch.ne(*dropped).any(1)


# The audit


def audit(
    model: Transformer,
    costs: Costs,
    batches: Sequence[Batch],
    sequences: int,
    device: Device,
    agree: Callable[[float], float] = float,
    **keys: Any,
) -> Measured:
    """Measure a trained model; the ranks of a group all call this, and find the same.

    Args:
        model: as trained.
        costs: as booked.
        batches: all validation tokens, of which some are looked at.
        sequences: as many as a micro-batch has.
        device: where it runs.
        agree: makes all ranks go by rank 0's number.
        keys: of the contexts: ``seed``, and ``step`` and ``progress`` of the last step; in training, the balance scope.

    Raises:
        DecisionError: a decision is malformed.
    """
    with _undisturbed(model):
        batch = _batch(batches, sequences, keys["seed"])
        samples, last = costs.samples, keys["step"]
        moments = {step: keys["progress"] * step / (last + 1) for step in sorted({0, last // 2} - {last})}
        evaluated = replace(batch, sequence_B=EVAL_SEQUENCES + batch.sequence_B)
        trained = Audit(model, batch, device, keys | {"explore": True, "micro_batch": 0}, samples, moments)
        plain = {name: value for name, value in keys.items() if name != "sum_over_scope"}
        greedy = Audit(model, evaluated, device, plain | {"explore": False}, 1, moments)
        (training, sampled), (evaluation, clean) = (_mode(mode, keys["seed"], agree) for mode in (trained, greedy))
        return {
            "tokens": batch.tokens_BS.size,
            "causal_L": [router.causal for router in model.routers],
            "two_rules_L": [router.two_rules for router in model.routers],
            "training": training,
            "evaluation": evaluation,
            "flops": _flops(model, costs, sampled, clean),
            "regret": regret(model, batches, sequences, device, **plain),
        }


def _seed_global(device: Device) -> None:
    """Seed PyTorch's generators of the host and a device; ``torch.manual_seed`` also keeps a traceback for every kind
    of device that is not there.
    """
    torch.default_generator.manual_seed(0)
    if device.name != "cpu":
        torch.cuda.manual_seed(0)


@contextmanager
def _undisturbed(model: Transformer) -> Iterator[None]:
    """Give back what a router may have moved against its contract: its numbers, and generators. Nothing is compiled
    meanwhile: what is hooked must be run.
    """
    devices = [model.embed.weight.device] if model.embed.weight.is_cuda else []
    drawn, drawn_too = random.getstate(), np.random.get_state()
    held = [{name: value.clone() for name, value in router.state_dict().items()} for router in model.routers]
    compiled = model.compiled
    set_compiled(model, False)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        set_compiled(model, compiled)
        random.setstate(drawn)
        np.random.set_state(drawn_too)
        for router, state in zip(model.routers, held, strict=True):
            router.load_state_dict(state)


def _batch(batches: Sequence[Batch], sequences: int, seed: int) -> Batch:
    """Return some of the validation sequences, drawn by seed, under ids of their own among those of training."""
    tokens_BS, targets_BS = (
        np.concatenate([getattr(b, name) for b in batches]) for name in ("tokens_BS", "targets_BS")
    )
    order = seeding.numpy_generator(seed, "audit").permutation(len(tokens_BS))
    rows = np.resize(order, sequences)
    return Batch(tokens_BS[rows], targets_BS[rows], UNSEEN + np.arange(sequences), None)


def _mode(passes: Audit, seed: int, agree: Callable[[float], float]) -> tuple[MeasuredMode, Trace]:
    """Return what one mode shows, and its unchanged trace."""
    tokens_BS = passes.batch.tokens_BS
    vocabulary = passes.model.embed.num_embeddings
    draw = seeding.numpy_generator(seed, "audit", "changes")
    base, again = passes.run(tokens_BS), passes.run(tokens_BS)
    others = None
    if len(tokens_BS) > 1:
        others = passes.depends(base, [_change_whole(tokens_BS, draw, vocabulary, parity) for parity in (0, 1)])
    mixed = others is not None and any(
        [*others["routes_L"], *chain(*others["routes_ML"]), *others["drops_L"], others["outputs"]]
    )
    alone = bool(agree(float(mixed)))  # else a change elsewhere could be taken for one behind
    rounds = min(ROUNDS, -(-PLACES // (len(CHANGES) * (1 if alone else len(tokens_BS)))))
    changes = [_change_behind(tokens_BS, draw, vocabulary, how, alone) for how in rounds * CHANGES]
    later = passes.depends(base, changes)
    pairs_L = [float(d.runs_R.sum()) / d.num_tokens for d in base.ran_L]
    twice = zip(chain(*base.chosen_ML), chain(*again.chosen_ML), strict=True)
    repeats = not any(bool(_routes_differ(a, b).any()) for a, b in twice)
    found: MeasuredMode = {
        "pairs_L": pairs_L,
        "repeats": repeats,
        "steps_M": list(passes.moments),
        "later": later,
        "others": others,
    }
    return found, base


def _others(tokens: np.ndarray, draw: np.random.Generator, vocabulary: int) -> np.ndarray:
    """Return tokens, none of which is the one in its place."""
    return (tokens + draw.integers(1, max(2, vocabulary), tokens.shape)) % vocabulary


def _change_whole(
    tokens_BS: np.ndarray, draw: np.random.Generator, vocabulary: int, parity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Change every second sequence; the others are not to change."""
    changes_B = np.arange(len(tokens_BS)) % 2 == parity
    changed_BS = np.where(changes_B[:, None], _others(tokens_BS, draw, vocabulary), tokens_BS)
    return changed_BS, np.broadcast_to(~changes_B[:, None], tokens_BS.shape).copy()


def _change_behind(
    tokens_BS: np.ndarray, draw: np.random.Generator, vocabulary: int, how: str, alone: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Change tokens behind a position of each sequence (or, ``alone``, of one); what stands before is not to change."""
    count, length = tokens_BS.shape
    place_S, cut_B = np.arange(length), draw.integers(0, max(1, length - 1), count)
    changes_BS = place_S > cut_B[:, None]
    if how == "next":
        changes_BS = place_S == cut_B[:, None] + 1
    elif how == "last":
        cut_B = np.full(count, length - 2)
        changes_BS = place_S > cut_B[:, None]
    if alone:
        changes_BS = changes_BS & (np.arange(count) == draw.integers(count))[:, None]
    new_BS = _others(tokens_BS, draw, vocabulary)
    if how == "swapped":
        rolled_BS = np.roll(tokens_BS, 1, axis=0)
        new_BS = np.where(rolled_BS == tokens_BS, new_BS, rolled_BS)
    touched_B1 = changes_BS.any(1, keepdims=True)
    return np.where(changes_BS, new_BS, tokens_BS), (place_S <= cut_B[:, None]) & touched_B1


def _flops(model: Transformer, costs: Costs, sampled: Trace, clean: Trace) -> MeasuredFlops:
    """Return what each router was booked to run per row, and what it runs on the audit's rows."""
    found = [
        measure(router, x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)), {False: plain, True: training})
        for router, x_TD, plain, training in zip(
            model.routers, sampled.x_L, clean.contexts_L, sampled.contexts_L, strict=True
        )
    ]
    return {
        "booked_L": per_row(costs.work_L),
        "measured_L": per_row(found),
        "declared_L": [_declared(router) for router in model.routers],
        "elementwise_L": [work.elementwise for work in found],
        "foreign_L": [sorted({*first.foreign, *now.foreign}) for first, now in zip(costs.work_L, found, strict=True)],
    }


def per_row(work_L: Iterable[Work]) -> list[RouterFlops]:
    """Return the FLOPs per row of each site's router."""
    return [{"greedy": work.greedy, "training": work.training} for work in work_L]


def _declared(router: Router) -> int | None:
    """Return the FLOPs of its greedy forward that a router claims, where it does: nobody has to, or is believed."""
    claim = getattr(router, "flops_per_token", None)
    return None if claim is None else int(claim() if callable(claim) else claim)


# What they say


def claims(routers: Sequence[Router], gate_form: str) -> dict[str, Any]:
    """Return what routers say of themselves: the meaning of their gates, what they learn from, whether they are
    causal.
    """
    return {
        "gate": {"form": gate_form, "meaning": _listed(router.gate_meaning for router in routers)},
        "learns_from": sorted({signal for router in routers for signal in router.learns_from}),
        "causal": all(router.causal for router in routers),
    }


def _listed(meanings: Iterable[str]) -> str:
    """Return different texts once each, in their order; ``none`` where there is none."""
    return "; ".join(dict.fromkeys(meanings)) or "none"
