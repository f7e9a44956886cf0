"""What is to be trained, and how it is launched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rlroute.config import RunConfig
from rlroute.errors import ConfigError
from rlroute.execution import Keep
from rlroute.limits import Between, check_fields, checked_seed
from rlroute.schema import Asked
from rlroute.sink import Mode

Launcher = Literal["auto", "ray", "local"]
Processes = Annotated[int, Between(1, 2**14)]


@dataclass(frozen=True)
class Search:
    """Successive halving (ASHA, Li et al. 2018, arXiv 1810.05934): trials that lag are stopped early. For tuning alone:
    which ones are stopped depends on the order in which they arrive.

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
    asked: Asked | None = None
    """With what it is asked for, likewise: see :func:`together`."""
    label: str = ""
    """What it is called while it runs; the router's name if nothing is said."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", checked_seed(self.seed))

    @property
    def id(self) -> str:
        """The run's id."""
        return self.config.run_id(self.seed)

    @property
    def entry(self) -> str:
        """The run's id without its seed."""
        return self.id.rpartition("-s")[0]


def together(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs of every entry with every seed, each of which says of the others."""
    entries, seeds = dict.fromkeys(job.entry for job in jobs), dict.fromkeys(job.seed for job in jobs)
    return [replace(job, asked={"entries": list(entries), "seeds": list(seeds)}) for job in jobs]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where runs are stored, and where and how they are started."""

    store: Path = Path("runs")
    """The run store's folder."""
    launcher: Launcher = "auto"
    """ray: Tune trials; local: one after the other in this process; auto: ray for more than one run or worker."""
    concurrency: Processes | None = None
    """Trials at a time under ray; none: as many as there is room for."""
    address: str | None = None
    """A running Ray cluster (host:port, or auto); none, or local: a Ray of our own on this machine."""
    cpus: Annotated[float, Between(1e-4, 1e6)] = 1.0
    """Cores of a worker."""
    gpus: Annotated[float, Between(0, 1e6)] = 0.0
    """GPUs of a worker; a fraction shares one."""
    workers: Processes = 1
    """Processes that train one run together."""
    expert_parallel: Processes = 1
    """Shards into which they cut the experts."""
    exchange_chunks: Annotated[int, Between(0, 2**14)] = 1
    """Parts in which rows travel between shards; one is computed while the next is on its way. 0: nothing is computed
    meanwhile.
    """
    retries: Annotated[int, Between(0, 1000)] = 2
    """How often a run is started again whose process was lost or hung."""
    patience: Annotated[float, Between(1e-3, 1e5)] = 10.0
    """Minutes without a step after which a run counts as hung; the first step has ten if that is more."""
    wandb: Mode = "off"
    """Log every run to Weights & Biases as well: offline, for `wandb sync`, or online; it never harms a run."""
    keep: Keep = "weights"
    """What of a run's checkpoints stays once it has ended: the last one's weights; its optimizer's state as well; the
    weights of all, by which `rlroute inspect` shows how routes settle.
    """

    @property
    def cluster(self) -> str | None:
        """The cluster that is joined, None for a Ray of our own."""
        return None if self.address == "local" else self.address

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal, or does not go with another.
        """
        check_fields(self, None)
        if self.cluster not in (None, "auto") and not re.fullmatch(r"[^/]+:[0-9]{1,5}", self.cluster):
            raise ConfigError(f"--address {self.address}: legal are HOST:PORT, auto and local")
        if self.exchange_chunks != 1 and self.expert_parallel == 1:
            raise ConfigError(f"--exchange-chunks {self.exchange_chunks}: without --expert-parallel no rows travel")
        if self.gpus % 1 and self.workers > 1:
            raise ConfigError(
                f"--gpus {self.gpus} with --workers {self.workers}: workers of one run cannot share a GPU"
            )
        if self.launcher == "local":
            for name in ("workers", "address", "concurrency", "cpus", "gpus", "patience", "retries"):
                if (value := getattr(self, name)) != getattr(Launch(), name) and (name, value) != ("retries", 0):
                    raise ConfigError(f"--launcher local trains in this process: --{name} {value} wants --launcher ray")

    def uses_ray(self, jobs: int) -> bool:
        """Whether so many jobs go through Ray."""
        several = jobs > 1 or self.workers > 1 or self.address is not None
        return self.launcher == "ray" or (self.launcher == "auto" and several)
