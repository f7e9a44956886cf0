"""Which routers there are: a router's name is its file's name, and there is nothing to register by hand.

Ours are the files of ``rlroute.agents`` and ``rlroute.baselines``. Third parties plug in with an entry point of the
group ``rlroute.routers`` whose name is the router's and whose value is its class.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from rlroute.config import (
    DENSE,
    DataConfig,
    ModelConfig,
    RouterConfig,
    RunConfig,
    SitedRouter,
    TrainConfig,
    from_dict,
    needed_fields,
    refuse_unknown,
)
from rlroute.errors import ConfigError
from rlroute.routing import Router, RouterShape
from rlroute.sources import digest, router_files

WINGS = ("rlroute.agents", "rlroute.baselines")
GROUP = "rlroute.routers"


@cache
def _sources() -> dict[str, str | EntryPoint]:
    """Map each router's name to its module's path, or to the entry point that a third party declares."""
    found: dict[str, str | EntryPoint] = {}
    for wing in WINGS:
        for module in pkgutil.iter_modules(importlib.import_module(wing).__path__):
            found[module.name] = f"{wing}.{module.name}"
    for point in entry_points(group=GROUP):
        if point.name in found or point.name == DENSE:
            raise ConfigError(f"entry point {point.value!r} names its router {point.name!r}, which is taken")
        found[point.name] = point
    return found


def router_names() -> list[str]:
    """Return the names of all routers, sorted."""
    return sorted(_sources())


def default_names() -> list[str]:
    """Return the names of the routers that need no field: those that take part where nobody is named."""
    return [name for name in router_names() if not needed_fields(router_class(name).Config)]


def router_class(name: str) -> type[Router]:
    """Return the router class called ``name``.

    Raises:
        ConfigError: there is none, or its file or entry point does not define exactly one.
    """
    sources = _sources()
    if name not in sources:
        near = get_close_matches(name, [*sources, DENSE], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"unknown router {name!r}{hint}: legal are {', '.join(router_names())}")
    source = sources[name]
    router = _only_router(source) if isinstance(source, str) else _load(source)
    if not (inspect.isclass(router) and issubclass(router, Router)):
        raise ConfigError(
            f"entry point {name!r} of group {GROUP} is {router!r}: want a subclass of rlroute.routing.Router"
        )
    if router.Config.name != name:
        raise ConfigError(f"router {name!r} is defined in a file called {router.Config.name!r}: the names must agree")
    return router


def router_code(name: str) -> dict[str, str]:
    """Return what a router's code is, but for rlroute's core: the SHA-256 of its file, and of the others that belong to
    it (:func:`rlroute.sources.router_files`); of another distribution its name and version.

    Raises:
        ConfigError: there is no such router, or its file cannot be read.
    """
    module, point = sys.modules[router_class(name).__module__], _sources().get(name)
    shipped = point.dist if isinstance(point, EntryPoint) else None
    listed = {str(file): Path(str(file.locate())) for file in shipped.files or ()} if shipped else {}
    try:
        files = {part: path.read_bytes() for part, path in router_files(module, listed).items()}
    except OSError as error:
        raise ConfigError(f"router {name!r}: {error.filename} cannot be read: {error.strerror}") from error
    of_file = digest({name: files.pop(module.__name__)})
    code = {"sha256": of_file, "others_sha256": digest(files), "distribution": shipped.name if shipped else "rlroute"}
    return code | ({"version": shipped.version} if shipped else {})


def make_router(config: RouterConfig, shape: RouterShape) -> Router:
    """Return a new router of a configuration for a shape.

    Raises:
        ConfigError: the router refuses the shape.
    """
    return router_class(config.name)(config, shape)


def refusals(shapes: Sequence[RouterShape]) -> dict[str, str]:
    """Return which of :func:`default_names` refuse one of the shapes by their default configuration, each with its
    reason.
    """
    reasons = {}
    for name in default_names():
        router = router_class(name)
        reason = next(filter(None, (router.refuses(router.Config(), shape) for shape in shapes)), None)
        if reason:
            reasons[name] = reason
    return reasons


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Build a run's configuration from plain dictionaries, as :meth:`rlroute.config.RunConfig.to_dict` returns them.

    Raises:
        ConfigError: an unknown router or field, or an illegal value.
    """
    refuse_unknown("run", values, ("data", "model", "router", "others", "train"))
    others = values.get("others", ())
    if not isinstance(others, list | tuple):
        raise ConfigError(f"others = {others!r}: want a list")
    return RunConfig(
        data=from_dict(DataConfig, values.get("data", {}), "data"),
        model=from_dict(ModelConfig, values.get("model", {}), "model"),
        router=_router_config(values.get("router", {"name": DENSE})),
        others=tuple(map(_sited_router, others)),
        train=from_dict(TrainConfig, values.get("train", {}), "train"),
    )


def _router_config(values: Mapping[str, Any]) -> RouterConfig | None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"router = {values!r}: want a mapping of fields")
    fields = dict(values)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError("router has no 'name'")
    if name == DENSE:
        refuse_unknown("router dense", fields, ())
        return None
    return from_dict(router_class(name).Config, fields, f"router {name}")


def _sited_router(values: Mapping[str, Any]) -> SitedRouter:
    if not isinstance(values, Mapping):
        raise ConfigError(f"others = {values!r}: want a mapping of fields")
    router = _router_config({name: value for name, value in values.items() if name != "sites"})
    if router is None:
        raise ConfigError("the dense model is no router for some sites: say model.num_dense_layers")
    return SitedRouter(sites=values.get("sites", ""), router=router)


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # another distribution's import may fail in any way
        raise ConfigError(f"router {point.name!r}: {point.value} cannot be imported: {error}") from error


def _only_router(path: str) -> type[Router]:
    module = importlib.import_module(path)
    routers = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Router) and value.__module__ == module.__name__
    ]
    if len(routers) != 1:
        raise ConfigError(f"{path} defines {len(routers)} routers: a file holds exactly one")
    return routers[0]
