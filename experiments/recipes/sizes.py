"""What ``--preset`` stands for: models and steps for one GPU, by active parameters; published models; their tiny forms.

Memory is that of weights, gradients and both moments in float32, 16 bytes a parameter, and of what a micro-batch keeps;
``docs/gpu.md`` has both.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.catalogue import CATALOGUE, Published, tiny

Part = TypeVar("Part", DataConfig, ModelConfig, TrainConfig)


@dataclass(frozen=True)
class Preset:
    """A data, a model and a training configuration, and the entry where none is named; "": it has none."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    entry: str = ""


_DATA = DataConfig(seq_len=1024, eval_tokens=262_144)
_TRAIN = TrainConfig(
    batch_size=64,
    warmup_steps=200,
    eval_every=250,
    checkpoint_every=500,
    device="cuda",
    dtype="bfloat16",
)
SIZES = {
    "gpu-30m": Preset(
        _DATA,
        ModelConfig(num_layers=8, d_model=512, num_heads=8, num_experts=32, k=4, d_expert=384),
        replace(_TRAIN, steps=4_000, lr=2e-3, micro_batches=2),
    ),
    "gpu-124m": Preset(
        _DATA,
        ModelConfig(num_layers=13, d_model=768, num_heads=12, num_experts=64, k=8, d_expert=384),
        replace(_TRAIN, steps=4_000, lr=1e-3, micro_batches=2),
    ),
    "gpu-350m": Preset(
        _DATA,
        ModelConfig(num_layers=25, d_model=1024, num_heads=16, num_experts=64, k=8, d_expert=384),
        replace(_TRAIN, steps=4_000, lr=6e-4, micro_batches=4),
    ),
}
"""The learning rates are usual ones for such widths, not tuned."""


def _published(published: Published) -> Preset:
    train = replace(_TRAIN, steps=100_000, batch_size=1024, micro_batches=64, lr=3e-4, warmup_steps=2_000)
    return Preset(replace(_DATA, seq_len=4096), published.model, train, published.entry)


def _tiny(published: Published) -> Preset:
    return Preset(DataConfig(), tiny(published), TrainConfig(), published.entry)


PRESETS = (
    SIZES
    | {name: _published(published) for name, published in CATALOGUE.items()}
    | {f"{name}-tiny": _tiny(published) for name, published in CATALOGUE.items()}
)
"""By name. Steps, batches and learning rates of published models are ours, and not tuned."""


def find_preset(name: str | None) -> Preset:
    """Return a preset; the defaults where none is named.

    Raises:
        ConfigError: no preset is called that.
    """
    if name is None:
        return Preset(DataConfig(), ModelConfig(), TrainConfig())
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"preset {name!r}{hint}: legal are {', '.join(SIZES)}, and those that `rlroute presets` lists"
        )
    return PRESETS[name]


def with_preset(
    name: str | None, data: DataConfig, model: ModelConfig, train: TrainConfig, said: Mapping[str, Set[str]]
) -> Preset:
    """Return a preset, with the fields that were said on purpose in place of its own; what is given, and no entry,
    where none is named.

    Args:
        name: the preset's.
        data, model, train: as given.
        said: the fields that were, by part.

    Raises:
        ConfigError: no preset is called that, or its micro-batches do not divide the batch that was said.
    """
    if name is None:
        return Preset(data, model, train)
    size = over(find_preset(name), data, model, train, said)
    if "micro_batches" not in said["train"] and size.train.batch_size % size.train.micro_batches:
        raise ConfigError(
            f"train.batch_size = {size.train.batch_size}: preset {name!r} has train.micro_batches = "
            f"{size.train.micro_batches}, which must divide it; --train.micro-batches says another number"
        )
    return size


def over(
    chosen: Preset, data: DataConfig, model: ModelConfig, train: TrainConfig, said: Mapping[str, Set[str]]
) -> Preset:
    """Return a preset with the fields that were said on purpose in place of its own, as :func:`with_preset` does."""
    parts = _over(chosen.data, data, said["data"]), _over(chosen.model, model, said["model"])
    return Preset(*parts, _over(chosen.train, train, said["train"]), chosen.entry)


def _over(chosen: Part, given: Part, said: Set[str]) -> Part:
    values: dict[str, Any] = {f.name: getattr(given, f.name) for f in fields(given) if f.name in said}
    return replace(chosen, **values)
