"""SparseMixer: choices and gates against a reference token by token, draws by their frequencies, Heun's rule by what it
integrates.

Shape suffixes: T tokens, D model width, E experts, K choices.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.baselines.sparse_mixer import SparseMixerRouter, heun
from rlroute.errors import ConfigError
from tests.conftest import D, draw, make_context, make_shape

E = 6
JITTERS = [0.01, 0.2, 0.5, 1.0]


def make(k: int = 2, **fields: Any) -> SparseMixerRouter:
    return SparseMixerRouter(SparseMixerRouter.Config(init_std=0.7, **fields), make_shape(E, k)).double()


def near_of(left: dict[int, float], jitter: float) -> list[int]:
    """The experts that are not masked, by the definition."""
    best = max(left.values())
    return [e for e, z in left.items() if (best - z) / max(abs(z), best) <= 2 * jitter]


def share_of(left: dict[int, float], near: list[int], expert: int) -> float:
    return math.exp(left[expert]) / sum(math.exp(left[e]) for e in {*near, expert})


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shift", [0.0, -9.0])  # with it all scores are negative
def test_evaluation_takes_the_largest_and_gates_are_shares_of_the_near_ones(
    k: int, jitter: float, shift: float
) -> None:
    router, x_TD = make(k, jitter=jitter), draw(40, D)
    router.scores.register_forward_hook(lambda module, inputs, logits_TE: logits_TE + shift)
    decision = router(x_TD, make_context(40, explore=False)).detach()
    assert decision.logits_TE is not None
    masked = 0
    for token, scores in enumerate(decision.logits_TE.tolist()):
        left = dict(enumerate(scores))
        for choice in range(k):
            expert = max(left, key=lambda e: left[e])
            near = near_of(left, jitter)
            masked += len(left) - len(near)
            assert int(decision.expert_ids_R[token * k + choice]) == expert
            assert float(decision.gates_R[token * k + choice]) == pytest.approx(share_of(left, near, expert))
            del left[expert]
    assert (masked > 0) == (jitter < (0.5 if shift else 1.0))


def test_training_draws_from_the_near_ones_and_cuts_three_of_four_gates_that_are_not_the_largest() -> None:
    router, tokens, kinds = make(jitter=0.5), 40_000, 4
    x_TD = draw(kinds, D, seed=4).repeat(tokens // kinds, 1)
    decision = router(x_TD, make_context(tokens)).detach()
    assert decision.logits_TE is not None
    ids_TK, gates_TK = decision.expert_ids_R.view(-1, 2), decision.gates_R.view(-1, 2)
    cut = whole = 0
    for kind in range(kinds):
        left = dict(enumerate(decision.logits_TE[kind].tolist()))
        mine_K, gates_K = ids_TK[kind::kinds], gates_TK[kind::kinds]
        first = near_of(left, 0.5)
        count = len(mine_K)
        for e in left:
            share = share_of(left, first, e) if e in first else 0.0
            found = float((mine_K[:, 0] == e).double().mean())
            assert abs(found - share) <= 4.5 * math.sqrt(share * (1 - share) / count) + 1e-12
        taken = first[-1] if len(first) > 1 else first[0]
        rest = {e: z for e, z in left.items() if e != taken}
        second, after = near_of(rest, 0.5), mine_K[:, 0] == taken
        for e in second:
            share = share_of(rest, second, e)
            found = float((mine_K[after, 1] == e).double().mean())
            assert abs(found - share) <= 4.5 * math.sqrt(share * (1 - share) / int(after.sum())) + 1e-12
        best = max(left, key=lambda e: left[e])
        for e in first:
            ratio_N = gates_K[mine_K[:, 0] == e, 0] / share_of(left, first, e)
            if e == best:
                assert torch.allclose(ratio_N, torch.ones_like(ratio_N))
                continue
            is_cut_N = torch.isclose(ratio_N, torch.full_like(ratio_N, 1 / 3))
            assert bool((is_cut_N | torch.isclose(ratio_N, torch.ones_like(ratio_N))).all())
            cut, whole = cut + int(is_cut_N.sum()), whole + int((~is_cut_N).sum())
    assert abs(cut / (cut + whole) - 0.75) < 4.5 * math.sqrt(0.75 * 0.25 / (cut + whole)) and cut + whole > 1000


class MidPoint(torch.autograd.Function):
    """The estimator written by hand: the gradient of a share, whatever the gate was multiplied with."""

    @staticmethod
    def forward(ctx: Any, left_TE: Tensor, near_TE: Tensor, ids_T1: Tensor, factor_T1: Tensor) -> Tensor:
        shares_TE = left_TE.exp() * near_TE / (left_TE.exp() * near_TE).sum(1, keepdim=True)
        ctx.save_for_backward(shares_TE, ids_T1)
        return shares_TE.gather(1, ids_T1) * factor_T1

    @staticmethod
    def backward(ctx: Any, dgate_T1: Tensor) -> tuple[Tensor | None, ...]:
        shares_TE, ids_T1 = ctx.saved_tensors
        mine_T1 = shares_TE.gather(1, ids_T1)
        return (torch.zeros_like(shares_TE).scatter(1, ids_T1, 1.0) - shares_TE) * mine_T1 * dgate_T1, None, None, None


def test_the_gradient_is_that_of_the_estimator_written_by_hand() -> None:
    router, x_TD, tokens = make(jitter=0.5), draw(200, D), 200
    decision = router(x_TD, make_context(tokens))
    credit_TK = draw(tokens, 2, seed=5)
    (got,) = torch.autograd.grad((decision.gates_R.view(-1, 2) * credit_TK).sum(), router.scores.weight)
    left_TE, total, cuts = router.scores(x_TD), torch.zeros(()).double(), 0
    keep_TE = torch.ones(tokens, E, dtype=torch.bool)
    for choice in range(2):
        rows = [{e: z for e, z in enumerate(row) if keep_TE[t, e]} for t, row in enumerate(left_TE.tolist())]
        near_TE = torch.tensor([[e in near_of(row, 0.5) for e in range(E)] for row in rows])
        ids_T1 = decision.expert_ids_R.view(-1, 2)[:, choice, None]
        plain_T1 = MidPoint.apply(left_TE, near_TE, ids_T1, torch.ones(tokens, 1).double())
        factor_T1 = decision.gates_R.detach().view(-1, 2)[:, choice, None] / plain_T1.detach()
        cuts += int((factor_T1 < 0.5).sum())
        total = total + (MidPoint.apply(left_TE, near_TE, ids_T1, factor_T1) * credit_TK[:, choice, None]).sum()
        keep_TE = keep_TE.scatter(1, ids_T1, False)
    (want,) = torch.autograd.grad(total, router.scores.weight)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert cuts > 10


def test_the_rule_is_exact_for_cubics() -> None:
    """What an expert is worth, f(p) - f(0), is the mean over the coin of f'(gate) p."""
    p = torch.tensor([[0.3], [0.9]], dtype=torch.float64)
    whole, cut = (heun(p, torch.full_like(p, coin, dtype=torch.bool)) for coin in (True, False))
    for power in (1, 2, 3):
        slopes = [power * gate ** (power - 1) for gate in (whole, cut)]
        torch.testing.assert_close((slopes[0] / 4 + 3 * slopes[1] / 4) * p, p**power)


def test_a_forced_expert_that_is_far_has_a_gate_and_a_gradient() -> None:
    router, x_TD = make(jitter=0.01), draw(12, D)
    for explore in (False, True):
        context = make_context(12, explore=explore)
        worst_TK = router.scores(x_TD).argsort(1)[:, :2]
        decision = router(x_TD, replace(context, choices={context.site: worst_TK}))
        assert torch.equal(decision.expert_ids_R, worst_TK.flatten())
        first_T = decision.gates_R.view(-1, 2)[:, 0]
        assert bool(((first_T > 0) & (first_T < 1)).all())
        (gradient,) = torch.autograd.grad(first_T.sum(), router.scores.weight)
        assert bool(gradient.any())


def test_a_third_expert_is_refused() -> None:
    with pytest.raises(ConfigError, match="router sparse_mixer: k = 3: legal are 1 and 2"):
        make(3)
