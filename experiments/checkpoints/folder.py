"""``rlroute import``: the MoE blocks of a Hugging Face checkpoint, read from its files.

A checkpoint is a folder with ``config.json`` and one or more .safetensors, or one of those files. Many formats store
each expert's matrices by themselves; they are put together as :mod:`.blocks` takes them. transformers is not needed.

Shape suffixes: D model width, E experts, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlroute.arrays import MOST, naming
from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.checkpoints.blocks import FORMATS, Block, Config, read_block
from rlroute.foreign import clipped, parse_json, read_bytes, reading, shown

PLACES = dict.fromkeys(FORMATS, r"model\.layers\.\d{1,5}\.mlp") | {
    "dbrx": r"transformer\.blocks\.\d{1,5}\.ffn",
    "mixtral": r"model\.layers\.\d{1,5}\.block_sparse_moe",
    "switch_transformers": r"(?:en|de)coder\.block\.\d{1,5}\.layer\.\d{1,5}\.mlp",
}
"""Where a model has its MLPs, of which those with a router are blocks."""
ROUTERS = ("gate.weight", "router.weight", "router.layer.weight", "router.classifier.weight")
EXPERT = re.compile(r"experts\.(\d{1,5})\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "dbrx": {"ffn_config": {"moe_normalize_expert_weights": 1.0, "ffn_act_fn": {"name": "silu"}}},
}
"""What transformers takes where the published ``config.json`` of a format says nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, whose tensors are read when they are asked for.

    Attributes:
        kind: its format.
        config: what its ``config.json`` says.
        files: the file of each tensor.
    """

    kind: str
    config: Config
    files: dict[str, Path]

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """Yield each MoE block with the name of its place, first to last.

        Raises:
            ConfigError: our layer cannot express it, or there is none.
            StoreError: a tensor cannot be read.
        """
        places: dict[str, list[str]] = {}
        for name in self.files:
            if place := re.match(rf"({PLACES[self.kind]})\.", name):
                places.setdefault(place[1], []).append(name[place.end() :])
        routed = [here for here, names in places.items() if not set(ROUTERS).isdisjoint(names)]
        if not routed:
            raise ConfigError(f"no MoE block of {self.kind!r} among {len(self.files)} tensors")
        for here in sorted(routed, key=_by_numbers):
            state = {name: self._tensor(f"{here}.{name}") for name in places[here]}
            try:
                yield here, read_block(self.kind, self.config, together(state))
            except ConfigError as error:
                raise ConfigError(f"{here}: {error}") from error

    def _tensor(self, name: str) -> Tensor:
        with opened(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def together(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a block's weights with the matrices of experts that stand by themselves in two tensors: ``gate_up_proj``
    of shape (E, 2F, D) and ``down_proj`` of shape (E, D, F).

    Raises:
        ConfigError: an expert lacks one, or they are not of one shape and type.
    """
    matrices: dict[int, dict[str, Tensor]] = {}
    others = dict[str, Tensor]()
    for name, tensor in state.items():
        if found := EXPERT.fullmatch(name):
            matrices.setdefault(int(found[1]), {})[ROLES[found[2]]] = tensor
        else:
            others[name] = tensor
    if not matrices:
        return others
    experts = [matrices.get(expert, {}) for expert in range(len(matrices))]
    for expert, roles in enumerate(experts):
        if lacking := sorted({"gate", "up", "down"} - roles.keys()):
            raise ConfigError(f"expert {expert} of {len(experts)} has no {lacking[0]} projection")
    if len(types := {matrix.dtype for roles in experts for matrix in roles.values()}) > 1:
        raise ConfigError(f"its experts are not of one type: {', '.join(sorted(map(str, types)))}")
    try:
        gate_up_EHD = torch.stack([torch.cat([roles["gate"], roles["up"]]) for roles in experts])
        down_EDF = torch.stack([roles["down"] for roles in experts])
    except RuntimeError as error:
        raise ConfigError(f"its experts are not of one shape: {clipped(str(error))}") from error
    return others | {"experts.gate_up_proj": gate_up_EHD, "experts.down_proj": down_EDF}


def open_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint by its folder, or by one of its files.

    Raises:
        ConfigError: it is of no known format.
        StoreError: it cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    values = _json(folder / "config.json")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ConfigError(f"{folder / 'config.json'}: model_type is {shown(kind)}, legal are {', '.join(FORMATS)}")
    files = sorted(folder.glob("*.safetensors")) if path.is_dir() else [path]
    index = folder / "model.safetensors.index.json"
    if path.is_dir() and index.exists():
        named = _json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) and Path(n).name == n for n in named.values()):
            raise StoreError(f"{index}: want a weight_map from tensors to files beside it")
        files = sorted({folder / name for name in named.values()})
    if not files:
        raise StoreError(f"{path} holds no .safetensors")
    config = _over(DEFAULTS.get(kind, {}), values)
    return Checkpoint(kind, config, {name: file for file in files for name in _names(file)})


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a .safetensors, whose tensors are read as they are asked for; a link to one is what caches hold."""
    with naming(path):
        with reading(path, MOST, follow=True):
            pass  # a regular file, and not too large
        with safe_open(path, "pt") as file:
            yield file


def _names(path: Path) -> list[str]:
    with opened(path) as file:
        return list(file.keys())


def _json(path: Path) -> dict[str, Any]:
    with naming(path):
        value = parse_json(read_bytes(path, follow=True))
    if not isinstance(value, dict):
        raise StoreError(f"{path} is {shown(value)}: want an object")
    return value


def _over(plain: Any, values: Any) -> Any:
    """Return values over defaults, objects within likewise."""
    if not isinstance(plain, dict) or not isinstance(values, dict):
        return values
    return plain | {name: _over(plain.get(name), value) for name, value in values.items()}


def _by_numbers(place: str) -> tuple[bool, list[int]]:
    """Return a key by which layer 10 comes after layer 9, and a decoder after its encoder."""
    return place.startswith("decoder"), [int(part) for part in place.split(".") if part.isdigit()]
