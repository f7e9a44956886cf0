"""How even the loads of a trace are.

Shape suffixes: T tokens, K experts per token, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from rlroute import metrics
from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.traces.reading import NONE, Layer, Part, Trace

PERCENTS = (50, 75, 90, 95)
MOST_COUNTS = 1 << 26
"""Numbers that are held: experts, by layer and step."""


@dataclass(frozen=True)
class LayerLoads:
    """What one layer of a trace did.

    Attributes:
        layer: its name.
        family: what those are called that are shown as one.
        experts: E.
        tokens: all its tokens.
        silent: those without any expert.
        repeated: those of them whose row named an expert twice.
        load_E: pairs of each expert.
        max_vio, gini, min_over_max, dead: of these loads; NaN where there are none.
        step_max_vio: percentiles of MaxVio over the steps.
    """

    layer: str
    family: str
    experts: int
    tokens: int
    silent: int
    repeated: int
    load_E: list[int]
    max_vio: float
    gini: float
    min_over_max: float
    dead: int
    step_max_vio: list[float]


@dataclass(frozen=True)
class Loads:
    """What was measured of a trace.

    Attributes:
        name, kind: the trace's.
        steps: how many it has.
        stated: whether it says how many experts there are; else they are taken to end with the highest id.
        layers: by layer.
        spread: percentiles of a measure, over layers, or over steps and layers.
    """

    name: str
    kind: str
    steps: int
    stated: bool
    layers: list[LayerLoads]
    spread: dict[str, list[float]]

    @property
    def shown(self) -> list[LayerLoads]:
        """The layers as tables show them: the heads of a routed attention as one."""
        found: dict[str, list[LayerLoads]] = {}
        for of in self.layers:
            found.setdefault(of.family, []).append(of)
        return [_as_one(parts) for parts in found.values()]


def _as_one(parts: Sequence[LayerLoads]) -> LayerLoads:
    """Return layers as one: their experts one after the other, and the worst of each measure."""
    one = parts[0]
    if len(parts) == 1:
        return one
    return replace(
        one,
        layer=one.family,
        experts=sum(of.experts for of in parts),
        silent=max(of.silent for of in parts),
        repeated=max(of.repeated for of in parts),
        load_E=[load for of in parts for load in of.load_E],
        max_vio=max(of.max_vio for of in parts),
        gini=max(of.gini for of in parts),
        min_over_max=min(of.min_over_max for of in parts),
        dead=sum(of.dead for of in parts),
        step_max_vio=[max(at) for at in zip(*(of.step_max_vio for of in parts), strict=True)],
    )


@dataclass
class _Counts:
    """What one reading of a trace adds up."""

    load: dict[Layer, dict[int, np.ndarray]] = field(default_factory=dict)  # by layer and step
    tokens: dict[Layer, int] = field(default_factory=dict)
    silent: dict[Layer, int] = field(default_factory=dict)
    repeated: dict[Layer, int] = field(default_factory=dict)
    experts: dict[Layer, int] = field(default_factory=dict)
    held: int = 0

    def add(self, part: Part) -> None:
        for layer, ids_TK in part.ids.items():
            new_E = np.bincount(ids_TK[ids_TK != NONE])
            load_S = self.load.setdefault(layer, {})
            old_E = load_S.get(part.step, new_E[:0])
            load_S[part.step] = _sum(old_E, new_E)
            self.held += len(load_S[part.step]) - len(old_E)
            for total, count in (
                (self.tokens, len(ids_TK)),
                (self.silent, int((ids_TK == NONE).all(1).sum())),
                (self.repeated, part.repeated[layer]),
            ):
                total[layer] = total.get(layer, 0) + count
        for layer, count in part.experts.items():
            self.experts[layer] = max(count, self.experts.get(layer, 0))


def _sum(one_E: np.ndarray, other_E: np.ndarray) -> np.ndarray:
    short_E, long_E = sorted((one_E, other_E), key=len)
    sum_E = long_E.copy()
    sum_E[: len(short_E)] += short_E
    return sum_E


def measure(trace: Trace, experts: int | None = None) -> Loads:
    """Read a trace once and measure its loads.

    Args:
        trace: the trace.
        experts: how many experts a layer has, where the trace does not say it.

    Raises:
        StoreError: it cannot be read, holds nothing, or more than can be held.
        ConfigError: it holds an expert that there is not.
    """
    counts = _Counts()
    for part in trace.parts():
        counts.add(part)
        if counts.held > MOST_COUNTS:
            raise StoreError(f"{trace.name} has more than {MOST_COUNTS:,} loads, by step, layer and expert: want fewer")
    if not sum(counts.tokens.values()):
        raise StoreError(f"{trace.name} holds no token")
    number = _experts(trace.name, counts, experts)
    layers, vios, ginis = [], list[float](), list[float]()
    for layer in sorted(counts.load):
        steps = [_padded(load_E, number[layer]) for load_E in counts.load[layer].values()]
        vios_S = [float(metrics.max_vio(load_E)) for load_E in steps]
        vios += vios_S
        ginis += [float(metrics.gini(load_E)) for load_E in steps]
        layers.append(_layer(layer, counts, torch.stack(steps).sum(0), vios_S))
    spread = {
        "MaxVio of a layer": [of.max_vio for of in layers],
        "MaxVio of a layer and step": vios,
        "Gini of a layer": [of.gini for of in layers],
        "Gini of a layer and step": ginis,
    }
    steps_seen = {step for load_S in counts.load.values() for step in load_S}
    percentiles = {name: _percentiles(values) for name, values in spread.items()}
    return Loads(
        trace.name, trace.kind, len(steps_seen), counts.load.keys() <= counts.experts.keys(), layers, percentiles
    )


def _layer(layer: Layer, counts: _Counts, load_E: Tensor, vios_S: list[float]) -> LayerLoads:
    return LayerLoads(
        layer=layer.name,
        family=layer.family,
        experts=len(load_E),
        tokens=counts.tokens[layer],
        silent=counts.silent[layer],
        repeated=counts.repeated[layer],
        load_E=load_E.tolist(),
        max_vio=float(metrics.max_vio(load_E)),
        gini=float(metrics.gini(load_E)),
        min_over_max=float(metrics.min_over_max(load_E)),
        dead=int(metrics.dead_experts(load_E)),
        step_max_vio=_percentiles(vios_S),
    )


def _experts(name: str, counts: _Counts, said: int | None) -> dict[Layer, int]:
    """Return the number of experts of each layer."""
    seen = {layer: max(map(len, load_S.values())) for layer, load_S in counts.load.items()}
    unsaid = [layer for layer in seen if layer not in counts.experts]
    highest = max((seen[layer] for layer in unsaid), default=0)
    number = counts.experts | dict.fromkeys(unsaid, max(highest, 1) if said is None else said)
    for layer, least in seen.items():
        if least > number[layer]:
            raise ConfigError(
                f"{name}: layer {layer.name} has expert {least - 1}, and is said to have {number[layer]} experts"
            )
    return number


def _padded(load_E: np.ndarray, experts: int) -> Tensor:
    return torch.from_numpy(np.pad(load_E, (0, experts - len(load_E))).astype(np.int64))


def _percentiles(values: Sequence[float]) -> list[float]:
    """Return the percentiles of values, and the highest of them."""
    return list(metrics.percentiles(torch.tensor(values, dtype=torch.float64), (*PERCENTS, 100)).tolist())
