"""Run many training runs: here in sequence, or as Ray Tune trials, as many at a time as the machine or cluster has room for.

The run store is the truth. Ray is a scheduler and no more: whatever happens to it, launching the same jobs again keeps what is
finished and resumes what is not.

A run that fails by its own doing (bad input, a defect in a router, a store that cannot be written) fails at once; one whose process is
lost, or makes no step for too long, is started again from its checkpoint and at last set aside. The others are not held up by either.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlroute.config import RunConfig
from rlroute.errors import ConfigError, MissingDependencyError, RlrouteError
from rlroute.sink import Mode, take_warnings
from rlroute.watchdog import stacks, watchdog

Launcher = Literal["auto", "ray", "local"]
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
SCRATCH = "rlroute-"
LONGEST_TEMPORARY = 14  # a socket's name may have 107 characters; with Ray's part and ours 14 are left
TOKEN = secrets.token_hex(32)
"""Of the Ray sessions of this process and its children; Ray reads it once in a process."""
STOPPED = "stopped"
"""The file that marks a trial that a search has stopped early."""
WANT_OF_MEMORY = "for want of memory"


@dataclass(frozen=True)
class Search:
    """Successive halving (ASHA, Li et al. 2018, arXiv 1810.05934): trials that lag are stopped early. For tuning alone: which ones are
    stopped depends on the order in which they arrive.

    Attributes:
        steps: the most steps of a trial.
        grace: steps before any is stopped.
        reduction: one in so many goes on.
    """

    steps: int
    grace: int
    reduction: float = 3.0

    def tune_options(self) -> dict[str, Any]:
        """Return the fields of Tune's configuration."""
        from ray.tune.schedulers import ASHAScheduler

        halving = ASHAScheduler(
            time_attr="step", max_t=self.steps + 1, grace_period=self.grace, reduction_factor=self.reduction
        )
        return {"scheduler": halving, "metric": "bits_per_byte", "mode": "min"}


