"""A model and one micro-batch under the gradient instrument: router logits can be shifted, choices forced, gates held.

Routers are not edited. The shift is added to what a router's ``scores`` module returns; a choice is forced by
answering, for as long as the router decides, every ranking of a (tokens, experts) matrix with the wanted experts first.
Both are checked: a router on which either does not take is named as unmeasurable.

Shape suffixes: T tokens of the micro-batch, N replicas of it in one forward, L MoE layers, E experts, K experts per
token.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlroute.experiments.gradients.forcing import ForcedRanking
from rlroute.model import Transformer
from rlroute.routing import Feedback, Router, RoutingContext, RoutingDecision, Term
from rlroute.sampling import plackett_luce_log_prob
from rlroute.training.data import Batch
from rlroute.training.step import Device, forward, make_context

DEVICE = Device("cpu", torch.float64)


class Unmeasurable(Exception):
    """The instrument does not apply to a router; ``str`` says why, in words for a table."""


class Probe:
    """A float64 copy of a model, with its parameters frozen, at one micro-batch.

    Args:
        model: copied, not touched.
        batch: the micro-batch, sequences of equal length.
        step: the training step that the forwards pretend to be (temperature schedules read it).

    Attributes:
        gates_follow: whether the gates' values change with the logits while the choices are held. They do not where
            gates are constant or straight-through: there the loss depends on the logits through the choices alone.
        independent: whether a micro-batch's estimate stays as it is beside others in one batch.
    """

    def __init__(self, model: Transformer, batch: Batch, step: int) -> None:
        self.model = copy.deepcopy(model).double().requires_grad_(False)
        self.batch, self.step = batch, step
        self.tokens = int(batch.tokens_BS.size)
        self.routers = self.model.routers
        self._shift_L: Tensor | None = None
        self._ids_L: Tensor | None = None
        self._held = False
        for layer, router in enumerate(self.routers):
            self._steer(layer, router)
        self.num_experts, self.k = self.routers[0].shape.num_experts, self.routers[0].shape.k
        self.num_samples = max(router.num_samples for router in self.routers)
        self._rewarded: dict[int, list[list[str]]] = {}
        self._check_reach()
        self.gates_follow = self._do_gates_follow()
        self.independent = self._are_sequences_independent()

    def zero_shift(self, replicas: int = 1, *, requires_grad: bool = True) -> Tensor:
        """Return a shift of 0 of shape (L, N * T, E)."""
        shape = (len(self.routers), replicas * self.tokens, self.num_experts)
        return torch.zeros(shape, dtype=torch.float64, requires_grad=requires_grad)

    # Choices forced: what the exact gradient is made of.

    def forced(self, ids_LNTK: Tensor, shift_LTE: Tensor, *, held: bool) -> tuple[Tensor, Tensor]:
        """Run N replicas of the micro-batch, each with its own choices, without exploration.

        Args:
            ids_LNTK: ordered choices, int64.
            shift_LTE: added to the logits; of T rows (shared by the replicas) or N * T.
            held: let the gates carry no gradient.

        Returns:
            Each replica's mean next-token loss, shape (N,), and each choice's log-probability under the Plackett-Luce
            policy of the router's distribution ``probs_TE``, shape (L, N, T).
        """
        replicas = ids_LNTK.shape[1]
        _, loss_MT, decisions = self._run(shift_LTE, replicas, ids_LTK=ids_LNTK.flatten(1, 2), held=held)
        log_prob_L = [
            plackett_luce_log_prob(log_policy(d), ids_TK).sum(1).view(replicas, -1)
            for d, ids_TK in zip(decisions, ids_LNTK.flatten(1, 2), strict=True)
        ]
        return loss_MT.view(replicas, -1).mean(1), torch.stack(log_prob_L)

    def policy(self, ids_LNTK: Tensor, layer: int) -> Tensor:
        """Return a layer's unnormalised log-probabilities, shape (N * T, E), after the forced choices of the layers
        before it.
        """
        with torch.no_grad():
            decisions = self._run(self.zero_shift(), ids_LNTK.shape[1], ids_LTK=ids_LNTK.flatten(1, 2), held=True)[2]
        return log_policy(decisions[layer])

    # The router as it is: what training gets.

    def estimates(self, count: int, seed: int, *, turn: int = 0, ids_LNTK: Tensor | None = None) -> Tensor:
        """Return what each of N training micro-batches gives the logits, shape (N, L, T, E), from one forward and
        backward.

        It is the gradient of the language-model loss (through the gates) plus the values, unweighted, of those terms of
        the routers' objectives that depend on the losses: balance, entropy and z terms are not part of the signal, and
        a weight is a learning rate. The replicas are sequences of one batch, each with draws of its own. That equals N
        micro-batches where no such term mixes sequences, which ``independent`` says.

        Args:
            count: N.
            seed: keys the draws.
            turn: added to the step, for routers that do something else in each of L successive steps.
            ids_LNTK: choices to force in place of the router's draws, of M * N micro-batches, the first routing samples
                first.
        """
        shift_LTE, ids_LTK = self.zero_shift(count), None if ids_LNTK is None else ids_LNTK.flatten(1, 2)
        context, loss_MT, decisions = self._run(shift_LTE, count, seed=seed, turn=turn, explore=True, ids_LTK=ids_LTK)
        feedback = Feedback(context=context, loss_MT=loss_MT.detach(), num_valid=count * self.tokens)
        total = loss_MT.mean() + self._reward_terms(decisions, feedback)
        gradient_LTE = torch.zeros_like(shift_LTE)
        if total.requires_grad:
            (gradient_LTE,) = torch.autograd.grad(total, shift_LTE, allow_unused=True, materialize_grads=True)
        return count * gradient_LTE.view(-1, count, self.tokens, self.num_experts).transpose(0, 1)

    def samples_its_policy(self) -> bool:
        """Whether training draws each routing sample independently from the policy whose gradient is measured."""
        decisions = self._run(self.zero_shift(), 16, explore=True)[2]
        return all(self._is_drawn(decision) for decision in decisions)

    def _is_drawn(self, decision: RoutingDecision) -> bool:
        """Compare the router's own log-probabilities with the policy's, and its samples with one another: a held one
        repeats.
        """
        if decision.log_prob_R is None:
            return False
        ids_TK = decision.expert_ids_R.view(-1, self.k)
        same = torch.allclose(
            decision.log_prob_R.view(-1, self.k), plackett_luce_log_prob(log_policy(decision), ids_TK)
        )
        first, *others = ids_TK.view(self.num_samples, -1, self.k)
        return same and not any(torch.equal(first, other) for other in others)

    def _reward_terms(self, decisions: list[RoutingDecision], feedback: Feedback) -> Tensor | float:
        """Return the sum of the terms that other losses would change; which these are is found out once for each
        step.
        """
        terms_L, step = self._terms(decisions, feedback), feedback.context.step
        if step not in self._rewarded:
            # Not an affine change: a router that standardises its advantages would not notice one.
            changed_L = self._terms(decisions, replace(feedback, loss_MT=feedback.loss_MT.square() + feedback.loss_MT))
            self._rewarded[step] = [
                [name for name in terms if not torch.equal(terms[name].value, changed[name].value)]
                for terms, changed in zip(terms_L, changed_L, strict=True)
            ]
        found = zip(terms_L, self._rewarded[step], strict=True)
        return sum((terms[name].value for terms, names in found for name in names), start=0.0)

    def _terms(self, decisions: list[RoutingDecision], feedback: Feedback) -> list[dict[str, Term]]:
        return [router.objective(d, feedback) for router, d in zip(self.routers, decisions, strict=True)]

    # How it is done.

    def _run(
        self,
        shift_LTE: Tensor,
        replicas: int = 1,
        *,
        ids_LTK: Tensor | None = None,
        held: bool = False,
        explore: bool = False,
        seed: int = 0,
        turn: int = 0,
    ) -> tuple[RoutingContext, Tensor, list[RoutingDecision]]:
        """Run replicas of the micro-batch as sequences of one batch, with routing samples where exploring."""
        batch = repeat(self.batch, replicas)
        samples = self.num_samples if explore else 1
        context = make_context(batch, DEVICE, seed=seed, step=self.step + turn, explore=explore, samples=samples)
        self._shift_L, self._ids_L, self._held = shift_LTE, ids_LTK, held
        try:
            return context, *forward(self.model, batch, context, DEVICE)
        finally:
            self._shift_L, self._ids_L, self._held = None, None, False

    def _steer(self, layer: int, router: Router) -> None:
        """Let a router's logits be shifted and its choices be forced."""
        scores = getattr(router, "scores", None)
        if not isinstance(scores, nn.Module):
            raise Unmeasurable("no scores, so no gradient at logits")
        decide = router.forward

        def shifted(module: nn.Module, inputs: Any, logits_TE: Tensor) -> Tensor:
            assert self._shift_L is not None
            return logits_TE + self._shift_L[layer].repeat(len(logits_TE) // self._shift_L.shape[1], 1)

        def steered(x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
            with nullcontext() if self._ids_L is None else ForcedRanking(self._ids_L[layer]):
                decision = decide(x_TD, context)
            if self._ids_L is not None and not torch.equal(decision.expert_ids_R, self._ids_L[layer].flatten()):
                raise Unmeasurable("its choice cannot be forced: it is no ranking of a (tokens, experts) matrix")
            return replace(decision, gates_R=decision.gates_R.detach()) if self._held else decision

        scores.register_forward_hook(shifted)
        # The copy of the model is ours; mypy refuses a plain assignment.
        setattr(router, "forward", steered)  # noqa: B010

    def _check_reach(self) -> None:
        """Make sure that a shift arrives in the first layer's logits as it is.

        Raises:
            Unmeasurable: it does not, or there is no fixed number of experts per token to enumerate.
        """
        shift_LTE = torch.linspace(-1e-3, 1e-3, self.zero_shift().numel(), dtype=torch.float64).view_as(
            self.zero_shift()
        )
        with torch.no_grad():
            plain, shifted = (self._run(shift)[2][0] for shift in (0 * shift_LTE, shift_LTE))
        if plain.k is None:
            raise Unmeasurable("not a token choice of fixed k")
        if plain.logits_TE is None or shifted.logits_TE is None:
            raise Unmeasurable("no logits in its decision")
        if not torch.allclose(shifted.logits_TE - plain.logits_TE, shift_LTE[0], rtol=0, atol=1e-9):
            raise Unmeasurable("its logits are not what its module `scores` returns")

    def _do_gates_follow(self) -> bool:
        """Compare the gates' autograd derivative along a random direction with their finite difference, choices forced.

        Raises:
            Unmeasurable: they move, but not as autograd says: then nothing here could tell their exact gradient.
        """
        zero_LTE, generator = self.zero_shift(), torch.Generator().manual_seed(0)
        direction_LTE = torch.randn(zero_LTE.shape, generator=generator, dtype=torch.float64)
        chosen = torch.stack([d.expert_ids_R.view(-1, self.k) for d in self._run(zero_LTE)[2]])
        ids_LTK = (
            chosen + 1
        ) % self.num_experts  # not what it would choose by itself, so that forcing is put to the test

        def gates(shift_LTE: Tensor) -> Tensor:
            return torch.cat([d.gates_R for d in self._run(shift_LTE, ids_LTK=ids_LTK)[2]])

        with torch.no_grad():
            difference_R = (gates(1e-4 * direction_LTE) - gates(-1e-4 * direction_LTE)) / 2e-4
        if difference_R.abs().max() < 1e-9:  # the value 1/k + g - g is 1/k but for rounding
            return False
        weights_R = torch.rand(len(difference_R), generator=generator, dtype=torch.float64)
        total = (gates(zero_LTE) * weights_R).sum() + 0 * zero_LTE.sum()
        (slope_LTE,) = torch.autograd.grad(total, zero_LTE)
        if not torch.isclose((slope_LTE * direction_LTE).sum(), difference_R @ weights_R, rtol=1e-4, atol=1e-9):
            raise Unmeasurable("the gradient of its gates is not their derivative")
        return True

    def _are_sequences_independent(self) -> bool:
        together, alone = self.estimates(4, 0)[:1], self.estimates(1, 0)
        return torch.allclose(together, alone, rtol=1e-6, atol=1e-12)


def repeat(batch: Batch, count: int) -> Batch:
    """Return a batch so many times, as one; each time its sequences are others, which have draws of their own."""
    sequences = len(batch.sequence_B)
    return Batch(
        np.tile(batch.tokens_BS, (count, 1)),
        np.tile(batch.targets_BS, (count, 1)),
        np.tile(batch.sequence_B, count) + np.repeat(np.arange(count), sequences) * sequences,
        None,
    )


def log_policy(decision: RoutingDecision) -> Tensor:
    """Return logits of the policy whose gradient is measured: the router's published distribution, else softmax of its
    logits.
    """
    assert decision.logits_TE is not None
    if decision.probs_TE is None:
        return decision.logits_TE
    return decision.probs_TE.clamp(min=torch.finfo(decision.probs_TE.dtype).tiny).log()
