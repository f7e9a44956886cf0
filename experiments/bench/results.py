"""What a bench's JSON file holds, and reading it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from rlroute.errors import StoreError
from rlroute.foreign import Unfit, hold, parse_json, read_bytes, why
from rlroute.limits import Between

Size = Annotated[int, Between(1, 2**53)]
Positive = Annotated[float, Between(1e-30, 1e30)]
Amount = Annotated[float, Between(0, 1e30)]
Share = Annotated[float, Between(0, 1)]


class Ratio(TypedDict):
    """A ratio, and the ends of its 95% interval where it has one."""

    mean: Positive
    low: Positive | None
    high: Positive | None


class Failed(TypedDict):
    """A contender that failed, and why."""

    failed: str


class Times(TypedDict):
    """What was measured of a contender."""

    seconds: Positive
    """Median of one call."""
    time_over_base: Ratio
    speed_of_ours: Ratio
    all_to_all_share: NotRequired[Share]
    """The share of the time in sending and waiting."""


class Row(TypedDict):
    """What was measured at once."""

    what: str
    base: str
    ours: str
    work: NotRequired[str]
    contenders: dict[str, Failed | Times]


class Where(TypedDict):
    """Where it was measured."""

    device_name: str
    torch: str
    triton: str | None
    threads: Size
    tile_table: str
    commit: str | None


class Measured(TypedDict):
    """The result of ``bench kernels``, ``layer`` or ``parallel``."""

    bench: Literal["kernels", "layer", "parallel"]
    command: str
    rounds: Size
    environment: Where
    rows: list[Row]


class StepTimes(TypedDict):
    """What was measured of a training step."""

    seconds: Positive
    """Median of one step."""
    time_over_base: Ratio
    tokens_per_second: Positive
    mfu: Amount
    """Model FLOPs of a step, over those of a matrix product in the same time."""
    mfu_of_vendor: Amount | None
    held_bytes: Amount
    peak_bytes: Amount
    host_waits: Amount | None


class StepRow(TypedDict):
    """What was measured of one model."""

    what: str
    base: str
    steps: Size
    product_flops_per_second: Positive
    vendor_flops_per_second: Positive | None
    contenders: dict[str, Failed | StepTimes]


class Stepped(TypedDict):
    """The result of ``bench step``."""

    bench: Literal["step"]
    command: str
    rounds: Size
    environment: Where
    rows: list[StepRow]


class Recorded(TypedDict):
    """The runs whose loads a plan is for."""

    runs: Size
    seeds: list[int]
    commits: list[str]


class Hardware(TypedDict):
    """The device that a plan is for."""

    name: str
    gemm_efficiency: Share
    memory: Positive
    source: str


class Planned(TypedDict):
    """A model."""

    name: str
    source: str
    T: Size
    D: Size
    F: Size
    E: Size
    K: Size


class Way(TypedDict):
    """With exchange and compute apart, or overlapped."""

    efficiency: Share
    limit: str


class Routed(TypedDict):
    """What a router's loads cost."""

    imbalance: Ratio
    apart: Way
    overlapped: Way


class Plan(TypedDict):
    """A model on so many devices: bytes and seconds of a layer's step, per device."""

    model: str
    devices: Size
    shards: Size
    replicas: Size
    local_bytes: Amount
    within_bytes: Amount
    between_bytes: Amount
    compute: Amount
    within: Amount
    between: Amount
    memory: Amount
    drawn: bool
    routers: dict[str, Routed]


class Figures(TypedDict):
    """What was predicted and what was measured of a share."""

    predicted: Amount
    measured: Amount


class Slowdown(TypedDict):
    """What was predicted and what was measured of a slowdown."""

    predicted: Amount
    measured: Ratio


Held = TypedDict(
    "Held",
    {"from": str, "flops": Amount, "bandwidth": Amount, "of": str, "share": Figures, "slowdown": Slowdown},
)
"""One shape, predicted from the rates of another."""


class Check(TypedDict):
    """A plan held against ``bench parallel``."""

    command: str
    commit: str | None
    rows: list[Held]


class Scaled(TypedDict):
    """The result of ``bench scale``."""

    bench: Literal["scale"]
    command: str
    recorded: Recorded
    device: Hardware
    models: list[Planned]
    rows: list[Plan]
    check: Check | None


@contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Turn what a file that is no such result makes a reader raise into an error that names it.

    Raises:
        StoreError: it is none.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        kind = "" if isinstance(error, OSError | Unfit) else f"{type(error).__name__}: "
        raise StoreError(f"{path} is not {what}: {kind}{why(error)}") from error


def read_result(path: Path, what: str) -> Any:
    """Return what a bench's file holds: Measured, Stepped or Scaled.

    Raises:
        StoreError: it cannot be read, or is none.
    """
    with refusing(path, what):
        result = parse_json(read_bytes(path, follow=True))
        bench = result.get("bench") if isinstance(result, dict) else None
        hold(result, Scaled if bench == "scale" else Stepped if bench == "step" else Measured)
        if bench == "scale":
            _refuse_unplanned(result)
    return result


def _refuse_unplanned(result: Scaled) -> None:
    """Every model has a plan, and every plan the same routers, as the tables have."""
    names = {model["name"] for model in result["models"]}
    if names != {row["model"] for row in result["rows"]} or not names:
        raise Unfit(": want plans of each model, and of no other", "rows")
    if any(row["routers"].keys() != result["rows"][0]["routers"].keys() for row in result["rows"]):
        raise Unfit(": want the same routers in each plan", "rows")
