"""Routers in environments: the same router, learning by the same code, from rewards in place of losses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

from rlroute.agents.reinforce import ReinforceRouter
from rlroute.errors import ConfigError
from rlroute.experiments.play import cartpole, games
from rlroute.experiments.play import player as playing
from rlroute.experiments.play.games import play, to_markdown
from rlroute.experiments.play.player import Learning, RouterPlayer, Spec
from rlroute.registry import router_class
from rlroute.routing import RoutingDecision
from tests.strangers import install

QUICK = Learning(updates=80, copies=32, rollout=8)


def player_of(environment, name="reinforce", copies=4, **fields):
    envs = games._make(environment, None, copies)
    router = router_class(name)
    return RouterPlayer(router.Config(**fields), Spec.of(envs), seed=0), envs


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["reinforce", "reinforce:baseline=leave_one_out", "actor_critic", "bandit"])
def test_every_agent_that_learns_from_reward_passes_nine_tenths_of_the_oracle(name, seed):
    greedy, *_ = play("TokenBandit-v0", (name,), 32, seed, QUICK)
    assert greedy.score > 0.9


def test_what_learns_from_gates_or_not_at_all_is_evaluated_and_says_so():
    switch, hashed, _, sampled = play("TokenBandit-v0", ("switch", "hash", "credit"), 16, 0, Learning())
    for result in (switch, hashed):
        assert "untaught" in result.name and result.score < 0.2
    assert sampled.name == "credit (sampled)" and abs(sampled.score) < 0.1


@pytest.mark.parametrize("environment", ["TokenBandit-v0", "TokenBandits-v0", "Dispatch-v0"])
def test_a_rollout_decided_again_is_what_was_played(environment, monkeypatch):
    player, envs = player_of(environment, init_std=1.0)
    played, again = [], []
    decide, forward = player.decide, player.router.forward

    def note(*arguments, **keys):
        played.append(decide(*arguments, **keys))
        return played[-1]

    def listen(x_TD, context):
        decision = forward(x_TD, context)
        if torch.is_grad_enabled():
            again.append(decision.expert_ids_R)
        return decision

    monkeypatch.setattr(player, "decide", note)
    monkeypatch.setattr(player.router, "forward", listen)
    rollout = envs.world.length // 2 + 5  # the second one sees the episodes end
    player.learn(envs, Learning(updates=2, copies=4, rollout=rollout))
    for update in range(2):
        steps = [d.expert_ids_R.view(4, 1, -1) for d in played[rollout * update : rollout * (update + 1)]]
        assert torch.equal(torch.cat(steps, dim=1).flatten(), again[update])


def test_another_episode_is_another_sequence():
    player, _ = player_of("Dispatch-v0")
    ended = torch.tensor([[0, 0, 1], [0, 1, 1]])
    context = player.context(torch.zeros(2, 3, 1, dtype=torch.long), ended, step=7, first=0, explore=True)
    first, second = context.sequence_T.view(2, 3).tolist()
    assert first[0] == first[1] != first[2] and second[0] != second[1] == second[2]
    assert not set(first) & set(second) and context.position_T.tolist() == [0, 1, 2, 0, 1, 2]


def test_learning_is_the_reward_s(monkeypatch):
    """With the reward's sign turned, the router finds the experts to avoid."""
    monkeypatch.setattr(playing, "_token_losses", lambda outcomes, actions, rewards_C: rewards_C)
    greedy, _ = play("TokenBandit-v0", ("reinforce",), 16, 0, QUICK)
    assert greedy.score < 0.1


def test_the_batched_form_takes_a_batch_of_tokens_a_step():
    greedy, *_ = play("TokenBandits-v0", ("reinforce",), 16, 0, Learning(updates=80, copies=8, rollout=2))
    assert greedy.score > 0.9


@pytest.mark.slow
def test_a_router_learns_to_dispatch():
    names = ("uniform", "reinforce:discount=0.9,baseline=ema")
    uniform, greedy, _ = play("Dispatch-v0", names, 32, 0, Learning(updates=400))
    assert greedy.score > uniform.score + 0.2


