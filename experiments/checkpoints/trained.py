"""Trained runs, with the weights of their checkpoints in a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlroute.config import RunConfig
from rlroute.errors import CheckpointError, ConfigError, StoreError
from rlroute.model import Transformer
from rlroute.provenance import made_from
from rlroute.records import RunFolder
from rlroute.registry import run_config
from rlroute.schema import RunRecord
from rlroute.training.batches import Batch, eval_batches
from rlroute.training.checkpoint import load_weights
from rlroute.training.data import Corpus, corpus_of
from rlroute.training.loop import DTYPES
from rlroute.training.manifest import own_checkpoints
from rlroute.training.prepare import build_model, refuse_changed
from rlroute.training.start import take_start
from rlroute.training.step import Device


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """An ended run and what it was trained on; its models are built when they are asked for.

    Attributes:
        record: the run's.
        config: its configuration.
        folder: its folder, which holds its checkpoints.
        corpus: what it was trained on.
    """

    record: RunRecord
    config: RunConfig
    folder: Path
    corpus: Corpus

    @property
    def id(self) -> str:
        """The run's id."""
        return self.record.id

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.record.config["seed"]

    @property
    def device(self) -> Device:
        """Where and in what precision it was trained."""
        return Device(self.config.train.device, DTYPES[self.config.train.dtype])

    @property
    def last_step(self) -> int:
        """The step at which it ended."""
        return self.record.summary["steps"]

    @property
    def steps(self) -> list[int]:
        """The steps of its checkpoints, first to last."""
        return list(own_checkpoints(self.folder))

    @cached_property
    def model(self) -> Transformer:
        """The model that it ended with.

        Raises:
            StoreError: there is no checkpoint.
            CheckpointError: it cannot be read, or is of an earlier step.
        """
        model = self._built()
        step = load_weights(self.folder, model, self.id)
        if step is None:
            raise StoreError(f"{self.folder} holds no checkpoint")
        if step != self.last_step and self.record.summary["status"] == "finished":
            raise CheckpointError(f"{self.folder} holds weights of step {step}: the run ended at step {self.last_step}")
        return model

    def initial(self) -> Transformer:
        """Return a model at the run's initial weights.

        Raises:
            ConfigError, CheckpointError: those of another run, which is gone or has changed.
        """
        model = self._built()
        if self.config.start is not None:
            take_start(model, self.config, self.corpus, self.seed, self.folder.parent)
        return model

    def _built(self) -> Transformer:
        return build_model(self.config, self.corpus, self.seed)

    def at(self, step: int) -> Transformer:
        """Return the model of a checkpoint.

        Raises:
            StoreError: there is none of this step.
            CheckpointError: it cannot be read.
        """
        model = self._built()
        if load_weights(self.folder, model, self.id, step) is None:
            raise StoreError(f"{self.folder} holds no checkpoint of step {step}: there are {self.steps}")
        return model

    def batches(self, tokens: int, corpus: Corpus | None = None) -> list[Batch]:
        """Return validation windows in batches of a micro-batch's size, as the run was evaluated on.

        Args:
            tokens: at least so many.
            corpus: in place of the run's own.

        Raises:
            DataError: there are fewer.
        """
        size = self.config.train.batch_size // self.config.train.micro_batches
        return eval_batches(corpus or self.corpus, num_tokens=tokens, batch_size=size, seq_len=self.config.data.seq_len)


def open_run(record: RunRecord, store: Path) -> TrainedRun:
    """Return a run whose model can be built again.

    Args:
        record: the run.
        store: the run store that holds its checkpoint.

    Raises:
        ConfigError: it was made from other code or data.
        DataError: its corpus cannot be read.
    """
    config = run_config(record.config["config"])
    corpus = corpus_of(config.data)
    refuse_changed(RunFolder(store, config, record.config["seed"]), made_from(config, corpus.provenance))
    return TrainedRun(record, config, store / record.id, corpus)


def open_routed(record: RunRecord, store: Path) -> TrainedRun:
    """Return a run of routers, as :func:`open_run` does.

    Raises:
        ConfigError: it has none.
    """
    config = run_config(record.config["config"])
    if config.router is None or not config.model.moe_layers:
        raise ConfigError(f"run {record.id} has no MoE layer: want one of a router")
    return open_run(record, store)
