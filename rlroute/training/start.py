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

from rlroute.config import ModelConfig, RunConfig, StartConfig
from rlroute.errors import ConfigError
from rlroute.mixing import MIXING
from rlroute.model import Transformer
from rlroute.model.accounting import is_expert, is_router
from rlroute.model.upcycling import DENSE_IN, DENSE_OUT, group_scores, upcycled
from rlroute.reading import read_described, refuse_link
from rlroute.training.checkpoint import read_whole
from rlroute.training.data import Corpus
from rlroute.training.group import ALONE, Group
from rlroute.training.manifest import folder_name, own_checkpoints, read_manifest
from rlroute.training.prepare import meta_model

SAME = (
    "num_heads",
    "num_kv_heads",
    "head_width",
    "activation",
    "rope_base",
    "attention_form",
    "tie_embeddings",
    *sorted(MIXING),
)
"""The fields of ``model`` that change what the same weights compute, and that no shape tells."""
MOMENTS = ("exp_avg", "exp_avg_sq")
State = Mapping[str, Tensor]
Moments = Mapping[str, Mapping[str, Tensor]]


def start_of(folder: Path, step: int | None = None, **choices: Any) -> StartConfig:
    """Return the start from a checkpoint in a run's folder.

    Args:
        folder: the run's, which is called as its id.
        step: after which the checkpoint was written; the newest by default.
        choices: the other fields of the start.

    Raises:
        ConfigError: there is no such checkpoint, or no optimizer's state that could be carried; or an illegal value.
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
    manifest, carried = read_manifest(found[step], folder.name), choices.get("optimizer") == "carried"
    if carried and not all((found[step] / name).exists() for name in manifest.files):
        raise ConfigError(
            f"run {folder.name}: no optimizer's state in {found[step]}; --keep state keeps that of the last"
        )
    start = StartConfig(run=folder.name, step=step, sha256=manifest.sha256(carried), **choices)
    start.check()
    return start


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
    start, (source, _) = _read(config, corpus, store)
    values = placed(source, whole, start)
    return [name for name in whole if name not in values]


@torch.no_grad()
def take_start(
    model: Transformer,
    config: RunConfig,
    corpus: Corpus,
    seed: int,
    store: Path,
    group: Group = ALONE,
) -> Moments:
    """Put the weights that a run starts from into its model, which is at those that its seed gives, and return the
    moments that its optimizer carries on.

    Args:
        model, config, corpus, seed: the run's.
        store: the folder in which the source's folder lies.
        group: the processes that train together, each of which holds some experts.

    Raises:
        As :func:`check_start`.
    """
    whole = meta_model(config, corpus, seed).state_dict()
    start, (source, moments) = _read(config, corpus, store)
    values = placed(source, whole, start, seed)
    for name, own in model.state_dict().items():
        if name in values:
            own.copy_(_held(name, values[name], group))
    if start.upcycle:
        group_scores(model, source)
    return _carried(moments, whole, start, group)


def _carried(moments: Moments, whole: State, start: StartConfig, group: Group) -> Moments:
    """Return moments as those of the parameters that this process of a group holds."""
    made: dict[str, dict[str, Tensor]] = {}
    for key in MOMENTS:
        by_name = placed({name: kept[key] for name, kept in moments.items()}, whole, start, weights=False)
        for name, value in by_name.items():
            made.setdefault(name, {})[key] = _held(name, value, group)
    for name, kept in made.items():
        origin = name if name in moments else name.partition("moe.")[0] + DENSE_IN
        kept["step"] = moments[origin]["step"]
    return made


def _held(name: str, value: Tensor, group: Group) -> Tensor:
    """Return of a parameter's values those that this process holds."""
    if not is_expert(name):
        return value
    held = group.placement.held(len(value))
    return value[held.start : held.stop]


def _read(config: RunConfig, corpus: Corpus, store: Path) -> tuple[StartConfig, tuple[dict[str, Tensor], Moments]]:
    """Return a run's start, and what there is to be taken of its source."""
    start = config.start
    assert start is not None
    folder = store / start.run
    if not folder.is_dir():
        raise ConfigError(f"start.run = {start.run!r}: no such run in {store}, where the run that starts from it lies")
    _refuse_other(config, corpus, folder)
    return start, read_whole(folder / folder_name(start.step), start)


def placed(
    source: State, whole: State, start: StartConfig, seed: int = 0, *, weights: bool = True
) -> dict[str, Tensor]:
    """Return what of a model's state a source gives, by name.

    Args:
        source: its state.
        whole: that of the model, whose shapes alone are looked at.
        start: what is wanted of it.
        seed: the run's.
        weights: False for an optimizer's moments of them.

    Raises:
        ConfigError: something of the source has no place in the model, or another shape there.
    """
    if start.upcycle:
        source = upcycled(source, whole, start, seed, weights=weights)
    taken = {name: value for name, value in source.items() if start.router == "kept" or not is_router(name)}
    lost = [name for name in taken if name not in whole and not is_router(name)]
    if lost:
        way_out = "; start.upcycle = True makes experts of it" if lost[0].endswith((DENSE_IN, DENSE_OUT)) else ""
        raise ConfigError(f"start.run = {start.run!r}: its {lost[0]} has no place in this model{way_out}")
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
    for name in SAME:
        theirs = described["config"]["model"].get(name, getattr(ModelConfig, name))
        mine = getattr(config.model, name)
        if theirs != mine:
            raise ConfigError(f"model.{name} = {mine!r}: start.run = {folder.name!r} was trained with {theirs!r}")
    then, now = described.get("made_from", {}).get("tokenizer"), corpus.provenance["tokenizer_sha256"]
    if then != now:
        mine, other = config.data.tokenizer, described["config"]["data"].get("tokenizer")
        raise ConfigError(f"data.tokenizer = {mine!r}: start.run = {folder.name!r} was trained with another, {other!r}")
