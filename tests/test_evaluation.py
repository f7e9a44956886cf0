"""Evaluation worked out by hand: Python's numbers, one token and one pair after the other.

Shape suffixes: B sequences, S sequence length, V vocabulary, E experts, L layers.
"""

import math
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlroute.model import Transformer
from rlroute.routing import RoutingDecision
from rlroute.training.batches import Batch
from rlroute.training.evaluate import evaluate
from rlroute.training.step import forward
from tests.tiny import CPU64, make_batch, make_model, run_batch, shake, small_config

EXPERTS = 16
BYTES_V = np.array([0.0, 1, 1, 2, 3, 5, 8, 4, 1, 2, 7])
BATCHES = [make_batch(seed=seed) for seed in range(3)]
UNEQUAL = [make_batch(sequences=4), make_batch(sequences=3, seed=1), make_batch(sequences=1, length=3, seed=2)]
"""As at the end of a validation set: means over batches would be far off."""
KEY: dict[str, Any] = {"seed": 3, "step": 7}
"""What draws are keyed by."""


def many_experts(router: str | None, **fields: Any) -> Transformer:
    return shake(make_model(router, small_config(num_experts=EXPERTS, **fields)))


def results(model: Transformer, batches: list[Batch], final: bool = False) -> dict[str, Any]:
    return evaluate(model, batches, BYTES_V, CPU64, final=final, progress=0.5, **KEY)


def run_all(
    model: Transformer, batches: list[Batch], explore: bool = False
) -> tuple[float, list[list[RoutingDecision]]]:
    """Return the sum of all tokens' losses in nats, and the decisions by layer and batch."""
    nats, decisions = 0.0, []
    for batch in batches:
        logits_BSV, made = run_batch(model, batch, explore=explore, **KEY)
        for row_V, target in zip(logits_BSV.flatten(0, 1).tolist(), batch.targets_BS.flatten().tolist(), strict=True):
            nats -= math.log(math.exp(row_V[target]) / sum(map(math.exp, row_V)))
        decisions.append(made)
    return nats, [list(layer) for layer in zip(*decisions, strict=True)]


def loads(decisions: list[RoutingDecision]) -> list[int]:
    """Count the pairs that chose each expert, dropped or not, over all batches of a layer."""
    chosen = Counter(e for decision in decisions for e in decision.expert_ids_R.tolist())
    return [chosen[e] for e in range(EXPERTS)]


def running(decision: RoutingDecision) -> Counter[int]:
    """Count the pairs of each token that run."""
    return Counter(t for t, kept in zip(decision.token_ids_R.tolist(), decision.kept_R.tolist(), strict=True) if kept)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def entropy(fractions: list[float]) -> float:
    return -sum(f * math.log(f) for f in fractions if f > 0)


@pytest.mark.parametrize("lengths", [(8, 8), (8, 5)], ids=["equal batches", "a shorter last one"])
@pytest.mark.parametrize("router", [None, "switch", "hash"])
def test_loss_is_per_token_and_bits_are_per_byte_of_the_targets_text(
    router: str | None, lengths: tuple[int, int]
) -> None:
    model = many_experts(router)
    batches = [make_batch(length=length, seed=length + i) for i, length in enumerate(lengths)]
    nats, _ = run_all(model, batches)
    targets = [token for batch in batches for token in batch.targets_BS.flatten().tolist()]
    text_bytes = sum(float(BYTES_V[token]) for token in targets)
    row = results(model, batches)
    assert row["loss"] == pytest.approx(nats / len(targets), rel=1e-9)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-9)
    assert abs(text_bytes - len(targets)) > 10, "a byte is not a token here"


