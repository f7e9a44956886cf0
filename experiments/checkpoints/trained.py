"""A trained run's model, as its checkpoint has it."""

from __future__ import annotations

from pathlib import Path

from rlroute.config import RunConfig
from rlroute.errors import CheckpointError, StoreError
from rlroute.model import Transformer
from rlroute.provenance import made_from
from rlroute.records import RunFolder
from rlroute.registry import run_config
from rlroute.schema import RunRecord
from rlroute.training.checkpoint import load_weights
from rlroute.training.data import Corpus, load_corpus
from rlroute.training.prepare import build_model, refuse_changed


def trained_model(record: RunRecord, store: Path) -> tuple[RunConfig, Corpus, Transformer]:
    """Return a run's configuration, its corpus, and its model with the weights that it ended with.

    Args:
        record: the run.
        store: the run store that holds its checkpoint.

    Raises:
        ConfigError: it was made from other code or data.
        StoreError: its checkpoint is not there.
        CheckpointError, DataError: its checkpoint or its corpus cannot be read.
    """
    config, seed = run_config(record.config["config"]), record.config["seed"]
    corpus = load_corpus(config.data.spec, config.data.tokenizer)
    refuse_changed(RunFolder(store, config, seed), made_from(config, corpus.provenance))
    model = build_model(config, corpus, seed)
    step, ended = load_weights(store / record.id, model, record.id), record.summary["steps"]
    if step is None:
        raise StoreError(f"{store / record.id} holds no checkpoint")
    if step != ended and record.summary["status"] == "finished":
        raise CheckpointError(f"{store / record.id} holds weights of step {step}: the run ended at step {ended}")
    return config, corpus, model
