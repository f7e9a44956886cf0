"""Comparisons that are ready to run: who takes part where nobody is named, and at which settings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields
from functools import partial

from rlroute.config import DENSE, DataConfig, ModelConfig, RouterConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import Overrides, build_entry, parse_entry, split_sites
from rlroute.experiments.recipes.tuned import settings_of, tuned_settings
from rlroute.registry import default_names, refusals, router_class
from rlroute.routing import RouterShape
from rlroute.training.data import corpus_of
from rlroute.training.prepare import shapes

ALL = "all"
"""In place of entries: every one that there is."""
DEFAULT = (DENSE, "hash", "unbalanced", "switch", "noisy_topk", "bias_balanced", "reinforce")
"""The entries of the default comparison."""


def all_entries() -> list[str]:
    """Return the dense model, every router that needs no field, and position hashing as a control."""
    return [DENSE, *default_names(), "hash:table=position"]


def routers_for(shapes: Sequence[RouterShape], say: Callable[[str], None]) -> list[str]:
    """Return the routers that need no field and take all of these shapes; tell in one line who is left out, and why."""
    return fitting(default_names(), shapes, say)


def fitting(entries: Sequence[str], shapes: Sequence[RouterShape], say: Callable[[str], None]) -> list[str]:
    """Return those of the entries, which nobody named, whose routers take all of these shapes; tell who is left out."""
    refused = refusals(shapes)
    if refused:
        say(f"left out: {'; '.join(f'{name} ({reason})' for name, reason in refused.items())}")
    return [entry for entry in entries if parse_entry(entry)[0] not in refused]


def fitting_entries(entries: Sequence[str], data: DataConfig, model: ModelConfig) -> tuple[str, ...]:
    """Return those of the entries, which nobody named, whose routers take the model's shapes; say who is left out."""
    config = RunConfig(data=data, model=model)
    wanted = shapes(config, corpus_of(config.data))
    return tuple(fitting(entries, wanted, partial(print, file=sys.stderr)))


def build_comparison(
    entries: Iterable[str],
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    *,
    tuned: bool,
    said: Collection[str] = (),
) -> list[RunConfig]:
    """Return the configurations of all entries, each with its tuned settings where ``tuned`` asks for them.

    Args:
        entries: what to train.
        data, model, train: the parts that all entries share.
        tuned: whether an entry's tuned settings come on top of these.
        said: fields of ``train`` that were set on purpose, beyond those that differ from their defaults.

    Raises:
        ConfigError: an illegal entry; or a field of ``train`` that was set, and that ``tuned`` would overwrite.
    """
    if not tuned:
        return [build_entry(entry, data, model, train) for entry in entries]
    entries = list(entries)
    for entry in entries:
        why = f"the tuned recipe sets it for {entry}; --no-tuned takes yours for all"
        refuse_overwritten(train, said, tuned_settings(split_sites(entry)[0], train), why)
    return [build_entry(entry, data, model, train, partial(tuned_settings, train=train)) for entry in entries]


def build_pair(
    candidate: str,
    reference: str,
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    *,
    tuned: bool,
    said: Collection[str] = (),
) -> tuple[list[RunConfig], list[str]]:
    """Return the configurations of two entries of which one changes the routing of the other, and whose settings each
    has.

    A candidate that was never tuned gets the reference's learning rates, and its router's fields where it has fields of
    the same name: what differs is the routing, and a copy of the reference under another name is the same.

    Args:
        candidate, reference: entries.
        data, model, train, tuned, said: as of :func:`build_comparison`.

    Raises:
        ConfigError: as :func:`build_comparison` does.
    """
    first = split_sites(candidate)[0]
    lent = _lent(first, split_sites(reference)[0], train) if tuned and not tuned_settings(first, train) else {}
    (theirs,) = build_comparison([reference], data, model, train, tuned=tuned, said=said)
    refuse_overwritten(train, said, lent, f"it is lent {candidate} by {reference}; --no-tuned takes yours for both")
    if lent:
        mine = build_entry(candidate, data, model, train, lambda router: lent if router == first else {})
        return [mine, theirs], [f"those of {reference}", settings_of(theirs.to_dict())]
    (mine,) = build_comparison([candidate], data, model, train, tuned=tuned, said=said)
    return [mine, theirs], [settings_of(config.to_dict()) for config in (mine, theirs)]


def _lent(router: str, reference: str, train: TrainConfig) -> Overrides:
    """Return the tuned settings of another router as far as a router takes them: terms that read what its decisions do
    not carry are left out.
    """
    cls, lent = router_class(parse_entry(router)[0]), tuned_settings(reference, train)
    terms = RouterConfig().term_weights
    known = {field.name for field in fields(cls.Config) if field.name not in terms or cls.carries(field.name)}
    return lent and lent | {"router": {n: v for n, v in lent.get("router", {}).items() if n in known}}


def refuse_overwritten(train: TrainConfig, said: Collection[str], settings: Overrides, why: str) -> None:
    """Refuse a field of ``train`` that was set and that an entry's settings would overwrite.

    Args:
        train: what all entries share.
        said: its fields that were set on purpose, beyond those that differ from their defaults.
        settings: the entry's own.
        why: said of the field.

    Raises:
        ConfigError: naming the first.
    """
    for name in settings.get("train", {}):
        if name in said or getattr(train, name) != getattr(TrainConfig(), name):
            raise ConfigError(f"train.{name} = {getattr(train, name)}: {why}")
