"""What ``rlroute finetune`` trains: a run's own model and routers on other data, all of it or a part, with the defaults
of fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product

from rlroute.config import Parts, RunConfig, StartConfig
from rlroute.experiments.recipes.entries import Overrides, build_entry, parse_entry
from rlroute.experiments.recipes.sizes import Preset

SLOWER = 0.1
"""The peak learning rate over the source's."""


def defaults(source: RunConfig) -> Preset:
    """Return the options of fine-tuning a run, where nothing is said: its own data and model, and shorter and slower
    training with evaluations of both training and validation tokens.
    """
    train = replace(
        source.train,
        steps=200,
        lr=SLOWER * source.train.lr,
        warmup_steps=10,
        eval_every=20,
        eval_train=True,
        budget="tokens",
        budget_amount=None,
        parts="all",
        record_choices=False,
    )
    return Preset(replace(source.data, train_tokens=None), source.model, train)


def variants(
    entries: Sequence[str],
    source: RunConfig,
    size: Preset,
    start: StartConfig,
    *,
    parts: Sequence[Parts],
    expert_dropout: Sequence[float],
    tokens: Sequence[int],
) -> list[tuple[str, RunConfig]]:
    """Return the configurations of all entries with all combinations of what is varied, each with what it is called.

    Args:
        entries: routers; of the source's own, what an entry leaves out is as the source has it. None: the source's.
        source: the configuration of the run that all start from.
        size: the data, model and train options that all share.
        start: of all of them.
        parts, expert_dropout, tokens: what varies; none: as ``size`` has it.

    Raises:
        ConfigError: an unknown router or field, or an illegal value.
    """
    bare = replace(source, data=size.data, model=size.model, train=size.train, start=start)
    configs = {entry: _entry(entry, source, bare) for entry in entries} or {source.router_name: bare}
    dropouts, sizes = expert_dropout or [size.model.expert_dropout], list[int | None](tokens) or [None]
    named = []
    for (entry, config), part, dropout, most in product(configs.items(), parts, dropouts, sizes):
        data, model = replace(config.data, train_tokens=most), replace(config.model, expert_dropout=dropout)
        words = [entry, part, *([f"dropout={dropout}"] if dropout else []), *([f"tokens={most}"] if most else [])]
        train = replace(config.train, parts=part)
        named.append((" ".join(words), replace(config, data=data, model=model, train=train)))
    return named


def _entry(entry: str, source: RunConfig, bare: RunConfig) -> RunConfig:
    mine = {router.name: asdict(router) for router in source.by_place.values()}

    def as_in_source(router: str) -> Overrides:
        return {"router": mine.get(parse_entry(router)[0], {})}

    built = build_entry(entry, bare.data, bare.model, bare.train, as_in_source)
    return replace(built, start=bare.start)
