"""Which routers there are: a router's name is its file's name, and there is nothing to register by hand.

Ours are the files of ``rlroute.agents`` and ``rlroute.baselines``. Third parties plug in with an entry point of the
group ``rlroute.routers`` whose name is the router's and whose value is its class; and a file from anywhere comes in by
:func:`include`. A router that cannot be loaded costs those who do not name it nothing.
"""

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.metadata import Distribution, entry_points
from pathlib import Path
from typing import Any

from rlroute.config import (
    DENSE,
    DataConfig,
    ModelConfig,
    RouterConfig,
    RunConfig,
    SitedRouter,
    StartConfig,
    TrainConfig,
)
from rlroute.errors import ConfigError, DefectError, RlrouteError
from rlroute.faults import explain, innermost, noted
from rlroute.loading import Source, checked_path, file_of, load
from rlroute.routing import Router, RouterShape
from rlroute.sources import digest, loaded, remember, router_files
from rlroute.values import from_dict, needed_fields, refuse_unknown

WINGS = ("rlroute.agents", "rlroute.baselines")
GROUP = "rlroute.routers"
INCLUDE = "RLROUTE_INCLUDE"
"""The environment variable that names router files from anywhere, as PATH does folders."""
_remembered: set[type[Router]] = set()


@cache
def _sources() -> dict[str, Source]:
    """Map each router's name to its module's path, to the entry point that a third party declares, or to its file."""
    found: dict[str, Source] = {}
    for wing in WINGS:
        for module in pkgutil.iter_modules(importlib.import_module(wing).__path__):
            found[module.name] = f"{wing}.{module.name}"
    for point in entry_points(group=GROUP):
        if point.name in found or point.name == DENSE:
            raise ConfigError(f"entry point {point.value!r} names its router {point.name!r}, which is taken")
        found[point.name] = point
    for file in map(checked_path, included()):
        other = found.setdefault(file.stem, file)
        ours = file_of(other)
        if file.stem == DENSE or not (ours and ours.samefile(file)):
            raise ConfigError(f"router file {file}: the name {file.stem!r} is taken by {ours or other}")
    return found


def include(*files: str | Path) -> None:
    """Bring in routers from files anywhere, for this process and those that it starts; each is called as its file.

    Raises:
        ConfigError: there is no such file, or its name cannot be a router's.
    """
    paths = [str(checked_path(file)) for file in (*included(), *files)]
    if paths:
        os.environ[INCLUDE] = os.pathsep.join(dict.fromkeys(paths))
        _sources.cache_clear()


def included() -> list[Path]:
    """Return the files that were brought in, as absolute paths."""
    return [Path(file).expanduser().absolute() for file in os.environ.get(INCLUDE, "").split(os.pathsep) if file]


def router_names() -> list[str]:
    """Return the names of all routers, sorted."""
    return sorted(_sources())


def broken() -> dict[str, str]:
    """Return which routers cannot be loaded, each with the reason, which has file and line."""
    reasons = {}
    for name in router_names():
        try:
            router_class(name)
        except RlrouteError as error:
            reasons[name] = str(error)
    return reasons


def default_names() -> list[str]:
    """Return the names of the routers that need no field: those that take part where nobody is named."""
    left_out = broken()
    whole = [name for name in router_names() if name not in left_out]
    return [name for name in whole if not needed_fields(router_class(name).Config)]


def router_class(name: str) -> type[Router]:
    """Return the router class called ``name``.

    Raises:
        ConfigError: there is none, or it cannot be loaded: see :func:`rlroute.loading.load`.
        MissingDependencyError: its file imports a package that is not installed.
    """
    sources = _sources()
    if name not in sources:
        near = get_close_matches(name, [*sources, DENSE], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"unknown router {name!r}{hint}: legal are {', '.join(router_names())}, and those of --include FILE"
        )
    router = load(name, sources[name])
    if router not in _remembered:  # its code may be changed before router_code is asked
        remember(_code_files(name, router).values())
        _remembered.add(router)
    return router


