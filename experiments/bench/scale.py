"""``rlroute bench scale``: what expert parallelism would cost at 8, 64 and 512 devices, calculated from recorded loads
and data sheets.

P devices are ``replicas`` times ``shards`` (as in :mod:`rlroute.parallel.mesh`), with shards = min(P, E) and every
device bringing T tokens. Each exchange moves T K rows a device, four times a step and layer; the fullest device
receives I times as many, computes I times as long, and all others wait for it:

    time = I (compute + exchange), or with perfect overlap I max(compute, exchange);    efficiency = compute / time,

where I is the imbalance: the fullest device's pairs over the mean, itself averaged over steps, as the times add up.
Nothing here runs on a GPU. docs/scale.md says what is left out.

Shape suffixes: N recorded loads of one run (steps times layers), E experts, P devices (shards).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.comparison.entries import make_entries
from rlroute.experiments.statistics import Interval, t_interval
from rlroute.schema import RunRecord
from rlroute.seeding import numpy_generator

DEVICES = (8, 64, 512)
DRAWS = 16
"""Arrangements drawn for each recorded load where the model has more experts than were recorded."""
OPTIMIZER_BYTES = 16
"""Per parameter: weight, gradient and AdamW's two moments in float32; or bfloat16 weight and gradient beside a float32
copy and both.
"""
Limit = Literal["imbalance", "NVLink", "InfiniBand"]


@dataclass(frozen=True)
class Model:
    """An MoE layer (of ``layers`` equal ones): tokens of one device, widths, experts, bytes of a number that
    travels.
    """

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int
    layers: int
    number_bytes: int
    source: str


@dataclass(frozen=True)
class Device:
    """A device: peak FLOP/s, the share of it that expert products reach, bytes/s each way within and between nodes,
    bytes of memory.
    """

    name: str
    flops: float
    gemm_efficiency: float
    within: float
    between: float
    per_node: int
    memory: float
    source: str


MODELS = (
    Model("rlroute's comparison", 1024, 64, 64, 16, 2, 1, 2, "experiments/results/comparison.jsonl"),
    Model("Mixtral 8x7B", 4096, 4096, 14336, 8, 2, 32, 2, "Jiang et al. 2024, arXiv 2401.04088, table 1"),
    Model("DeepSeek-V3", 4096, 7168, 2048, 256, 8, 58, 2, "arXiv 2412.19437, section 4.2"),
)
H100 = Device(
    "H100 SXM, 8 a node",
    flops=989.4e12,
    gemm_efficiency=0.5,
    within=450e9,
    between=50e9,
    per_node=8,
    memory=80e9,
    source="NVIDIA's H100 data sheet: 1,979 TFLOP/s bfloat16 with sparsity, half without; NVLink 900 GB/s both ways; "
    "one 400 Gb/s InfiniBand port a GPU (DGX H100). Expert products at 0.43 to 0.60 of the peak: SonicMoE, arXiv "
    "2512.14080, figure 14, D = 4096",
)


@dataclass(frozen=True)
class Plan:
    """One layer's step on balanced devices: bytes that a device sends in the four exchanges, seconds, and memory of all
    layers' experts.
    """

    shards: int
    replicas: int
    local_bytes: float
    within_bytes: float
    between_bytes: float
    compute: float
    within: float
    between: float
    memory: float

    def efficiency(self, imbalance: float, overlap: bool) -> float:
        """Return the time of balanced compute alone over that of the fullest device, exchanges included."""
        exchange = max(self.within, self.between)  # both links carry at once
        return self.compute / (imbalance * (max(self.compute, exchange) if overlap else self.compute + exchange))

    def limit(self, imbalance: float, overlap: bool) -> Limit:
        """Return what costs the larger factor: the imbalance, or the slower link."""
        if imbalance * self.efficiency(1.0, overlap) >= 1:
            return "imbalance"
        return "NVLink" if self.within >= self.between else "InfiniBand"


def split_pairs(pairs_PP: np.ndarray, per_node: int) -> tuple[float, float, float]:
    """Return how many pairs stay on their device, travel within their node, and travel between nodes.

    Args:
        pairs_PP: pairs from each device's tokens (row) to each device's experts (column).
        per_node: consecutive devices in one node.
    """
    device_P = np.arange(len(pairs_PP))
    node_P = device_P // per_node
    local, near = device_P[:, None] == device_P, node_P[:, None] == node_P
    return tuple(float(pairs_PP[where].sum()) for where in (local, near & ~local, ~near))  # type: ignore[return-value]


def plan(model: Model, device: Device, devices: int) -> Plan:
    """Return the plan of a model on so many devices, with balanced routing.

    Raises:
        ConfigError: the experts cannot be spread evenly, or a size is not positive.
    """
    for name, value in [*asdict(model).items(), *asdict(device).items()]:
        if not isinstance(value, str) and not value > 0:
            raise ConfigError(f"{name} = {value}: want a positive number")
    shards = min(devices, model.E)
    if devices < 1 or model.E % shards or devices % shards:
        raise ConfigError(f"{devices} devices for {model.E} experts: want a divisor or a multiple of {model.E}")
    pairs_PP = np.full((shards, shards), model.T * model.K / shards)
    row_bytes = 4 * model.D * model.number_bytes / shards  # out and home, forward and backward; of one device
    local, within, between = (pairs * row_bytes for pairs in split_pairs(pairs_PP, device.per_node))
    return Plan(
        shards=shards,
        replicas=devices // shards,
        local_bytes=local,
        within_bytes=within,
        between_bytes=between,
        compute=18 * model.T * model.K * model.D * model.F / (device.flops * device.gemm_efficiency),  # SwiGLU
        within=within / device.within,
        between=between / device.between,
        memory=3.0 * model.D * model.F * model.E / shards * model.layers * OPTIMIZER_BYTES,
    )


def recorded_loads(records: Sequence[RunRecord]) -> dict[str, list[np.ndarray]]:
    """Return each router's load fractions over the last quarter of the recorded steps, one array of shape (N, E) a run.

    They are those of the feed-forward layers, whose experts can be spread; steps in which nothing was chosen have none.

    Raises:
        StoreError: no run has loads, or they are of different numbers of experts.
    """
    found = {}
    for entry in make_entries(records):
        rows = [run.loads[-max(1, len(run.loads) // 4) :] for run in entry.runs]
        spread = [index for index, site in enumerate(entry.sites) if isinstance(site, int)]
        loads = [
            np.array([load_E for row in part for i in spread if any(load_E := row["load_LE"][i])]) for part in rows
        ]
        if any(load_NE.size for load_NE in loads):
            found[entry.label] = [load_NE for load_NE in loads if load_NE.size]
    widths = sorted({load_NE.shape[1] for loads in found.values() for load_NE in loads})
    if len(widths) != 1:
        raise StoreError(f"runs with loads of {widths or 'no'} experts: want runs of one number of experts")
    return found


def imbalance(loads: Sequence[np.ndarray], experts: int, shards: int) -> Interval:
    """Return the mean over steps and layers of the fullest device's load over the mean load, with the interval over
    runs.

    Devices hold consecutive experts. Fewer experts than recorded: neighbours count as one. More: every recorded expert
    stands for several, and ``DRAWS`` random orders of them are averaged, as if where an expert lies said nothing of its
    load.

    Raises:
        ConfigError: ``experts`` is neither a divisor nor a multiple of those recorded.
    """
    recorded = loads[0].shape[1]
    if experts % recorded and recorded % experts:
        raise ConfigError(f"experts = {experts}: want a divisor or a multiple of the {recorded} recorded")
    values = []
    for run, load_NE in enumerate(loads):
        if experts > recorded:
            copies = np.tile(load_NE, (DRAWS, experts // recorded))
            load_NE = numpy_generator("bench scale", experts, run).permuted(copies, axis=1)
        load_NP = load_NE.reshape(len(load_NE), shards, -1).sum(2)
        values.append(float((load_NP.max(1) / load_NP.mean(1)).mean()))
    return t_interval(values)


def bench_scale(loads: Mapping[str, Sequence[np.ndarray]], device: Device = H100) -> list[dict[str, Any]]:
    """Return one row per model and number of devices: its plan, and imbalance and efficiency by router."""
    rows = []
    recorded = next(iter(loads.values()))[0].shape[1]
    for model in MODELS:
        for devices in DEVICES:
            planned = plan(model, device, devices)
            row = {"model": model.name, "devices": devices, **asdict(planned), "drawn": recorded < model.E}
            found = {router: imbalance(runs, model.E, planned.shards) for router, runs in loads.items()}
            rows.append(row | {"routers": {router: _outlook(planned, value) for router, value in found.items()}})
    return rows


def _outlook(planned: Plan, value: Interval) -> dict[str, Any]:
    how = {"apart": False, "overlapped": True}.items()
    return {"imbalance": asdict(value)} | {
        name: {"efficiency": planned.efficiency(value.mean, o), "limit": planned.limit(value.mean, o)}
        for name, o in how
    }


def breaks_at(rows: Sequence[Mapping[str, Any]], router: str, how: str) -> tuple[int, Limit] | None:
    """Return the fewest devices at which a router falls under half the efficiency, and what limits it there; None if
    none of them.

    Args:
        rows: those of one model, as :func:`bench_scale` returns them.
        router: its label.
        how: ``apart`` or ``overlapped``.
    """
    for row in sorted(rows, key=lambda row: int(row["devices"])):
        found = row["routers"][router][how]
        if found["efficiency"] < 0.5:
            return row["devices"], found["limit"]
    return None


def hold_against(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Predict each shape of ``bench parallel``'s experts from the rates of each other one; return it beside what was
    measured.
    """
    rows = [row for row in measured["rows"] if row["work"] == "experts"]
    cases = [(_shape_of(row), row["contenders"][row["base"]], row["contenders"][row["ours"]]) for row in rows]
    found = []
    for calibrated, alone, together in cases:
        rates = plan(calibrated, Device("", 1.0, 1.0, 1.0, 1.0, 2, 1.0, ""), 2)  # work as time at a rate of 1
        bandwidth = rates.within / (together["all_to_all_share"] * together["seconds"])
        cpu = Device("", rates.compute / alone["seconds"], 1.0, bandwidth, bandwidth, 2, 1.0, "")
        for model, _, values in cases:
            if model is not calibrated:
                share = 1 - plan(model, cpu, 2).efficiency(1.0, overlap=False)
                found.append(
                    {"from": calibrated.name, "of": model.name, "flops": cpu.flops, "bandwidth": bandwidth}
                    | {"share": {"predicted": share, "measured": values["all_to_all_share"]}}
                    | {"slowdown": {"predicted": 1 / (1 - share), "measured": values["time_over_base"]}}
                )
    return found


def _shape_of(row: Mapping[str, Any]) -> Model:
    sizes = {name: int(size) for name, size in re.findall(r"(\w)=(\d+)", row["what"])}
    return Model(row["what"].partition(",")[0], **sizes, layers=1, number_bytes=4, source="")
