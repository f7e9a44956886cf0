"""Replay: a run's choices, recorded and taken again, give its losses bit for bit: every kind of choice, in one process
and in two.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlroute import registry
from rlroute.baselines.replay import ReplayRouter
from rlroute.choices import ChoiceLog
from rlroute.config import DataConfig, ModelConfig, RouterConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError, DecisionError, StoreError
from rlroute.parallel.local import run_ranks
from rlroute.parallel.mesh import Mesh
from rlroute.registry import router_class
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.training.loop import train

DATA = DataConfig(spec="synth:vocab=32,documents=40", seq_len=16, eval_tokens=64)
MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=4, k=2, d_expert=8)
TRAIN = TrainConfig(
    steps=4,
    batch_size=4,
    micro_batches=2,
    warmup_steps=1,
    eval_every=2,
    log_every=1,
    checkpoint_every=2,
    record_choices=True,
)


class Threshold(Router):
    """Every expert whose probability is above 1/E: a variable number."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """No fields."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax"

    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 0.5)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE, experts = self.scores(x_TD), self.shape.num_experts
        probs_TE = logits_TE.softmax(1)
        ids_TK = context.choose(probs_TE.masked_fill(probs_TE < 1 / experts, float("-inf")), experts)
        gates_TK = torch.nn.functional.pad(probs_TE, (0, 1)).gather(1, ids_TK)
        return RoutingDecision.token_choice(ids_TK, gates_TK, experts, logits_TE=logits_TE, probs_TE=probs_TE)


class ExpertChoice(Router):
    """Each expert takes the tokens that like it best."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """No fields."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax"
    causal = False

    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 0.5)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.scores(x_TD)
        probs_TE = logits_TE.softmax(1)
        ids_EC = context.choose(probs_TE.t(), len(x_TD) * self.shape.k // self.shape.num_experts)
        gates_EC = probs_TE.t().gather(1, ids_EC)
        return RoutingDecision.expert_choice(ids_EC, gates_EC, len(x_TD), logits_TE=logits_TE, probs_TE=probs_TE)


for router, name in ((Threshold, "threshold"), (ExpertChoice, "expert_choice")):
    router.Config.name = name
FOREIGN: dict[str, type[Router]] = {"threshold": Threshold, "expert_choice": ExpertChoice}


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install this module's routers."""
    install(monkeypatch.setattr)


def install(patch: Callable[[Any, str, Any], None]) -> None:
    known = registry.router_class
    patch(registry, "router_class", lambda name: FOREIGN.get(name) or known(name))


def run_of(name: str, **model: Any) -> RunConfig:
    router = FOREIGN.get(name) or router_class(name)
    return RunConfig(data=DATA, model=replace(MODEL, **model), router=router.Config(), train=TRAIN)


def replay_of(source: RunConfig, folder: Path) -> RunConfig:
    return replace(source, router=ReplayRouter.Config(run=str(folder / source.run_id(0))))


def losses(folder: Path, config: RunConfig) -> list[tuple[str, int, float]]:
    rows = (folder / config.run_id(0) / "metrics.jsonl").read_text().splitlines()
    return [(row["kind"], row["step"], row["loss"]) for row in map(json.loads, rows)]


def train_as_rank(values: dict[str, Any], folder: str) -> None:
    install(setattr)
    train(registry.run_config(values), 0, Path(folder), group=Mesh(2))


KINDS = ["switch", "reinforce", "hash", "noisy_topk", "threshold", "expert_choice"]


@pytest.mark.parametrize("name", KINDS)
def test_replay_gives_the_losses_of_a_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = run_of(name)
    train(source, 0, tmp_path)
    replay = replay_of(source, tmp_path)
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay) == losses(tmp_path, source)
    assert ChoiceLog(tmp_path / replay.run_id(0)).sha256() == ChoiceLog(tmp_path / source.run_id(0)).sha256()


@pytest.mark.processes
@pytest.mark.parametrize("name", ["switch", "threshold", "expert_choice"])
def test_replay_in_two_processes_is_the_run_in_two_processes(name: str, tmp_path: Path) -> None:
    source = run_of(name)
    run_ranks(train_as_rank, 2, source.to_dict(), str(tmp_path))
    replay = replay_of(source, tmp_path)
    run_ranks(train_as_rank, 2, replay.to_dict(), str(tmp_path))
    assert losses(tmp_path, replay) == losses(tmp_path, source)


def test_two_sites_of_a_block_are_replayed_and_so_is_a_capacity(tmp_path: Path) -> None:
    source = run_of("switch", attention_experts=4, capacity_factor=1.0)
    train(source, 0, tmp_path)
    replay = replay_of(source, tmp_path)
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay) == losses(tmp_path, source)


def test_choices_are_taken_rather_than_made_again(tmp_path: Path) -> None:
    """With the recorded choices altered, the losses are others: what is replayed is the record, not the router."""
    source = run_of("switch")
    train(source, 0, tmp_path)
    log = ChoiceLog(tmp_path / source.run_id(0))
    log.write(0, 0, {0: (log.read(0, 0, 0) + 1) % 4})
    replay = replay_of(source, tmp_path)
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay)[0] != losses(tmp_path, source)[0]


def test_an_interrupted_replay_goes_on(tmp_path: Path) -> None:
    source = run_of("switch")

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(source, 0, tmp_path, on_step=stop)
    train(source, 0, tmp_path)
    replay = replay_of(source, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(replay, 0, tmp_path, on_step=stop)
    train(replay, 0, tmp_path)
    assert losses(tmp_path, replay) == losses(tmp_path, source)


def test_what_cannot_be_replayed_is_refused_by_name(tmp_path: Path) -> None:
    source = run_of("hash")
    train(replace(source, train=replace(TRAIN, record_choices=False)), 0, tmp_path)
    silent = replace(source, train=replace(TRAIN, record_choices=False)).run_id(0)
    config = ReplayRouter.Config
    with pytest.raises(StoreError, match=r"was not trained with --train\.record-choices"):
        config(run=str(tmp_path / silent))
    train(source, 0, tmp_path)
    replay = replay_of(source, tmp_path)
    with pytest.raises(ConfigError, match="has seed 0: legal is that, not 1"):
        train(replay, 1, tmp_path)
    with pytest.raises(ConfigError, match="weights of terms are those of the recorded run"):
        config(run=str(tmp_path / source.run_id(0)), balance_weight=0.1)
    with pytest.raises(StoreError, match="holds no step 4"):
        train(replace(replay, train=replace(TRAIN, steps=5)), 0, tmp_path)
    with pytest.raises(DecisionError, match="choices forced at site 0 have shape"):
        train(replace(replay, train=replace(TRAIN, batch_size=8)), 0, tmp_path)
    assert isinstance(replay.router, config)
    with pytest.raises(ConfigError, match="has choices of SHA-256"):
        train(replace(replay, router=replace(replay.router, sha256="0" * 64)), 0, tmp_path)
