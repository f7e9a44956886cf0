"""A model and one micro-batch under the gradient instrument: router logits can be shifted, choices forced, gates held.

Routers are not edited. The shift is added to what a router's ``scores`` module returns, and gates are detached as a
decision comes back, both by hooks that last for one forward; choices are forced by ``RoutingContext.choices``. What a
router makes of it is checked: one on which it does not take is named as unmeasurable.

A site is a place with a router: a layer, or its attention. A router may rank more columns than there are experts (zero
experts): a choice is then one of its columns.

Shape suffixes: T tokens of the micro-batch, N replicas of it in one forward, L routed sites, E columns of logits, K
choices per token, R routed pairs.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlroute.experiments.gradients.steering import (
    OTHER_LOGITS,
    VARIABLE_K,
    Unmeasurable,
    check_answer,
    hold,
    log_policy,
    scores_of,
    shift_by,
    size_of,
    weights,
)
from rlroute.model import Transformer
from rlroute.routing import Feedback, RoutingContext, RoutingDecision, Term
from rlroute.sampling import plackett_luce_log_prob, top_k
from rlroute.training.batches import Batch
from rlroute.training.step import Device, forward, make_context

DEVICE = Device("cpu", torch.float64)
WIDE_SHIFT = 10.0
"""Standard deviation of a shift after which whoever chooses a variable number of experts does so."""


class Probe:
    """A float64 copy of a model, with its parameters frozen, at one micro-batch.

    Args:
        model: copied, not touched.
        batch: the micro-batch, sequences of equal length.
        step: the training step that the forwards pretend to be (temperature schedules read it).
        progress: the share of the run's budget that is spent by then.

    Attributes:
        columns, k: E and K, the same at all sites.
        gates_follow: whether the gates' values change with the logits while the choices are held. They do not where
            gates are constant or straight-through: there the loss depends on the logits through the choices alone.
        independent: whether a micro-batch's estimate stays as it is beside others in one batch.

    Raises:
        Unmeasurable: the instrument does not apply to one of the routers.
    """

    def __init__(self, model: Transformer, batch: Batch, step: int, progress: float = 0.0) -> None:
        self.model = copy.deepcopy(model).double().requires_grad_(False)
        self.batch, self.step, self.progress = batch, step, progress
        self.tokens = int(batch.tokens_BS.size)
        self.routers = self.model.routers
        self.scores = [scores_of(router) for router in self.routers]
        self.num_samples = max(router.num_samples for router in self.routers)
        self._rewarded: dict[int, list[list[str]]] = {}
        self.k, self.columns = self._sizes()
        self._check_reach()
        self._check_fixed_k()
        self.gates_follow = self._do_gates_follow()
        self.independent = self._are_sequences_independent()

    def zero_shift(self, replicas: int = 1, *, requires_grad: bool = True) -> Tensor:
        """Return a shift of 0 of shape (L, N * T, E)."""
        shape = (len(self.routers), replicas * self.tokens, self.columns)
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

    def policy(self, ids_LNTK: Tensor, site: int) -> Tensor:
        """Return a site's unnormalised log-probabilities, shape (N * T, E), after forced choices at those before it."""
        with torch.no_grad():
            decisions = self._run(self.zero_shift(), ids_LNTK.shape[1], ids_LTK=ids_LNTK.flatten(1, 2), held=True)[2]
        return log_policy(decisions[site])

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
        return count * gradient_LTE.view(-1, count, self.tokens, self.columns).transpose(0, 1)

    def samples_its_policy(self) -> bool:
        """Whether training draws each routing sample independently from the policy whose gradient is measured."""
        decisions = self._run(self.zero_shift(), 16, explore=True)[2]
        return all(self._is_drawn(decision) for decision in decisions)

    def _is_drawn(self, decision: RoutingDecision) -> bool:
        """Compare the router's own log-probabilities with the policy's, and its samples with one another: a held one
        repeats.
        """
        if decision.log_prob_R is None or decision.k != self.k:
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
        shift_LTE: Tensor | None,
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
        sites = [router.shape.site for router in self.routers]
        choices = {} if ids_LTK is None else dict(zip(sites, ids_LTK, strict=True))
        keys = {"seed": seed, "step": self.step + turn, "progress": self.progress, "choices": choices}
        context = make_context(batch, DEVICE, samples=samples, explore=explore, **keys)
        with ExitStack() as hooks:
            for scores, shift_TE in zip(self.scores, () if shift_LTE is None else shift_LTE, strict=False):
                hooks.enter_context(scores.register_forward_hook(shift_by(shift_TE)))
            for router in self.routers if held else ():
                hooks.enter_context(router.register_forward_hook(hold))
            loss_MT, decisions = forward(self.model, batch, context, DEVICE)
        for decision, ids_TK in zip(decisions, () if ids_LTK is None else ids_LTK, strict=False):
            check_answer(decision, ids_TK)
        return context, loss_MT, decisions

    def _sizes(self) -> tuple[int, int]:
        """Return the choices of a token and the columns that it chooses from.

        Raises:
            Unmeasurable: there is no fixed number of choices to enumerate, or these numbers differ between sites.
        """
        sizes = dict.fromkeys(size_of(decision) for decision in self._run(None)[2])
        if len(sizes) > 1:
            found = " and ".join(f"{k} of {columns}" for k, columns in sizes)
            raise Unmeasurable(f"its sites choose {found} experts: measured is the same choice at all")
        return next(iter(sizes))

    def _check_reach(self) -> None:
        """Make sure that a shift arrives in each site's logits as it is.

        Raises:
            Unmeasurable: it does not.
        """
        ramp_LTE = torch.linspace(-1e-3, 1e-3, self.zero_shift().numel(), dtype=torch.float64).view_as(
            self.zero_shift()
        )
        for site, ramp_TE in enumerate(ramp_LTE):
            shift_LTE = torch.zeros_like(ramp_LTE)
            shift_LTE[site] = ramp_TE  # alone, since what is shifted before a site changes its logits too
            with torch.no_grad():
                plain, shifted = (self._run(shift)[2][site].logits_TE for shift in (0 * shift_LTE, shift_LTE))
            assert plain is not None and shifted is not None
            if not torch.allclose(shifted - plain, ramp_TE, rtol=0, atol=1e-9):
                raise Unmeasurable(OTHER_LOGITS)

    def _check_fixed_k(self) -> None:
        """Make sure that all slots are used, whatever the logits, in training and out of it, save by zero experts; that
        they are not all experts; and that logits choose them.

        Raises:
            Unmeasurable: it is otherwise.
        """
        replicas, generator = 16, torch.Generator().manual_seed(0)
        normal_LTE = torch.randn(self.zero_shift(replicas).shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            decisions = [
                decision
                for explore in (False, True)
                for scale in (0.0, WIDE_SHIFT)
                for decision in self._run(scale * normal_LTE, replicas, explore=explore)[2]
            ]
        if any(d.num_experts == self.columns and not d.used_R.all() for d in decisions):
            raise Unmeasurable(VARIABLE_K)
        if self.k == self.columns:
            raise Unmeasurable("it runs all experts, so nothing is chosen")
        plain_L, shifted_L = decisions[: len(self.routers)], decisions[len(self.routers) : 2 * len(self.routers)]
        if any(torch.equal(d.expert_ids_R, s.expert_ids_R) for d, s in zip(plain_L, shifted_L, strict=True)):
            raise Unmeasurable("its logits choose nothing")

    def _do_gates_follow(self) -> bool:
        """Compare the gates' autograd derivative along a random direction with their finite difference, choices forced.

        Raises:
            Unmeasurable: they move, but not as autograd says: then nothing here could tell their exact gradient.
        """
        zero_LTE, generator = self.zero_shift(), torch.Generator().manual_seed(0)
        direction_LTE = torch.randn(zero_LTE.shape, generator=generator, dtype=torch.float64)
        own_LTK = torch.stack([top_k(log_policy(d), self.k) for d in self._run(zero_LTE)[2]])
        # Every column in its turn: not only what the router would choose by itself, so that forcing is put to the test.
        ids_LTK = torch.cat([(own_LTK + turn) % self.columns for turn in range(self.columns)], dim=1)

        def gates(shift_LTE: Tensor) -> Tensor:
            decisions = self._run(shift_LTE, self.columns, ids_LTK=ids_LTK)[2]
            return torch.cat([part.flatten() for d in decisions for part in weights(d).values()])

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
