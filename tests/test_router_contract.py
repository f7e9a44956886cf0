"""Every router keeps the contract: laws that iterate the registry, and broken routers that fail the very same laws.

A case is a router with its default configuration, or with one that differs from it in a single choice, or with no
weight on any term.

Shape suffixes: T tokens, D model width, E experts, K experts per token, R routed pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute.balance import load_balance, router_z
from rlroute.config import ModelConfig, RouterConfig, RunConfig
from rlroute.errors import ConfigError, DecisionError
from rlroute.experiments.laws import contract as laws
from rlroute.experiments.laws.cases import HELD, OF_WEIGHTS, Case, cases
from rlroute.experiments.laws.contract import LAWS
from rlroute.experiments.laws.steps import with_a_past
from rlroute.registry import router_class, run_config
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Term
from tests.conftest import D, make_shape
from tests.policies import any_router_names, default_config, needs

CASES = {
    case.label: case
    for name in any_router_names()
    for case in cases(router_class(name), default_config(name), partial(needs, name, D))
    if name in ("switch", "reinforce") or case.changed not in (tuple(OF_WEIGHTS), tuple(HELD))  # the base's own
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("law_"))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_router(case: Case, law: Callable[[Case], None]) -> None:
    law(case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_configurations_survive_the_way_through_a_dictionary(case: Case) -> None:
    config = RunConfig(router=case.config)
    assert run_config(config.to_dict()) == config
    assert config.run_id(3) == f"{case.config.name}-{config.content_hash()}-s3"


@pytest.mark.parametrize("name", any_router_names())
def test_every_router_refuses_more_experts_per_token_than_there_are(name: str) -> None:
    router = router_class(name)
    for k in (0, ModelConfig().num_experts + 1):
        with pytest.raises(ConfigError, match=f"k = {k}: legal are 1 to num_experts = 16"):
            router(default_config(name, D, 16), make_shape(16, k))


# Broken routers, each of which must fail a law; and a sound one, which must pass them all.


class Sound(Router):
    """Softmax top-k with a z-loss."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        pass

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax"
    count: Tensor

    def __init__(self, config: RouterConfig, shape: Any) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 0.5)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.scores(x_TD)
        probs_TE, ids_TK = logits_TE.softmax(1), context.choose(logits_TE, self.shape.k)
        gates_TK = probs_TE.gather(1, ids_TK)
        return RoutingDecision.token_choice(
            ids_TK, gates_TK, self.shape.num_experts, logits_TE=logits_TE, probs_TE=probs_TE
        )

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        assert decision.logits_TE is not None
        return {"z": Term(feedback.mean(router_z(decision.logits_TE)), 0.1)}


