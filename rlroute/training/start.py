"""Initial weights from another run's checkpoint: found, checked before any work, and put into a model.

Whatever the source holds besides its routers must have its place in the model; what the model has and the source has
not is initialised from its key, as in a run that starts from no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlroute.config import RunConfig, StartConfig
from rlroute.errors import ConfigError
from rlroute.model import Transformer
from rlroute.model.accounting import is_expert, is_router
from rlroute.reading import read_described, refuse_link
from rlroute.training.checkpoint import read_weights
from rlroute.training.data import Corpus
from rlroute.training.group import ALONE, Group
from rlroute.training.manifest import folder_name, own_checkpoints, read_manifest
from rlroute.training.prepare import meta_model

SAME = ("num_heads", "num_kv_heads", "head_width", "activation", "rope_base")
"""The fields of ``model`` that change what the same weights compute, and that no shape tells."""
State = Mapping[str, Tensor]


def start_of(folder: Path, step: int | None = None, **choices: Any) -> StartConfig:
    """Return the start from a checkpoint in a run's folder.

    Args:
        folder: the run's, which is called as its id.
        step: after which the checkpoint was written; the newest by default.
        choices: the other fields of the start.

    Raises:
        ConfigError: there is no such checkpoint.
        CheckpointError: it has no sound manifest.
    """
    refuse_link(folder)
    found = own_checkpoints(folder)
    if not found:
        raise ConfigError(f"run {folder.name}: no checkpoint in {folder}")
    step = max(found) if step is None else step
    if step not in found:
        steps = ", ".join(map(str, found))
        raise ConfigError(
            f"run {folder.name}: no checkpoint of step {step} in {folder}, legal are {steps}; --keep all keeps them all"
        )
    sha256 = read_manifest(found[step], folder.name).weights_sha256
    return StartConfig(run=folder.name, step=step, sha256=sha256, **choices)


def check_start(config: RunConfig, corpus: Corpus, store: Path) -> list[str]:
    """Find out whether a run can start from what its configuration says, and return what its model has from keys.

    Args:
        config: of a run that starts from another.
        corpus: its corpus.
        store: the folder in which the other's folder lies.

    Raises:
        ConfigError: there is no such source, or it does not fit the model; the message names the field or parameter.
        CheckpointError: it is damaged, or has changed.
    """
    whole = meta_model(config, corpus).state_dict()
    return [name for name in whole if name not in _values(config, corpus, store, whole)]


@torch.no_grad()
def take_start(
    model: Transformer, config: RunConfig, corpus: Corpus, seed: int, store: Path, group: Group = ALONE
) -> None:
    """Put the weights that a run starts from into its model, which is at those that its seed gives.

    Args:
        model, config, corpus, seed: the run's.
        store: the folder in which the source's folder lies.
        group: the processes that train together, each of which holds some experts.

    Raises:
        As :func:`check_start`.
    """
    whole = meta_model(config, corpus, seed).state_dict()
    values = _values(config, corpus, store, whole)
    for name, own in model.state_dict().items():
        if name in values:
            held = group.placement.held(len(values[name])) if is_expert(name) else range(0)
            own.copy_(values[name][held.start : held.stop] if held else values[name])


def _values(config: RunConfig, corpus: Corpus, store: Path, whole: State) -> dict[str, Tensor]:
    """Return what of a model's whole state the source gives, by name; ``whole`` has the shapes of all of it."""
    start = config.start
    assert start is not None
    folder = store / start.run
    if not folder.is_dir():
        raise ConfigError(f"start.run = {start.run!r}: no such run in {store}, where the run that starts from it lies")
    _refuse_other(config, corpus, folder)
    source = read_weights(folder / folder_name(start.step), start.run, start.sha256)
    return placed(source, whole, start)


def placed(source: State, whole: State, start: StartConfig) -> dict[str, Tensor]:
    """Return what of a model's state a source gives, by name.

    Args:
        source: its state.
        whole: that of the model, whose shapes alone are looked at.
        start: what is wanted of it.

    Raises:
        ConfigError: something of the source has no place in the model, or another shape there.
    """
    taken = {name: value for name, value in source.items() if start.router == "kept" or not is_router(name)}
    lost = [name for name in taken if name not in whole and not is_router(name)]
    if lost:
        raise ConfigError(f"start.run = {start.run!r}: its {lost[0]} has no place in this model")
    found = {name: taken[name] for name in whole if name in taken}
    for name in found:
        if taken[name].shape != whole[name].shape:
            had, wanted = tuple(taken[name].shape), tuple(whole[name].shape)
            way_out = "; start.router = 'fresh' leaves it out" if is_router(name) else ""
            raise ConfigError(f"start.run = {start.run!r}: its {name} is of shape {had}, here {wanted}{way_out}")
    return found


def _refuse_other(config: RunConfig, corpus: Corpus, folder: Path) -> None:
    """Refuse a source in which the same weights compute something else: another tokenizer, or other heads, say.

    Raises:
        ConfigError: naming the field, what it was and is.
        StoreError: its record cannot be read.
    """
    described = read_described(folder)
    theirs, mine = described["config"]["model"], config.to_dict()["model"]
    for name in SAME:
        if name in theirs and theirs[name] != mine[name]:
            raise ConfigError(
                f"model.{name} = {mine[name]!r}: start.run = {folder.name!r} was trained with {theirs[name]!r}"
            )
    then, now = described.get("made_from", {}).get("tokenizer"), corpus.provenance["tokenizer_sha256"]
    if then != now:
        mine, other = config.data.tokenizer, described["config"]["data"].get("tokenizer")
        raise ConfigError(f"data.tokenizer = {mine!r}: start.run = {folder.name!r} was trained with another, {other!r}")