def router_file(name: str) -> str | None:
    """Return the file that a router is written in.

    Raises:
        ConfigError: there is no such router.
    """
    return inspect.getsourcefile(router_class(name))


def router_code(name: str) -> dict[str, str]:
    """Return what a router's code is, but for rlroute's core: the SHA-256 of its file, and of the others that belong to
    it (:func:`rlroute.sources.router_files`); of another distribution its name and version.

    Raises:
        ConfigError: there is no such router; or a file of its code cannot be read, or was changed since this process
            loaded it.
    """
    router = router_class(name)
    try:
        files = loaded(_code_files(name, router))
    except OSError as error:
        raise ConfigError(f"router {name!r}: {error.filename} cannot be read: {error.strerror}") from error
    of_file, shipped = digest({name: files.pop(router.__module__)}), _distribution(name)
    distribution = shipped.name if shipped else "none" if isinstance(_sources().get(name), Path) else "rlroute"
    code = {"sha256": of_file, "others_sha256": digest(files), "distribution": distribution}
    return code | ({"version": shipped.version} if shipped else {})


def _code_files(name: str, router: type[Router]) -> dict[str, Path]:
    shipped = _distribution(name)
    listed = {str(file): Path(str(file.locate())) for file in shipped.files or ()} if shipped else {}
    return router_files(sys.modules[router.__module__], listed)


def _distribution(name: str) -> Distribution | None:
    """Return the distribution whose entry point a router is, None where it is ours or a file from anywhere."""
    source = _sources().get(name)
    return None if source is None or isinstance(source, str | Path) else source.dist


def make_router(config: RouterConfig, shape: RouterShape) -> Router:
    """Return a new router of a configuration for a shape.

    Raises:
        ConfigError: the router refuses the shape.
    """
    with noted(config.name, shape.site):
        return router_class(config.name)(config, shape)


@contextmanager
def naming_defects() -> Iterator[None]:
    """Say a router's defect in one line, outside of runs, which keep the traceback. What passed through no router's
    file is ours and stays as it is, for who mends it.

    Raises:
        DefectError: in place of an error that passed through a router's file; it names the router.
    """
    try:
        yield
    except RlrouteError:
        raise
    except Exception as error:
        names = {str(file_of(source)): name for name, source in _sources().items()}
        if (frame := innermost(error, names)) is None:
            raise
        raise DefectError(f"router {names[frame.filename]}: {explain(error, {frame.filename})}") from error


def refusals(shapes: Sequence[RouterShape]) -> dict[str, str]:
    """Return which of :func:`default_names` refuse one of the shapes by their default configuration, each with its
    reason.
    """
    reasons = {}
    for name in default_names():
        router = router_class(name)
        try:
            reason = next(filter(None, (router.refuses(router.Config(), shape) for shape in shapes)), None)
        except Exception as error:  # nobody asked for it: it holds no one up
            reason = explain(error, {router_file(name) or ""})
        if reason:
            reasons[name] = reason
    return reasons


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Build a run's configuration from plain dictionaries, as :meth:`rlroute.config.RunConfig.to_dict` returns them.

    Raises:
        ConfigError: an unknown router or field, or an illegal value.
    """
    refuse_unknown("run", values, ("data", "model", "router", "others", "train", "start"))
    others = values.get("others", ())
    if not isinstance(others, list | tuple):
        raise ConfigError(f"others = {others!r}: want a list")
    return RunConfig(
        data=from_dict(DataConfig, values.get("data", {}), "data"),
        model=from_dict(ModelConfig, values.get("model", {}), "model"),
        router=_router_config(values.get("router", {"name": DENSE})),
        others=tuple(map(_sited_router, others)),
        train=from_dict(TrainConfig, values.get("train", {}), "train"),
        start=None if values.get("start") is None else from_dict(StartConfig, values["start"], "start"),
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
