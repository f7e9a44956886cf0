"""What a field may hold is said by its annotation, and refused by name wherever a configuration is put together."""

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import pytest

from rlroute.config import DataConfig, ModelConfig, RouterConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.limits import Above, AtLeast, BelowOne, Between, Count, Positive
from tests.policies import any_router_names, default_config


@dataclass(frozen=True, kw_only=True)
class Config(RouterConfig):
    form: Literal["a", "b"] = "a"
    number: float = 0.0
    count: Count = 1
    decay: BelowOne = 0.5
    scale: Positive | None = None
    pair: tuple[Annotated[int, Between(1, 3)], ...] = (1, 3)


@pytest.mark.parametrize(
    ("limit", "legal", "illegal", "text"),
    [
        (Above(0), [1e-9, math.inf], [0, -1], "numbers above 0"),
        (AtLeast(2), [2, 3], [1.9], "numbers from 2"),
        (Between(0, 1), [0, 1], [-0.1, 1.1], "numbers from 0 to 1"),
        (Between(0, 1, below=True), [0, 0.99], [-0.1, 1, 2], "numbers from 0 to below 1"),
    ],
)
def test_a_limit_holds_its_bounds_and_says_them(
    limit: Any, legal: list[float], illegal: list[float], text: str
) -> None:
    assert all(value in limit for value in legal)
    assert not any(value in limit for value in [*illegal, math.nan])
    assert str(limit) == text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "c"}, "form = 'c': legal are 'a', 'b'"),
        ({"number": math.nan}, "number = nan: legal are finite numbers"),
        ({"number": "1"}, "number = '1': want float"),
        ({"count": 0}, "count = 0: legal are numbers from 1 to 2147483647"),
        ({"count": True}, "count = True: want int"),
        ({"decay": 1.0}, "decay = 1.0: legal are numbers from 0 to below 1"),
        ({"scale": 0.0}, "scale = 0.0: legal are numbers above 0, or none"),
        ({"pair": (1, 4)}, "pair = 4: legal are numbers from 1 to 3"),
    ],
)
def test_a_router_without_a_line_of_checks_refuses_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config(**values)
    assert str(error.value) == f"router .{message}"
    assert Config(scale=2).scale == 2  # a whole number stands for a float


@pytest.mark.parametrize(
    "config", [DataConfig(), ModelConfig(), TrainConfig(), *map(default_config, any_router_names())]
)
def test_no_number_of_a_run_may_be_nan(config: Any) -> None:
    for field in fields(config):
        if isinstance(getattr(config, field.name), int | float):
            with pytest.raises(ConfigError, match=rf"\.{field.name} = nan"):
                broken = replace(config, **{field.name: math.nan})
                RunConfig(**{type(config).__name__.removesuffix("Config").lower(): broken})
