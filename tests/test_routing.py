"""Decisions, keyed noise, the registry and configurations: what everything that routes is built on.

Shape suffixes: T tokens, E experts, K experts per token, C tokens per expert, R routed pairs.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from rlroute import registry, seeding
from rlroute.config import DataConfig, ModelConfig, RouterConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError, DecisionError
from rlroute.mixing import MIXING
from rlroute.registry import default_names, router_class, router_names, run_config
from rlroute.routing import Router, RoutingDecision
from tests import ROOT
from tests.conftest import capped, draw, make_context, make_feedback

# Decisions

IDS_TK = torch.tensor([[2, 0], [1, 2], [2, 3]])


def token_choice(ids_TK: Tensor = IDS_TK, experts: int = 4, **scores: Any) -> RoutingDecision:
    return RoutingDecision.token_choice(ids_TK, draw(*ids_TK.shape).softmax(1), experts, **scores)


def variable_k() -> RoutingDecision:
    """Token 0 uses no expert, token 1 one, token 2 two."""
    return token_choice(torch.tensor([[4, 4], [1, 4], [2, 3]]))


def expert_choice(tokens: int = 6, experts: int = 4, capacity: int = 2) -> RoutingDecision:
    ids_EC = draw(experts, tokens).argsort(1)[:, :capacity]
    return RoutingDecision.expert_choice(ids_EC, draw(experts, capacity).sigmoid(), tokens)


def test_token_choice_is_token_major() -> None:
    gates_TK, log_prob_TK = draw(3, 2), draw(3, 2, seed=1)
    decision = RoutingDecision.token_choice(IDS_TK, gates_TK, 4, log_prob_TK=log_prob_TK, probs_TE=draw(3, 4))
    assert (decision.num_tokens, decision.num_experts, decision.k) == (3, 4, 2)
    assert decision.token_ids_R.tolist() == [0, 0, 1, 1, 2, 2]
    assert decision.expert_ids_R.tolist() == [2, 0, 1, 2, 2, 3]
    assert torch.equal(decision.gates_R.view(3, 2), gates_TK) and bool(decision.kept_R.all())
    assert decision.log_prob_R is not None and torch.equal(decision.log_prob_R.view(3, 2), log_prob_TK)
    assert decision.logits_TE is None and decision.memo == {}


def test_expert_choice_is_expert_major() -> None:
    ids_EC = torch.tensor([[2, 0], [1, 2], [2, 1]])
    decision = RoutingDecision.expert_choice(ids_EC, draw(3, 2), 5)
    assert (decision.num_tokens, decision.num_experts, decision.k) == (5, 3, None)
    assert decision.token_ids_R.tolist() == [2, 0, 1, 2, 2, 1]
    assert decision.expert_ids_R.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("shape", [(3, 1), (2, 2), (6,)])
def test_shapes_that_disagree_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DecisionError, match=r"ids_TK has shape \(3, 2\), gates_TK .*: want \(T, K\)"):
        RoutingDecision.token_choice(IDS_TK, draw(*shape), 4)
    with pytest.raises(DecisionError, match=r"ids_EC has shape \(3, 2\), gates_EC .*: want \(E, C\)"):
        RoutingDecision.expert_choice(IDS_TK, draw(*shape), 4)


def test_demand_counts_what_was_chosen_and_load_what_was_kept() -> None:
    decision = replace(token_choice(), kept_R=torch.tensor([True, False, True, True, False, True]))
    assert decision.demand_E().tolist() == [1, 1, 3, 1]
    assert decision.load_E().tolist() == [0, 1, 2, 1]
    mask_T = torch.tensor([True, False, True])
    assert decision.demand_E(mask_T).tolist() == [1, 0, 2, 1]
    assert decision.load_E(mask_T).tolist() == [0, 0, 1, 1]
    assert variable_k().demand_E().tolist() == [0, 1, 1, 1]


def test_sums_over_a_tokens_pairs_leave_unused_slots_out() -> None:
    values_R = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert token_choice().token_sum(values_R).tolist() == [3.0, 12.0, 48.0]
    assert variable_k().token_sum(values_R).tolist() == [0.0, 4.0, 48.0]
    chosen = RoutingDecision.expert_choice(IDS_TK, draw(3, 2), 4)
    assert chosen.token_sum(values_R).tolist() == [2.0, 4.0, 1.0 + 8.0 + 16.0, 32.0]


def test_a_token_is_kept_if_all_its_used_pairs_are() -> None:
    kept_R = torch.tensor([True, False, True, False, True, True])
    assert replace(token_choice(), kept_R=kept_R).all_kept_T().tolist() == [False, False, True]
    assert replace(variable_k(), kept_R=kept_R).all_kept_T().tolist() == [True, True, True]


def test_detach_cuts_every_tensor() -> None:
    leaf = torch.ones(3, 4, requires_grad=True)
    decision = RoutingDecision.token_choice(
        IDS_TK,
        leaf[:, :2],
        4,
        log_prob_TK=leaf[:, 2:],
        logits_TE=2 * leaf,
        probs_TE=3 * leaf,
        memo={"value_T": leaf.sum(1)},
    )
    cut = decision.detach()
    for value in (cut.gates_R, cut.log_prob_R, cut.logits_TE, cut.probs_TE, cut.memo["value_T"]):
        assert value is not None and not value.requires_grad
    assert decision.gates_R.requires_grad and torch.equal(cut.gates_R, decision.gates_R)


# Capacity

DECISIONS: dict[str, Callable[[], RoutingDecision]] = {
    "fixed k": lambda: token_choice(draw(20, 5, seed=3).argsort(1)[:, :3], 5),
    "collapsed": lambda: token_choice(torch.arange(2).expand(9, 2), 4),
    "variable k": variable_k,
    "flat pairs": lambda: replace(variable_k(), k=None),
    "expert choice": lambda: expert_choice(tokens=7, experts=5, capacity=4),
    "dropped before": lambda: replace(token_choice(), kept_R=torch.tensor([False, True, True, True, True, True])),
}


def drop_one_by_one(decision: RoutingDecision, capacity: int, order: str) -> list[bool]:
    """Let the pairs in one after the other, in their order, while their expert has room."""
    pairs = list(range(len(decision.kept_R)))
    if order == "gate":
        pairs.sort(key=lambda r: -float(decision.gates_R[r]))
    elif decision.k is not None:
        pairs.sort(key=lambda r: (r % int(decision.k or 1), r))  # first choices first
    else:
        pairs.sort(key=lambda r: int(decision.token_ids_R[r]))
    room, kept = [capacity] * decision.num_experts + [0], [False] * len(pairs)
    for r in pairs:
        expert = int(decision.expert_ids_R[r])
        kept[r] = bool(decision.kept_R[r]) and room[expert] > 0
        room[expert] -= kept[r]
    return kept


@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
@pytest.mark.parametrize("order", ["position", "gate"])
@pytest.mark.parametrize("make", DECISIONS.values(), ids=DECISIONS.keys())
def test_drops_are_those_of_one_pair_after_the_other(
    make: Callable[[], RoutingDecision], order: Literal["position", "gate"], capacity: int
) -> None:
    decision = make()
    dropped = capped(decision, capacity, order)
    assert dropped.kept_R.tolist() == drop_one_by_one(decision, capacity, order)
    assert torch.equal(dropped.demand_E(), decision.demand_E())
    assert int(dropped.load_E().max()) <= capacity
    assert torch.equal(capped(dropped, capacity, order).kept_R, dropped.kept_R)


# Feedback


def test_values_of_micro_batches_add_up_to_the_mean_over_the_step() -> None:
    values_T, mask_T = draw(12), torch.arange(12) % 5 != 4
    parts = [slice(0, 4), slice(4, 12)]
    total = torch.zeros(())
    for rows in parts:
        context = make_context(len(values_T[rows]), mask_T=mask_T[rows])
        total = total + make_feedback(context, num_valid=int(mask_T.sum())).mean(values_T[rows])
    assert float(total) == pytest.approx(float(values_T[mask_T].mean()), abs=1e-12)


def test_padding_may_hold_anything() -> None:
    mask_T = torch.arange(12) < 9
    values_T = torch.where(mask_T, 2.0, torch.nan)
    assert float(make_feedback(make_context(mask_T=mask_T)).mean(values_T)) == 2.0


def test_shares_of_micro_batches_add_up_to_one_for_any_number_of_samples() -> None:
    for samples in (1, 3):
        contexts = [make_context(4, samples=samples), make_context(8, samples=samples)]
        shares = [float(make_feedback(context, num_valid=12).share) for context in contexts]
        assert shares == pytest.approx([1 / 3, 2 / 3])


# Noise


@pytest.mark.parametrize(
    "key",
    [
        {"seed": 1},
        {"site": 2},
        {"site": "1.attention"},
        {"step": 1},
        {"position_T": torch.arange(12) % 4 + 4},
        {"sequence_T": torch.arange(12) // 4},
    ],
    ids=lambda key: next(iter(key)),
)
def test_every_key_changes_every_draw(key: dict[str, Any]) -> None:
    uniform_TE = make_context().noise("a", (8,))
    assert not (uniform_TE == make_context(**key).noise("a", (8,))).any()
    assert not (uniform_TE == make_context().noise("b", (8,))).any()
    assert torch.equal(uniform_TE, make_context().noise("a", (8,)))


def test_draws_do_not_depend_on_the_batch_they_are_made_in() -> None:
    whole, rows = make_context(), torch.tensor([9, 2, 5])
    keys = ("token_ids_T", "position_T", "sequence_T", "mask_T")
    part = replace(whole, **{name: getattr(whole, name)[rows] for name in keys}, explore=False)
    assert torch.equal(part.noise("a", (2, 3)), whole.noise("a", (2, 3))[rows])


def test_samples_and_slots_draw_apart() -> None:
    context = make_context(4, samples=3)
    assert context.sample_T.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    uniform_TE = context.noise("a", (5,))
    assert len(uniform_TE.unique()) == uniform_TE.numel()
    assert torch.equal(uniform_TE[:4], make_context(4).noise("a", (5,)))


def test_uniform_normal_and_gumbel_draws_have_their_moments() -> None:
    uniform = make_context(40_000, length=40).noise("a", (4,))
    assert float(uniform.min()) > 0 and float(uniform.max()) < 1
    for values, mean, variance in (
        (uniform, 1 / 2, 1 / 12),
        (seeding.normal(uniform), 0.0, 1.0),
        (seeding.gumbel(uniform), 0.577216, math.pi**2 / 6),
    ):
        assert bool(values.isfinite().all())
        assert float(values.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / values.numel()))
        assert float(values.var()) == pytest.approx(variance, rel=0.02)
        correlation = torch.corrcoef(torch.stack([values[:-1, 0], values[1:, 0], values[:-1, 1]]))
        assert float((correlation - torch.eye(3)).abs().max()) < 0.025


# The registry


def test_a_routers_name_is_its_files_name() -> None:
    files = [path.stem for wing in ("agents", "baselines") for path in (ROOT / wing).glob("[!_]*.py")]
    assert set(files) <= set(router_names()) and router_names() == sorted(router_names())
    assert all(router_class(name).Config.name == name for name in files)


def test_unknown_routers_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown router 'hsah' \(did you mean 'hash'\?\): legal are actor_critic, "):
        router_class("hsah")
    with pytest.raises(ConfigError, match="unknown router '_softmax_topk'"):
        router_class("_softmax_topk")


class ThirdParty(Router):
    """A router of a distribution of its own, in a file called as this one."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        rate: float = 0.5

    gate_meaning = "none"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Declare an entry point as an installed distribution would."""

    def declare(name: str, value: str) -> None:
        points = [EntryPoint(name=name, value=f"{__name__}:{value}", group=registry.GROUP)]
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
        registry._sources.cache_clear()

    yield declare
    registry._sources.cache_clear()


def test_a_third_party_plugs_in_by_entry_point(install: Callable[[str, str], None]) -> None:
    install("test_routing", "ThirdParty")
    assert "test_routing" in router_names() and router_class("test_routing") is ThirdParty
    config = run_config({"router": {"name": "test_routing", "rate": 1}})
    assert config.router == ThirdParty.Config(rate=1.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hash", "ThirdParty", "names its router 'hash', which is taken"),
        ("dense", "ThirdParty", "names its router 'dense', which is taken"),
        ("test_routing", "IDS_TK", "want a subclass of rlroute.routing.Router"),
        ("other", "ThirdParty", "'other' is defined in a file called 'test_routing': the names must agree"),
    ],
)
def test_bad_entry_points_are_refused(install: Callable[[str, str], None], name: str, value: str, message: str) -> None:
    install(name, value)
    with pytest.raises(ConfigError, match=message):
        router_class(name)


# Configurations


@pytest.mark.parametrize("name", [None, *default_names()])
def test_a_configuration_comes_back_from_json_with_its_hash(name: str | None) -> None:
    config = RunConfig(router=None if name is None else router_class(name).Config())
    values = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    again = run_config(values)
    assert again == config and again.content_hash() == config.content_hash()
    assert run_config({part: values[part] for part in reversed(values)}).content_hash() == config.content_hash()
    assert run_config({"router": {"name": name or "dense"}}) == config


def test_every_field_is_part_of_the_hash() -> None:
    hashes = {RunConfig().content_hash(), RunConfig(router=router_class("hash").Config()).content_hash()}
    changed = 0
    bases: list[tuple[str, Any, Callable[[str], bool]]] = [
        ("data", DataConfig(), lambda name: True),
        ("model", ModelConfig(num_layers=2, capacity_factor=1.0), lambda name: name not in MIXING),
        ("model", ModelConfig(kv_rank=4, mixers="mamba2+attention"), lambda name: name in MIXING),
        ("train", TrainConfig(), lambda name: True),
    ]
    for part, base, belongs in bases:
        for field in (field for field in fields(base) if belongs(field.name)):
            value = getattr(base, field.name)
            if isinstance(value, bool):
                hashes.add(RunConfig(**{part: replace(base, **{field.name: not value})}).content_hash())
                changed += 1
            elif isinstance(value, int | float):
                other = 2 * value or (0.5 if isinstance(value, float) else 2)
                hashes.add(RunConfig(**{part: replace(base, **{field.name: other})}).content_hash())
                changed += 1
    assert len(hashes) == 2 + changed and changed > 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "run has no field 'modle': legal are data, model, others, router, start, train"),
        ({"model": {"widht": 3}}, "model has no field 'widht': legal are "),
        ({"model": 3}, "model = 3: want a mapping of fields"),
        ({"model": {"d_model": "96"}}, "model.d_model = '96': want int"),
        ({"model": {"d_model": True}}, "model.d_model = True: want int"),
        ({"model": {"gate_form": "both"}}, "model.gate_form = 'both': legal are 'own', 'unit'"),
        ({"model": {"k": 17}}, "model.k = 17: legal are 1 to model.num_experts = 16"),
        ({"train": {"lr": 0}}, "train.lr = 0: legal are numbers above 0"),
        ({"train": {"clip": math.nan}}, "train.clip = nan: legal are numbers above 0"),
        ({"train": {"steps": 0}}, "train.steps = 0: legal are numbers from 1"),
        ({"train": {"steps": 1.5}}, "train.steps = 1.5: want int"),
        ({"model": {"num_shared_experts": -1}}, "model.num_shared_experts = -1: legal are numbers from 0"),
        ({"model": {"capacity_factor": 0}}, "model.capacity_factor = 0: legal are numbers above 0, or none"),
        ({"train": {"micro_batches": 3}}, "train.micro_batches = 3: must divide train.batch_size = 8"),
        ({"train": {"budget": "flops"}}, "train.budget_amount = None with budget 'flops'"),
        ({"router": {"name": "nash"}}, "unknown router 'nash'"),
        ({"router": {"table": "random"}}, "router has no 'name'"),
        ({"router": {"name": "dense", "table": "random"}}, "router dense has no field 'table': legal are none"),
        (
            {"router": {"name": "hash", "tabel": "random"}},
            "router hash has no field 'tabel': legal are balance_rate, balance_weight, ",
        ),
        ({"router": {"name": "switch", "normalize": 1}}, "router switch.normalize = 1: want bool"),
        ({"router": {"name": "switch", "z_weight": -1}}, "router switch.z_weight = -1: legal are numbers from 0"),
        ({"model": {"devices": 3}}, "model.devices = 3: must divide model.num_experts = 16"),
        ({"model": {"capacity_of": "device"}}, "model.capacity_of = 'device' needs model.devices"),
        (
            {"model": {"capacity_rows": "sequence", "capacity_groups": 2}},
            "model.capacity_groups = 2: with capacity_rows 'sequence' legal is 1",
        ),
        (
            {"model": {"capacity_order": "gate"}},
            "model.capacity_order = 'gate' does nothing without model.capacity_factor",
        ),
        ({"model": {"capacity_rows": "sequence"}}, "model.capacity_rows = 'sequence' does nothing without model.capac"),
        (
            {"model": {"capacity_groups": 2}},
            "model.capacity_groups = 2 does nothing without model.capacity_factor: leg",
        ),
        (
            {"model": {"capacity_of": "device", "devices": 2}},
            "model.capacity_of = 'device' does nothing without model.capacity_factor: legal is 'expert'",
        ),
        (
            {"router": {"name": "switch", "erc_alpha": 0.5}},
            "switch.erc_alpha = 0.5 does nothing without switch.erc_weight: legal is 1.0",
        ),
        (
            {"router": {"name": "switch", "balance_rate": 0.5, "balance_weight": 0.1}},
            "switch.balance_rate = 0.5 does nothing without switch.target_max_vio: legal is 0.001",
        ),
        (
            {"router": {"name": "topk", "load_std": 0.5}},
            "topk.load_std = 0.5 does nothing without topk.load_weight: legal is None",
        ),
        (
            {"router": {"name": "noisy_topk", "load_std": 0.5}},
            "noisy_topk.load_std = 0.5: legal is none, it draws noise of its own",
        ),
        ({"model": {"head_width": 5}}, "model.head_width = 5: must be even"),
        ({"model": {"num_kv_heads": 3}}, "model.num_kv_heads = 3: must divide model.num_heads = 4"),
        ({"model": {"attention_experts": 1}}, "model.attention_experts = 1 with k = 2 and num_heads = 4"),
        ({"model": {"attention_experts": 8, "k": 3}}, "model.attention_experts = 8 with k = 3 and num_heads = 4"),
    ],
)
def test_bad_configurations_name_the_value_and_what_is_legal(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_config(values)
    assert str(error.value).startswith(message)


def test_whole_numbers_stand_for_floats_and_null_for_none() -> None:
    config = run_config({"train": {"lr": 1}, "model": {"capacity_factor": None}})
    assert isinstance(config.train.lr, float) and config.model.capacity_factor is None
    assert config == RunConfig(train=TrainConfig(lr=1.0))
