"""What is claimed of the tasks holds: closed forms, dynamics, masks, the order of the reference policies."""

import importlib.util

import pytest

if importlib.util.find_spec("gymnasium") is None:
    pytest.skip("needs gymnasium (extra 'envs')", allow_module_level=True)

import gymnasium
import numpy as np

from rlroute.envs.clusters import Clusters
from rlroute.envs.dispatch import KINDS_PER_TOPIC, DispatchConfig, DispatchWorld
from rlroute.envs.references import PUBLISHED, play, reference_policies, score_interval
from rlroute.envs.tables import TokenTable, load_table
from rlroute.errors import ConfigError, DataError

Z = 4.5
"""Standard errors that a Monte Carlo mean may be off: 1 false alarm in 150,000."""


def _near(samples, expected: float) -> bool:
    samples = np.asarray(samples, dtype=np.float64)
    return abs(samples.mean() - expected) <= Z * max(samples.std(ddof=1), 1e-12) / len(samples) ** 0.5


@pytest.mark.parametrize(
    "settings",
    [{}, {"sigma": 1.0}, {"sigma": 1.0, "skew": 1.2}, {"sigma": 0.7, "experts": 16, "skew": 0.5}, {"experts": 2}],
    ids=str,
)
def test_closed_forms_agree_with_monte_carlo(settings):
    task = Clusters(**settings, tokens=2**15, task_seed=5)
    table, ladder = task.draw_table(), task.ladder()
    rows, losses_NE = np.arange(task.tokens), table.losses_NE
    bayes = task.bayes_actions(table.x_ND)
    assert _near(losses_NE.mean(1), ladder["uniform"])
    assert _near(losses_NE[:, 0], ladder["fixed"])
    assert _near(losses_NE[rows, bayes], ladder["bayes"])
    assert _near(bayes != table.labels_N, task.bayes_error())
    assert _near(losses_NE[rows, table.labels_N], ladder["oracle"])
    assert list(ladder.values()) == sorted(ladder.values())
    assert np.array_equal(losses_NE.argmin(1), table.labels_N), "the cluster's expert is each token's best"


def test_token_ids_say_nothing_about_the_cluster():
    table = Clusters(tokens=2**15).draw_table()
    counts = np.zeros((64, 8))
    np.add.at(counts, (table.token_ids_N, table.labels_N), 1)
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), 63 * 7
    assert abs(chi_square - freedom) < Z * (2 * freedom) ** 0.5


def test_reward_is_the_negative_loss_of_the_observed_token():
    env = gymnasium.make("rlroute.envs:rlroute/TokenBandit-v0")
    table = env.unwrapped.world.table
    observation, info = env.reset(seed=0)
    for expert in range(8):
        (row,) = np.flatnonzero((table.x_ND == observation).all(1))
        assert info["token_id"] == table.token_ids_N[row] and info["label"] == table.labels_N[row]
        losses = info["expert_losses"]
        observation, reward, _, _, info = env.step(expert)
        assert reward == -losses[expert] and info["regret"] == pytest.approx(losses[expert] - losses.min())


def test_a_batch_averages_its_tokens_and_may_leave_some_out():
    env = gymnasium.make("rlroute.envs:rlroute/TokenBandits-v0", batch=6)
    _, info = env.reset(seed=0)
    experts = np.array([0, 1, 8, 3, 8, 5])
    paid = np.where(experts == 8, info["skip_loss"], info["expert_losses"][np.arange(6), experts % 8])
    assert env.step(experts)[1] == pytest.approx(-paid.mean(dtype=np.float64))
    assert env.action_space.contains(env.action_space.sample(tuple(info["action_mask"])))


