"""Token choice equals a slow reference for every published class that it covers; groups, bias and refusals.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlroute import metrics
from rlroute.baselines.topk import TopKRouter
from rlroute.errors import ConfigError
from rlroute.experiments.laws.cases import Case
from rlroute.experiments.laws.contract import LAWS
from rlroute.routing import RoutingDecision, Sums
from tests.conftest import D, draw, make_context, make_feedback, make_shape, sums_of

E, K, T = 16, 4, 64
SIGMOID_BIAS: dict[str, Any] = {"score": "sigmoid", "bias_rate": 0.001}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mixtral, Qwen3": {},
    "Qwen2, OLMoE, Jamba": {"normalize": False},
    "GPT-OSS": {"order": "choose_first", "linear_bias": True},
    "JetMoE, Granite, Aria": {"order": "choose_first"},
    "OpenAI privacy filter": {"order": "choose_first", "route_scale": 1 / K},
    "DeepSeek-V2": {"normalize": False, "route_scale": 16, "groups": 8, "groups_kept": 3, "group_score": "max"},
    "Mistral 4": {"groups": 4, "groups_kept": 2},
    "DeepSeek-V3, Kimi K2, GLM-5": {**SIGMOID_BIAS, "route_scale": 2.5, "groups": 8, "groups_kept": 4},
    "A.X K2": {**SIGMOID_BIAS, "groups": 4, "groups_kept": 2, "outside": "zero"},
    "MiniMax-M2": SIGMOID_BIAS,
    "Kolibri": {**SIGMOID_BIAS, "order": "choose_first"},
    "Laguna": {**SIGMOID_BIAS, "soft_cap": 0.7},
    "Muse Spark": {**SIGMOID_BIAS, "logit_scale": 3.0},
    "Flint": {"score": "sigmoid", "normalize": False},
    "Cohere 2": {"score": "sigmoid", "order": "choose_first"},
    "Ernie 4.5": {"bias_rate": 0.001},
    "LongCat-Flash": {"bias_rate": 0.001, "normalize": False, "route_scale": 6.0},
    "Gemma 4": {"norm_input": True, "expert_scales": True},
    "DeepSeek-V4": {"score": "sqrt_softplus", "bias_rate": 0.001, "route_scale": 1.5},
}


def make(experts: int = E, k: int = K, devices: int = 1, **config: Any) -> TopKRouter:
    shape = make_shape(experts, k, devices=devices)
    return TopKRouter(TopKRouter.Config(**{"init_std": 0.5} | config), shape).double()


def shaken(router: TopKRouter, seed: int = 0) -> TopKRouter:
    """Give the router a random bias of the choice, of the logits, and random scales."""
    scores = router.scores
    for part, offset in ((router.bias_E, 0), (scores.bias, 0), (getattr(router, "scale_E", None), 1)):
        if part is not None:
            part.data.copy_(offset + 0.3 * draw(len(part), seed=seed))
            seed += 1
    return router


SCORES: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "sqrt_softplus": lambda z: math.sqrt(math.log(1 + math.exp(z))),
}


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def reference(router: TopKRouter, x: list[float]) -> dict[int, float]:
    """One token's experts and their gates, one number at a time."""
    c, experts, k = router.config, range(router.shape.num_experts), router.shape.k
    if c.norm_input:
        root = math.sqrt(sum(value**2 for value in x) / len(x) + torch.finfo(torch.float64).eps)
        x = [value / root for value in x]
    offsets = [0.0] * len(experts) if not c.linear_bias else router.scores.bias.tolist()
    logits = [
        c.logit_scale * (sum(w * value for w, value in zip(row, x, strict=True)) + offset)
        for row, offset in zip(router.scores.weight.tolist(), offsets, strict=True)
    ]
    if c.soft_cap:
        logits = [c.soft_cap * math.tanh(z / c.soft_cap) for z in logits]
    scores = softmax(logits) if c.score == "softmax" else [SCORES[c.score](z) for z in logits]
    bias = [0.0] * len(experts) if router.bias_E is None else router.bias_E.tolist()
    ranked = [v + b for v, b in zip(logits if c.order == "choose_first" else scores, bias, strict=True)]
    width = len(experts) // c.groups
    groups = [ranked[start : start + width] for start in range(0, len(experts), width)]
    worth = [sum(sorted(group)[-(1 if c.group_score == "max" or width == 1 else 2) :]) for group in groups]
    kept = sorted(range(c.groups), key=lambda group: -worth[group])[: c.groups_kept]
    legal = [expert for expert in experts if expert // width in kept or c.outside == "zero"]
    chosen = sorted(legal, key=lambda expert: -(ranked[expert] if expert // width in kept else 0.0))[:k]
    gates = [scores[expert] for expert in chosen]
    if c.score == "softmax" and c.order == "choose_first":
        gates = softmax([logits[expert] for expert in chosen])
    if c.normalize and k > 1:
        gates = [gate / sum(gates) for gate in gates]
    scales = router.scale_E.tolist() if c.expert_scales else [1.0] * len(experts)
    return {expert: c.route_scale * gate * scales[expert] for expert, gate in zip(chosen, gates, strict=True)}


def by_token(decision: RoutingDecision) -> list[dict[int, float]]:
    assert decision.k is not None
    ids_TK, gates_TK = decision.expert_ids_R.view(-1, decision.k), decision.gates_R.view(-1, decision.k)
    return [dict(zip(ids, gates, strict=True)) for ids, gates in zip(ids_TK.tolist(), gates_TK.tolist(), strict=True)]


@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("name", PUBLISHED)
def test_choices_and_gates_are_those_of_the_published_classes(name: str, k: int) -> None:
    config = TopKRouter.Config(**PUBLISHED[name])
    if reason := TopKRouter.refuses(config, make_shape(E, k)):
        assert k == 1 and "constant 1" in reason
        return
    router, x_TD = shaken(make(k=k, **PUBLISHED[name])), draw(T, D)
    got = by_token(router(x_TD, make_context(T)))
    for mine, x in zip(got, x_TD.tolist(), strict=True):
        want = reference(router, x)
        assert mine.keys() == want.keys()
        assert all(mine[expert] == pytest.approx(want[expert], rel=1e-9) for expert in want)


def groups_used(router: TopKRouter) -> list[set[int]]:
    width = E // router.config.groups
    return [{e // width for e in token} for token in by_token(router(draw(T, D), make_context(T)))]


@pytest.mark.parametrize("score", ["max", "top2"])
@pytest.mark.parametrize("shift", [0.0, -50.0, 50.0])
def test_no_token_leaves_its_groups_whatever_the_bias(shift: float, score: str) -> None:
    """With a mask of 0 in place of none, scores that are all negative send every token into forbidden groups."""
    config = {**SIGMOID_BIAS, "groups": 4, "groups_kept": 2, "group_score": score}
    router, free = (make(**{**config, "groups_kept": kept}) for kept in (2, 4))
    zero = make(**config, outside="zero")
    for one in (router, free, zero):
        assert one.bias_E is not None
        one.bias_E += shift
    limited, unlimited, masked_by_0 = (groups_used(one) for one in (router, free, zero))
    assert max(map(len, limited)) == 2 < max(map(len, unlimited))
    for best, other in zip(limited, masked_by_0, strict=True):
        assert best.isdisjoint(other) if shift < 0 else best == other


def test_all_groups_are_no_limit() -> None:
    free, grouped = make(), make(groups=4, groups_kept=4)
    x_TD, context = draw(T, D), make_context(T)
    assert torch.equal(free(x_TD, context).expert_ids_R, grouped(x_TD, context).expert_ids_R)


@pytest.mark.parametrize(("kept", "k"), [(1, 4), (2, 4), (3, 6)])
def test_experts_of_a_token_are_on_its_best_devices(kept: int, k: int) -> None:
    """Of the devices as the context has them, each ranked by its best expert (DeepSeek-V2)."""
    router = make(k=k, devices=4, groups=0, groups_kept=kept, group_score="max", normalize=False)
    context = make_context(T).at(router.shape, {})
    decision, device_E = router(draw(T, D), context), context.expert_device_E
    assert device_E is not None and decision.probs_TE is not None
    for token, probs in zip(by_token(decision), decision.probs_TE.tolist(), strict=True):
        best = [max(probs[e] for e in range(E) if int(device_E[e]) == device) for device in range(4)]
        allowed = sorted(range(4), key=lambda device: -best[device])[:kept]
        legal = [e for e in range(E) if int(device_E[e]) in allowed]
        assert token.keys() == set(sorted(legal, key=lambda e: -probs[e])[:k])


def test_as_many_devices_as_may_be_used_are_no_limit() -> None:
    x_TD, context = draw(T, D), make_context(T)
    free = make()(x_TD, context).expert_ids_R
    for devices in (1, 2):
        assert torch.equal(make(devices=devices, groups=0, groups_kept=2)(x_TD, context).expert_ids_R, free)
    with pytest.raises(ConfigError, match=r"groups = 8: legal are divisors .* leave 4 or more"):
        make(devices=8, groups=0, groups_kept=1)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("law_"))
def test_group_limited_routing_keeps_the_contract(law: Callable[[Case], None]) -> None:
    config = TopKRouter.Config(score="sigmoid", groups=2, groups_kept=1, bias_rate=0.1, route_scale=2.5)
    law(Case(TopKRouter, config))


def test_the_bias_moves_by_the_sign_and_balances_collapsed_scores() -> None:
    router = make(experts=8, k=2, bias_rate=0.01, score="sigmoid", init_std=0.3)
    x_TD, context, worst = draw(512, D) + 2, make_context(512), []
    assert router.learns_from == {"gate", "load"} and make().learns_from == {"gate"} and make().bias_E is None
    for _ in range(150):
        decision = router(x_TD, context)
        worst.append(float(metrics.max_vio(decision.demand_E())))
        router.adapt(sums_of(router, decision, make_feedback(context)), 0.0)
    assert worst[0] > 1.5 and worst[-1] < 0.3


@pytest.mark.parametrize(("progress", "moves"), [(0.0, 1), (0.49, 1), (0.5, 0), (1.0, 0)])
def test_the_bias_moves_by_the_rate_until_its_share_of_the_budget(progress: float, moves: int) -> None:
    router = make(experts=8, k=2, bias_rate=0.25, bias_until=0.5)
    router.adapt(Sums({"demand_E": torch.tensor([9, 3, 6, 6] + [6] * 4)}, []), progress)
    assert router.bias_E is not None and router.bias_E.tolist() == [-0.25 * moves, 0.25 * moves, *[0.0] * 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", [{"score": s} for s in ("softmax", "sigmoid", "sqrt_softplus")] + [{"soft_cap": 5}])
def test_gradients_are_finite_where_scores_underflow(config: dict[str, Any], dtype: torch.dtype) -> None:
    """The root of softplus has none at 0, which softplus is in float32 from a logit of about -104."""
    router = make(**config).to(dtype)
    router.scores.weight.data.fill_(-1.0)
    decision = router(torch.full((3, D), 1000.0, dtype=dtype), make_context(3))
    (decision.gates_R * torch.arange(3 * K)).sum().backward()
    assert bool(decision.gates_R.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in router.parameters())


@pytest.mark.parametrize(
    ("config", "k", "message"),
    [
        ({"score": "relu"}, 2, r"topk\.score = 'relu': legal are 'softmax', 'sigmoid', 'sqrt_softplus'"),
        ({"soft_cap": -1.0}, 2, r"topk\.soft_cap = -1\.0: legal are numbers from 0"),
        ({"logit_scale": 0.0}, 2, r"topk\.logit_scale = 0\.0: legal are numbers above 0"),
        ({"groups": -1}, 2, r"topk\.groups = -1: legal are numbers from 0"),
        ({"groups": 2, "groups_kept": 3}, 2, r"topk\.groups_kept = 3: legal are 1 to groups = 2"),
        ({"group_score": "max"}, 2, r"topk\.group_score = 'max' needs groups: 1 ranks nothing"),
        ({"outside": "zero"}, 2, r"topk\.outside = 'zero' needs groups: 1 ranks nothing"),
        ({"groups": 3}, 2, r"groups = 3: legal are divisors of num_experts = 16 that leave 2 or more to each"),
        ({"groups": 16, "groups_kept": 8}, 4, r"groups = 16: legal are divisors .* 2 or more"),
        ({"groups": 8, "groups_kept": 2}, 8, r"groups = 8: legal are divisors .* 4 or more"),
        ({"groups": 16, "groups_kept": 2, "group_score": "max"}, 3, r"groups = 16: legal are divisors .* 2 or more"),
        ({"order": "choose_first"}, 1, r"k = 1: a softmax over the chosen .* legal are 2 and more"),
    ],
)
def test_what_cannot_be_is_refused_by_name(config: dict[str, Any], k: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(k=k, **config)


def test_what_the_gate_is_follows_the_configuration() -> None:
    told = {
        make().gate_meaning: "softmax over all experts, normalised over the chosen",
        make(normalize=False).gate_meaning: "softmax over all experts",
        make(k=1).gate_meaning: "softmax over all experts",
        make(order="choose_first").gate_meaning: "softmax over the chosen",
        make(**SIGMOID_BIAS, route_scale=2.5).gate_meaning: "sigmoid, unbiased, normalised over the chosen, times 2.5",
        make(score="sqrt_softplus", normalize=False, expert_scales=True).gate_meaning: (
            "sqrt-softplus, times a learned scale of the expert"
        ),
    }
    assert all(said == want for said, want in told.items())
