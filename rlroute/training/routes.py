"""Other routes through the last MoE layer: what its router answers when a choice is forced, and the losses that follow.

That layer comes after all attention, so a token's route there changes its own next-token loss and no other's.

Shape suffixes: T rows, N of them that are measured, D model width, V vocabulary, E experts, K slots per token, C slots
per expert, P pairs of a token and an expert, M of the N tokens.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlroute.decision import RoutingDecision
from rlroute.errors import DecisionError
from rlroute.faults import explain
from rlroute.model import Transformer
from rlroute.model.moe import MoELayer, apply_gate_form, ask
from rlroute.routing import RoutingContext
from rlroute.training.batches import Batch
from rlroute.training.step import Device, forward, make_context

BESIDE = ("self_T", "shared_gates_TS", "fill_TD")
"""What a decision adds to its pairs, by token."""


class Unforced(Exception):
    """Other routes cannot be had; ``str`` says why."""


class Routes:
    """A batch at the last MoE layer: the routes that some of its tokens took, and what others would give them.

    Args:
        model: in evaluation.
        batch: as large as a micro-batch: rules may mix its tokens.
        tokens: so many of them are measured at most, evenly spread.
        device: where it runs.
        keys: of the context: ``seed``, ``step`` and so on.

    Attributes:
        real: the first so many of the E experts run something.
        targets_N: the tokens that follow.
        sets_NE: bool, the experts that each token chose; where experts choose, those that ran it.

    Raises:
        Unforced: attention follows the last layer with experts, or its router does not choose by its context.
    """

    def __init__(self, model: Transformer, batch: Batch, tokens: int, device: Device, **keys: Any) -> None:
        self.model, self.device, self.layer = model, device, _last_layer(model)
        self.seen = _look(model, self.layer, batch, device, **keys)
        self.taken, rows = self.seen.taken, batch.tokens_BS.size
        self.real = self.layer.router.shape.num_real_experts
        self.rows_N = torch.arange(count := min(tokens, rows), device=device.name) * rows // count
        self.targets_N = torch.from_numpy(batch.targets_BS.reshape(-1)).to(device.name)[self.rows_N]
        self.stream_ND, self.x_ND = self.seen.stream_TD[self.rows_N], self.seen.x_TD[self.rows_N]
        chosen_R = self.taken.used_R if self.taken.k is not None else self.taken.used_R & self.taken.kept_R
        self.sets_NE = self.taken.table(chosen_R.long())[self.rows_N, :-1] > 0
        self.outputs_NED = self._outputs() if self.layer.config.gate_at == "output" else None

    def logits_taken(self) -> Tensor:
        """Return the logits of the N tokens on the routes that they took, shape (N, V), in float32 at least."""
        return self._logits(_at_rows(self.taken, self.rows_N), torch.arange(len(self.rows_N), device=self.device.name))

    def losses(self, sets_ME: Tensor, which_M: Tensor) -> Tensor:
        """Return the losses in nats of some of the N tokens on the routes of sets of real experts; shape (M,).

        Args:
            sets_ME: bool, each as many as the token chose.
            which_M: int64, which tokens; the others keep theirs.

        Raises:
            Unforced: the router does not answer with them.
        """
        decision = self._forced(torch.cat([sets_ME, self.sets_NE[which_M, self.real :]], 1), which_M)
        return functional.cross_entropy(self._logits(decision, which_M), self.targets_N[which_M], reduction="none")

    def ranked(self, sets_ME: Tensor, which_M: Tensor) -> Tensor:
        """Return the real experts, those of each set first, best scores first; int64 of shape (M, E)."""
        logits_TE = self.taken.logits_TE
        if logits_TE is None:
            logits_TE = -torch.arange(self.real, device=sets_ME.device).expand(self.taken.num_tokens, -1).float()
        scores_ME = logits_TE[self.rows_N[which_M], : self.real].masked_fill(~sets_ME, -torch.inf)
        return torch.sort(scores_ME, dim=1, descending=True, stable=True).indices

    # What follows the routers

    def _outputs(self) -> Tensor:
        """Return the output of each real expert for each of the N tokens, shape (N, E, D), in float32 at least."""
        ids_P = torch.arange(self.real, device=self.device.name).repeat(len(self.rows_N))
        x_PD = self.x_ND.repeat_interleave(self.real, 0)
        alone = RoutingDecision.token_choice(ids_P[:, None], torch.ones_like(x_PD[:, :1]), self.real)
        with self.device.autocast():
            outputs_PD, _ = self.layer.start_experts(x_PD, alone, self.seen.context)()
        return outputs_PD.to(self.stream_ND.dtype).view(len(self.rows_N), self.real, -1)

    def _logits(self, decision: RoutingDecision, which_M: Tensor) -> Tensor:
        """Return the logits of some of the N tokens on the routes of a decision over them and all experts."""
        layer, x_MD, wide = self.layer, self.x_ND[which_M], torch.autocast(self.device.name, enabled=False)
        with self.device.autocast():
            if self.outputs_NED is None:  # an expert's output is not proportional to its gate
                pairs_MD, _ = layer.start_experts(x_MD, decision, self.seen.context)()
            else:
                with wide:
                    gates_ME = decision.gates_R.view(-1, decision.num_experts)[:, : self.real]
                    outputs_MED = self.outputs_NED[which_M]
                    pairs_MD = torch.einsum("me,med->md", gates_ME.to(outputs_MED.dtype), outputs_MED)
            y_MD = layer.add_rest(pairs_MD, x_MD, decision, layer.of_shared(x_MD, decision))
        with wide:
            normed_MD = self.model.norm(self.stream_ND[which_M] + y_MD)
            return functional.linear(normed_MD, self.model.unembed.weight.to(normed_MD.dtype))

    # Choices

    def _forced(self, sets_ME: Tensor, which_M: Tensor) -> RoutingDecision:
        """Return what runs of some of the N tokens when sets of all E experts are chosen for them."""
        if self.taken.k is not None:
            return self._answer(self._slots(sets_ME, which_M), sets_ME, self.rows_N[which_M])
        made, rows, slots = [], self.taken.num_tokens, self.seen.ids.shape[1]
        for sets, rows_M in zip(torch.split(sets_ME, slots), torch.split(self.rows_N[which_M], slots), strict=True):
            ids_EC = torch.full_like(self.seen.ids, rows)  # no expert takes anybody but those of a token's set
            ids_EC[:, : len(rows_M)] = torch.where(sets.t(), rows_M, rows)
            made.append(self._answer(ids_EC, sets, rows_M))
        return _joined(made)

    def _slots(self, sets_ME: Tensor, which_M: Tensor) -> Tensor:
        """Return the choices of all rows, with sets in the slots of real experts of those that have some."""
        ids_TK, order_ME = self.seen.ids.clone(), self.ranked(sets_ME[:, : self.real], which_M)
        ids_MK = ids_TK[rows_M := self.rows_N[which_M]]
        real_MK = ids_MK < self.real
        place_MK = (real_MK.cumsum(1) - 1).clamp(min=0)
        ids_TK[rows_M] = torch.where(real_MK, order_ME.gather(1, place_MK), ids_MK)
        return ids_TK

    def _answer(self, ids: Tensor, sets_ME: Tensor, rows_M: Tensor) -> RoutingDecision:
        """Return what runs at some rows when choices are forced; slots that a capacity dropped stay dropped."""
        context = replace(self.seen.context, choices={self.seen.context.site: ids}, chosen=None)
        try:
            answer = ask(self.layer.router, self.seen.x_TD, context, self.layer.config)
        except Exception as error:  # whatever a router makes of a choice that it would not have made
            raise Unforced(f"its choice cannot be forced: {explain(error)}") from error
        if not torch.equal(answer.table(answer.used_R.long())[rows_M, :-1] > 0, sets_ME):
            raise Unforced("its choice cannot be forced: it answers with another")
        if self.taken.k is not None:
            answer = replace(answer, kept_R=self.taken.kept_R)
        return _at_rows(apply_gate_form(answer, self.layer.config.gate_form), rows_M)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a forward showed at the last MoE layer: the residual stream before it, its input and context, the decision
    as it was run, and what the router chose: (T, K) experts or (E, C) tokens.
    """

    stream_TD: Tensor
    x_TD: Tensor
    context: RoutingContext
    taken: RoutingDecision
    ids: Tensor


