"""Layers of ours that were read from a checkpoint of others, as files: one each, in the layout of docs/export.md.

The metadata hold, beside the layout, the router's entry, the model options that differ from the defaults, as JSON, and
where the layer came from. Tensors are in the checkpoint's precision.

Shape suffixes: D model width, E experts, H hidden rows of an expert, F expert width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from rlroute.config import ModelConfig
from rlroute.errors import StoreError
from rlroute.experiments.checkpoints.blocks import Block
from rlroute.experiments.checkpoints.folder import Checkpoint, opened
from rlroute.experiments.checkpoints.moe_file import LAYOUT, named
from rlroute.foreign import parse_json
from rlroute.records import replacing
from rlroute.values import from_dict

ALONE = {"shared_gate": "shared_gate.weight", "latent.down": "down.weight", "latent.up": "up.weight"}
"""Names in a file, and in a layer's state, that differ and stand for one tensor."""


class Layer(NamedTuple):
    """A layer that was written.

    Attributes:
        path: its file.
        place: where it was in the checkpoint.
        options: as they are written on the command line, the entry first.
    """

    path: Path
    place: str
    options: tuple[str, ...]


def write_layers(checkpoint: Checkpoint, out: Path) -> list[Layer]:
    """Write the blocks of a checkpoint into a folder, one file each, in their order.

    Raises:
        ConfigError: our layer cannot express one.
        StoreError: a file cannot be read or written.
    """
    written = []
    for number, (place, block) in enumerate(checkpoint.blocks()):
        path, changed = out / f"layer-{number:03d}.safetensors", _changed(block.model)
        tensors = {f"layers.{number}.{name}": t.detach().contiguous() for name, t in named(block.as_stored())}
        metadata = {"layout": LAYOUT, "entry": block.entry, "model": json.dumps(changed)}
        with replacing(path) as file:
            file.write(save(tensors, metadata | {"from": f"{checkpoint.kind} {place}"}))
        written.append(Layer(path, place, (block.entry, *(_option(*part) for part in changed.items()))))
    return written


def _option(name: str, value: Any) -> str:
    """Return a field of the model as it is written on the command line; a switch says no value."""
    if isinstance(value, bool):
        name, value = name if value else f"no_{name}", ""
    return f"--model.{name.replace('_', '-')} {value}".strip()


def read_layer(path: Path) -> Block:
    """Return what :func:`write_layers` wrote; ``.layer()`` of it runs.

    Raises:
        ConfigError, StoreError: it is no such file.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        if not {"entry", "model"} <= metadata.keys():
            raise StoreError(f"{path}: its metadata have no 'entry' and 'model': want a file that rlroute import wrote")
        fields = parse_json(metadata["model"])
        stored = {name.split(".", 2)[-1]: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return Block(from_dict(ModelConfig, fields, "model"), metadata["entry"], _state(stored))


def _state(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file by the names of a layer's state."""
    state = {ALONE.get(name, name): t for name, t in stored.items() if name.split(".")[0] not in ("experts", "shared")}
    for name, suffix in (("experts", ""), ("shared", ".experts")):
        mine = {part.removeprefix(f"{name}."): t for part, t in stored.items() if part.startswith(f"{name}.")}
        if not mine:
            continue
        mine = {part: t[None] for part, t in mine.items()} if name == "shared" else mine
        rows = [part for part in ("gate", "up") if part in mine]
        state[f"{name}{suffix}.in_EHD"] = torch.cat([mine[part] for part in rows], 1)
        state[f"{name}{suffix}.out_EDF"] = mine["down"]
        if "down_bias" in mine:
            state[f"{name}{suffix}.in_bias_EH"] = torch.cat([mine[f"{part}_bias"] for part in rows], 1)
            state[f"{name}{suffix}.out_bias_ED"] = mine["down_bias"]
    return state


def _changed(model: ModelConfig) -> dict[str, Any]:
    plain = asdict(ModelConfig())
    return {name: value for name, value in asdict(model).items() if value != plain[name]}