class RepeatsAnExpert(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = super().forward(x_TD, context)
        return replace(decision, expert_ids_R=torch.zeros_like(decision.expert_ids_R))


class ClaimsToHaveNoScores(Sound):
    publishes = frozenset()


class IgnoresForcedChoices(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        return super().forward(x_TD, replace(context, choices={}))


class ChoosesTwice(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        context.choose(x_TD.sin() @ self.scores.weight.t(), self.shape.k)
        return super().forward(x_TD, context)


class LooksAhead(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        same_T = (context.sequence_T == context.sequence_T.roll(-1)) & (context.sample_T == context.sample_T.roll(-1))
        return super().forward(x_TD + same_T[:, None] * x_TD.roll(-1, 0), context)


class ClaimsToLookAhead(Sound):
    causal = False


class ReadsTheMicroBatch(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        return super().forward(x_TD if context.micro_batch is None else -x_TD, context)


class ExpectsToBeFirst(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        assert context.previous is None
        return super().forward(x_TD, context)


class IsTheSameAtEverySite(Sound):
    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        super().__init__(config, replace(shape, site=0))


class RefusesTooLate(Sound):
    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        if shape.k == 1:
            raise ConfigError("k = 1: legal are 2 and more")


class ScoresAreNoDistribution(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = super().forward(x_TD, context)
        return replace(decision, probs_TE=self.scores(x_TD).sigmoid())


class AlwaysFloat32(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = super().forward(x_TD, context)
        return replace(decision, gates_R=decision.gates_R.float())


class CountsForwards(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        self.count += 1
        return super().forward(x_TD, context)


class AsksWhetherItTrains(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        return super().forward(x_TD if self.training else -x_TD, context)


class DrawsFromTheGlobalStream(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        return super().forward(x_TD + torch.randn_like(x_TD) if context.explore else x_TD, context)


class ClaimsToSample(Sound):
    stochastic = True


class JittersItsInput(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        return super().forward(x_TD.mul_(1.1), context)


class RoutesByRow(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        return super().forward(x_TD + torch.arange(len(x_TD))[:, None] % 3, context)


class MixesTokens(Sound):
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        return super().forward(x_TD - x_TD.mean(0), context)


class AveragesOverTheMicroBatch(Sound):
    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        assert decision.logits_TE is not None
        mask_T = feedback.context.mask_T
        return {"z": Term((router_z(decision.logits_TE) * mask_T).sum() / mask_T.sum(), 0.1)}


class ClaimsToMixTokens(Sound):
    batch_dependent = True


class CountsPadding(Sound):
    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        assert decision.logits_TE is not None
        return {"z": Term(router_z(decision.logits_TE).sum() / feedback.num_valid, 0.1)}


class BalancesAfterDrops(Sound):
    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        assert decision.probs_TE is not None
        ran = replace(decision, expert_ids_R=torch.where(decision.kept_R, decision.expert_ids_R, decision.num_experts))
        return {"balance": Term(feedback.share * load_balance(decision.probs_TE, ran, feedback.context), 0.1)}


class SoftmaxAfterTopK(Sound):
    """The single gate of k = 1 is a constant 1."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = super().forward(x_TD, context)
        assert decision.logits_TE is not None
        ids_TK = decision.expert_ids_R.view(-1, self.shape.k)
        return replace(decision, gates_R=decision.logits_TE.gather(1, ids_TK).softmax(1).reshape(-1))


class HidesItsReward(Sound):
    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        assert decision.probs_TE is not None
        return {"policy": Term(feedback.mean(feedback.loss_MT.reshape(-1) * decision.probs_TE[:, 0]), 0.1)}


class ClaimsReward(Sound):
    learns_from = frozenset({"gate", "reward"})


class ClaimsLoad(Sound):
    learns_from = frozenset({"gate", "load"})


class AdaptsInSecret(Sound):
    def adapt(self, sums: Any, progress: float) -> None:
        self.count += sums["tokens"]


class HasAnIdleParameter(Sound):
    def __init__(self, config: RouterConfig, shape: Any) -> None:
        super().__init__(config, shape)
        self.idle = torch.nn.Parameter(torch.ones(3))


class RemembersItsLogits(Sound):
    """An evaluation in between overwrites the graph that the objective needs."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = super().forward(x_TD, context)
        self.__dict__["last"] = decision
        return decision

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        last: RoutingDecision = self.__dict__["last"]
        assert last.logits_TE is not None
        return {"z": Term(router_z(last.logits_TE).sum() / feedback.num_valid, 0.1)}


class ObservesWhatIsCounted(Sound):
    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        return {"demand_E": torch.ones(8)}


def test_a_router_cannot_claim_what_is_counted() -> None:
    with pytest.raises(DecisionError, match="observes 'demand_E', which is counted"):
        with_a_past(Case(ObservesWhatIsCounted, Sound.Config()).make())


BROKEN: list[tuple[type[Router], Callable[[Case], None]]] = [
    (RepeatsAnExpert, laws.law_pairs),
    (ScoresAreNoDistribution, laws.law_scores),
    (ClaimsToHaveNoScores, laws.law_scores),
    (IgnoresForcedChoices, laws.law_choices),
    (ChoosesTwice, laws.law_choices),
    (LooksAhead, laws.law_causal),
    (ClaimsToLookAhead, laws.law_causal),
    (ReadsTheMicroBatch, laws.law_keys),
    (ExpectsToBeFirst, laws.law_surroundings),
    (IsTheSameAtEverySite, laws.law_sites),
    (RefusesTooLate, laws.law_shapes),
    (AlwaysFloat32, laws.law_precision),
    (CountsForwards, laws.law_evaluation),
    (CountsForwards, laws.law_purity),
    (AsksWhetherItTrains, laws.law_evaluation),
    (DrawsFromTheGlobalStream, laws.law_keys),
    (ClaimsToSample, laws.law_keys),
    (JittersItsInput, laws.law_purity),
    (RoutesByRow, laws.law_permutation),
    (MixesTokens, laws.law_neighbours),
    (MixesTokens, laws.law_accumulation),
    (AveragesOverTheMicroBatch, laws.law_accumulation),
    (ClaimsToMixTokens, laws.law_accumulation),
    (CountsPadding, laws.law_padding),
    (BalancesAfterDrops, laws.law_demand),
    (SoftmaxAfterTopK, laws.law_gate_signal),
    (HidesItsReward, laws.law_reward_signal),
    (ClaimsReward, laws.law_reward_signal),
    (ClaimsLoad, laws.law_load_signal),
    (AdaptsInSecret, laws.law_load_signal),
    (HasAnIdleParameter, laws.law_every_parameter_moves),
    (RemembersItsLogits, laws.law_interruption),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("law_"))
def test_a_sound_router_passes(law: Callable[[Case], None]) -> None:
    law(Case(Sound, Sound.Config()))


@pytest.mark.parametrize(("router", "law"), BROKEN, ids=[f"{r.__name__}-{law.__name__[4:]}" for r, law in BROKEN])
def test_a_broken_router_fails(router: type[Router], law: Callable[[Case], None]) -> None:
    with pytest.raises((AssertionError, ConfigError, DecisionError)):
        law(Case(router, router.Config()))
