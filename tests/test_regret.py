"""The regret of a router's routes is that of the whole model run again on every alternative.

Shape suffixes: T tokens, N tokens, K slots per token, E experts, C tokens per expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlroute.config import RouterConfig, RunConfig
from rlroute.model import Transformer
from rlroute.records import RunFolder
from rlroute.registry import router_class
from rlroute.routing import Router, RoutingContext, RoutingDecision
from rlroute.training import audit, loop, regret
from rlroute.training.batches import Batch
from rlroute.training.regret import Search, all_sets
from rlroute.training.routes import Routes
from rlroute.training.step import forward, make_context
from tests import tiny
from tests.conftest import make_shape
from tests.policies import any_router_names, needs
from tests.tiny import CPU64, make_batch, make_model, shake, small_config

KEYS: dict[str, Any] = {"seed": 0, "step": 3}
FREE = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 1}


@pytest.fixture(autouse=True)
def of_all_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it; the other tests look at fewer."""
    monkeypatch.setattr(regret, "TOKENS", 128)
    monkeypatch.setattr(regret, "SETS", 512)


def model_of(router: str | None, k: int = 2, model: dict[str, Any] | None = None, **fields: Any) -> Transformer:
    config = small_config(k=k, **(model or {}))
    if router is not None:
        fields |= needs(router, config.d_model, config.num_experts)
    return shake(make_model(router, config, seq_len=16, **fields))


def run(model: Transformer, batch: Batch, **fields: Any) -> tuple[Tensor, RoutingDecision, Tensor]:
    """Return the losses of a greedy run, and what the last router decided and chose."""
    context = make_context(batch, CPU64, explore=False, chosen={}, **KEYS, **fields)
    loss_MT, decisions = forward(model, batch, context, CPU64)
    assert context.chosen is not None
    return loss_MT[0], decisions[-1], context.chosen[model.routers[-1].shape.site]


def search_of(model: Transformer, batch: Batch, tokens: int = 64) -> Search:
    with torch.no_grad():
        routes = Routes(model, batch, tokens, CPU64, **KEYS)
        search = Search(routes, functional.cross_entropy(routes.logits_taken(), routes.targets_N, reduction="none"))
        search.run()
    return search


def alternatives(ids_TK: Tensor, row: int, experts: int) -> Iterator[Tensor]:
    """Yield the slots of a token with any other set of real experts in those of real ones."""
    mine_K = ids_TK[row].clone()
    real_K = mine_K < experts
    for members in combinations(range(experts), int(real_K.sum())):
        yield mine_K.masked_scatter(real_K, torch.tensor(members, dtype=torch.int64))


# Against brute force: the whole model, run again for each token and alternative, all other tokens on their routes


@torch.no_grad()
def brute_force(model: Transformer, batch: Batch) -> Tensor:
    loss_T, _, ids_TK = run(model, batch)
    site, best_T = model.routers[-1].shape.site, loss_T.clone()
    for row in range(len(loss_T)):
        for slots_K in alternatives(ids_TK, row, model.routers[-1].shape.num_real_experts):
            forced_TK = ids_TK.clone()
            forced_TK[row] = slots_K
            best_T[row] = min(best_T[row], run(model, batch, choices={site: forced_TK})[0][row])
    return loss_T - best_T


@pytest.mark.parametrize(("k", "router"), [(1, "switch"), (2, "topk")])
def test_regret_is_that_of_the_whole_model_run_again_for_each_alternative(k: int, router: str) -> None:
    model, batch = model_of(router, k), make_batch(4, 16)
    search = search_of(model, batch)
    assert len(search.regret_N) == 64 and search.exact_N.all()
    torch.testing.assert_close(search.regret_N, brute_force(model, batch), rtol=0, atol=1e-9)
    assert (search.regret_N >= 0).all() and search.regret_N.mean() > 0.01, "there is something to compare"
    found = regret.regret(model, [batch], 4, CPU64, **KEYS)
    assert not isinstance(found, str) and found["nats"] == pytest.approx(float(search.regret_N.mean()), abs=1e-12)


CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "hash of one": ("hash", 1, {}, {}),
    "gates of 1/k": ("reinforce", 2, {}, {}),
    "biased choice": ("bias_balanced", 2, {}, {}),
    "shared gates that hang on the choice": ("joint_gates", 2, {"num_shared_experts": 2}, {}),
    "a fill that hangs on the choice": ("default_moe", 2, {}, {}),
    "free experts": ("moe_plus_plus", 2, FREE, {}),
    "variable k": ("top_p", 2, {"num_experts": 5}, {"p": 0.6}),
    "an attention of experts": ("topk", 2, {"attention_experts": 4}, {}),
    "gates at the input": ("topk", 2, {"gate_at": "input", "expert_bias": True}, {}),
    "unit gates": ("switch", 2, {"gate_form": "unit"}, {}),
    "gated shared experts, latents": (
        "gshard",
        2,
        {"num_shared_experts": 1, "shared_gate": "sigmoid", "d_latent": 6},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_so_it_is_for_other_routers_and_layers(case: str) -> None:
    """All tokens are on an alternative at a time: none of them changes another's loss, as the test above shows."""
    router, k, layer, fields = CASES[case]
    model, batch = model_of(router, k, layer, **fields), make_batch(4, 16)
    search = search_of(model, batch)
    with torch.no_grad():
        loss_T, _, ids_TK = run(model, batch)
        last = model.routers[-1].shape
        by_row = [list(alternatives(ids_TK, row, last.num_real_experts)) for row in range(len(ids_TK))]
        best_T = loss_T
        for turn in range(max(map(len, by_row))):
            forced_TK = torch.stack([sets[min(turn, len(sets) - 1)] for sets in by_row])
            best_T = torch.minimum(best_T, run(model, batch, choices={last.site: forced_TK})[0])
    torch.testing.assert_close(search.regret_N, loss_T - best_T, rtol=0, atol=1e-9)
    assert search.regret_N.mean() > 1e-3


@torch.no_grad()
def test_where_experts_choose_a_token_goes_to_as_many_others(k: int = 2) -> None:
    model, batch = model_of("expert_choice", k), make_batch(2, 8)
    loss_T, _, ids_EC = run(model, batch)
    site, best_T, tokens = model.routers[-1].shape.site, loss_T.clone(), len(loss_T)
    for row in range(tokens):
        mine = [expert for expert in range(4) if row in ids_EC[expert]]
        for others in combinations(range(4), len(mine)):
            forced_EC = ids_EC.masked_fill(ids_EC == row, tokens)
            for expert in others:
                forced_EC[expert, 0] = row  # whoever has to go has no part in this token's loss
            best_T[row] = min(best_T[row], run(model, batch, choices={site: forced_EC})[0][row])
    torch.testing.assert_close(search_of(model, batch).regret_N, loss_T - best_T, rtol=0, atol=1e-9)


# What is measured


@pytest.mark.parametrize("name", any_router_names())
def test_every_router_has_a_regret(name: str) -> None:
    shape = make_shape(4)
    if reason := router_class(name).refuses(router_class(name).Config(**needs(name, 6, 4)), shape):
        pytest.skip(reason)
    model, batch = model_of(name), make_batch(2, 16)
    found = regret.regret(model, [batch], 2, CPU64, **KEYS)
    assert not isinstance(found, str), found
    assert found["layer"] == 1 and found["tokens"] == 32 and found["exact"] == 1 and len(found["nats_C"]) == 10
    assert sorted(found["confidence_C"]) == found["confidence_C"]
    assert (found["nats"] > 0) == (name != "soft"), "all experts are no choice"


@pytest.mark.parametrize("layer", [{}, {"capacity_factor": 0.5}, FREE, {"num_shared_experts": 1}], ids=str)
@pytest.mark.parametrize("router", ["topk", "expert_choice", "hash"])
def test_the_route_taken_has_the_loss_of_evaluation(router: str, layer: dict[str, Any]) -> None:
    model, batch = model_of(router, 2, layer), make_batch(4, 16)
    with torch.no_grad():
        search, loss_T = search_of(model, batch), run(model, batch)[0]
    torch.testing.assert_close(search.taken_N, loss_T, rtol=0, atol=1e-9)
    assert (search.regret_N >= 0).all()


def test_what_a_capacity_dropped_stays_dropped() -> None:
    model, batch = model_of("topk", 2, {"capacity_factor": 0.25}), make_batch(4, 16)
    with torch.no_grad():
        decision = run(model, batch)[1]
    search, without_T = search_of(model, batch), decision.token_sum(decision.runs_R.long()) == 0
    assert 0 < int(without_T.sum()) < 64
    assert not search.regret_N[without_T].any() and search.regret_N[~without_T].any()


def test_beyond_the_bound_regret_is_at_least_what_exchanges_find(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(4, 16)
    for k, experts in ((1, 8), (3, 8)):
        model = model_of("topk", k, {"num_experts": experts})
        exact = search_of(model, batch)
        monkeypatch.setattr(regret, "SETS", 4)
        few, found = search_of(model, batch), regret.regret(model, [batch], 4, CPU64, **KEYS)
        monkeypatch.setattr(regret, "SETS", 40)
        more = search_of(model, batch)
        monkeypatch.setattr(regret, "SETS", 512)
        assert exact.exact_N.all() and not few.exact_N.any() and (few.tried_N == experts - k).all()
        assert not isinstance(found, str) and found["exact"] == 0 and found["better"] is None
        assert (few.regret_N <= more.regret_N).all() and (more.regret_N <= exact.regret_N + 1e-12).all()
        assert (few.regret_N > 0).any() and (k > 1 or torch.equal(few.regret_N, exact.regret_N))
        assert float(more.regret_N.mean()) > 0.8 * float(exact.regret_N.mean())


def test_the_share_of_better_sets_is_counted_among_all_others() -> None:
    model, batch = model_of("topk", 1), make_batch(4, 16)
    search = search_of(model, batch)
    with torch.no_grad():
        loss_T, _, ids_TK = run(model, batch)
        losses = torch.stack(
            [run(model, batch, choices={1: torch.full_like(ids_TK, expert)})[0] for expert in range(4)]
        )
    torch.testing.assert_close(search.better_share_N, (losses < loss_T - 1e-12).double().sum(0) / 3)
    assert len(all_sets(5, 2)) == 10 and (all_sets(5, 2).sum(1) == 2).all() and len(all_sets(5, 2).unique(dim=0)) == 10


# Who has none


class DeafRouter(Router):
    """Takes the best by itself, or chokes on what is forced."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        how: str = "deaf"

    gate_meaning = "1"
    publishes = frozenset()
    config: Config

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        best_TK = x_TD[:, : self.shape.num_experts].topk(self.shape.k).indices
        ids_TK = best_TK if self.config.how == "silent" else context.take(best_TK)
        if self.config.how == "twice":
            context.take(best_TK)
        if self.config.how == "chokes" and not torch.equal(ids_TK, best_TK):
            raise ZeroDivisionError("not mine")
        ids_TK = best_TK if self.config.how == "deaf" else ids_TK
        return RoutingDecision.token_choice(ids_TK, torch.ones_like(ids_TK, dtype=x_TD.dtype), self.shape.num_experts)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("deaf", "answers with another"),
        ("chokes", "ZeroDivisionError: not mine"),
        ("silent", "does not choose by its context"),
        ("twice", "chose twice"),
    ],
)
def test_a_router_that_cannot_be_forced_has_none_and_says_why(how: str, why: str) -> None:
    model = make_model("topk", small_config(), seq_len=16)
    for site in model.routed:
        site.router = DeafRouter(DeafRouter.Config(how=how), site.router.shape)
    found = regret.regret(model, [make_batch()], 2, CPU64, **KEYS)
    assert isinstance(found, str) and why in found


def test_a_layer_before_attention_has_none() -> None:
    batch = make_batch()
    for model, why in (
        (model_of("topk", 2, {"moe_every": 2, "num_layers": 3}), "attention follows"),
        (model_of(None), "no experts"),
    ):
        found = regret.regret(model, [batch], 2, CPU64, **KEYS)
        assert isinstance(found, str) and why in found


# In a run


def test_it_changes_no_bit_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(tiny.MODEL, num_layers=2)
    config = RunConfig(data=tiny.DATA, model=model, router=router_class("topk").Config(), train=tiny.TRAIN)
    loop.train(config, 0, tmp_path / "with")
    monkeypatch.setattr(audit, "regret", lambda *args, **keys: "not measured")
    loop.train(config, 0, tmp_path / "without")
    one, other = (RunFolder(tmp_path / name, config, 0).read() for name in ("with", "without"))
    for part in ("evals", "train", "loads"):
        rows = [[{**row, "seconds": 0} for row in getattr(run, part)] for run in (one, other)]
        assert rows[0] == rows[1]
    assert one.summary["measured"] and other.summary["measured"]
    assert {**one.summary["measured"], "regret": 0} == {**other.summary["measured"], "regret": 0}
    found = one.summary["measured"]["regret"]
    assert not isinstance(found, str) and found["nats"] > 0
    assert len(regret.spread([make_batch(3), make_batch(3)], 4).tokens_BS) == 4


def test_neither_model_nor_generator_is_touched() -> None:
    model, batch = model_of("bias_balanced"), make_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    regret.regret(model, [batch], 2, CPU64, **KEYS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
