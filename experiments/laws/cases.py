"""What a router is tested on: its default configuration, those that differ from it in a single choice, and the shapes
that it takes.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from rlroute.config import RouterConfig
from rlroute.errors import ConfigError
from rlroute.experiments.laws.steps import make_shape
from rlroute.routing import Router

SHAPES = [(12, 8, 2), (12, 8, 1), (6, 3, 3), (1, 4, 2), (12, 16, 4)]
"""(T, E, k), with k = E and a single token among them."""
OTHER_SHAPES = [(12, experts, k) for experts in (*range(2, 17), 24, 32, 64) for k in (1, 2, 3, 4, 6, 8) if k <= experts]
"""For a router that takes none of these."""
TERMS = dict.fromkeys(RouterConfig().term_weights, 0.5)
OF_WEIGHTS: dict[str, Any] = {name: TERMS.pop(name) for name in ("simbal_weight", "erc_weight")} | {"orthogonal": True}
"""What only routers with linear scores can have."""
HELD: dict[str, Any] = {"balance_weight": 0.5, "target_max_vio": 0.5}
"""An f.P loss whose weight moves."""


@dataclass(frozen=True)
class Case:
    """A router and a configuration of it.

    Attributes:
        router, config: these.
        changed: the fields in which the configuration differs from the default one.
        needs: fields that follow the number of experts, such as a file of that size.
    """

    router: type[Router]
    config: RouterConfig
    changed: tuple[str, ...] = ()
    needs: Callable[[int], dict[str, Any]] = lambda experts: {}

    @property
    def label(self) -> str:
        """The configuration as an entry."""
        said = ",".join(f"{name}={getattr(self.config, name)}" for name in self.changed)
        return f"{self.config.name}:{said}" if said else self.config.name

    @cached_property
    def shapes(self) -> list[tuple[int, int, int]]:
        """The shapes that the router takes; every law asks for them, and some are found by building a router.

        Raises:
            ConfigError: it refuses all that are tried.
        """
        taken = [shape for shape in SHAPES if self.reason(*shape[1:]) is None]
        taken = taken or [shape for shape in OTHER_SHAPES if self.reason(*shape[1:]) is None][:1]
        if not taken:
            raise ConfigError(f"{self.label} refuses all shapes that are tried: {self.reason(*SHAPES[0][1:])}")
        return taken

    def reason(self, experts: int, k: int) -> str | None:
        """Return why the router refuses a shape, None if it takes it."""
        return self.router.refuses(self.config_for(experts), make_shape(experts, k))

    def make(
        self,
        experts: int | None = None,
        k: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        **shape: Any,
    ) -> Router:
        """Return a new router; of the first shape that it takes, unless another is said."""
        if experts is None or k is None:
            _, experts, k = self.shapes[0]
        return self.router(self.config_for(experts), make_shape(experts, k, seed=seed, **shape)).to(dtype)

    def config_for(self, experts: int) -> RouterConfig:
        """Return the configuration for so many experts."""
        return replace(self.config, **self.needs(experts))

    @property
    def teaches(self) -> bool:
        """Whether terms have weights: with none, a router that learns by its objective learns nothing."""
        return not any(name.endswith("_weight") and not getattr(self.config, name) for name in self.changed)


def changes(router: type[Router], config: RouterConfig) -> list[dict[str, Any]]:
    """The default; each other value of a choice, each switch turned, each number of its own that is 0 set to 1/2; all
    terms that any router with scores can have, those of score weights, and a balance that is held; and no weight at
    all."""
    found: list[dict[str, Any]] = [{}]
    shared = {field.name for field in fields(RouterConfig)}
    for name, hint in get_type_hints(type(config)).items():
        if name in shared:
            continue
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            found += [{name: other} for other in get_args(hint) if other != value]
        elif isinstance(value, bool):
            found.append({name: not value})
        elif isinstance(value, float) and value == 0:
            found.append({name: 0.5})
    weights = {field.name: 0.0 for field in fields(config) if field.name.endswith("_weight")}
    terms = {name: weight for name, weight in TERMS.items() if router.carries(name)}
    found += [terms, OF_WEIGHTS, HELD] if terms else []
    return found + ([weights] if any(getattr(config, name) for name in weights) else [])


def cases(
    router: type[Router], config: RouterConfig, needs: Callable[[int], dict[str, Any]] = lambda experts: {}
) -> Iterator[Case]:
    """Yield the cases of a router; of its choices those that go together with the others, and with its scores.

    Args:
        router: its class.
        config: the configuration from which the others differ.
        needs: fields that follow the number of experts.
    """
    for change in changes(router, config):
        try:
            case = Case(router, replace(config, **change), tuple(change), needs)
        except ConfigError:  # a rule between fields forbids it
            if not change:
                raise
            continue
        if change is not OF_WEIGHTS or _takes_any(case):
            yield case


def _takes_any(case: Case) -> bool:
    """Whether there is a shape that the router takes; where it cannot be built at all, its default case says so."""
    try:
        return bool(case.shapes)
    except Exception:
        return False
