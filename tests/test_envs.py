"""Every environment keeps Gymnasium's laws, and its native vector form equals the synchronous one bit for bit."""

import copy
import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest

if importlib.util.find_spec("gymnasium") is None:
    pytest.skip("needs gymnasium (extra 'envs')", allow_module_level=True)

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from rlroute.envs import IDS, drawing
from rlroute.envs.drawing import Panel, ansi_frame, rgb_frame
from rlroute.errors import ConfigError, MissingDependencyError
from tests import ROOT
from tests.conftest import HANG

SHORT = {"episode_length": 5}
MODES = pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
EACH = pytest.mark.parametrize("name", IDS)


def _script(text: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*sys.path, ROOT]))}
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _equal(a, b) -> bool:
    """Compare nested results bit for bit, dtypes included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray) and a.dtype == object:
        return a.shape == b.shape and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


def _pair(name: str, mode: AutoresetMode, copies: int, **settings):
    native = gymnasium.make_vec(f"rlroute.envs:{name}", num_envs=copies, autoreset_mode=mode, **settings)
    make = partial(gymnasium.make, f"rlroute.envs:{name}", disable_env_checker=True, **settings)
    return native, SyncVectorEnv([make] * copies, autoreset_mode=mode)


@EACH
@pytest.mark.filterwarnings("error")
def test_gymnasium_finds_no_fault(name):
    check_env(gymnasium.make(f"rlroute.envs:{name}").unwrapped)
    check_env(gymnasium.make(f"rlroute.envs:{name}", render_mode="rgb_array", **SHORT).unwrapped)


@EACH
def test_equal_seeds_play_equal_episodes(name):
    envs = [gymnasium.make(f"rlroute.envs:{name}", **SHORT) for _ in range(2)]
    for env in envs:
        env.action_space.seed(0)
    first, second = [[env.reset(seed=7)] + [env.step(env.action_space.sample()) for _ in range(5)] for env in envs]
    assert all(_equal(list_of(a), list_of(b)) for a, b in zip(first, second, strict=True))
    assert not _equal(first[0][0], envs[0].reset(seed=8)[0])


def list_of(result) -> dict:
    return dict(enumerate(result))


@EACH
@MODES
def test_vector_equals_synchronous(name, mode):
    native, sync = _pair(name, mode, 3, **SHORT)
    assert native.single_observation_space == sync.single_observation_space
    assert native.observation_space == sync.observation_space and native.action_space == sync.action_space
    assert native.metadata["autoreset_mode"] is native.autoreset_mode is mode
    native.action_space.seed(1)
    assert _equal(list_of(native.reset(seed=11)), list_of(sync.reset(seed=11)))
    for step in range(40):
        actions = native.action_space.sample()
        got, want = native.step(actions), sync.step(actions)
        assert _equal(list_of(got), list_of(want)), f"step {step}"
        if mode is AutoresetMode.DISABLED and got[3].any():
            for options in _resets(got[3], step):
                assert _equal(list_of(native.reset(options=options)), list_of(sync.reset(options=copy.copy(options))))


def _resets(ended, step):
    """Reset finished copies: one by one, all that are over, or everything."""
    if step % 3 == 0:
        return [{"reset_mask": np.arange(len(ended)) == i} for i in np.flatnonzero(ended)]
    return [{"reset_mask": ended}] if step % 3 == 1 else [None]


@EACH
@MODES
def test_copies_out_of_step_equal_synchronous(name, mode):
    native, sync = _pair(name, mode, 4, **SHORT)
    native.action_space.seed(2)
    for envs in (native, sync):
        envs.reset(seed=[5, 6, 7, 8])
    for step in range(30):
        if step in (2, 4, 11):  # copies restart in mid-episode, some with a seed of their own
            mask = np.arange(4) % (step + 1) == 1
            seed = [None, 20 + step, None, 30]
            assert _equal(
                list_of(native.reset(seed=seed, options={"reset_mask": mask})),
                list_of(sync.reset(seed=seed, options={"reset_mask": mask})),
            )
        actions = native.action_space.sample()
        got, want = native.step(actions), sync.step(actions)
        assert _equal(list_of(got), list_of(want)), f"step {step}"
        if mode is AutoresetMode.DISABLED and got[3].any():
            for envs in (native, sync):
                envs.reset(options={"reset_mask": got[3].copy()})


@EACH
def test_many_copies_equal_few(name):
    """Whole episodes of the default length in 70 copies: no batch size changes a rounding."""
    native = gymnasium.make_vec(f"rlroute.envs:{name}", num_envs=70)
    few = gymnasium.make_vec(f"rlroute.envs:{name}", num_envs=3)
    native.action_space.seed(3)
    native.reset(seed=0), few.reset(seed=0)
    for _ in range(native.world.length + 3):
        actions = native.action_space.sample()
        got, want = native.step(actions), few.step(actions[:3])
        assert all(_equal(a[:3], b) for a, b in zip(got[:4], want[:4], strict=True))
        assert _equal({key: value[:3] for key, value in got[4].items()}, want[4])


@EACH
def test_returned_arrays_are_the_callers(name):
    envs = gymnasium.make_vec(f"rlroute.envs:{name}", num_envs=2, **SHORT)
    twin = gymnasium.make_vec(f"rlroute.envs:{name}", num_envs=2, **SHORT)
    envs.action_space.seed(0)
    for result in (envs.reset(seed=0), twin.reset(seed=0)):
        result[0].fill(0)
    for _ in range(12):
        actions = envs.action_space.sample()
        got, want = envs.step(actions), twin.step(actions)
        assert _equal(list_of(got), list_of(want))
        for array in (*got[:4], *got[4].values()):
            array.fill(0)


@pytest.mark.processes
def test_registration_needs_no_import_and_loads_no_torch():
    orders = (
        "import gymnasium as gym",
        "import rlroute, gymnasium as gym",
        "import gymnasium as gym, rlroute",
        "import rlroute.envs, gymnasium as gym",
    )
    for order in orders:
        _script(
            f"import sys\n{order}\n"
            f"for name in {list(IDS)}:\n"
            "    env = gym.make(f'rlroute.envs:{name}')\n"
            "    env.reset(seed=0), env.step(env.action_space.sample())\n"
            "    gym.make_vec(f'rlroute.envs:{name}', num_envs=2).reset(seed=0)\n"
            "assert 'torch' not in sys.modules\n"
        )


@pytest.mark.processes
def test_importing_the_environments_registers_them():
    _script(f"import gymnasium as gym, rlroute.envs\nfor name in {list(IDS)}:\n    gym.make(name).reset(seed=0)\n")


@pytest.mark.processes
def test_importing_rlroute_loads_nothing_else():
    _script(
        "import sys\nfinders = list(sys.meta_path)\nimport rlroute\n"
        "assert not {'gymnasium', 'numpy', 'torch'} & set(sys.modules) and sys.meta_path == finders"
    )


@pytest.mark.processes
def test_without_gymnasium_rlroute_imports_and_says_what_is_missing():
    _script(
        "import sys\n"
        "sys.modules['gymnasium'] = None\n"
        "import rlroute\n"
        "from rlroute.errors import MissingDependencyError\n"
        "try:\n"
        "    import rlroute.envs\n"
        "except MissingDependencyError as error:\n"
        "    assert \"pip install 'gymnasium<2,>=1.1'\" in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )


def _make_bandit():
    return gymnasium.make("rlroute.envs:rlroute/TokenBandit-v0", **SHORT)


@pytest.mark.slow
@pytest.mark.processes
def test_spawned_workers_find_the_environment():
    spawned = AsyncVectorEnv([_make_bandit] * 2, context="spawn")
    sync = SyncVectorEnv([_make_bandit] * 2)
    try:
        assert _equal(list_of(spawned.reset(seed=3)), list_of(sync.reset(seed=3)))
        assert _equal(list_of(spawned.step(np.array([0, 1]))), list_of(sync.step(np.array([0, 1]))))
    finally:
        spawned.close()


@EACH
def test_pictures(name):
    frames = {}
    for mode in ("ansi", "rgb_array"):
        env = gymnasium.make(f"rlroute.envs:{name}", render_mode=mode)
        env.reset(seed=0)
        frames[mode] = env.render()
        envs = gymnasium.make_vec(f"rlroute.envs:{name}", num_envs=2, render_mode=mode)
        envs.reset(seed=0)
        both = envs.render()
        assert len(both) == 2 and np.array_equal(both[0], frames[mode])
    picture = frames["rgb_array"]
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.min() < 255
    lines = frames["ansi"].splitlines()
    assert 2 <= len(lines) <= 4 and all(line.endswith("|") for line in lines)


def test_every_panel_of_a_picture_has_its_own_words_and_a_marked_bar_its_number():
    panels = [Panel(title, np.full(40, 0.5), marked) for title in ("affinity", "queue") for marked in (-1, 7, 8)]
    pictures = [rgb_frame([panel]) for panel in panels]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    titles = [picture[: drawing.TITLE] for picture in pictures]
    assert all((a == b).all() == (i // 3 == j // 3) for i, a in enumerate(titles) for j, b in enumerate(titles))


def test_without_pillow_a_picture_is_refused_in_one_line_and_text_is_drawn(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"rgb_array.* needs the package pillow.*'ansi' does without"):
        rgb_frame([Panel("queue", np.ones(3))])
    assert ansi_frame([Panel("queue", np.ones(3))])


@EACH
def test_render_without_a_mode_warns(name):
    for env in (gymnasium.make(f"rlroute.envs:{name}").unwrapped, gymnasium.make_vec(f"rlroute.envs:{name}")):
        env.reset(seed=0)
        with pytest.warns(UserWarning, match="render_mode"):
            assert env.render() is None


@EACH
def test_bad_arguments_are_named(name):
    make, make_vec = (partial(function, f"rlroute.envs:{name}") for function in (gymnasium.make, gymnasium.make_vec))
    with pytest.raises(ConfigError, match=r"no setting 'expert'; legal are .*experts"):
        make(expert=3)
    with pytest.raises(ConfigError, match="episode_length = 0, legal are integers from 1"):
        make(episode_length=0)
    with pytest.raises(ConfigError, match="render_mode = 'human', legal are None, 'ansi', 'rgb_array'"):
        make_vec(render_mode="human")
    with pytest.raises(ConfigError, match="autoreset_mode = 'never', legal are 'NextStep', 'SameStep', 'Disabled'"):
        make_vec(autoreset_mode="never")
    with pytest.raises(ConfigError, match="num_envs = 0, legal are integers from 1"):
        make_vec(num_envs=0)


@EACH
def test_bad_steps_are_named(name):
    env = gymnasium.make(f"rlroute.envs:{name}", **SHORT, disable_env_checker=True)
    envs = gymnasium.make_vec(f"rlroute.envs:{name}", num_envs=2, autoreset_mode="Disabled", **SHORT)
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.step(envs.action_space.sample())
    env.reset(seed=0), envs.reset(seed=0)
    with pytest.raises(gymnasium.error.InvalidAction, match=r"reach from 99 to 99, legal are 0 to \d"):
        env.step(np.full(env.action_space.shape, 99))
    with pytest.raises(gymnasium.error.InvalidAction, match="want integers of"):
        envs.step(envs.action_space.sample()[:1])
    for _ in range(5):
        env.step(env.action_space.sample()), envs.step(envs.action_space.sample())
    with pytest.raises(gymnasium.error.ResetNeeded, match="over"):
        env.step(env.action_space.sample())
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"copies \[0, 1\] are over"):
        envs.step(envs.action_space.sample())
    with pytest.raises(ValueError, match="3 seeds for 2 copies"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="reset_mask"):
        envs.reset(options={"reset_mask": np.zeros(2, dtype=bool)})
