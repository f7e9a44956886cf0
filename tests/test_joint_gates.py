"""Gates of chosen and shared experts under one sum: against one number after another, and as the layer runs them.

Shape suffixes: T tokens, E experts, K experts per token, S shared experts.
"""

import math
from dataclasses import replace

import pytest
import torch

from rlroute.baselines.joint_gates import JointGatesRouter
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.routing import Sums
from rlroute.training.prepare import check
from tests.conftest import D, draw, make_context, make_shape
from tests.tiny import DATA, MODEL, TRAIN, make_model, run_tokens, shake, small_config

T, E, K, S = 12, 6, 2, 3


def make(shared: int = S, k: int = K, **config) -> JointGatesRouter:
    router = JointGatesRouter(
        JointGatesRouter.Config(init_std=0.7, **config), make_shape(E, k, num_shared_experts=shared)
    )
    return router.double()


def test_one_sum_divides_all_gates_and_the_bias_moves_the_choice_alone():
    router = make(route_scale=8.0)
    router.scale.data.fill_(0.5)
    router.bias_E.copy_(0.3 * draw(E, seed=5))
    x_TD = draw(T, D)
    decision = router(x_TD, make_context(T))
    assert decision.shared_gates_TS is not None
    for token, x_D in enumerate(x_TD):
        rows_XD = torch.cat([router.scores.weight, router.shared_SD]).tolist()
        odds = [1 / (1 + math.exp(-sum(w * x for w, x in zip(row, x_D.tolist(), strict=True)))) for row in rows_XD]
        odds_E, shared_S = odds[:E], odds[E:]
        best = sorted(range(E), key=lambda e: -(odds_E[e] + float(router.bias_E[e])))[:K]
        total = sum(odds_E[e] for e in best) + sum(shared_S)
        rows = slice(token * K, (token + 1) * K)
        assert decision.expert_ids_R[rows].tolist() == best
        assert decision.gates_R[rows].tolist() == pytest.approx([4 * odds_E[e] / total for e in best])
        assert decision.shared_gates_TS[token].tolist() == pytest.approx([4 * s / total for s in shared_S])


def test_without_shared_experts_it_is_topk() -> None:
    router = make(shared=0)
    decision = router(draw(T, D), make_context(T))
    assert decision.shared_gates_TS is None
    assert torch.allclose(decision.gates_R.view(T, K).sum(1), torch.ones((), dtype=torch.float64))


def test_a_layer_weighs_its_shared_experts_by_these_gates():
    """Where all experts give the same, the layer's output is that times the scale, whoever is chosen."""
    config = small_config(num_layers=1, num_shared_experts=2)
    model = shake(make_model("joint_gates", config))
    layer = model.routed[0]
    width = config.d_expert
    gate_FD, up_FD = layer.shared.experts.in_EHD.data[0].chunk(2)
    for expert in range(config.num_experts):
        layer.experts.in_EHD.data[expert] = torch.cat([gate_FD[:width], up_FD[:width]])
        layer.experts.out_EDF.data[expert] = layer.shared.experts.out_EDF.data[0, :, :width]
    for part in (gate_FD, up_FD):
        part[width:] = part[:width]
    layer.shared.experts.out_EDF.data[0, :, width:] = layer.shared.experts.out_EDF.data[0, :, :width]
    x_TD = draw(T, config.d_model)
    out_TD, _ = layer(x_TD, make_context(T, site=0))
    hidden_TF = torch.nn.functional.silu(x_TD @ gate_FD[:width].T) * (x_TD @ up_FD[:width].T)
    want_TD = layer.router.scale * hidden_TF @ layer.shared.experts.out_EDF[0, :, :width].T
    torch.testing.assert_close(out_TD, want_TD)
    logits, _ = run_tokens(model, torch.zeros(1, 4, dtype=torch.long))
    assert bool(logits.isfinite().all())


def test_the_bias_moves_until_its_share_of_the_budget() -> None:
    router = make(bias_rate=0.25, bias_until=0.5)
    for progress in (0.4, 0.6):
        router.adapt(Sums({"demand_E": torch.tensor([9, 3, 6, 6, 6, 6])}, []), progress)
    assert router.bias_E.tolist() == [-0.25, 0.25, 0, 0, 0, 0]


def test_gates_that_the_layer_makes_are_refused_before_any_work() -> None:
    config = build_entry("joint_gates", DATA, replace(MODEL, num_shared_experts=1, shared_gate="sigmoid"), TRAIN)
    with pytest.raises(
        ConfigError, match=r"joint_gates: model\.shared_gate weighs the shared experts, .* legal is 'none'"
    ):
        check({config: [0]})
    check({replace(config, model=replace(config.model, shared_gate="none")): [0]})


def test_a_gate_that_is_alone_is_its_score() -> None:
    router = make(shared=0, k=1)
    decision = router(draw(T, D), make_context(T))
    assert decision.logits_TE is not None
    torch.testing.assert_close(decision.gates_R, decision.logits_TE.sigmoid().amax(1))
