"""The way to Ray: an address that leads nowhere and a token that does not fit cost one line; a caller's own Ray is used
and left as it is.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from rlroute.errors import ConfigError
from rlroute.experiments.launch import reach, supervisor
from rlroute.experiments.launch.jobs import Launch
from tests import ROOT
from tests.commands import TINY, refused, rlroute, start
from tests.conftest import HANG

COMPARE = ("compare", "hash", "switch", *TINY, "--seeds", "1")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory in which a refused command leaves nothing."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.glob("runs/*"))


@pytest.fixture
def bound(monkeypatch):
    """Let nobody wait for long."""
    for ask in (reach.unreachable, reach.deaf):
        monkeypatch.setattr(ask, "__defaults__", (0.1,))


@pytest.fixture
def silence():
    """A function that does not return until the test is over."""
    over = threading.Event()

    def wait(*given, **options):
        over.wait(HANG)
        raise TimeoutError("at last")

    yield wait
    over.set()


@pytest.fixture
def dead_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("command", ["compare", "train", "sweep"])
def test_an_address_where_nobody_listens_is_refused_before_any_work(command, here, dead_port):
    (here / "spec.toml").write_text('entries = ["hash"]\nbase.data.spec = "synth:documents=64,length=64"\n')
    given = {"compare": COMPARE, "train": ("train", "hash", *TINY), "sweep": ("sweep", "spec.toml")}[command]
    said = refused(rlroute(*given, "--address", f"127.0.0.1:{dead_port}"))
    assert f"--address 127.0.0.1:{dead_port}: nothing answers" in said and "Connection refused" in said
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_auto_goes_by_what_is_set(here, dead_port, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{dead_port}")
    assert f"nothing answers at 127.0.0.1:{dead_port}" in refused(rlroute(*COMPARE, "--address", "auto"))


@pytest.mark.parametrize("what", ["getaddrinfo", "create_connection"])
def test_a_host_that_does_not_answer_is_given_up(what, here, bound, silence, monkeypatch):
    """As a firewall that drops what it gets, and a name server that is gone."""
    monkeypatch.setattr(socket, what, silence)
    said = refused(rlroute(*COMPARE, "--address", "nowhere.invalid:6379"))
    assert "--address nowhere.invalid:6379: nothing answers" in said and "no answer in 0.1 s" in said


@pytest.mark.parametrize("address", ["", "here", "host:port", "host:", ":", "host:123456", "ray://host:1", "host:1/x"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="legal are HOST:PORT, auto and local"):
        Launch(address=address).check()


@pytest.mark.parametrize("address", [None, "local", "auto", "host:6379", "10.0.0.1:1", "[::1]:6379"])
def test_an_address_that_may_be_one_is_let_pass(address):
    Launch(address=address).check()
    assert Launch(address=address).cluster == (None if address == "local" else address)


@pytest.mark.parametrize("address", [(), ("--address", "local")])
@pytest.mark.parametrize("fault", [OSError(101, "Network is unreachable"), TimeoutError("timed out")])
def test_a_machine_that_does_not_reach_itself_is_told_so(fault, address, here, monkeypatch):
    def fail(*given, **options):
        raise fault

    monkeypatch.setattr(socket, "create_connection", fail)
    said = refused(rlroute(*COMPARE, *address))
    assert "does not reach itself at 127.0.0.2" in said and "--launcher local" in said
    assert str(fault).rpartition("] ")[2] in said


def test_a_machine_that_waits_for_itself_is_told_so(here, bound, silence, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", silence)
    assert "no answer in 0.1 s" in refused(rlroute(*COMPARE))


@pytest.mark.processes
def test_without_a_loopback_interface_ray_is_not_even_started(tmp_path):
    apart = ["unshare", "--net", "--map-root-user", sys.executable, "-m", "rlroute", *COMPARE]
    if not shutil.which("unshare") or subprocess.run([*apart[:3], "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(apart, cwd=tmp_path, env=there, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "does not reach itself at 127.0.0.2" in done.stderr


@pytest.mark.slow
@pytest.mark.processes
def test_a_cluster_that_is_not_there_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where Ray notes which cluster is there
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    process = start(tmp_path, *COMPARE, "--address", "auto")
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 2
    *begun, line = err.splitlines()
    assert line.startswith("error: --address auto: ") and all("runs" in other for other in begun)


@pytest.mark.processes
def test_something_else_that_listens_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "JOIN_SECONDS", 5.0)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said = refused(rlroute(*COMPARE, "--address", address))
    assert f"--address {address}: it has not let this process in within 5 s" in said


CALLER = """
import os, stat, sys
from pathlib import Path
import ray
if sys.argv[1] == "starts":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    kept = ray.put("what the caller has put there")

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.experiments.launch.jobs import Job, Launch
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.entries import build_entry

data = DataConfig(spec="synth:documents=64,length=64", seq_len=16, eval_tokens=128)
model = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_experts=4, d_expert=8)
before = {name: value for name, value in os.environ.items() if "RAY" in name}
records = run_all([Job(build_entry(e, data, model, TrainConfig(steps=4)), 0) for e in ("hash", "switch")], Launch())
assert {name: value for name, value in os.environ.items() if "RAY" in name} == before
print([record.summary["status"] for record in records])
if sys.argv[1] == "starts":
    print(ray.get(kept), len(ray.nodes()))
else:
    assert not ray.is_initialized()
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("does", ["starts", pytest.param("imports", marks=pytest.mark.slow)])
def test_a_callers_own_ray_is_used_and_left_alone_and_one_imported_before_is_in_nobodys_way(does, tmp_path):
    """No ``__main__`` guard: it is a script as people write it."""
    (tmp_path / "script.py").write_text(CALLER)
    there = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    there |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py", does]
    done = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    finished, *kept = done.stdout.splitlines()
    assert finished == "['finished', 'finished']"
    assert kept == (["what the caller has put there 1"] if does == "starts" else [])
    assert (tmp_path / ".ray" / "auth_token").exists() == (does == "starts")  # the caller's; ours is in no file
