"""Hash layers: tables that derive from their seed, pairs of tokens, pools of experts, and learned gates.

Shape suffixes: T tokens, X rows of the table, V vocabulary, E experts, K experts per token.
"""

import math
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.baselines import hash as hash_layers
from rlroute.baselines.hash import HashRouter, previous_token
from rlroute.baselines.hash_gated import HashGatedRouter
from rlroute.baselines.token_scores import TokenScoresRouter
from rlroute.errors import ConfigError
from rlroute.routing import Router, RoutingDecision
from rlroute.values import from_dict
from tests.conftest import D, draw, make_context, make_shape

R = TypeVar("R", bound=Router)


def make(router: type[R], experts: int = 8, k: int = 2, shape: dict[str, Any] | None = None, **config: Any) -> R:
    return router(router.Config(**config), make_shape(experts, k, **(shape or {}))).double()


def decide(router: Router, tokens: int = 12, **context: Any) -> RoutingDecision:
    return router(draw(tokens, D), make_context(tokens, **context))


def in_columns(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Return ids_TK and gates_TK."""
    assert decision.k is not None
    return decision.expert_ids_R.view(-1, decision.k), decision.gates_R.detach().view(-1, decision.k)


# tables


def test_a_token_has_its_experts_for_good() -> None:
    router = make(HashRouter)
    ids_TK, gates_TK = in_columns(decide(router, tokens=44))
    elsewhere_TK, _ = in_columns(decide(router, tokens=44, length=11, step=9, seed=3, explore=False))
    assert torch.equal(ids_TK, elsewhere_TK) and torch.equal(ids_TK[:11], ids_TK[11:22])
    assert bool((gates_TK == 0.5).all())


def test_tables_derive_from_seed_and_layer() -> None:
    tables = [make(HashRouter, shape=shape).table_XK for shape in ({}, {"seed": 1}, {"site": 2}, {})]
    assert torch.equal(tables[0], tables[3])
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("k", [1, 2, 8])
def test_the_balanced_table_evens_out_what_the_random_one_does_not(k: int) -> None:
    counts_V = (100_000 / torch.arange(1, 301)).long()[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    shape = {"vocab_size": 300, "token_counts_V": counts_V}

    def load_E(table: str) -> Tensor:
        table_VK = make(HashRouter, k=k, shape=shape, table=table).table_XK
        assert all(len(set(row)) == k for row in table_VK.tolist())
        return torch.zeros(8, dtype=torch.int64).index_add(0, table_VK.reshape(-1), counts_V.repeat_interleave(k))

    even, uneven = metrics.max_vio(load_E("balanced")), metrics.max_vio(load_E("random"))
    # No table can be even below the most frequent token: it goes to k experts and no more.
    floor = max(0.0, float(counts_V.max() * 8 / (k * counts_V.sum())) - 1)
    assert float(even) < floor + 0.01 and (k == 8 or float(uneven) > floor + 0.2)


def test_the_balanced_table_needs_counts() -> None:
    with pytest.raises(ConfigError, match="'balanced' needs the corpus's token counts: legal without are 'random'"):
        make(HashRouter, shape={"token_counts_V": None}, table="balanced")
    with pytest.raises(
        ConfigError, match=r"hash\.table = 'even': legal are 'random', 'balanced', 'position', 'bigram', 'multi'"
    ):
        from_dict(HashRouter.Config, {"table": "even"}, "router hash")


def test_the_control_routes_by_position_alone_and_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_layers, "POSITIONS", 5)
    router = make(HashRouter, table="position")
    first_TK, _ = in_columns(decide(router, length=12))
    other_TK, _ = in_columns(decide(router, length=12, token_ids_T=torch.zeros(12, dtype=torch.int64)))
    assert torch.equal(first_TK, other_TK) and torch.equal(first_TK[:5], first_TK[5:10])
    assert len(first_TK[:5].unique(dim=0)) > 1


# bigram


def test_the_token_before_is_found_in_any_order_of_the_rows() -> None:
    context = make_context(tokens=12, length=4, samples=2)
    want = [-1 if t % 4 == 0 else int(context.token_ids_T[t - 1]) for t in range(24)]
    assert previous_token(context).tolist() == want
    for seed in range(3):
        order_T = draw(24, seed=seed).argsort()
        # rows of a sample stay together, as the contract has it
        order_T = torch.cat([order_T[order_T < 12], order_T[order_T >= 12]])
        keys = {n: getattr(context, n)[order_T] for n in ("token_ids_T", "position_T", "sequence_T", "mask_T")}
        shuffled = make_context(tokens=12, samples=2, **keys)
        assert previous_token(shuffled).tolist() == [want[row] for row in order_T]


def test_a_gap_in_a_sequence_is_no_predecessor() -> None:
    position_T = torch.tensor([0, 1, 3, 4])
    assert (previous_token(make_context(4, position_T=position_T)) == -1).tolist() == [True, False, True, False]


def test_a_pair_of_tokens_has_its_experts_wherever_it_stands() -> None:
    ids_T = torch.tensor([3, 5, 3, 5, 4, 5, 3, 5])
    router = make(HashRouter, experts=64, table="bigram")
    ids_TK, gates_TK = in_columns(decide(router, tokens=8, length=8, token_ids_T=ids_T))
    by_pair: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for pair, experts in zip(zip([-1, *ids_T.tolist()], ids_T.tolist(), strict=False), ids_TK.tolist(), strict=True):
        by_pair.setdefault(pair, set()).add(tuple(experts))
    assert all(len(experts) == 1 for experts in by_pair.values()) and len(by_pair) == 5
    assert len(set.union(*by_pair.values())) == 5, "the same token behind others has others"
    assert bool((gates_TK == 0.5).all())
    other = make(HashRouter, experts=64, shape={"seed": 1}, table="bigram")
    assert not torch.equal(in_columns(decide(other, tokens=8, length=8, token_ids_T=ids_T))[0], ids_TK)


def test_pairs_are_spread_over_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_layers, "BIGRAMS", 8)
    router = make(HashRouter, k=1, table="bigram", shape={"vocab_size": 1000})
    router.table_XK.copy_(torch.arange(8)[:, None])  # the expert is the row
    ids_T = (1000 * draw(8000).abs()).long() % 1000
    demand_E = decide(router, tokens=8000, length=100, token_ids_T=ids_T).demand_E()
    assert float(metrics.max_vio(demand_E)) < 0.15


# multi


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (8, 3), (8, 8)])
def test_each_slot_has_a_function_and_experts_of_its_own(experts: int, k: int) -> None:
    table_VK = make(HashRouter, experts, k, shape={"vocab_size": 2000}, table="multi").table_XK
    pools = [set(column.tolist()) for column in table_VK.t()]
    assert sorted(expert for pool in pools for expert in pool) == list(range(experts))  # all, each in one pool
    assert max(map(len, pools)) - min(map(len, pools)) <= 1
    for first, second in zip(table_VK.t(), table_VK.t()[1:], strict=False):  # one says nothing of the other
        joint = torch.zeros(experts, experts).index_put((first, second), torch.ones(2000), accumulate=True) / 2000
        assert float((joint - joint.sum(1, keepdim=True) * joint.sum(0)).abs().max()) < 0.03


# hash_gated


@pytest.mark.parametrize("k", [1, 2, 3])
def test_experts_are_those_of_the_table_and_gates_those_of_their_scores(k: int) -> None:
    """As DeepSeek-V4's public code has it, save that a single gate is not divided by itself."""
    router = make(HashGatedRouter, k=k, init_std=0.5, shape={"vocab_size": 11})
    table_VK = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(v))[:k] for v in range(11)])
    router.table_XK.copy_(table_VK)
    assert router.table_XK.shape == (11, k) and "table_XK" in router.state_dict()
    context = make_context(12)
    ids_TK, gates_TK = in_columns(decide(router))
    assert torch.equal(ids_TK, table_VK[context.token_ids_T])
    for x, experts, gates in zip(draw(12, D).tolist(), ids_TK.tolist(), gates_TK.tolist(), strict=True):
        rows = [router.scores.weight[expert].tolist() for expert in experts]
        logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in rows]
        scores = [math.sqrt(math.log(1 + math.exp(z))) for z in logits]
        assert gates == pytest.approx([1.5 * score / (sum(scores) if k > 1 else 1) for score in scores])


