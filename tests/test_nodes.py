"""Two Ray nodes on one machine form one expert-parallel group: as two raylets, and in two network namespaces."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlroute.experiments.launch import ray_session
from rlroute.reading import read_runs
from tests import ROOT
from tests.commands import TINY
from tests.conftest import HANG, until
from tests.runs import figures
from tests.test_workers import config_of, grouped

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture
def two_nodes():
    """Two nodes of one core beside a head without any, so that a group of two has to span both."""
    ray_session.require()
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="rr") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_TOKEN", ray_session.TOKEN)  # Ray reads it once in a process
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster, nodes
        ray.shutdown()
        cluster.shutdown()


def test_a_group_spans_two_nodes_and_outlives_one(two_nodes, tmp_path):
    cluster, nodes = two_nodes
    config, store = config_of(steps=60), tmp_path / "lost"
    grouped(tmp_path / "calm", config)
    trainer = ThreadPoolExecutor(1).submit(grouped, store, config)
    until(lambda: any(store.glob("*/checkpoint-*")) or trainer.done())
    cluster.remove_node(nodes[1], allow_graceful=False)
    cluster.add_node(num_cpus=1)
    assert trainer.result(timeout=HANG)["status"] == "finished"
    assert figures(store / config.run_id(0)) == figures(tmp_path / "calm" / config.run_id(0))


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them, and a Ray node of one core in each; yield how to run something
    in the first.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    mark = uuid.uuid4().hex[:6]
    names, ends, addresses = [f"rr{mark}{x}" for x in "ab"], [f"v{mark}{x}" for x in "ab"], ["10.213.7.1", "10.213.7.2"]
    ip = ["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]
    if subprocess.run(ip, capture_output=True).returncode:
        pytest.skip("no virtual network devices here")
    with tempfile.TemporaryDirectory(prefix="rr") as folder:
        settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0" * 64,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        environment = os.environ | ray_session.RAY_ENVIRONMENT | settings

        def run(name, *command, **options):
            inside = ["ip", "netns", "exec", name, *command]
            return subprocess.run(inside, env=environment, capture_output=True, text=True, **options)

        try:
            for name, end, address in zip(names, ends, addresses, strict=True):
                subprocess.run(["ip", "netns", "add", name], check=True)
                subprocess.run(["ip", "link", "set", end, "netns", name], check=True)
                for line in (f"addr add {address}/24 dev {end}", f"link set {end} up", "link set lo up"):
                    run(name, "ip", *line.split(), check=True)
            ray = (sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--num-cpus=1")
            here = (f"--node-ip-address={addresses[0]}", f"--temp-dir={folder}/a", "--include-dashboard=false")
            run(names[0], *ray, "--head", "--port=6399", *here, check=True, timeout=HANG)
            run(
                names[1],
                *ray,
                f"--address={addresses[0]}:6399",
                f"--node-ip-address={addresses[1]}",
                check=True,
                timeout=HANG,
            )
            yield lambda *command: run(names[0], *command, timeout=HANG), f"{addresses[0]}:6399"
        finally:
            for name in names:
                pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
                for pid in map(int, pids):
                    os.kill(pid, signal.SIGKILL)
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_a_group_spans_two_hosts(two_hosts, tmp_path):
    run, address = two_hosts
    command = (sys.executable, "-m", "rlroute", "train", "switch", *TINY, "--train.micro-batches", "2")
    together = ("--workers", "2", "--expert-parallel", "2", "--address", address)
    done = run(*command, *together, "--store", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert run(*command, "--store", str(tmp_path / "one")).returncode == 0
    (two,), (one,) = (read_runs(tmp_path / name) for name in ("two", "one"))
    assert two.environment["workers"] == 2
    assert abs(two.summary["final"]["loss"] - one.summary["final"]["loss"]) < 1e-4
