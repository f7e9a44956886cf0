"""Models and steps for one GPU, by active parameters: what ``--preset`` stands for.

Memory is that of weights, gradients and both moments in float32, 16 bytes a parameter, and of what a micro-batch keeps;
``docs/gpu.md`` has both.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.errors import ConfigError

Part = TypeVar("Part", DataConfig, ModelConfig, TrainConfig)


@dataclass(frozen=True)
class Preset:
    """A data, a model and a training configuration."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig


_DATA = DataConfig(seq_len=1024, eval_tokens=262_144)
_TRAIN = TrainConfig(
    batch_size=64,
    warmup_steps=200,
    eval_every=250,
    checkpoint_every=500,
    device="cuda",
    dtype="bfloat16",
)
PRESETS = {
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


def with_preset(
    name: str | None, data: DataConfig, model: ModelConfig, train: TrainConfig, said: Mapping[str, Set[str]]
) -> Preset:
    """Return a preset, with the fields that were said on purpose in place of its own; what is given where none is
    named.

    Args:
        name: the preset's.
        data, model, train: as given.
        said: the fields that were, by part.

    Raises:
        ConfigError: no preset is called that.
    """
    if name is None:
        return Preset(data, model, train)
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r}: legal are {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    return Preset(
        _over(chosen.data, data, said["data"]),
        _over(chosen.model, model, said["model"]),
        _over(chosen.train, train, said["train"]),
    )


def _over(chosen: Part, given: Part, said: Set[str]) -> Part:
    values: dict[str, Any] = {f.name: getattr(given, f.name) for f in fields(given) if f.name in said}
    return replace(chosen, **values)