@dataclass(frozen=True)
class Job:
    """One run to train."""

    config: RunConfig
    seed: int
    command: str | None = None
    """The command line behind it, for the run's record."""
    label: str = ""
    """What it is called while it runs; the router's name if nothing is said."""

    @property
    def id(self) -> str:
        """The run's id."""
        return self.config.run_id(self.seed)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where runs are stored, and where and how they are started."""

    store: Path = Path("runs")
    """The run store's folder."""
    launcher: Launcher = "auto"
    """ray: Tune trials; local: one after the other in this process; auto: ray for more than one run or worker."""
    concurrency: int | None = None
    """Trials at a time under ray; none: as many as there is room for."""
    address: str | None = None
    """A running Ray cluster (host:port, or auto); none: a Ray of our own on this machine."""
    cpus: float = 1.0
    """Cores of a worker."""
    gpus: float = 0.0
    """GPUs of a worker; a fraction shares one."""
    workers: int = 1
    """Processes that train one run together."""
    expert_parallel: int = 1
    """Shards into which they cut the experts."""
    exchange_chunks: int = 1
    """Parts in which rows travel between shards; one is computed while the next is on its way. 0: nothing is computed meanwhile."""
    retries: int = 2
    """How often a run is started again that failed, or whose process was lost or hung."""
    patience: float = 10.0
    """Minutes without a step after which a run counts as hung; the first step has ten if that is more."""
    wandb: Mode = "off"
    """Log every run to Weights & Biases as well: offline, for `wandb sync`, or online; it never harms a run."""

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal, or does not go with another.
        """
        for name in ("cpus", "workers", "expert_parallel", "patience"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        for name in ("gpus", "retries", "exchange_chunks"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: legal are numbers from 0")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"--concurrency {self.concurrency}: legal are numbers from 1")
        if self.exchange_chunks != 1 and self.expert_parallel == 1:
            raise ConfigError(f"--exchange-chunks {self.exchange_chunks}: without --expert-parallel no rows travel")
        if self.gpus % 1 and self.workers > 1:
            raise ConfigError(
                f"--gpus {self.gpus} with --workers {self.workers}: workers of one run cannot share a GPU"
            )
        if self.launcher == "local" and (self.workers > 1 or self.address):
            raise ConfigError("--launcher local trains in this process: --workers and --address want --launcher ray")

    def uses_ray(self, jobs: int) -> bool:
        """Whether so many jobs go through Ray."""
        several = jobs > 1 or self.workers > 1 or self.address is not None
        return self.launcher == "ray" or (self.launcher == "auto" and several)


def launch(
    jobs: Sequence[Job],
    how: Launch,
    search: Search | None = None,
    say: Callable[[str, str], None] = lambda run, reason: None,
) -> dict[str, str]:
    """Train all jobs to their ends and return the reasons of those that failed, by run id; the others are not held up.

    Args:
        jobs: what to train; ended runs, and those that this search has stopped, cost nothing.
        how: where, and how many at a time.
        search: stops trials early, under Ray alone.
        say: told of a run that failed, as soon as it has, and why.
    """
    from rlroute.records import RunFolder  # and with it torch, which the command line's help does without

    through_ray = how.uses_ray(len(jobs))  # also for the last that is left
    jobs = [job for job in jobs if not RunFolder(how.store, job.config, job.seed).ended]
    jobs = [job for job in jobs if search is None or not (how.store / job.id / STOPPED).exists()]
    if jobs and through_ray:
        with session(how) as (tune, scratch):
            reasons = _tune(tune, jobs, how, scratch, search, say)
    else:
        reasons = {}
        for job in jobs:
            reasons[job.id] = _train(job, how)
            if reasons[job.id]:
                say(job.id, reasons[job.id])
    return {run: reason for run, reason in reasons.items() if reason}


def _train(job: Job, how: Launch, on_step: Callable[[int], None] = lambda step: None) -> str:
    """Train a job in this process, or with workers; return why it failed, or an empty string.

    What bad input or the store brings about would come again. Anything else is tried again from the last checkpoint.
    """
    for _ in range(how.retries + 1):
        try:
            _train_once(job, how, on_step)
            return ""
        except RlrouteError as error:
            return str(error)
        except Exception as error:  # a defect in one router must not take the other runs with it; its reason is printed
            reason = f"{type(error).__name__}: {error}"
    return reason


def _train_once(job: Job, how: Launch, on_step: Callable[[int], None]) -> None:
    from rlroute.training.loop import train

    if how.workers == 1:
        train(job.config, job.seed, how.store, command=job.command, on_step=on_step, wandb=how.wandb)
    else:
        from rlroute.parallel.workers import train_group

        train_group(
            job.config,
            job.seed,
            how.store,
            workers=how.workers,
            expert_parallel=how.expert_parallel,
            chunks=how.exchange_chunks,
            cpus=how.cpus,
            gpus=how.gpus,
            command=job.command,
            retries=how.retries,
            patience=60 * how.patience,
            wandb=how.wandb,
        )


def require() -> tuple[Any, Any]:
    """Return Ray and Tune, set up to be quiet and to ask every caller for its token.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise MissingDependencyError(
            "--launcher ray needs the extra 'ray' (ray[tune]); --launcher local needs none"
        ) from error
    _make_tune_survive_want_of_memory()
    return ray, tune


def _make_tune_survive_want_of_memory() -> None:
    """Let Tune take a process that Ray's memory monitor ended for a lost one.

    Ray 2.60 reports it as an ``OutOfMemoryError``, which is not the ``RayActorError`` by which Tune knows a lost process, and which Tune
    takes for a defect of its own: it ends all trials.
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

    A Ray of our own has a token that this process and its children alone know, and keeps its files in the private folder (Ray's own are
    open to all users), which is removed at the end, or by the next session if this process is killed.

    Raises:
        ConfigError: the cluster cannot be reached, or has no room for a trial.
        MissingDependencyError: Ray is not installed.
    """
    before = os.environ.copy()
    if how.address is None:  # whatever is set for another cluster
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    ray, tune = require()
    _remove_orphans()
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-", dir=_temporary_folder()))
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
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if how.address is None:
        wanted = how.cpus * how.workers * (how.concurrency or 1)
        ray.init(
            address="local",
            num_cpus=max(len(os.sched_getaffinity(0)), math.ceil(wanted)),
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            _temp_dir=str(scratch / "ray"),
            _node_ip_address="127.0.0.2",  # 127.0.0.1 is "this machine" to Ray, which then takes its address in the network
            **quiet,
        )
        return
    try:
        ray.init(address=how.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--address {how.address}: {' '.join(str(error).split())[:300]}") from error


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
            f"a run wants {how.workers} x ({how.cpus:g} CPUs, {how.gpus:g} GPUs), each on one node: there are nodes of {there}"
        )


