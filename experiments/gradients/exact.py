"""The exact gradient of the expected loss at a router's logits: by enumeration of all joint choices, or of one choice
at a time.

The target is G_l = d/d delta E[L] at delta = 0, delta_l (T, E) being added to layer l's logits, the same for all draws,
and L the mean next-token loss of a micro-batch of T tokens, as training divides it. The expectation is over the choices
of all tokens in all layers, drawn in order and without replacement (Plackett-Luce) from each router's distribution.
Later logits depend on earlier choices, and gates may depend on the logits, so

    G = sum_a P(a) [ L(a) d log P(a)/d delta + dL(a)/d delta ],     P(a) = prod over layers and tokens of pi(a_lt |
    a_before).

Autograd through sum_a P(a) L(a) gives both terms, the ways through gates into later logits included. With constant or
straight-through gates the second term is 0.

Beyond ``ENUMERABLE`` joint choices, the *conditional* gradient: the choices are drawn, and for one token and layer at a
time all its choices c are enumerated while the others are held, each weighted by P(c | the others) = P(c, others) /
sum_c' P(c', others): a Rao-Blackwell step, so its mean over draws is G at any depth. Policy weights pi(c) in place of
P(c | the others) would not do: later layers' choices were drawn under another c. L is taken relative to the mean loss
of the other draws, which changes no expectation.

Shape suffixes: T tokens, N replicas, L routed sites, E columns of logits, K choices per token, C ordered choices of a
token, S sampled joint choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from rlroute.experiments.gradients.probe import Probe
from rlroute.experiments.gradients.steering import Unmeasurable
from rlroute.sampling import gumbel_top_k
from rlroute.seeding import derive_key

ENUMERABLE = 4096
"""The most joint choices that are enumerated, and the most choices of one token."""
CHUNK_ROWS = 8192
"""Token rows of one forward, about."""


@dataclass(frozen=True, eq=False)
class Target:
    """What estimates are compared with.

    Attributes:
        gradient_LTE: the gradient of the expected loss.
        choice_LTE: its part through the choices alone, gates held; the whole where gates do not follow the logits.
        kind: ``exact``, or ``conditional``: a mean over sampled choices.
        error_L: expected norm of the sampling error over the norm, by layer; 0 where exact.
    """

    gradient_LTE: Tensor
    choice_LTE: Tensor
    kind: Literal["exact", "conditional"]
    error_L: tuple[float, ...]


def count_choices(num_experts: int, k: int) -> int:
    """Return C, the number of ordered choices of k of E experts."""
    return math.perm(num_experts, k)


def ordered_choices(num_experts: int, k: int) -> Tensor:
    """Return all ordered choices of k of E experts, int64 of shape (C, K)."""
    return torch.tensor(list(permutations(range(num_experts), k)))


def is_enumerable(num_experts: int, k: int, layers: int, tokens: int) -> bool:
    """Whether all joint choices of all tokens in all layers are few enough."""
    return bool(count_choices(num_experts, k) ** (layers * tokens) <= ENUMERABLE)


def joint_choices(num_experts: int, k: int, layers: int, tokens: int) -> Iterator[Tensor]:
    """Yield all joint choices as ids of shape (L, N, T, K), some at a time."""
    choices_CK = ordered_choices(num_experts, k)
    places = len(choices_CK) ** torch.arange(layers * tokens).view(layers, 1, tokens)
    numbers = torch.arange(len(choices_CK) ** (layers * tokens))
    for numbers_N in torch.split(numbers, max(1, CHUNK_ROWS // tokens)):
        yield choices_CK[numbers_N[None, :, None] // places % len(choices_CK)]


def measure_target(probe: Probe, *, samples: int, seed: int) -> Target:
    """Return the exact gradient where it can be enumerated, else the conditional one over ``samples`` (at least 2)
    draws.

    Raises:
        Unmeasurable: a token has too many choices.
    """
    layers, choices = len(probe.routers), count_choices(probe.columns, probe.k)
    if choices > ENUMERABLE:
        raise Unmeasurable(f"{probe.k} of {probe.columns}: {choices} choices of a token, measured are {ENUMERABLE}")
    if is_enumerable(probe.columns, probe.k, layers, probe.tokens):
        whole = exact_gradient(probe, held=not probe.gates_follow)
        choice = exact_gradient(probe, held=True) if probe.gates_follow else whole
        return Target(whole, choice, "exact", (0.0,) * layers)
    ids_LSTK = sample_choices(probe, samples, seed)
    whole_SLTE = conditional_gradients(probe, ids_LSTK, held=not probe.gates_follow)
    choice_SLTE = conditional_gradients(probe, ids_LSTK, held=True) if probe.gates_follow else whole_SLTE
    mean_LTE = whole_SLTE.mean(0)
    error_L = (whole_SLTE.var(0).sum((1, 2)) / samples).sqrt() / mean_LTE.flatten(1).norm(dim=1)
    return Target(mean_LTE, choice_SLTE.mean(0), "conditional", tuple(error_L.tolist()))


def expected_loss(probe: Probe, shift_LTE: Tensor, *, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, chunk by chunk of the joint choices, the terms of sum_a P(a) L(a) and the probabilities, summed over the
    chunk.
    """
    for ids_LNTK in joint_choices(probe.columns, probe.k, len(probe.routers), probe.tokens):
        loss_N, log_prob_LNT = probe.forced(ids_LNTK, shift_LTE, held=held)
        prob_N = log_prob_LNT.sum((0, 2)).exp()
        yield (prob_N * loss_N).sum(), prob_N.sum().detach()