def test_tables_survive_a_file_and_errors_are_named(tmp_path):
    table = Clusters(tokens=50).draw_table()
    path = tmp_path / "tokens.npz"
    table.save(path)
    assert all(np.array_equal(getattr(table, k), v) for k, v in vars(load_table(str(path))).items())
    env = gymnasium.make("rlroute.envs:rlroute/TokenBandit-v0", table=str(path))
    assert len(env.unwrapped.world.table.x_ND) == 50
    with pytest.raises(ConfigError, match="experts = 4 beside table"):
        gymnasium.make("rlroute.envs:rlroute/TokenBandit-v0", table=str(path), experts=4)
    arrays = {**vars(table)}
    with pytest.raises(DataError, match=r"losses_NE is float64 of shape \(50, 8\), want float32 of shape \(N, E\)"):
        TokenTable(**arrays | {"losses_NE": table.losses_NE.astype(np.float64)})
    with pytest.raises(DataError, match="skip_N has N = 49, x_ND has 50"):
        TokenTable(**arrays | {"skip_N": table.skip_N[1:]})
    with pytest.raises(DataError, match="x_ND holds numbers that are not finite"):
        TokenTable(**arrays | {"x_ND": table.x_ND * np.float32("nan")})
    np.savez(path, x_ND=table.x_ND)
    with pytest.raises(DataError, match="no array labels_N, losses_NE"):
        load_table(str(path))
    path.write_text("no archive")
    for bad in (path, tmp_path / "none.npz"):
        with pytest.raises(DataError, match=bad.name):
            load_table(str(bad))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": 1}, "experts = 1, legal are integers from 2 to 16"),
        ({"experts": 17}, "experts = 17, legal are integers from 2 to 16"),
        ({"sigma": 0}, "sigma = 0, legal are numbers above 0"),
        ({"skew": -1}, "skew = -1, legal are numbers from 0"),
        ({"tokens": 2.5}, "tokens = 2.5, legal are integers from 1"),
    ],
)
def test_illegal_clusters_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        Clusters(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devices": 3}, "devices = 3, legal are divisors of experts = 8"),
        ({"load": 0.0}, "load = 0.0, legal are above 0"),
        ({"hot": 1.5}, "hot = 1.5, legal are 0 to 1.0"),
        ({"slowdown": 0}, "slowdown = 0, legal are above 0 to 1.0"),
        ({"capacity": 0}, "capacity = 0, legal are integers from 1"),
    ],
)
def test_illegal_dispatch_is_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        DispatchConfig(**settings)


def test_dispatch_follows_a_slow_reference():
    """The rules once more, in scalars and from what the observation and info show alone."""
    env = gymnasium.make("rlroute.envs:rlroute/Dispatch-v0")
    world = env.unwrapped.world
    config, queue = world.config, [0.0] * 8
    env.action_space.seed(0)
    observation, info = env.reset(seed=0)
    drops = 0
    for _ in range(config.episode_length):
        affinity, fill, rate, away = observation.reshape(4, 8).astype(float)
        assert np.allclose(fill * config.capacity, queue, atol=1e-6)
        assert info["action_mask"].tolist() == [int(q + 1 <= config.capacity) for q in queue]
        straggler = (
            np.abs(world.rates_GE / world.rates_GE.max() - rate).max(1).argmin()
        )  # observations are rounded, rates are not
        expert, rates = env.action_space.sample(), world.rates_GE[straggler]
        if queue[expert] + 1 > config.capacity:
            want, drops = -config.drop_cost, drops + 1
        else:
            delay = (queue[expert] + 1) / rates[expert] + config.transfer * away[expert]
            want = affinity[expert] - config.latency_weight * delay
            queue[expert] += 1
        queue = [max(0.0, q - r) for q, r in zip(queue, rates, strict=True)]
        observation, reward, _, truncated, info = env.step(expert)
        assert reward == pytest.approx(want, abs=1e-5)
        assert info["dropped"] == (want == -config.drop_cost)
    assert truncated and drops


def test_dispatch_load_and_drift_are_what_they_say():
    config = DispatchConfig(load=0.8, drift=16)
    world = DispatchWorld(config, 64)
    world.restart(np.arange(64), [np.random.default_rng(seed) for seed in range(64)])
    assert world.rates_GE.sum(1).mean() == pytest.approx(1 / 0.8)
    changes_TC = np.diff(world._straggler_TC, axis=0) != 0
    assert np.isin(changes_TC.sum(0), (16, 17)).all(), "every 16 of 257 steps, from a random phase"
    topics_TC = world._kind_TC // KINDS_PER_TOPIC
    first = topics_TC[:16].reshape(16, 64)
    most = max((first == topic).mean(0).max() for topic in range(8))
    assert most > 0.5 and topics_TC.max() == 7 and topics_TC.min() == 0