def _temporary_folder() -> str:
    """Return where private folders lie: the usual place, or /tmp where that has too long a name for the sockets that Ray puts inside."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_TEMPORARY else "/tmp"


def _host() -> str:
    """Return what tells processes that can see each other from those of other hosts and containers; empty where nothing does."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return ""


def _remove_orphans() -> None:
    """Remove the private folders of processes of this host that were killed."""
    for folder in Path(_temporary_folder()).glob(f"{SCRATCH}[0-9]*-*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        with contextlib.suppress(OSError):
            mine = folder.stat().st_uid == os.getuid() and (folder / "host").read_text() == _host() != ""
            if mine and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(folder, ignore_errors=True)


def _tune(
    tune: Any, jobs: Sequence[Job], how: Launch, scratch: Path, search: Search | None, say: Callable[[str, str], None]
) -> dict[str, str]:
    how = replace(how, store=how.store.absolute())
    plain = [(job.config.to_dict(), job.seed, job.command) for job in jobs]

    def trial(parameters: dict[str, int]) -> None:
        from rlroute.registry import run_config  # and with it torch

        values, seed, command = plain[parameters["job"]]
        job = Job(run_config(values), seed, command)
        folder = how.store / job.id
        if how.workers > 1:  # each of them has a watchdog of its own
            reason = _train(job, how)
        else:
            try:
                with watchdog(60 * how.patience, folder) as alive:
                    reason = _train(job, how, _reporting(tune, job, folder, alive) if search else alive)
            except OSError as error:  # a full disk, or a store that cannot be written any more
                reason = f"cannot write {folder}: {error.strerror or error}"
        _give_memory_back()
        tune.report({"reason": reason, "warnings": take_warnings()} | (_score(folder) if search else {}))

    room = [{"CPU": how.cpus} | ({"GPU": how.gpus} if how.gpus else {})] * how.workers
    bundles = room if how.workers == 1 else [{}, *room]  # the process that looks after a group needs no core
    tuner = tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory(bundles)),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=how.concurrency, reuse_actors=True, **(search.tune_options() if search else {})
        ),
        run_config=tune.RunConfig(
            name="runs",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=how.retries),
            callbacks=[_listener(tune, jobs, how, say)],
        ),
    )
    reasons = {}
    for result in tuner.fit():
        job = jobs[result.config["job"]]
        reasons[job.id] = _lost(job, how, result.error) if result.error else result.metrics.get("reason", "")
        for line in () if result.error else result.metrics.get("warnings", ()):
            print(line, file=sys.stderr)
    return reasons


def _give_memory_back() -> None:
    """Return freed memory to the system: a worker trains run after run, each in a new thread, whose heap the C library would keep."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _listener(tune: Any, jobs: Sequence[Job], how: Launch, say: Callable[[str, str], None]) -> Any:
    class Listener(tune.Callback):  # type: ignore[misc]  # a class of Tune, which is imported late
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            run = jobs[trial.config["job"]].id
            if (reason := trial.last_result.get("reason")) is None:  # it did not come to its end
                (how.store / run / STOPPED).touch()
            elif reason:
                say(run, reason)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            job = jobs[trial.config["job"]]
            say(job.id, _lost(job, how, trial.get_error() or ""))

    return Listener()


def _lost(job: Job, how: Launch, error: object) -> str:
    """Say why a run has failed whose process is gone."""
    if hung := stacks(how.store / job.id):
        return f"no step in {how.patience:g} minutes, {how.retries + 1} times; where it stood is in {hung}"
    memory = f", {WANT_OF_MEMORY}" if WANT_OF_MEMORY in str(error) else ""
    return f"its process was lost {how.retries + 1} times{memory}"


def _score(folder: Path) -> dict[str, float]:
    """Return what a search goes by: the last evaluation's bits per byte, and its step."""
    from rlroute.records import read_rows

    file = folder / "metrics.jsonl"
    rows = read_rows(file, torn_ok=True) if file.exists() else []
    evaluated = [row for row in rows if row["kind"] == "eval"] or [{"bits_per_byte": math.inf, "step": 0}]
    return {name: evaluated[-1][name] for name in ("bits_per_byte", "step")}


def _reporting(tune: Any, job: Job, folder: Path, alive: Callable[[int], None]) -> Callable[[int], None]:
    every = job.config.train.eval_every

    def on_step(step: int) -> None:
        alive(step)
        if step > every and step % every == 1:  # the evaluation of the step before is on disk
            tune.report(_score(folder))

    return on_step