def test_tokens_take_their_strongest_pair_and_none_without_one():
    player, _ = player_of("TokenBandits-v0", copies=1)
    experts, tokens = player.spec.num_experts, 32
    decision = RoutingDecision(
        num_tokens=tokens,
        num_experts=experts,
        k=None,
        token_ids_R=torch.tensor([0, 0, 1, 2]),
        expert_ids_R=torch.tensor([3, 5, 2, experts]),
        kept_R=torch.tensor([True, True, False, True]),
        gates_R=torch.tensor([0.9, 0.1, 1.0, 1.0]),
    )
    actions = player.actions(decision, 1)[0]
    assert actions[0] == 3 and all(actions[1:] == experts)


def test_losses_of_a_batch_are_those_of_the_experts_taken():
    infos = {"expert_losses": np.array([[[1.0, 2.0], [3.0, 4.0]]]), "skip_loss": np.array([[9.0, 8.0]])}
    outcomes = playing._outcomes(np.zeros((1, 2, 5)), infos)
    losses = playing._token_losses(outcomes, np.array([[1, 2]]), np.zeros(1))
    assert losses.tolist() == [[2.0, 8.0]]


# Tokens without an expert.


@pytest.mark.parametrize("samples", [1, 2])
def test_in_a_batch_a_token_without_an_expert_costs_what_skipping_it_costs(samples, monkeypatch):
    install(monkeypatch, "threshold_like")
    player, envs = player_of("TokenBandits-v0", "threshold_like", samples=samples)
    chosen, decide, again = player.chosen, playing.decide, []

    def listen(router, x_TD, context, config):
        decision = decide(router, x_TD, context, config)
        if torch.is_grad_enabled():
            again.append((x_TD, chosen(decision)))
        return decision

    monkeypatch.setattr(playing, "decide", listen)
    player.learn(envs, Learning(updates=2, copies=4, rollout=2))
    table = envs.world.table
    worth_NX = np.concatenate([table.losses_NE, table.skip_N[:, None]], axis=1)
    row_of = {x_D.tobytes(): row for row, x_D in enumerate(table.x_ND)}
    for (x_TD, chosen_T), loss_MT in zip(again, player.router.seen["loss"], strict=True):
        rows_T = [row_of[x_D.tobytes()] for x_D in x_TD.numpy()]
        assert np.array_equal(loss_MT.reshape(-1).numpy(), worth_NX[rows_T, chosen_T.numpy()])
        assert 0 < int((chosen_T == player.spec.num_experts).sum()) < len(chosen_T)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("environment", ["TokenBandit-v0", "Dispatch-v0"])
def test_where_none_is_no_action_its_router_is_refused_before_any_work(environment, samples, monkeypatch):
    install(monkeypatch, "threshold_like")
    monkeypatch.setattr(RouterPlayer, "learn", lambda *arguments: pytest.fail("work was begun"))
    if environment == "Dispatch-v0" and samples == 2:
        reason = "wants 2 outcomes of each token"
    else:
        reason = "router 'threshold_like' left a token without an expert.*legal is rlroute/TokenBandits-v0"
    with pytest.raises(ConfigError, match=reason):
        play(environment, ("reinforce", f"threshold_like:samples={samples}"), 4, 0, QUICK)


def test_who_learns_to_leave_tokens_without_an_expert_is_refused_by_name(monkeypatch):
    install(monkeypatch, "threshold_like")
    player, envs = player_of("TokenBandit-v0", "threshold_like", threshold=0.01)

    def take_nobody(sums, progress):
        player.router.config = replace(player.router.config, threshold=1.5)

    monkeypatch.setattr(player.router, "adapt", take_nobody)
    with pytest.raises(ConfigError, match="router 'threshold_like' left a token without an expert"):
        player.learn(envs, Learning(updates=2, copies=4, rollout=2))