def exact_gradient(probe: Probe, *, held: bool) -> Tensor:
    """Return the gradient of the expected loss with respect to a shift of the logits, shape (L, T, E), by
    enumeration.
    """
    shift_LTE, total = probe.zero_shift(), torch.zeros(())
    gradient_LTE = torch.zeros_like(shift_LTE)
    for expected, probability in expected_loss(probe, shift_LTE, held=held):
        gradient_LTE += torch.autograd.grad(expected, shift_LTE)[0]
        total = total + probability
    assert abs(float(total) - 1) < 1e-9, f"the probabilities of all joint choices sum to {float(total)}"
    return gradient_LTE


def sample_choices(probe: Probe, samples: int, seed: int) -> Tensor:
    """Draw joint choices from the policies, layer after layer; int64 of shape (L, S, T, K)."""
    layers, rows = len(probe.routers), samples * probe.tokens
    generator = torch.Generator().manual_seed(derive_key("gradients", "joint choices", seed) % 2**63)
    ids_LSTK = torch.arange(probe.k).expand(layers, samples, probe.tokens, probe.k).clone()
    for layer in range(layers):
        uniform_TE = torch.rand(rows, probe.columns, generator=generator, dtype=torch.float64)
        drawn_TK = gumbel_top_k(probe.policy(ids_LSTK, layer), probe.k, uniform_TE.clamp(1e-12, 1 - 1e-12))
        ids_LSTK[layer] = drawn_TK.view(samples, probe.tokens, probe.k)
    return ids_LSTK


def conditional_gradients(probe: Probe, ids_LSTK: Tensor, *, held: bool) -> Tensor:
    """Return one conditional gradient for each sampled joint choice, shape (S, L, T, E)."""
    with torch.no_grad():
        loss_S, _ = probe.forced(ids_LSTK, probe.zero_shift(), held=True)
    others_S = (loss_S.sum() - loss_S) / max(len(loss_S) - 1, 1)
    return torch.stack([_conditional(probe, ids_LSTK[:, s], others_S[s], held) for s in range(len(loss_S))])


def _conditional(probe: Probe, ids_LTK: Tensor, baseline: Tensor, held: bool) -> Tensor:
    """Return the gradient at every logit, the other choices held at ``ids_LTK``; shape (L, T, E)."""
    choices_CK = ordered_choices(probe.columns, probe.k)
    count, tokens = len(choices_CK), probe.tokens
    result_LTE = probe.zero_shift(requires_grad=False)
    for slots_P in torch.split(torch.arange(len(ids_LTK) * tokens), max(1, CHUNK_ROWS // (count * tokens))):
        layer_N, token_N = (slots_P // tokens).repeat_interleave(count), (slots_P % tokens).repeat_interleave(count)
        replica_N = torch.arange(len(layer_N))
        ids_LNTK = ids_LTK[:, None].repeat(1, len(layer_N), 1, 1)
        ids_LNTK[layer_N, replica_N, token_N] = choices_CK.repeat(len(slots_P), 1)
        shift_LTE = probe.zero_shift(len(layer_N))
        loss_N, log_prob_LNT = probe.forced(ids_LNTK, shift_LTE, held=held)
        log_joint_N = log_prob_LNT.sum((0, 2))
        weight_N = log_joint_N.detach().view(-1, count).softmax(1).flatten()
        total = (weight_N * (loss_N + (loss_N.detach() - baseline) * log_joint_N)).sum()
        gradient_LNTE = torch.autograd.grad(total, shift_LTE)[0].view(*ids_LNTK.shape[:3], -1)
        own_NE = gradient_LNTE[layer_N, replica_N, token_N]  # each replica answers for the choice that it enumerates
        result_LTE[slots_P // tokens, slots_P % tokens] = own_NE.view(len(slots_P), count, -1).sum(1)
    return result_LTE