def test_masks_keep_tokens_from_being_dropped():
    env = gymnasium.make("rlroute.envs:rlroute/Dispatch-v0", load=1.2)
    env.action_space.seed(0)
    _, info = env.reset(seed=0)
    full = 0
    for _ in range(256):
        full += int((info["action_mask"] == 0).sum())
        assert np.array_equal(env.unwrapped.action_masks(), info["action_mask"] == 1)
        _, _, _, _, info = env.step(env.action_space.sample(info["action_mask"]))
        assert not info["dropped"]
    assert full


@pytest.mark.parametrize("name", ["TokenBandit", "TokenBandits"])
@pytest.mark.parametrize("skew", [0.0, 1.2])
def test_bandit_references_stand_in_order(name, skew):
    envs = gymnasium.make_vec(f"rlroute.envs:rlroute/{name}-v0", num_envs=32, sigma=1.0, skew=skew)
    scores = {n: score_interval(envs, play(envs, p)) for n, p in reference_policies(envs).items()}
    uniform, oracle = scores["uniform"], scores["oracle"]
    assert abs(uniform[0]) < uniform[1] * Z / 1.96 and oracle[0] == pytest.approx(1.0, abs=1e-3)
    ladder = Clusters(sigma=1.0, skew=skew).ladder()
    span = ladder["uniform"] - ladder["oracle"]
    for policy in ("fixed", "bayes"):
        mean, half = scores[policy]
        assert abs(mean - (ladder["uniform"] - ladder[policy]) / span) < half * Z / 1.96 + 0.02, (
            "0.02 for a finite table"
        )
    assert uniform[0] - 0.03 <= scores["fixed"][0] < scores["bayes"][0] < oracle[0]


@pytest.mark.parametrize("name", [*list(PUBLISHED)[:-1], pytest.param(list(PUBLISHED)[-1], marks=pytest.mark.slow)])
def test_published_scores_are_measured_again(name):
    envs = gymnasium.make_vec(f"rlroute.envs:{name}", num_envs=256)
    scores = {n: score_interval(envs, play(envs, p)) for n, p in reference_policies(envs).items()}
    assert scores.keys() == PUBLISHED[name].keys()
    for policy, (mean, half) in scores.items():
        assert abs(mean - PUBLISHED[name][policy]) < half + 0.001


def test_dispatch_references_stand_in_order():
    published = list(PUBLISHED["rlroute/Dispatch-v0"].values())
    assert published == sorted(published) and np.diff(published).min() > 2 * 0.0025


def test_no_action_passes_the_dispatch_bound():
    envs = gymnasium.make_vec("rlroute.envs:rlroute/Dispatch-v0", num_envs=64, load=0.01)
    best = play(envs, reference_policies(envs)["greedy"])
    assert 0.98 < envs.score(float(best.mean())) <= 1.0 + 0.01, (
        "queues are idle at a load of 0.01: the bound is attained"
    )


def test_the_bench_puts_every_environment_beside_its_peer():
    pytest.importorskip("scipy")
    from rlroute.experiments.bench.envs import CONTENDERS, COPIES, PEER, bench_envs, speed_text

    speeds = list(bench_envs(rounds=2, seconds=0.005))
    assert [(s.name, s.copies) for s in speeds] == [(name, copies) for copies in COPIES for name in CONTENDERS]
    assert all(s.ratio["mean"] == 1.0 for s in speeds if s.name == PEER) and all(s.steps_per_second > 0 for s in speeds)
    assert "TokenBandit-v0   n=64 " in speed_text(speeds[4])


def test_the_hard_bandit_leaves_room_between_the_frequent_expert_and_bayes():
    env = gymnasium.make("rlroute.envs:rlroute/TokenBanditHard-v0")
    ladder = env.unwrapped.world.config.clusters.ladder()
    score = {name: (ladder["uniform"] - loss) / (ladder["uniform"] - ladder["oracle"]) for name, loss in ladder.items()}
    assert env.action_space.n == 64 and env.observation_space.shape == (64,)
    assert score["fixed"] == pytest.approx(0.28, abs=0.01) and score["bayes"] == pytest.approx(0.89, abs=0.01)
    assert gymnasium.make("rlroute.envs:rlroute/TokenBanditHard-v0", experts=8).action_space.n == 8