def test_variable_k_and_expert_choice_play_where_they_can(monkeypatch):
    install(monkeypatch, "threshold_like", "expert_choice_like")
    how = Learning(updates=2, copies=4, rollout=2)
    several, *_ = play("TokenBandit-v0", ("threshold_like:threshold=0.01,noise=0.0",), 8, 0, how)
    batch, *_ = play("TokenBandits-v0", ("expert_choice_like",), 8, 0, Learning())
    assert math.isfinite(several.score) and math.isfinite(batch.score)
    with pytest.raises(ConfigError, match="'expert_choice_like' decides over a batch"):
        play("TokenBandit-v0", ("expert_choice_like",), 8, 0, how)


def test_who_refuses_the_only_site_that_there_is_is_refused_by_name(monkeypatch):
    install(monkeypatch, "picky")
    with pytest.raises(ConfigError, match="router picky: num_experts = 8 at site 1"):
        play("TokenBandits-v0", ("picky",), 8, 0, QUICK)
    with pytest.raises(ConfigError, match="router picky: num_experts = 2 at site 1"):
        cartpole.play("picky", [0])


def test_gates_change_nothing_so_their_credit_is_there_and_0(monkeypatch):
    install(monkeypatch, "threshold_like")
    player, envs = player_of("TokenBandits-v0", "threshold_like")
    weight = player.router.scores.weight.detach().clone()
    monkeypatch.setattr(player.router, "objective", lambda decision, feedback: {})
    player.learn(envs, Learning(updates=4, copies=4, rollout=2))
    assert player.router.seen["credit"] == [0.0] * 4 and player.router.seen["progress"] == [0, 0.25, 0.5, 0.75]
    assert torch.equal(player.router.scores.weight, weight)


def test_reference_policies_are_played_when_nobody_is_named():
    results = play("TokenBandit-v0", (), 16, 0, Learning())
    assert [r.name for r in results] == ["uniform", "fixed", "bayes", "oracle"]
    assert abs(results[-1].regret) < 0.01 < results[0].regret
    table = to_markdown("TokenBandit-v0", results)
    assert table.index("oracle") < table.index("uniform") and not math.isnan(results[0].half_width)


@pytest.mark.parametrize("field", ["updates", "copies", "rollout", "lr"])
def test_a_way_of_learning_where_nobody_learns_is_refused_by_name(field):
    how = replace(Learning(), **{field: 7})
    with pytest.raises(ConfigError, match=rf"--{field} 7(\.0)? does not apply: none of these policies learns here"):
        play("TokenBandit-v0", ("uniform", "switch"), 4, 0, how)


def test_what_cannot_play_is_refused_by_name(monkeypatch):
    with pytest.raises(ConfigError, match="environment 'Acrobot-v1': legal are rlroute/TokenBandit-v0"):
        play("Acrobot-v1", (), 16, 0, QUICK)
    for name in ("dense", "nobody"):
        with pytest.raises(ConfigError, match=f"policy '{name}': legal are uniform, fixed, bayes, oracle, sb3:FILE"):
            play("TokenBandit-v0", (name,), 16, 0, QUICK)
    with pytest.raises(ConfigError, match="wants 2 outcomes of each token"):
        player_of("Dispatch-v0", baseline="leave_one_out")
    with pytest.raises(ConfigError, match="rollout = 0: legal are numbers from 1"):
        Learning(rollout=0)
    with pytest.raises(ConfigError, match="episodes = 1"):
        play("TokenBandit-v0", (), 1, 0, QUICK)
    monkeypatch.setattr(ReinforceRouter, "causal", False)
    with pytest.raises(ConfigError, match="decides over a batch: legal is rlroute/TokenBandits-v0"):
        player_of("TokenBandit-v0")
    player_of("TokenBandits-v0")


@pytest.mark.slow
def test_cartpole_is_played_by_the_same_agent_code():
    """A short run that already balances far longer than a coin does; the whole of it is `rlroute play CartPole-v1`."""
    how = Learning(updates=25, copies=8, rollout=128, lr=0.03)
    (result,) = cartpole.play(cartpole.ENTRY, [0], how)
    assert result.steps == 25 * 8 * 128 and result.mean > 60
    assert "0 of 1 seeds" in cartpole.to_markdown("x", [result._replace(mean=474.9)])
    with pytest.raises(ConfigError, match="legal are routers"):
        cartpole.play("dense", [0], how)
