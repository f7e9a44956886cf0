"""The code and the data at hand, as far as several runs need them: read and computed once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from rlroute.commit import core_sha256_at
from rlroute.config import DataConfig, RunConfig
from rlroute.errors import ConfigError
from rlroute.model import Transformer
from rlroute.provenance import made_from
from rlroute.schema import MadeFrom
from rlroute.training.batches import Batch, batch_chain
from rlroute.training.data import Corpus, corpus_of
from rlroute.training.prepare import build_model, cut, training_batches, validation_batches
from rlroute.training.start import take_start


class AtHand:
    """What is computed from a run's configuration and seed alone, and from the runs that runs start from.

    Args:
        sources: the store in which these lie.
    """

    def __init__(self, sources: Path | None = None) -> None:
        self.sources = sources
        self.corpus = cache(self._corpus)
        self.made_from = cache(self._made_from)
        self.core_at = cache(core_sha256_at)
        self._chains: dict[tuple[DataConfig, int, int], tuple[Iterator[str], list[str]]] = {}

    def _corpus(self, data: DataConfig) -> Corpus:
        return corpus_of(data)

    def _made_from(self, config: RunConfig) -> MadeFrom:
        return made_from(config, self.corpus(config.data).provenance)

    def model(self, config: RunConfig, seed: int) -> Transformer:
        """Return a run's model at its initial weights, on the CPU.

        Raises:
            ConfigError, CheckpointError: those of another run, which are not in ``sources``, or are not what they were.
        """
        here, corpus = (
            replace(config, train=replace(config.train, device="cpu", kernel="auto")),
            self.corpus(config.data),
        )
        model = build_model(here, corpus, seed)
        if config.start is not None:
            if self.sources is None:
                raise ConfigError(f"start.run = {config.start.run!r}: want --sources STORE, in which that run lies")
            take_start(model, here, corpus, seed, self.sources)
        return model

    def validation(self, config: RunConfig) -> Sequence[Batch]:
        """Return a run's validation batches."""
        return validation_batches(config, self.corpus(config.data))

    def bits_per_nat(self, config: RunConfig, part: Literal["valid", "train"]) -> float:
        """Return the bits per byte of a loss of one nat per token over the tokens that a run evaluates."""
        corpus = self.corpus(config.data)
        batches = validation_batches(config, corpus) if part == "valid" else training_batches(config, corpus)
        tokens = sum(batch.targets_BS.size for batch in batches)
        text = math.fsum(float(np.sum(corpus.token_bytes_V[batch.targets_BS])) for batch in batches)
        return tokens / math.log(2) / text if batches else math.nan

    def _most_steps(self, config: RunConfig) -> int:
        """Return the steps that no run goes beyond: under budget flops, those of which the budget pays for the
        unembedding alone: three forwards of it each, or one where it may be frozen.
        """
        train = config.train
        if train.budget != "flops":
            return train.steps
        assert train.budget_amount is not None
        each = (6 if train.parts == "all" else 2) * config.model.d_model * self.corpus(config.data).vocab_size
        return int(train.budget_amount / (each * train.batch_size * config.data.seq_len)) + 1

    def chain(self, config: RunConfig, seed: int, steps: int) -> str:
        """Return the hash chain over the batches of so many steps; runs that see the same batches share it."""
        steps = min(steps, self._most_steps(config))  # no run has more, whatever its record says
        if steps < 1:
            return ""
        key = (config.data, seed, config.train.batch_size)
        if key not in self._chains:
            self._chains[key] = batch_chain(self.corpus(config.data), seed, **cut(config)), []
        links, known = self._chains[key]
        while len(known) < steps:
            known.append(next(links))
        return known[steps - 1]
