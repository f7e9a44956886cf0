"""The commands that come before training: ``plan`` and ``data``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlroute.config import DEFAULT_CORPUS, DataConfig
from rlroute.errors import ConfigError
from rlroute.experiments.cli.common import SHARED, Shared, recipe
from rlroute.experiments.cli.folders import make_folder
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.cli.output import show
from rlroute.limits import Count


def plan(
    entry: tyro.conf.Positional[str] = "",
    device: Literal["h100", "h200", "a100", "b200", "cpu"] | None = None,
    tuned: bool = True,
    preset: str | None = None,
    shared: Annotated[Shared, tyro.conf.arg(name="")] = SHARED,
) -> None:
    """Say what `train ENTRY` would need and take, before anything runs: parameters, memory by part, FLOPs, and the
    hours on a device.

    Args:
        entry: what would be trained; with a preset by default its own.
        device: where (default: h100 for --train.device cuda, else cpu); speed is assumed, and the page says from what.
        tuned: use the entry's tuned settings.
        preset: gpu-30m, gpu-124m, gpu-350m, or one of `rlroute presets`: the data, model and train options, but for
            those that are given; nothing is tuned.
    """
    from rlroute.experiments.bench.plan import make_plan, to_page
    from rlroute.experiments.recipes.presets import build_comparison
    from rlroute.training.data import corpus_of

    parts, own = recipe(preset, shared, tuned)
    if not (entry := entry or own):
        raise ConfigError("rlroute plan wants an ENTRY: a router (rlroute routers), or dense")
    name_broken(entry)
    (config,) = build_comparison([entry], **parts)
    corpus = corpus_of(config.data)
    where = device or ("cpu" if config.train.device == "cpu" else "h100")
    show(to_page(make_plan(config, corpus, where), " ".join(filter(None, (entry, preset)))))


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is read."""

    spec: str = DEFAULT_CORPUS
    """Corpus of text: file:GLOB, parquet:GLOB, package:NAME or stdlib."""
    tokenizer: str | None = "auto"
    """As of train: bytes, bpe, a tokenizers JSON file, or auto."""


TEXT = Text()


def data(
    what: tyro.conf.Positional[Literal["prepare"]],
    out: tyro.conf.Positional[Path],
    data: Annotated[Text, tyro.conf.arg()] = TEXT,
    shard_tokens: Count = 100_000_000,
) -> None:
    """Make shards for `--data.spec bin:...` out of local text, once: the same tokens, training and validation apart by
    document.

    Args:
        what: prepare.
        out: the folder to make; it appears whole or not at all.
        data: what is read.
        shard_tokens: tokens of one shard, at most.
    """
    from rlroute.training.write_shards import write_shards

    config = DataConfig(spec=data.spec, tokenizer=data.tokenizer)
    config.check()
    make_folder(out.absolute().parent)
    made = write_shards(out, config.spec, config.settled().tokenizer, shard_tokens)
    for note in made.notes:
        print(note, file=sys.stderr)
    tokens = f"{made.provenance['train_tokens']:,} tokens for training, {made.provenance['valid_tokens']:,} held out"
    print(f"{tokens}, in {made.shards} shards in {out}/; train with:")
    tokenizer = ["--data.tokenizer", made.tokenizer] if made.tokenizer else []
    print(shlex.join(["--data.spec", made.spec, *tokenizer]))