def test_scores_weigh_and_choose_nothing() -> None:
    one, other = (make(HashGatedRouter, init_std=std) for std in (0.02, 2.0))
    (ids_TK, gates_TK), (other_ids_TK, other_gates_TK) = in_columns(decide(one)), in_columns(decide(other))
    assert torch.equal(ids_TK, other_ids_TK) and not torch.allclose(gates_TK, other_gates_TK)
    assert torch.equal(ids_TK, in_columns(decide(make(HashRouter)))[0])


@pytest.mark.parametrize("router", [HashRouter, HashGatedRouter])
@pytest.mark.parametrize("table", ["random", "balanced", "position", "bigram", "multi"])
def test_both_routers_have_every_table(router: type[Router], table: str) -> None:
    ids_TK, _ = in_columns(decide(make(router, table=table)))
    assert all(len(set(row)) == 2 for row in ids_TK.tolist())
    assert torch.equal(ids_TK, in_columns(decide(make(HashRouter, table=table)))[0])


# token_scores


@pytest.mark.parametrize("k", [1, 2])
def test_scores_of_ids_are_a_table_and_with_the_hidden_state_its_sum_with_those(k: int) -> None:
    table = make(TokenScoresRouter, k=k, init_std=0.5, shape={"vocab_size": 11})
    both = make(TokenScoresRouter, k=k, init_std=0.5, hidden=True, shape={"vocab_size": 11})
    assert table.scores.of_hidden is None and both.scores.of_hidden is not None
    table_TE, hidden_TE = table.scores.table_VE[make_context(12).token_ids_T], both.scores.of_hidden(draw(12, D))
    for router, wanted_TE in ((table, table_TE), (both, table_TE + hidden_TE)):
        decision = decide(router)
        ids_TK, gates_TK = in_columns(decision)
        assert decision.logits_TE is not None and torch.allclose(decision.logits_TE, wanted_TE)
        assert torch.equal(ids_TK, wanted_TE.topk(k).indices)
        probs_TK = wanted_TE.softmax(1).gather(1, ids_TK)
        assert torch.allclose(gates_TK, probs_TK / (probs_TK.sum(1, keepdim=True) if k > 1 else 1))


def test_only_rows_of_ids_that_came_learn() -> None:
    router, context = make(TokenScoresRouter, shape={"vocab_size": 40}), make_context(12)
    decision = router(draw(12, D), context)
    (decision.gates_R**2).sum().backward()
    assert router.scores.table_VE.grad is not None
    moved_V = router.scores.table_VE.grad.any(1)
    assert moved_V.any() and set(moved_V.nonzero().flatten().tolist()) <= set(context.token_ids_T.tolist())
