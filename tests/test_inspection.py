"""Looking inside: counts are those by hand, masked experts are as if they had never been built, domains are found.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from rlroute import seeding
from rlroute.errors import ConfigError
from rlroute.experiments.inspection.drops import measure_drops, with_capacity
from rlroute.experiments.inspection.masking import Mask, masked
from rlroute.experiments.inspection.measures import agree, choices_of, coactivation, lifts, settling, shares
from rlroute.experiments.inspection.probe import loss_T, run_probe
from rlroute.experiments.inspection.worth import measure_worth
from rlroute.registry import default_names
from rlroute.routing import RoutingDecision
from tests.tiny import CPU64, make_batch, make_model, run_tokens, shake, small_config

BATCHES = [make_batch(3), make_batch(2, seed=1)]
KEYS = {"seed": 0, "step": 5}


def decision_of(ids_TK, experts):
    ids_TK = torch.tensor(ids_TK)
    return RoutingDecision.token_choice(ids_TK, torch.ones(ids_TK.shape), experts)


def losses(model):
    return loss_T(model, BATCHES, CPU64, **KEYS)


def table(ids_TK, experts):
    return choices_of(decision_of(ids_TK, experts))


# --- co-activation


def test_coactivation_is_what_a_hand_counts():
    ids_TK = [[0, 1], [1, 0], [0, 2], [3, 4], [2, 0]]  # 4 marks an unused slot
    together_EE = coactivation(table(ids_TK, 4))
    assert together_EE.tolist() == [[4, 2, 2, 0], [2, 2, 0, 0], [2, 0, 2, 0], [0, 0, 0, 1]]
    shares_EE = shares(together_EE)
    assert shares_EE[0, 1] == 0.5 and shares_EE[1, 0] == 1 and shares_EE[3, 0] == 0 and shares_EE[1, 1].isnan()
    lifts_EE = lifts(together_EE)
    apart = [(4, 2), (4, 2), (4, 1), (2, 2), (2, 1), (2, 1)]  # loads of each two experts, of which 4 tokens chose both
    assert lifts_EE[0, 1] == pytest.approx(2 * sum(a * b for a, b in apart) / (4 * 2) / 4) == lifts_EE[1, 0]


def test_coactivation_is_of_all_pairs_whatever_their_ranks():
    ids_TK = np.array([np.random.default_rng(t).permutation(6)[:4] for t in range(50)])
    together_EE = coactivation(table(ids_TK.tolist(), 6))
    for one, other in combinations(range(6), 2):
        assert together_EE[one, other] == sum(one in row and other in row for row in ids_TK) == together_EE[other, one]
    assert torch.equal(together_EE.diagonal(), decision_of(ids_TK.tolist(), 6).demand_E())


def test_choices_of_experts_are_choices_of_tokens():
    chosen_TE = choices_of(RoutingDecision.expert_choice(torch.tensor([[0, 2], [2, 3]]), torch.ones(2, 2), 3))
    assert chosen_TE.tolist() == [[True, False], [False, False], [True, True]]  # token 3 of 3 is an unused slot


# --- specialisation


def test_experts_of_one_domain_each_agree_with_domains():
    label_T = np.repeat([7, 3, 5], 40)
    apart = agree(table([[label // 2 - 1] for label in label_T], 4), label_T)
    assert apart.nmi == pytest.approx(1) == apart.explained and apart.chance < 0.1
    two_each = agree(table([[2 * (label // 2 - 1), 2 * (label // 2 - 1) + 1] for label in label_T], 6), label_T)
    assert two_each.explained == pytest.approx(1) and two_each.nmi == pytest.approx(
        2 * math.log(3) / (math.log(3) + math.log(6))
    )
    spread = agree(table([[t % 4] for t in range(120)], 4), label_T)
    assert spread.nmi == pytest.approx(0, abs=1e-12) == spread.explained
    none = agree(table([[4]] * 120, 4), label_T)
    assert none.nmi is None is none.explained is none.chance


def test_chance_is_what_shuffled_labels_show():
    draw = np.random.default_rng(0)
    found = agree(table(draw.integers(0, 8, (200, 1)).tolist(), 8), draw.integers(0, 100, 200))
    assert 0.2 < found.chance < 0.6 and abs(found.nmi - found.chance) < 0.05


# --- settling


def test_settling_of_a_hand_made_history():
    settled = settling([table(ids, 4) for ids in ([[0, 1], [2, 3]], [[0, 2], [2, 3]], [[1, 0], [1, 3]])])
    assert settled.saturation == [0.75, 0.5, 1]
    assert settled.changed == [None, 0.5, 1]
    assert settled.unsettled == [1, 1, 0]


# --- masks


def without(model, expert):
    """Return a model that was built without an expert of its site 0, of whose parameters it has all others."""
    layer = model.blocks[0].moe
    config = replace(layer.config, num_experts=layer.config.num_experts - 1)
    router = layer.router.config
    fields = {name: value for name, value in vars(router).items()}
    small = make_model(router.name, config, **fields)
    state = model.state_dict()
    for name, value in small.state_dict().items():
        given = state[name]
        if given.shape != value.shape:
            (axis,) = [a for a in range(given.dim()) if given.shape[a] != value.shape[a]]
            given = torch.cat(
                [given.narrow(axis, 0, expert), given.narrow(axis, expert + 1, len(given) - expert - 1)], axis
            )
        value.copy_(given)
    return small


ROUTERS = {
    "topk": {},
    "topk, not normalised": {"normalize": False},
    "topk of biased sigmoids": {"score": "sigmoid", "bias_rate": 0.1, "route_scale": 2.5},
    "topk, chosen first": {"order": "choose_first", "linear_bias": True},
    "switch": {},
    "bias_balanced": {},
    "noisy_topk": {},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_masked_expert_is_as_if_it_had_never_been_built(name):
    model = shake(make_model(name.partition(",")[0].partition(" ")[0], small_config(num_layers=1), **ROUTERS[name]))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("bias_E"):
                buffer += 0.2 * torch.arange(4.0)  # by which the choice alone would go
    base_T, moved = losses(model), 0
    for expert in range(4):
        with masked(model, {0: Mask(experts=(expert,))}):
            got_T = losses(model)
        torch.testing.assert_close(got_T, losses(without(model, expert)), rtol=1e-12, atol=1e-12)
        moved += not torch.equal(got_T, base_T)
    assert moved > 1
    assert torch.equal(losses(model), base_T)


@pytest.mark.parametrize("name", default_names())
def test_every_router_can_do_without_experts(name):
    """Also one of several sites whose later routers read what the first decided, and one that wants all experts."""
    model = shake(make_model(name, small_config()))
    ran = []
    with masked(model, {0: Mask(experts=(1,)), 1: Mask(experts=(0, 2))}):
        for site in model.routed:
            site.router.register_forward_hook(lambda router, inputs, decision: ran.append(decision.load_E().tolist()))
        assert losses(model).isfinite().all()
    first, second = ran[::2], ran[1::2]
    assert {load_E[1] for load_E in first} == {0} == {load_E[expert] for load_E in second for expert in (0, 2)}
    assert all(sum(load_E) for load_E in first)


def test_a_masked_shared_expert_is_as_if_it_had_never_been_built():
    model = shake(make_model("topk", small_config(num_shared_experts=1)))
    plain = make_model("topk", small_config())
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".shared." not in name})
    with masked(model, {0: Mask(shared=True), 1: Mask(shared=True)}):
        assert torch.equal(losses(model), losses(plain))
    assert not torch.equal(losses(model), losses(plain))


def test_a_masked_expert_of_a_table_loses_its_pairs():
    model = shake(make_model("hash", small_config(num_layers=1)))
    with masked(model, {0: Mask(experts=(2,))}):
        probe = run_probe(model, BATCHES, CPU64, **KEYS)
    chosen_TE = run_probe(model, BATCHES, CPU64, **KEYS).sites[0].chosen_TE
    assert torch.equal(probe.sites[0].chosen_TE, chosen_TE)  # it goes on choosing
    assert probe.sites[0].dropped == pytest.approx(float(chosen_TE[:, 2].sum() / chosen_TE.sum())) != 0
    with pytest.raises(ConfigError, match="ranks no experts"), masked(model, {0: Mask(best=1)}):
        losses(model)


def test_without_its_best_expert_a_token_takes_the_next():
    model = shake(make_model("topk", small_config(num_layers=1, k=1)))
    before = run_probe(model, BATCHES, CPU64, **KEYS).sites[0].chosen_TE
    with masked(model, {0: Mask(best=1)}):
        second = run_probe(model, BATCHES, CPU64, **KEYS).sites[0].chosen_TE
    two = shake(make_model("topk", small_config(num_layers=1, k=2)))
    two.load_state_dict(model.state_dict())
    assert torch.equal(before | second, run_probe(two, BATCHES, CPU64, **KEYS).sites[0].chosen_TE)
    assert not (before & second).any()


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({7: Mask()}, "site 7: legal are 0, 1"),
        ({0: Mask(experts=(4,))}, "expert 4 of site 0: legal are 0 to 3"),
        ({0: Mask(experts=(0, 1), best=1)}, "3 experts of site 0 cannot be masked: 4 with k = 2 can do without 2"),
        ({0: Mask(shared=True)}, "site 0 has no shared experts"),
    ],
)
def test_masks_that_cannot_be_are_refused(masks, said):
    model = make_model("topk", small_config())
    with pytest.raises(ConfigError, match=said), masked(model, masks):
        pass


def test_what_experts_are_worth_is_the_loss_without_them():
    model = shake(make_model("topk", small_config(num_shared_experts=1, num_layers=1)))
    worth = measure_worth(model, BATCHES, CPU64, **KEYS)
    base_T = losses(model)
    assert worth.loss == pytest.approx(float(base_T.mean()))
    assert len(worth.experts[0]) == 4 and list(worth.best) == [1, 2] and worth.shared is not None
    with masked(model, {0: Mask(experts=(1,))}):
        assert worth.experts[0][1].mean == pytest.approx(float((losses(model) - base_T).mean()))
    assert measure_worth(make_model("hash", small_config()), BATCHES, CPU64, **KEYS).best == {}


# --- probes


def test_a_probe_says_what_a_pass_did():
    model = shake(make_model("topk", small_config(capacity_factor=0.5)))
    probe = run_probe(model, BATCHES, CPU64, **KEYS)
    assert list(probe.sites) == [0, 1] and probe.position_T.tolist() == [*range(8)] * 5
    assert torch.equal(probe.loss_T, losses(model)) and len(probe.token_T) == 40
    for site in probe.sites.values():
        assert site.load_E.sum() == 80 and 0.3 < site.dropped < 0.7 and 0 < site.entropy < 1


# --- drops

WINDOWS = [make_batch(4, seed=seed) for seed in range(4)]


def drops(model, *factors, orders=3):
    return measure_drops(model, WINDOWS, CPU64, factors, orders=orders, **KEYS)


def test_a_capacity_makes_outputs_hang_on_the_batch_and_nothing_else_does():
    model = shake(make_model("topk", small_config()))
    tight, wide, dropless = drops(model, 0.75, 2.0, None)
    assert tight.dropped > 0.25 and tight.changed > 0.5 and tight.flipped > 0 and tight.rerouted > 0
    assert tight.divergence > 1e-3 and tight.spread > 1e-3 and len({said for said, _ in tight.example.said}) > 1
    for same in (wide, dropless):  # E / k times the fair share is room for all
        assert same.dropped == same.changed == same.flipped == same.rerouted == 0 and same.moved < 1e-12
        assert same.spread < 1e-12 and same.example is None and set(same.by_position) == {0}
    assert [site.config.capacity_factor for site in model.routed] == [None, None]


def test_later_rows_and_positions_lose_their_places_first():
    model = shake(make_model("topk", small_config(num_layers=1, k=1)))
    (tight,) = drops(model, 0.5)
    assert len(tight.by_row) == 4 and len(tight.by_position) == 8
    assert tight.by_row == sorted(tight.by_row) and tight.by_row[0] < tight.by_row[-1]
    (alone,) = drops(shake(make_model("topk", small_config(num_layers=1, k=1, capacity_rows="sequence"))), 0.5)
    assert alone.dropped > 0.2 and alone.moved < 1e-12  # capacities of a sequence's own
    assert alone.by_position[0] < alone.by_position[-1] and max(alone.by_row) - min(alone.by_row) < 0.2


def test_a_router_that_looks_at_the_batch_is_found_without_any_capacity():
    (found,) = drops(shake(make_model("expert_choice", small_config())), None)
    assert found.dropped == 0 and found.rerouted > 0.1 and found.changed > 0.1


def test_the_outputs_of_an_order_are_those_of_its_batches_run_by_hand():
    model = shake(make_model("topk", small_config()))
    (tight,) = drops(model, 0.75, orders=2)
    whole = np.concatenate([batch.tokens_BS for batch in WINDOWS])
    order_N = seeding.numpy_generator(0, "inspection", "orders").permutation(16)
    with with_capacity(model, 0.75), torch.no_grad():
        one, other = (
            torch.cat([run_tokens(model, torch.from_numpy(whole[rows]))[0] for rows in np.split(order, 4)])
            for order in (np.arange(16), order_N)
        )
    other = other[np.argsort(order_N)]
    assert tight.moved == pytest.approx(float(((other - one).abs().amax(2) / one.abs().amax(2)).max()))
    assert tight.flipped == pytest.approx(float((other.argmax(2) != one.argmax(2)).double().mean()))


@pytest.mark.parametrize("batches", [WINDOWS[:1], [make_batch(1, seed=seed) for seed in range(3)]])
def test_batches_that_cannot_differ_are_refused(batches):
    with pytest.raises(ConfigError, match="want two batches or more"):
        measure_drops(make_model("topk", small_config()), batches, CPU64, [None], orders=2, **KEYS)
