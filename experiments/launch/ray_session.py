"""Ray: a session of our own on this machine, or a cluster's; quiet, private, and left as it was found."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.launch.jobs import Launch
from rlroute.extras import missing
from rlroute.machine import cores

RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path (file:GLOB, a policy's file) means what it means here
}
LOOPBACK = "127.0.0.2"
SCRATCH = "rlroute-"
LONGEST_TEMPORARY = 14  # a socket's name may have 107 characters; with Ray's part and ours 14 are left
TOKEN = secrets.token_hex(32)
"""Of the Ray sessions of this process and its children; Ray reads it once in a process."""
WANT_OF_MEMORY = "for want of memory"


class NotStartedError(Exception):
    """A Ray of our own has not started, and why."""


def require_installed() -> None:
    """Refuse to go on without Ray, without importing it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    spec = find_spec("ray")
    if spec is None or spec.origin is None:  # a folder ./ray is a package without origin
        raise missing("--launcher ray", "ray", "--launcher local does without")


def require() -> tuple[Any, Any]:
    """Return Ray and Tune, set up to be quiet and to ask every caller for its token.

    Raises:
        MissingDependencyError: they are not installed.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise missing("--launcher ray", "ray", "--launcher local does without") from error
    _make_tune_survive_want_of_memory()
    return ray, tune


def _make_tune_survive_want_of_memory() -> None:
    """Let Tune take a process that Ray's memory monitor ended for a lost one.

    Ray 2.60 reports it as an ``OutOfMemoryError``, which is not the ``RayActorError`` by which Tune knows a lost
    process, and which Tune takes for a defect of its own: it ends all trials.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    failed = RayActorManager._actor_task_failed
    if failed.__module__ == __name__:
        return

    def translate(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"{WANT_OF_MEMORY}: {exception}")
        failed(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = translate


@contextmanager
def session(how: Launch) -> Iterator[tuple[Any, Path]]:
    """Connect to Ray, and leave it; yield Tune and a private folder.

    A Ray of our own has a token that this process and its children alone know, and keeps its files in the private
    folder (Ray's own are open to all users), which is removed at the end, or by the next session if this process is
    killed.

    Raises:
        ConfigError: the cluster cannot be reached, or has no room for a trial.
        MissingDependencyError: Ray is not installed.
        NotStartedError: a Ray of our own has not started.
        StoreError: there is no place for the private folder.
    """
    before = os.environ.copy()
    if how.cluster is None:  # whatever is set for another cluster
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    ray, tune = require()
    remove_orphans()
    scratch = _private_folder()
    try:
        (scratch / "host").write_text(_host())
        _connect(ray, how, scratch)
        for name in ("ray.tune", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        _require_room([node["Resources"] for node in ray.nodes() if node["Alive"]], how)
        yield tune, scratch
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _connect(ray: Any, how: Launch, scratch: Path) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if how.cluster is None:
        wanted = how.cpus * how.workers * (how.concurrency or 1)
        options |= {
            "num_cpus": max(cores(), math.ceil(wanted)),
            "include_dashboard": False,
            "object_store_memory": 80 * 2**20,
            "_temp_dir": str(scratch / "ray"),
            # 127.0.0.1 is "this machine" to Ray, which then takes its address in the network.
            "_node_ip_address": LOOPBACK,
        }
    try:
        ray.init(address=how.cluster or "local", **options)
    except Exception as error:  # also authentication errors, which are of classes of Ray's own
        why = " ".join(str(error).split())[:300]
        if how.cluster is None:
            raise NotStartedError(why) from error
        raise ConfigError(f"--address {how.cluster}: {why}") from error


def _require_room(nodes: Sequence[dict[str, float]], how: Launch) -> None:
    """Refuse trials that the whole cluster could not hold, which would wait for ever.

    Args:
        nodes: the resources of each.
        how: what a trial wants.

    Raises:
        ConfigError: naming what is wanted and what there is.
    """
    want = {"CPU": how.cpus, "GPU": how.gpus}
    held = [min(int(node.get(name, 0.0) / each + 1e-9) for name, each in want.items() if each) for node in nodes]
    if sum(held) < how.workers:
        there = "; ".join(", ".join(f"{node.get(name, 0.0):g} {name}s" for name in want) for node in nodes)
        raise ConfigError(
            f"a run wants {how.workers} x ({how.cpus:g} CPUs, {how.gpus:g} GPUs), each on one node: there are nodes of "
            f"{there}"
        )


def _private_folder() -> Path:
    folder = temporary_folder()
    try:
        return Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-", dir=folder))
    except OSError as error:
        raise StoreError(
            f"Ray's files cannot lie in {folder}: {error.strerror}; want a TMPDIR that can be written, of at most "
            f"{LONGEST_TEMPORARY} characters, for they are sockets"
        ) from error


def temporary_folder() -> str:
    """Return where private folders lie: the usual place, or /tmp where that has too long a name for the sockets that
    Ray puts inside.

    Raises:
        StoreError: there is none.
    """
    try:
        usual = tempfile.gettempdir()
    except OSError as error:
        raise StoreError(f"no temporary folder: {error.strerror}") from error
    return usual if len(usual) <= LONGEST_TEMPORARY else "/tmp"


def _host() -> str:
    """Return what tells processes that can see each other from those of other hosts and containers; empty where nothing
    does.
    """
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return ""


def remove_orphans() -> None:
    """Remove the private folders of processes of this host that were killed."""
    for folder in Path(temporary_folder()).glob(f"{SCRATCH}[0-9]*-*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        with contextlib.suppress(OSError):
            mine = folder.stat().st_uid == os.getuid() and (folder / "host").read_text() == _host() != ""
            if mine and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(folder, ignore_errors=True)
