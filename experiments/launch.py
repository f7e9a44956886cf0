"""Run many training runs: here in sequence, or as Ray Tune trials, as many at a time as there are cores.

The run store is the truth. Ray is a scheduler and no more: whatever happens to it, launching the same jobs again keeps what is
finished and resumes what is not.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlroute.config import RunConfig
from rlroute.errors import MissingDependencyError, RlrouteError
from rlroute.sink import Mode, take_warnings

Launcher = Literal["ray", "local"]
WORKER_RETRIES = 2
"""How often a run whose worker process died is started again, from its checkpoint."""
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Job:
    """One run to train."""

    config: RunConfig
    seed: int
    command: str | None = None
    """The command line behind it, for the run's record."""
    wandb: Mode = "off"
    """Where its rows go besides the record."""

    @property
    def id(self) -> str:
        """The run's id."""
        return self.config.run_id(self.seed)


def launch(jobs: Sequence[Job], store: Path, launcher: Launcher, concurrency: int) -> dict[str, str]:
    """Train all jobs to their ends and return the reasons of those that failed, by run id; the others are not held up.

    Args:
        jobs: what to train; ended runs cost nothing.
        store: the run store's folder.
        launcher: ``local`` trains in this process, one after the other; ``ray`` as Tune trials.
        concurrency: trials at a time under ``ray``.
    """
    local = launcher == "local"
    reasons = {job.id: _train(job, store) for job in jobs} if local else _launch_ray(jobs, store, concurrency)
    return {run: reason for run, reason in reasons.items() if reason}


def _train(job: Job, store: Path) -> str:
    """Train a job; return why it failed, or an empty string."""
    from rlroute.training.loop import train

    try:
        train(job.config, job.seed, store, command=job.command, wandb=job.wandb)
    except RlrouteError as error:
        return str(error)
    except Exception as error:  # a defect in one router must not take the other runs with it; its reason is printed
        return f"{type(error).__name__}: {error}"
    return ""


def require(launcher: Launcher) -> None:
    """Refuse a launcher that is not installed.

    Raises:
        MissingDependencyError: it is ``ray``, and Ray is not there.
    """
    if launcher == "ray":
        _import_ray()


def _import_ray() -> tuple[Any, Any]:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise MissingDependencyError(
            "--launcher ray needs the extra 'ray' (ray[tune]); --launcher local needs none"
        ) from error
    return ray, tune


def _launch_ray(jobs: Sequence[Job], store: Path, concurrency: int) -> dict[str, str]:
    ray, tune = _import_ray()
    scratch = Path(tempfile.mkdtemp(prefix="rlroute-"))  # private (0700): Ray's own folders are open to all users
    ray.init(
        address="local",
        num_cpus=concurrency,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=80 * 2**20,
        _temp_dir=str(scratch / "ray"),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        return _tune(tune, jobs, store.resolve(), concurrency, scratch)
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _tune(tune: Any, jobs: Sequence[Job], store: Path, concurrency: int, scratch: Path) -> dict[str, str]:
    plain = [(job.config.to_dict(), job.seed, job.command, job.wandb) for job in jobs]

    def trial(parameters: dict[str, int]) -> None:
        values, seed, command, wandb = plain[parameters["job"]]
        reason = _train(Job(RunConfig.from_dict(values), seed, command, wandb), store)
        tune.report({"reason": reason, "warnings": take_warnings()})

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrency, reuse_actors=True),
        run_config=tune.RunConfig(
            name="runs",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
        ),
    )
    reasons = {}
    for result in tuner.fit():
        job = jobs[result.config["job"]]
        reasons[job.id] = str(result.error) if result.error else result.metrics["reason"]
        for line in () if result.error else result.metrics["warnings"]:
            print(line, file=sys.stderr)  # what workers say is not shown
    return reasons