def _last_layer(model: Transformer) -> MoELayer:
    if not model.routed:
        raise Unforced("it has no experts")
    if (layer := model.blocks[-1].moe) is None:
        raise Unforced("attention follows the last layer that has experts, where a route changes other tokens' losses")
    return layer


def _look(model: Transformer, layer: MoELayer, batch: Batch, device: Device, **keys: Any) -> _Seen:
    """Run a batch greedily."""
    seen: dict[str, Any] = {}
    context = make_context(batch, device, explore=False, chosen={}, **keys)

    def enter(module: Any, args: tuple[Tensor]) -> None:
        seen["stream_TD"] = args[0].flatten(0, 1)

    def leave(module: Any, args: tuple[Tensor, RoutingContext], made: tuple[Tensor, RoutingDecision]) -> None:
        seen.update(x_TD=args[0], context=args[1], taken=made[1])

    with ExitStack() as hooks:
        hooks.callback(model.blocks[-1].ffn_norm.register_forward_pre_hook(enter).remove)
        hooks.callback(layer.register_forward_hook(leave).remove)
        try:
            forward(model, batch, context, device)
        except DecisionError as error:  # of a router that chooses twice
            raise Unforced(str(error)) from error
    taken, ids = seen["taken"], (context.chosen or {}).get(layer.router.shape.site)
    rows, slots = (taken.num_experts, -1) if taken.k is None else (taken.num_tokens, taken.k)
    if ids is None or len(ids) != rows or slots not in (-1, ids.shape[1]):
        raise Unforced("its choice cannot be forced: it does not choose by its context")
    return _Seen(**seen, ids=ids)


def _at_rows(decision: RoutingDecision, rows_M: Tensor) -> RoutingDecision:
    """Return what runs of a decision at some rows, as one that has a slot for every expert."""
    kept_R, experts = decision.used_R & decision.kept_R, decision.num_experts
    runs_ME = decision.table(kept_R.long())[rows_M, :-1] > 0
    gates_ME = decision.table(torch.where(kept_R, decision.gates_R, 0))[rows_M, :-1]
    ids_ME = torch.where(runs_ME, torch.arange(experts, device=runs_ME.device), experts)
    beside = {name: value[rows_M] for name in BESIDE if (value := getattr(decision, name)) is not None}
    made = RoutingDecision.token_choice(ids_ME, gates_ME, experts, **beside)
    return replace(made, num_free_experts=decision.num_free_experts)


def _joined(parts: Sequence[RoutingDecision]) -> RoutingDecision:
    """Return one decision over the rows of several that have a slot for every expert."""
    experts = parts[0].num_experts
    ids_ME, gates_ME = (
        torch.cat([getattr(part, name).view(-1, experts) for part in parts]) for name in ("expert_ids_R", "gates_R")
    )
    there = [name for name in BESIDE if getattr(parts[0], name) is not None]
    beside = {name: torch.cat([getattr(part, name) for part in parts]) for name in there}
    made = RoutingDecision.token_choice(ids_ME, gates_ME, experts, **beside)
    return replace(made, num_free_experts=parts[0].num_free_experts)
