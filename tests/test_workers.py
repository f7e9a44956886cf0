"""What Ray adds to expert parallelism: workers that are placed, lost, and started anew, without a figure changing."""

import contextlib
import os
import signal
import threading
import uuid
from pathlib import Path

import pytest

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError, DataError
from rlroute.experiments.bench import victims
from rlroute.experiments.launch import ray_session
from rlroute.experiments.launch.jobs import Launch
from rlroute.experiments.recipes.entries import build_entry
from rlroute.parallel.workers import LostWorkersError, interface_of, train_group
from rlroute.training import loop
from tests.commands import TINY, start
from tests.conftest import HANG, until
from tests.runs import figures

pytestmark = pytest.mark.processes

MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, num_experts=8, k=2, d_expert=8)


def config_of(spec="synth:documents=64,length=64", **train):
    data = DataConfig(spec=spec, seq_len=16, eval_tokens=128)
    parts = {"batch_size": 8, "micro_batches": 2, "warmup_steps": 2, "dtype": "float64", "eval_every": 10}
    return build_entry(
        "reinforce", data, MODEL, TrainConfig(**parts | {"log_every": 10, "checkpoint_every": 10} | train)
    )


MARK = uuid.uuid4().hex


@pytest.fixture(scope="module", autouse=True)
def session():
    other = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "of-another-cluster"}
    os.environ.update(other, RLROUTE_TEST_MARK=MARK)  # the mark is handed down to all of this session's processes
    with ray_session.session(Launch()):
        assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_AUTH_TOKEN"] not in other.values()
        yield
    assert {name: os.environ.pop(name) for name in other} == other
    del os.environ["RLROUTE_TEST_MARK"]


def workers():
    """Return the process ids of this session's workers."""
    found = []
    for pid in victims.marked(MARK):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Worker"):
                found.append(pid)
    return sorted(found)