@pytest.mark.parametrize("batches", [BATCHES, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("capacity_factor", [None, 0.9])
@pytest.mark.parametrize("router", ["switch", "hash"])
def test_balance_is_that_of_all_batches_together_before_drops(
    router: str, capacity_factor: float | None, batches: list[Batch]
) -> None:
    model = many_experts(router, capacity_factor=capacity_factor)
    _, decisions_L = run_all(model, batches)
    row = results(model, batches)
    for layer, decisions in enumerate(decisions_L):
        counts = loads(decisions)
        fair = sum(counts) / EXPERTS
        assert row["max_vio_L"][layer] == pytest.approx(max(counts) / fair - 1, rel=1e-6)
        assert row["cv_L"][layer] == pytest.approx(math.sqrt(mean([(n - fair) ** 2 for n in counts])) / fair, rel=1e-6)
        fractions = [n / sum(counts) for n in counts]
        assert row["load_LE"][layer] == pytest.approx(fractions, abs=1e-6)
        assert row["load_entropy_L"][layer] == pytest.approx(entropy(fractions) / math.log(EXPERTS), rel=1e-6)
        rows, pairs = [d.num_tokens for d in decisions], [int(d.kept_R.sum()) for d in decisions]
        assert row["pairs_L"][layer] == pytest.approx(sum(pairs) / sum(rows), rel=1e-9)
        alone = [n for d in decisions for n in Counter({t: 0 for t in range(d.num_tokens)} | running(d)).values()]
        assert row["without_L"][layer] == pytest.approx(alone.count(0) / sum(rows), rel=1e-9)
        dead = sum(n < 0.05 * fair for n in counts)
        assert row["dead_L"][layer] == dead
        assert 0 < dead < EXPERTS and counts != loads(decisions[:1]), (
            "neither none nor all, and no single batch says it"
        )


@pytest.mark.parametrize("batches", [BATCHES, UNEQUAL], ids=["equal", "unequal"])
def test_router_entropy_is_the_mean_over_tokens(batches: list[Batch]) -> None:
    model = many_experts("switch")
    _, decisions_L = run_all(model, batches)
    entropy_L = results(model, batches)["router_entropy_L"]
    for found, decisions in zip(entropy_L, decisions_L, strict=True):
        rows = [row_E for d in decisions if d.probs_TE is not None for row_E in d.probs_TE.tolist()]
        assert found == pytest.approx(mean([entropy(row_E) for row_E in rows]) / math.log(EXPERTS), rel=1e-9)
        assert 0.1 < found < 0.99


@pytest.mark.parametrize("batches", [BATCHES, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("router", ["switch", "hash"])
def test_drop_rate_is_the_share_of_pairs_over_capacity(router: str, batches: list[Batch]) -> None:
    model = many_experts(router, capacity_factor=0.9)
    _, decisions_L = run_all(model, batches)
    chosen = dropped = 0
    for decision in (d for decisions in decisions_L for d in decisions):
        most = math.ceil(0.9 * 2 * decision.num_tokens / EXPERTS)
        for demand in Counter(decision.expert_ids_R.tolist()).values():
            chosen += demand
            dropped += max(0, demand - most)
    found = results(model, batches)["drop_rate"]
    assert found == pytest.approx(dropped / chosen, rel=1e-9) and 0.05 < found < 0.95
    assert results(many_experts(router), batches)["drop_rate"] == 0


@pytest.mark.parametrize("order", ["position", "gate"])
def test_drops_are_told_by_the_quarter_of_the_sequence(order: str) -> None:
    """All of a sequence's rows compete alone, so that in the order of positions the last quarter loses most."""
    model = many_experts("switch", capacity_factor=0.7, capacity_order=order, capacity_rows="sequence")
    _, decisions_L = run_all(model, BATCHES)
    chosen, dropped = Counter[int](), Counter[int]()
    for decision in (d for decisions in decisions_L for d in decisions):
        for token, kept in zip(decision.token_ids_R.tolist(), decision.kept_R.tolist(), strict=True):
            quarter = token % 8 * 4 // 8
            chosen[quarter] += 1
            dropped[quarter] += not kept
    row = results(model, BATCHES)
    assert row["drop_by_position"] == pytest.approx([dropped[q] / chosen[q] for q in range(4)], rel=1e-9)
    assert mean(row["drop_by_position"]) == pytest.approx(row["drop_rate"])
    assert (row["drop_by_position"][-1] == max(row["drop_by_position"])) or order == "gate"


def test_what_is_not_there_is_said() -> None:
    assert results(many_experts("hash"), BATCHES)["router_entropy_L"] is None
    row = results(many_experts(None), BATCHES)
    assert [row[name] for name in ("max_vio_L", "cv_L", "load_entropy_L", "dead_L", "load_LE")] == [[]] * 5
    assert row["router_entropy_L"] is None and row["drop_rate"] == 0 and row["drop_by_position"] == [None] * 4


@pytest.mark.parametrize("batches", [BATCHES, UNEQUAL], ids=["equal", "unequal"])
def test_the_sampled_policy_stands_beside_the_greedy_one(batches: list[Batch]) -> None:
    model = many_experts("reinforce")
    greedy_nats, greedy_L = run_all(model, batches)
    sampled_nats, drawn_L = run_all(model, batches, explore=True)
    row = results(model, batches, final=True)
    tokens = sum(batch.targets_BS.size for batch in batches)
    assert row["loss"] == pytest.approx(greedy_nats / tokens, rel=1e-9)
    assert row["sampled"]["loss"] == pytest.approx(sampled_nats / tokens, rel=1e-9)
    assert abs(row["sampled"]["loss"] - row["loss"]) > 1e-4
    bits = row["bits_per_byte"] * row["sampled"]["loss"] / row["loss"]
    assert row["sampled"]["bits_per_byte"] == pytest.approx(bits, rel=1e-9)
    for found, greedy, drawn in zip(row["sampled"]["overlap_L"], greedy_L, drawn_L, strict=True):
        shares = []
        for one, other in zip(greedy, drawn, strict=True):
            pairs = zip(one.expert_ids_R.view(-1, 2).tolist(), other.expert_ids_R.view(-1, 2).tolist(), strict=True)
            shares += [len({*a} & {*b}) / 2 for a, b in pairs]
        assert found == pytest.approx(mean(shares), rel=1e-9) and 0 < found < 1
    assert results(model, batches)["sampled"] is None
    assert results(many_experts("hash"), BATCHES, final=True)["sampled"] is None, "nothing is drawn"


@pytest.mark.parametrize("router", ["switch", "reinforce", None])
def test_the_final_evaluation_has_the_greedy_loss_of_each_window(router: str | None) -> None:
    model = many_experts(router)
    row = results(model, UNEQUAL, final=True)
    alone = [
        replace(batch, **{name: getattr(batch, name)[i : i + 1] for name in ("tokens_BS", "targets_BS", "sequence_B")})
        for batch in UNEQUAL
        for i in range(len(batch.tokens_BS))
    ]
    wanted = [results(model, [window])["loss"] * window.targets_BS.size for window in alone]
    assert row["nats_W"] == pytest.approx(wanted, abs=6e-5) and len(set(row["nats_W"])) == len(alone) > 3
    assert "nats_W" not in results(model, UNEQUAL)


@pytest.mark.parametrize("router", ["switch", "reinforce"])
def test_memory_does_not_grow_with_the_number_of_batches(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch's decisions are held at a time, and nothing that points to them afterwards."""
    model, made, living = many_experts(router), weakref.WeakSet[Any](), []

    def watched(*arguments: Any) -> Any:
        loss_MT, decisions = forward(*arguments)
        made.update(
            tensor for d in decisions for tensor in (d, d.expert_ids_R, d.gates_R, d.logits_TE) if tensor is not None
        )
        made.add(loss_MT)
        living.append(len(made))
        return loss_MT, decisions

    monkeypatch.setattr("rlroute.training.evaluate.forward", watched)
    for count in (4, 40):
        living.clear()
        results(model, [make_batch(seed=seed) for seed in range(count)], final=True)
        passes = 2 if router == "reinforce" else 1
        assert len(living) == passes * count
        assert max(living[passes:]) <= max(living[: 2 * passes]) <= 2 * passes * (1 + 2 * 4)
        assert not made
