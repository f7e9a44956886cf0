"""A dense run as the start of a mixture: which mixture that is, and what it is worth before its first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlroute.config import DENSE, DataConfig, ModelConfig, RunConfig
from rlroute.errors import ConfigError
from rlroute.model import Transformer
from rlroute.reading import read_described
from rlroute.registry import run_config
from rlroute.training.checkpoint import load_weights
from rlroute.training.data import Corpus, corpus_of
from rlroute.training.evaluate import evaluate
from rlroute.training.loop import DTYPES
from rlroute.training.prepare import build_model, validation_batches
from rlroute.training.start import take_start
from rlroute.training.step import Device


def mixture_of(folder: Path, experts: int, k: int, pieces: int) -> tuple[DataConfig, ModelConfig]:
    """Return the data of a dense run, and the model whose experts are its MLPs or pieces of them.

    Args:
        folder: the run's.
        experts: of each layer that a mixture of the run's model has experts in.
        k: of them a token.
        pieces: into which an MLP is cut.

    Raises:
        ConfigError: the run is not dense, or its MLP cannot be cut so.
        StoreError: it cannot be read.
    """
    dense = _dense(folder)
    width, other = dense.model.active_width, dense.model.d_dense
    if width % pieces:
        raise ConfigError(f"--pieces {pieces}: must divide the width of the MLPs of run {folder.name}, {width}")
    some_dense = len(dense.model.moe_layers) < dense.model.num_layers
    rest, d_expert = (other or width) if some_dense else None, width // pieces
    model = replace(dense.model, num_experts=experts, k=k, d_expert=d_expert, num_shared_experts=0, d_dense=rest)
    return dense.data, model


def at_start(config: RunConfig, seed: int, store: Path) -> tuple[float, float]:
    """Return the validation loss in bits per byte of the dense model that a mixture starts from, and of the mixture
    before its first step: greedy, over the mixture's validation tokens.
    """
    assert config.start is not None
    corpus, folder = corpus_of(config.data), store / config.start.run
    source = replace(_dense(folder), data=config.data, train=config.train)
    dense, mixture = (build_model(each, corpus, seed) for each in (source, config))
    load_weights(folder, dense, folder.name, config.start.step)
    take_start(mixture, config, corpus, seed, store)
    return _bits(dense, config, corpus, seed), _bits(mixture, config, corpus, seed)


def _dense(folder: Path) -> RunConfig:
    described = read_described(folder)
    if described["router"] != DENSE:
        raise ConfigError(f"run {folder.name} is of router {described['router']}: want a dense one")
    return run_config(described["config"])


def _bits(model: Transformer, config: RunConfig, corpus: Corpus, seed: int) -> float:
    device = Device(config.train.device, DTYPES[config.train.dtype])
    batches, begins = validation_batches(config, corpus), {"seed": seed, "step": 0, "progress": 0.0}
    row = evaluate(model, batches, corpus.token_bytes_V, device, **begins, final=False)  # type: ignore[arg-type]
    return float(row["bits_per_byte"])