def grouped(store, config, **options):
    return train_group(config, 0, store, workers=2, expert_parallel=2, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    store, config = tmp_path_factory.mktemp("undisturbed"), config_of(steps=60)
    grouped(store, config)
    return figures(store / config.run_id(0))


def test_workers_leave_the_record_of_one_process(undisturbed, tmp_path):
    config = config_of(steps=60)
    loop.train(config, 0, tmp_path)
    alone = figures(tmp_path / config.run_id(0))
    pairs = list(zip(alone["metrics"], undisturbed["metrics"], strict=True))
    assert all(a["kind"] == b["kind"] and a["step"] == b["step"] and a.get("chain") == b.get("chain") for a, b in pairs)
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 1e-10
    assert alone["loads"] == undisturbed["loads"]


def strike(blow, store, *victims):
    """Send a signal to a worker as soon as a file is there, in each of the groups to come; return a list of those
    struck by now.

    Args:
        blow: the signal.
        store: of the group's run.
        victims: for each group which of its workers, and the file's pattern; a checkpoint is one that is not there yet.
    """
    struck, known = [], set()
    until(lambda: not workers())  # of the test before

    def two_new():
        return len(found := sorted(set(workers()) - known)) == 2 and found

    def wait(which, moment):
        pids = until(two_new)
        known.update(pids)
        old = set(store.glob("*/*checkpoint-*"))
        until(lambda: set(store.glob(f"*/{moment}")) - old, 0.001)
        os.kill(pids[which], blow)
        struck.append(pids[which])

    threading.Thread(target=lambda: [wait(*victim) for victim in victims], daemon=True).start()
    return struck


@pytest.mark.parametrize("blow", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", ["metrics.jsonl", pytest.param("*checkpoint-*", marks=pytest.mark.slow)])
def test_a_worker_killed_in_a_step_or_in_a_checkpoint_changes_no_figure(moment, which, blow, undisturbed, tmp_path):
    """A checkpoint is most often not whole by then, and at the latest some steps old."""
    config = config_of(steps=60)
    killed = strike(blow, tmp_path, (which, moment))
    grouped(tmp_path, config)
    assert killed
    assert figures(tmp_path / config.run_id(0)) == undisturbed
    assert not list(tmp_path.glob("*/.checkpoint-*"))


@pytest.mark.slow
def test_a_stopped_worker_is_given_up(undisturbed, tmp_path):
    config = config_of(steps=60)
    stopped = strike(signal.SIGSTOP, tmp_path, (1, "checkpoint-*"))
    grouped(tmp_path, config, timeout=30.0)
    assert stopped and figures(tmp_path / config.run_id(0)) == undisturbed


def test_an_error_of_the_training_is_raised_at_once_and_no_process_stays(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        grouped(tmp_path, config_of(spec="file:nowhere/*.txt"))
    until(lambda: not workers())


@pytest.mark.slow
def test_workers_that_are_lost_again_and_again_are_given_up_and_the_run_goes_on_from_its_checkpoint(
    undisturbed, tmp_path
):
    """The first is killed in a step before any checkpoint, the second one in or after the first checkpoint that it
    makes.
    """
    config = config_of(steps=60)
    killed = strike(signal.SIGKILL, tmp_path, (0, "metrics.jsonl"), (1, "*checkpoint-*"))
    with pytest.raises(LostWorkersError, match="lost 2 times"):
        grouped(tmp_path, config, retries=1)
    grouped(tmp_path, config)
    assert len(killed) == 2 and figures(tmp_path / config.run_id(0)) == undisturbed
    assert not list(tmp_path.glob("*/.checkpoint-*"))


@pytest.mark.parametrize(("options", "message"), [
    ({"workers": 3, "expert_parallel": 2}, "3 workers with expert parallelism 2"),
    ({"workers": 4, "expert_parallel": 2}, "micro_batches = 2: must be a multiple of the 4 workers"),
])  # fmt: skip
def test_a_group_that_cannot_be_is_refused_before_it_starts(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_group(config_of(), 0, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_group_that_finds_no_place_says_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr("rlroute.parallel.workers.PLACEMENT_SECONDS", 1)
    with pytest.raises(LostWorkersError, match="2 workers of 64 CPUs and 0 GPUs found no place"):
        grouped(tmp_path, config_of(), cpus=64)


def test_a_ray_of_our_own_has_a_loopback_address_alone():
    import ray

    assert ray.util.get_node_ip_address() == "127.0.0.2"


def test_what_a_ray_of_our_own_writes_is_for_nobody_else():
    (folder,) = Path(ray_session.temporary_folder()).glob(f"{ray_session.SCRATCH}{os.getpid()}-*")
    assert folder.stat().st_mode & 0o777 == 0o700 and any((folder / "ray").iterdir())


def test_the_interface_is_that_of_the_address():
    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == "lo"
    with pytest.raises(LostWorkersError, match=r"203\.0\.113\.9"):
        interface_of("203.0.113.9")


def test_a_run_that_no_node_could_hold_is_refused():
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]
    ray_session._require_room(nodes, Launch(cpus=4))
    ray_session._require_room(nodes, Launch(workers=8, cpus=1))
    ray_session._require_room(nodes, Launch(gpus=0.1))
    for how in (Launch(cpus=5), Launch(workers=3, cpus=3), Launch(workers=2, gpus=1)):
        with pytest.raises(ConfigError, match="each on one node: there are nodes of 4 CPUs, 1 GPUs; 4 CPUs, 0 GPUs"):
            ray_session._require_room(nodes, how)


@pytest.mark.slow
@pytest.mark.parametrize(("token", "said"), [(None, "token"), ("0" * 64, "")])
def test_a_cluster_that_wants_another_token_costs_one_line(token, said, tmp_path, monkeypatch):
    import ray

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    address = ray.get_runtime_context().gcs_address
    process = start(tmp_path, "compare", "hash", "switch", *TINY, "--address", address)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 2 and "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith(f"error: --address {address}: ") and said in line
    assert not list(tmp_path.glob("runs/*/failed.json")) and not (tmp_path / ".ray").exists()
